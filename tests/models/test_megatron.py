"""Rewired megatron-core models on CPU: against the stock model, the equations, and one schedule against the other.

Every case runs on ranks, because Megatron wants its process groups even for one.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from farskip.models.megatron import executor_of, rewire_spec, schedule_of
from farskip.models.testing_megatron import (
    causal_mask,
    global_names,
    megatron_ranks,
    on_cpu,
    tiny_gpt_model,
    tiny_megatron_config,
    tiny_megatron_spec,
    tokens,
)
from farskip.models.testing_models import forced_routing, next_token_loss
from farskip.parallel.testing_links import LateLink
from farskip.recorder import Recorder
from farskip.schedule import Do
from farskip.stage import Routing
from farskip.testing import assert_close, assert_equal_bits, load_beside

if TYPE_CHECKING:
    from farskip.testing import RankPool

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")

equations = load_beside(__file__, "two_stream_reference")
reference = load_beside(__file__, "megatron_reference")

LOGITS = {"max_error": 5e-5}
"""DESIGN.md 4: weights of experts are applied behind them instead of inside, and sums have another order."""
GRADIENTS = {"rel_norm": 1e-4}
"""DESIGN.md 4."""
WIRINGS = ("ordinary", "farskip", "attn_only", "mlp_only", "ladder")
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"moe": False, "add_bias_linear": True},
    "moe": {"shared": False},
    "shared": {},
    "gated": {
        "moe_shared_expert_gate": True,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
        "attention_dropout": 0.1,
    },
    "fused": {"init_method_std": 0.1},
    "latent": {"latent": True, "num_query_groups": 4, "kv_channels": 8},
    "input": {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True},
}
"""Settings of configs: biases, shared experts, a gate on one and DeepSeek-V3's router, DeepSeek-V3's attention, weights
on experts' inputs."""
BATCH, LENGTH = 2, 7

Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Logits or losses, and gradients."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model. `changes` are settings of its TransformerConfig."""

    kind: str = "shared"
    wiring: str = "farskip"
    layers: str = "all"
    chunks: int = 1
    routing: str = "free"
    changes: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        return tiny_megatron_config(**{**KINDS[self.kind], **self.changes}, expert_model_parallel_size=self.ranks)

    @property
    def ranks(self) -> int:
        return dist.get_world_size() if self.kind != "dense" else 1

    def spec(self, config: Any, **arguments: Any) -> Any:
        spec = tiny_megatron_spec(config, **arguments)
        return without_norms(spec) if self.kind == "fused" else spec

    def stock(self) -> Any:
        config = self.config()
        return tiny_gpt_model(config, self.spec(config))

    def ours(self, schedule: str = "overlapped") -> Any:
        config = self.config()
        spec = rewire_spec(
            self.spec(config), self.wiring, self.layers, schedule=schedule, chunks=self.chunks, link=LateLink
        )
        return tiny_gpt_model(config, spec)


def without_norms(spec: Any) -> Any:
    """Norms that are the identity, as where TransformerEngine's projections do them."""
    from megatron.core.transformer.identity_op import IdentityOp

    return replace(
        spec,
        layer_specs=[
            replace(one, submodules=replace(one.submodules, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp))
            for one in spec.layer_specs
        ],
    )


def ids_of(ranks: Sequence[int]) -> torch.Tensor:
    return torch.cat([tokens(BATCH, LENGTH, seed=100 + rank)[0] for rank in ranks])


def step(model: Any, ids_BS: torch.Tensor, num_targets: int | None = None) -> Outcome:
    """Logits, and gradients by their names in the model of one rank."""
    positions_BS = torch.arange(LENGTH).expand(ids_BS.shape)
    torch.manual_seed(3)  # of dropout
    return finish(model, model(ids_BS, positions_BS, causal_mask(LENGTH)), ids_BS, num_targets)


def finish(model: Any, logits: torch.Tensor, ids_BS: torch.Tensor, num_targets: int | None = None) -> Outcome:
    next_token_loss(logits, ids_BS, num_targets).backward()
    named = global_names(model)
    return logits.detach(), {name: each.grad.clone() for name, each in named.items() if each.grad is not None}


# -- ordinary wiring equals the stock model --


def ordinary(kinds: list[str]) -> None:
    with megatron_ranks(expert=dist.get_world_size()):
        ids = ids_of([dist.get_rank()])
        for kind in kinds:
            setting = Setting(kind=kind, wiring="ordinary")
            theirs, ours = setting.stock(), setting.ours()
            assert theirs.state_dict().keys() == ours.state_dict().keys()
            (expected, expected_gradients), (logits, gradients) = step(theirs, ids), step(ours, ids)
            assert len(gradients) == len(list(ours.parameters()))
            if dist.get_world_size() == 1:
                assert_equal_bits(logits, expected)
                if kind in ("dense", "moe"):
                    assert_equal_bits(gradients, expected_gradients)
                else:  # in front of a shared expert three gradients meet, and are added in another order
                    assert_close(gradients, expected_gradients, **GRADIENTS)
            else:
                assert_close(logits, expected, **LOGITS)
                assert_close(gradients, expected_gradients, **GRADIENTS)


@pytest.mark.parametrize("world", [1, 2])
def test_ordinary_is_the_stock_model(rank_pool: "RankPool", world: int) -> None:
    rank_pool.run(ordinary, world, list(KINDS) if world == 1 else ["moe", "shared", "input"])


# -- every wiring equals its equations --


def wirings(names: list[str], kinds: list[str], layers: str) -> None:
    with megatron_ranks(expert=dist.get_world_size()):
        ids = ids_of([dist.get_rank()])
        for name in names:
            for kind in kinds:
                setting = Setting(kind=kind, wiring=name, layers=layers)
                theirs = setting.stock()
                topology = {"mlp_only": "parallel"}.get(name, name)
                topologies = [topology if layers == "all" or layer >= 2 else "ordinary" for layer in range(4)]
                torch.manual_seed(3)
                expected, expected_gradients = finish(
                    theirs, reference.logits(equations, theirs, ids, causal_mask(LENGTH), topologies), ids
                )
                logits, gradients = step(setting.ours(), ids)
                assert_close(logits, expected, **LOGITS)
                assert_close(gradients, expected_gradients, **GRADIENTS)


@pytest.mark.parametrize(("world", "layers"), [(1, "all"), (1, "last:2"), (2, "all")])
def test_every_wiring_is_its_equations(rank_pool: "RankPool", world: int, layers: str) -> None:
    kinds = ["dense", "shared"] if layers != "all" else list(KINDS) if world == 1 else list(KINDS)[1:]
    rank_pool.run(wirings, world, list(WIRINGS), kinds, layers)


# -- serial and overlapped, recomputed or not, have the same bits --

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "each": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "pairs": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "some": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "shared_experts"]},
}


BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "moe_router_dtype": "fp32"}


def schedules(points: list[dict[str, Any]]) -> None:
    settings = [Setting(**point) for point in points]
    with megatron_ranks(expert=dist.get_world_size()):
        ids = ids_of([dist.get_rank()])
        for setting in settings:
            serial = step(setting.ours("serial"), ids)
            model, recorder = setting.ours(), Recorder()
            executor_of(model).observers.append(recorder)
            overlapped = step(model, ids)
            assert_equal_bits(overlapped[0], serial[0])
            assert_equal_bits(overlapped[1], serial[1])
            check_order(model, recorder)
            for recompute in ("each", "pairs", "some", "selective"):
                changed = replace(setting, changes={**setting.changes, **RECOMPUTE[recompute]})
                for mode in ("serial", "overlapped"):
                    model, recorder = changed.ours(mode), Recorder()
                    executor_of(model).observers.append(recorder)
                    again = step(model, ids)
                    assert_equal_bits(again[0], serial[0])
                    assert_equal_bits(again[1], serial[1])
                    check_order(model, recorder)


def check_order(model: Any, recorder: Recorder) -> None:
    """Autograd followed the backward list, and of an overlapped one exchanges were under compute."""
    config, schedule = model.config, schedule_of(model)
    recomputed = list(schedule.segments if config.recompute_granularity == "full" else ())
    assert (
        len(schedule.segments)
        == {None: 1, "uniform": 4 // (config.recompute_num_layers or 4), "block": 2}[config.recompute_method]
    )
    if config.recompute_method == "block":
        recomputed = recomputed[: config.recompute_num_layers]
    again = [each.bare for segment in reversed(recomputed) for each in schedule.of_segment(segment)]
    assert recorder.forward == [each.bare for each in schedule.forward] + again
    assert recorder.backward == [each.bare for each in schedule.backward]
    for seen in (recorder.forward, recorder.backward):
        in_flight, covered = 0, 0
        for each in seen:
            in_flight += {Do.LAUNCH: 1, Do.WAIT: -1, Do.RUN: 0}[each.do]
            covered += each.do is Do.RUN and in_flight > 0
        assert (covered > 0) == (schedule.mode == "overlapped")


@pytest.mark.parametrize(
    "points",
    [
        [{}, {"kind": "moe", "wiring": "ladder"}],
        [{"kind": "gated", "chunks": 2, "changes": BF16}, {"wiring": "attn_only", "layers": "last:2"}],
        [{"wiring": "ladder"}, {"wiring": "mlp_only"}],
    ],
    ids=["farskip", "chunks", "ladder"],
)
def test_serial_overlapped_and_recomputed_have_the_same_bits(
    rank_pool: "RankPool", points: list[dict[str, Any]]
) -> None:
    rank_pool.run(schedules, 2, points)


# -- experts on two ranks equal experts on one --


def spread(settings: list[Setting], num_ranks: int) -> list[Outcome]:
    """The step of the batch of `num_ranks` ranks; on one rank it is the whole batch's."""
    alone = dist.get_world_size() == 1
    with megatron_ranks(expert=dist.get_world_size()):
        ids = ids_of(range(num_ranks) if alone else [dist.get_rank()])
        outcomes = []
        for setting in settings:
            model = setting.ours()
            executor_of(model).routing_hook = forced_routing(setting.routing, tokens_per_rank=BATCH * LENGTH)
            outcomes.append(step(model, ids, num_ranks * BATCH * (LENGTH - 1)))
        return outcomes


def test_two_ranks_are_one(rank_pool: "RankPool") -> None:
    """Without auxiliary loss, which Megatron takes over each rank's tokens alone."""
    settings = [Setting(wiring=name, changes={"moe_aux_loss_coeff": 0.0}) for name in WIRINGS]
    settings.append(replace(settings[1], routing="one_expert"))  # and the second rank gets no row
    ones, twos = rank_pool.run(spread, 1, settings, 2)[0], rank_pool.run(spread, 2, settings, 2)
    for number, (logits, gradients) in enumerate(ones):
        parts = [outcomes[number] for outcomes in twos]
        assert_close(torch.cat([part[0] for part in parts]), logits, **LOGITS)
        total: dict[str, torch.Tensor] = {}
        for name in gradients:  # experts lie on one of the ranks, and got the gradients of both ranks' tokens
            total[name] = torch.stack([part[1][name] for part in parts if name in part[1]]).sum(0)
        assert_close(total, gradients, **GRADIENTS)


# -- Megatron's own data parallelism --


def distributed() -> None:
    """Gradients that are reduced from hooks of parameters, in small buckets, under backward."""
    with megatron_ranks(expert=2):
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        buckets = DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=2000)
        ordinary, rewired = Setting(wiring="ordinary"), Setting()
        reduced = []
        for model in (ordinary.stock(), ordinary.ours(), rewired.ours(), rewired.ours("serial")):
            wrapped = DistributedDataParallel(model.config, buckets, model)
            ids_BS = ids_of([dist.get_rank()])
            logits = wrapped(ids_BS, torch.arange(LENGTH).expand(ids_BS.shape), causal_mask(LENGTH))
            next_token_loss(logits, ids_BS).backward()
            wrapped.finish_grad_sync()
            reduced.append({name: each.main_grad.clone() for name, each in model.named_parameters()})
        assert_close(reduced[1], reduced[0], **GRADIENTS)
        assert_equal_bits(reduced[2], reduced[3])


def test_under_megatrons_data_parallelism(rank_pool: "RankPool") -> None:
    rank_pool.run(distributed, 2)


# -- pipeline stages --


def pipelined(settings: list[Setting], stages: int, expert: int, chunks: int = 1) -> list[Outcome]:
    """Losses of the micro-batches, and gradients, by Megatron's own schedules.

    Args:
        settings: of the models.
        stages: pipeline stages.
        expert: ranks that share the experts.
        chunks: virtual stages of each rank.
    """
    virtual = chunks if chunks > 1 else None
    with megatron_ranks(pipeline=stages, virtual=virtual, expert=expert):
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        outcomes = []
        place = parallel_state.get_pipeline_model_parallel_rank()
        for setting in settings:
            config = tiny_megatron_config(
                **{**KINDS[setting.kind], **setting.changes},
                pipeline_model_parallel_size=stages,
                virtual_pipeline_model_parallel_size=virtual,
                expert_model_parallel_size=expert,
                variable_seq_lengths=stages > 1,
                deallocate_pipeline_outputs=True,
                # of two stages both neighbors are one rank, and gloo then mixes what goes up with what goes down
                batch_p2p_comm=not virtual,
            )
            models = []
            for chunk in range(chunks):
                where = {"vp_stage": chunk if virtual else None}
                spec = rewire_spec(setting.spec(config, **where), setting.wiring, setting.layers)
                first, last = place == chunk == 0, place == stages - 1 and chunk == chunks - 1
                models.append(tiny_gpt_model(config, spec, pre_process=first, post_process=last, **where))
            batches = [ids_of([number + 4 * (dist.get_rank() % expert)]) for number in range(4)]
            losses = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(batches) for _ in models] if virtual else iter(batches),
                model=models,
                num_microbatches=len(batches),
                seq_length=LENGTH,
                micro_batch_size=BATCH,
                forward_only=False,
            )
            gradients = {
                name: each.grad.clone()
                for model in models
                for name, each in global_names(model).items()
                if each.grad is not None
            }
            outcomes.append((torch.stack([each["loss"] for each in losses]) if last else torch.empty(0), gradients))
        return outcomes


def forward_step(batches: Any, model: Any) -> Any:
    ids_BS = next(batches)
    output = model(ids_BS, torch.arange(LENGTH).expand(ids_BS.shape), causal_mask(LENGTH))

    def loss_of(logits_BSV: torch.Tensor) -> Any:
        loss = next_token_loss(logits_BSV, ids_BS)
        return loss, {"loss": loss.detach().clone()}

    return output, loss_of


def cuts(points: list[dict[str, Any]], expert: int = 1, chunks: int = 1) -> None:
    """On every rank: its part of the staged model, against the whole model without stages."""
    stages = dist.get_world_size() // expert
    settings = [Setting(**point) for point in points]
    wholes, cut = pipelined(settings, 1, expert), pipelined(settings, stages, expert, chunks)
    for whole, staged in zip(wholes, cut, strict=True):
        if len(staged[0]):
            assert_equal_bits(staged[0], whole[0])
        expected = {name: whole[1][name] for name in staged[1]}
        if expert > 1:
            assert_equal_bits(staged[1], expected)
        else:  # without collectives nothing fixes the order of gradient sums, and a cut moves it
            assert_close(staged[1], expected, rel_norm=1e-6)


def test_two_pipeline_stages_are_one(rank_pool: "RankPool") -> None:
    nothing_left_out_at_the_cut = {"wiring": "farskip", "layers": "first:2"}
    points = [{"wiring": "ladder", "kind": "dense"}, {"wiring": "mlp_only", "kind": "moe"}, nothing_left_out_at_the_cut]
    points.append({"kind": "fused"})  # Megatron's router reads the stream as it came
    rank_pool.run(cuts, 2, points)
    rank_pool.run(cuts, 2, points[:1], 1, 2)


def test_two_pipeline_stages_of_two_ranks_are_one_stage(rank_pool: "RankPool") -> None:
    rank_pool.run(cuts, 4, [{}], 2)
    rank_pool.run(cuts, 4, [{"changes": RECOMPUTE["each"]}], 2, 2)


# -- what stays as it is --


def unchanged() -> None:
    with megatron_ranks():
        setting = Setting(wiring="ordinary")
        theirs, ours = setting.stock(), setting.ours()
        sharded = [model.sharded_state_dict(metadata={"dp_cp_group": dist.group.WORLD}) for model in (theirs, ours)]
        keys = [{name: getattr(each, "key", None) for name, each in one.items()} for one in sharded]
        assert keys[0] == keys[1]
        assert any("local_experts" in name for name in keys[0])
        # a hook sees what each layer returns, whatever the segment
        seen: list[list[torch.Tensor]] = [[], []]
        for model, outputs in zip((theirs, ours), seen, strict=True):
            for layer in model.decoder.layers[1:3]:
                layer.register_forward_hook(lambda *call, outputs=outputs: outputs.append(call[2][0].detach()))
        executor_of(ours).routing_hook = ascending
        ids = ids_of([0])
        expected, logits = step(theirs, ids)[0], step(ours, ids)[0]
        assert_equal_bits(logits, expected)
        assert [len(each) for each in seen] == [2, 2]
        for ours_seen, expected in zip(seen[1], seen[0], strict=True):
            assert_equal_bits(ours_seen, expected)


def ascending(layer: int, routing: Routing, recomputing: bool) -> Routing:
    """A fixed order of a token's experts is a fixed order of the sum of their outputs."""
    assert bool((routing.experts_TK.diff(dim=1) > 0).all())
    return routing


def test_checkpoint_keys_and_hooks_are_those_of_the_stock_model(rank_pool: "RankPool") -> None:
    rank_pool.run(unchanged, 1)


# -- the documentation --

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "megatron.md"


def example() -> list[float]:
    program = DOCUMENT.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    with on_cpu():
        names: dict[str, Any] = {"__name__": "example"}
        exec(compile(program, str(DOCUMENT), "exec"), names)
        return names["main"](torch.device("cpu"))


def test_the_example_trains(rank_pool: "RankPool") -> None:
    for losses in rank_pool.run(example, 2):
        assert losses[0] > losses[1] > losses[2] > 0
