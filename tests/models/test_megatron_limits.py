"""What a rewired megatron-core model refuses, and with which words."""

import ast
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from farskip.models.megatron import executor_of, rewire_spec
from farskip.models.testing_megatron import (
    causal_mask,
    megatron_ranks,
    on_cpu,
    tiny_gpt_model,
    tiny_megatron_config,
    tiny_megatron_spec,
    tokens,
)

if TYPE_CHECKING:
    from farskip.testing import RankPool

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")

SETTINGS: dict[str, tuple[Any, str]] = {
    "overlap_moe_expert_parallel_comm": (True, "1F1B schedule plan"),
    "moe_shared_expert_overlap": (True, "inside Megatron's dispatcher"),
    "tensor_model_parallel_size": (2, "not in the schedule"),
    "expert_tensor_parallel_size": (2, "not in the schedule"),
    "sequence_parallel": (True, "not in the schedule"),
    "context_parallel_size": (2, "nothing has tested it"),
    "hidden_dropout": (0.1, "one dropout mask"),
    "moe_token_dispatcher_type": ("flex", "DeepEP"),
    "moe_expert_capacity_factor": (1.5, "no fixed number of choices"),
    "moe_latent_size": (16, "around the exchange"),
    "fp8": ("hybrid", "context around each layer"),
    "fp4": ("e2m1", "context around each layer"),
    "enable_autocast": (True, "round the stream"),
    "fp32_residual_connection": (True, "round the stream"),
    "cuda_graph_impl": ("transformer_engine", "whole segment"),
    "cpu_offloading": (True, "between two layers"),
    "fine_grained_activation_offloading": (True, "nothing has tested it"),
    "heterogeneous_block_specs": (True, "configs of their own"),
    "recompute_modules": (["core_attn", "moe"], "their recomputation"),
}


def refused(text: str, build: Callable[[], Any], kind: type[Exception] = ValueError) -> None:
    """One line that says this."""
    with pytest.raises(kind, match=re.escape(text)) as caught:
        build()
    assert "\n" not in str(caught.value)


def model_of(config: Any, *arguments: Any, **keywords: Any) -> Any:
    return tiny_gpt_model(config, rewire_spec(tiny_megatron_spec(config), *arguments, **keywords))


def building() -> None:
    with megatron_ranks():
        from megatron.core.transformer.spec_utils import build_module

        for name, (value, text) in SETTINGS.items():
            # set behind the config's own checks, which know no CPU
            granularity = {"recompute_granularity": "selective"} if name == "recompute_modules" else {}
            config = tiny_megatron_config(**granularity)
            spec = rewire_spec(tiny_megatron_spec(config))
            setattr(config, name, value)
            for words in (f"cannot honor {name}=", text):
                refused(words, lambda spec=spec, config=config: build_module(spec.layer_specs[0], config=config))
        config = tiny_megatron_config()
        dropping = replace(spec.layer_specs[0], params={**spec.layer_specs[0].params, "hidden_dropout": 0.2})
        refused("hidden_dropout=0.2", lambda: build_module(dropping, config=config))
        refused("wiring 'farskipp' is unknown", lambda: model_of(config, "farskipp"))
        refused("layer 9 is outside 0..3", lambda: model_of(config, layers=[9]))
        other = tiny_megatron_config(moe_layer_freq=[0, 0, 1, 1])
        spec = rewire_spec(tiny_megatron_spec(config))
        refused("layer 1 has attention, shared, routed where moe_layer_freq", lambda: tiny_gpt_model(other, spec))
        short = replace(spec, layer_specs=spec.layer_specs[:3])
        refused("3 of them were built", lambda: executor_of(tiny_gpt_model(config, short)), RuntimeError)
        refused("has no rewired layers", lambda: executor_of(tiny_gpt_model(config, tiny_megatron_spec(config))))


def test_settings_and_wirings(rank_pool: "RankPool") -> None:
    rank_pool.run(building, 1)


def stages() -> None:
    with megatron_ranks(pipeline=2):
        config = tiny_megatron_config(pipeline_model_parallel_size=2)
        refused("set variable_seq_lengths=True", lambda: model_of(config))
        model_of(config, "mlp_only")  # one stream crosses


def test_a_pipeline_cut_that_could_drop_a_stream(rank_pool: "RankPool") -> None:
    rank_pool.run(stages, 2)


def calling() -> None:
    with megatron_ranks():
        model = model_of(tiny_megatron_config())
        ids_BS, positions_BS = tokens(2, 7)

        def call(**arguments: Any) -> Any:
            return model(ids_BS, positions_BS, causal_mask(7), **arguments)

        refused("called with padding_mask", lambda: call(padding_mask=torch.zeros(2, 7, dtype=torch.bool)))
        refused("layer 0 was called with a context", lambda: call(extra_block_kwargs={"context": torch.zeros(1)}))
        hidden = torch.zeros(7, 2, 32)
        first, second = model.decoder.layers[:2]
        refused("called with inference_context", lambda: first(hidden, inference_context=object()))
        _, noted = first(hidden)
        refused("replaced the hidden states", lambda: second(hidden + 1, context=noted), RuntimeError)
        refused("without the context", lambda: model.decoder.layers[2](hidden), RuntimeError)


def test_calls(rank_pool: "RankPool") -> None:
    rank_pool.run(calling, 1)


def prediction() -> None:
    """Layers for multi-token prediction, from the stock spec and from the rewired one."""
    with megatron_ranks():
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

        config = tiny_megatron_config(mtp_num_layers=1)
        stock = tiny_megatron_spec(config)
        rewired = rewire_spec(stock)
        heads = [get_gpt_mtp_block_spec(config, one, use_transformer_engine=False) for one in (stock, rewired)]
        refused("multi-token prediction", lambda: tiny_gpt_model(config, rewired, mtp_block_spec=heads[1]))
        model = tiny_gpt_model(config, rewired, mtp_block_spec=heads[0])
        ids_BS, positions_BS = tokens(2, 7)
        model(ids_BS, positions_BS, causal_mask(7), labels=ids_BS).mean().backward()
        assert all(each.grad is not None for each in model.mtp.parameters())


def test_multi_token_prediction(rank_pool: "RankPool") -> None:
    rank_pool.run(prediction, 1)


def test_specs() -> None:
    with on_cpu():
        from megatron.core.transformer.identity_op import IdentityFuncOp
        from megatron.core.transformer.moe.moe_layer import MoELayer
        from megatron.core.transformer.spec_utils import ModuleSpec
        from megatron.core.transformer.transformer_layer import MoETransformerLayer

        class OtherMoE(MoELayer):  # type: ignore[misc]
            pass

        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        spec = get_gpt_layer_local_spec(num_experts=8)
        parts = spec.submodules

        def changed(**changes: Any) -> Any:
            return replace(spec, submodules=replace(parts, **changes))

        refused(
            "MoETransformerLayer has a forward of its own",
            lambda: rewire_spec(replace(spec, module=MoETransformerLayer)),
        )
        refused("cross attention", lambda: rewire_spec(changed(cross_attention=ModuleSpec(module=torch.nn.Identity))))
        refused("mlp_bda of the spec", lambda: rewire_spec(changed(mlp_bda=IdentityFuncOp)))
        refused(
            "OtherMoE has a forward of its own", lambda: rewire_spec(changed(mlp=replace(parts.mlp, module=OtherMoE)))
        )
        refused(
            "has no core to cut it at",
            lambda: rewire_spec(changed(self_attention=ModuleSpec(module=torch.nn.Identity))),
        )
        refused("list is no spec", lambda: rewire_spec([spec]))
        refused("goes with the name of a wiring", lambda: rewire_spec(spec, executor_wiring(), layers="first:1"))
        refused("schedule 'parallel' is unknown", lambda: rewire_spec(spec, schedule="parallel"))


def executor_wiring() -> Any:
    from farskip.wiring import Wiring

    return Wiring.named("farskip", 4)


def test_only_its_own_files_import_megatron_at_their_top() -> None:
    found = set()
    for path in (Path(__file__).resolve().parents[2] / "models").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(
                ("megatron", "farskip.models.megatron_")
            ):
                found.add(path.name)
    assert found == {"megatron_blocks.py", "megatron_layer.py", "megatron_limits.py"}


def test_megatron_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron", None)
    refused("pip install 'farskip[megatron]'", lambda: rewire_spec(None), ImportError)


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_cpu():
        import megatron.core.package_info as package_info
    monkeypatch.setattr(package_info, "MINOR", 17)
    refused("knows the layers of megatron-core 0.16", lambda: rewire_spec(None), ImportError)
