"""megatron-core without a GPU, for tests: what it calls of CUDA made inert, and a tiny GPTModel.

megatron-core computes on CPU, but asks CUDA for its device, streams, random states and ranges on the way. `on_cpu` puts
stand-ins there, for as long as the block runs, and nothing else: a model that was built inside has to be called inside.
Nothing of the package needs this on a GPU.
"""

import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

VOCABULARY = 97
NUM_EXPERTS = 8
TOP_K = 2


class _Inert:
    """Stands for a stream or an event: nothing to wait for on CPU."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        """Nothing."""

    def record_event(self) -> "_Inert":
        """Nothing."""
        return self

    def synchronize(self) -> None:
        """Nothing."""


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_zeros = torch.zeros


def _zeros_here(*arguments: Any, **keywords: Any) -> torch.Tensor:
    if keywords.get("device") == "cuda":
        keywords["device"] = "cpu"
    return _zeros(*arguments, **keywords)


@contextmanager
def on_cpu() -> Iterator[None]:
    """What megatron-core calls of CUDA, made inert; and its warnings unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, at import
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer import multi_latent_attention
        from megatron.core.transformer.moe import moe_utils, token_dispatcher
    cpu = torch.device("cpu")
    substitutes: tuple[tuple[Any, str, Any], ...] = (
        (torch.cuda, "Stream", _Inert),
        (torch.cuda, "current_stream", lambda *_: _Inert()),
        (torch.cuda, "stream", lambda *_: nullcontext()),
        (torch.cuda, "current_device", lambda: cpu),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "get_rng_state", lambda *_, **__: torch.zeros(1, dtype=torch.uint8)),
        (torch.cuda, "manual_seed", lambda *_: None),
        (random, "_get_cuda_rng_state", lambda *_, **__: torch.zeros(1, dtype=torch.uint8)),
        (random, "_set_cuda_rng_state", lambda *_, **__: None),
        (token_dispatcher, "maybe_move_tensor_to_cpu", _on_host),
        (schedules.torch, "zeros", _zeros_here),
        # Missing in 0.16.1 where TransformerEngine is: the router then raises a NameError, on a GPU too.
        (moe_utils, "te_general_gemm", None),
        (multi_latent_attention, "HAVE_TE", False),  # True without it, because an import of stand-ins succeeds
    )
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"megatron\.")
        warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)  # names it calls
        for owner, name, substitute in substitutes:
            stack.enter_context(mock.patch.object(owner, name, substitute, create=name == "te_general_gemm"))
        yield


@contextmanager
def megatron_ranks(*, expert: int = 1, pipeline: int = 1, virtual: int | None = None) -> Iterator[None]:
    """megatron-core's process groups on this world, `on_cpu`, and their end. A collective."""
    with on_cpu():
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer.moe import moe_utils

        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual,
            expert_model_parallel_size=expert,
        )
        random.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        try:
            yield
        finally:
            # What it keeps in globals, the next case would find.
            parallel_state.destroy_model_parallel()
            moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
            moe_utils.get_moe_layer_wise_logging_tracker().clear()


def tiny_megatron_config(*, moe: bool = True, shared: bool = True, latent: bool = False, **changes: Any) -> Any:
    """A TransformerConfig: four layers of width 32, of which the first is dense if there are experts.

    Args:
        moe: whether there are experts.
        shared: whether there is a shared one.
        latent: whether attention is multi-latent.
        **changes: settings to set otherwise.
    """
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    settings: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.2,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "pipeline_dtype": torch.float32,
        "moe_token_dispatcher_type": "alltoall",
    }
    if moe:
        settings |= {
            "num_moe_experts": NUM_EXPERTS,
            "moe_router_topk": TOP_K,
            "moe_ffn_hidden_size": 24,
            "moe_layer_freq": [0, 1, 1, 1],
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.01,
        }
        if shared:
            settings["moe_shared_expert_intermediate_size"] = 40
    if latent:
        settings |= {
            "multi_latent_attention": True,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_head_dim": 8,
            "qk_pos_emb_head_dim": 4,
            "v_head_dim": 8,
            "rope_type": "rope",
        }
        return MLATransformerConfig(**settings | changes)
    return TransformerConfig(**settings | changes)


def tiny_megatron_spec(config: Any, **arguments: Any) -> Any:
    """The stock spec of a block of such layers, without TransformerEngine."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", **arguments)
    if not config.multi_latent_attention:
        return spec
    return replace(spec, layer_specs=[_with_latent_core(one) for one in spec.layer_specs])


def _with_latent_core(spec: Any) -> Any:
    """Multi-latent attention tells its core the widths of heads, which only that of TransformerEngine takes."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class Core(DotProductAttention):
        def __init__(self, *arguments: Any, k_channels: int = 0, v_channels: int = 0, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)

    attention = spec.submodules.self_attention
    attention = replace(attention, submodules=replace(attention.submodules, core_attention=Core))
    return replace(spec, submodules=replace(spec.submodules, self_attention=attention))


def tiny_gpt_model(config: Any, spec: Any, *, seed: int = 0, **arguments: Any) -> Any:
    """A GPTModel in training mode; equal weights for equal seeds on any number of ranks and stages.

    Args:
        config: see `tiny_megatron_config`.
        spec: stock or rewired.
        seed: of all weights.
        **arguments: further ones of GPTModel.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel

    model = GPTModel(config, spec, VOCABULARY, max_sequence_length=32, position_embedding_type="rope", **arguments)
    with torch.no_grad():
        for name, parameter in global_names(model).items():
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name else noise)
    if config.bf16:
        model.bfloat16()  # as Megatron's Float16Module does
    return model.train()


def global_names(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of this rank by the names that they have in a model on one rank."""
    named = {}
    layers = list(model.decoder.layers)
    first = layers[0].layer_number - 1 if layers else 0
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            local = int(parts[2])
            parts[2] = str(first + local)
            if "local_experts" in parts:
                place, moe = parts.index("local_experts") + 1, layers[local].mlp
                parts[place] = str(moe.local_expert_indices[int(parts[place])])
        named[".".join(parts)] = parameter
    return named


def causal_mask(length: int) -> torch.Tensor:
    """True where attention is not allowed, [1, 1, S, S]."""
    return torch.ones(1, 1, length, length).triu(1).bool()


def tokens(batch: int, length: int, *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens int64 [B, S] and their positions."""
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    return ids_BS, torch.arange(length).expand(batch, length)
