"""Expert parallelism on real ranks: serial equals overlapped in bits, and k ranks equal one on the whole batch."""

import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from farskip.models.attach import attachment_of
from farskip.models.kernels import use_kernels
from farskip.models.parallelize import full_state_dict, parallelize, tune_schedule
from farskip.models.recompute import recompute_stages
from farskip.models.surgery import rewire, wiring_of
from farskip.models.testing_models import forced_routing, gradients, next_token_loss, tiny_model, token_ids
from farskip.parallel.collectives import ProcessGroupLink
from farskip.parallel.data_parallel import DataParallel
from farskip.parallel.mesh import EP_AXIS, axis_size, build_mesh
from farskip.parallel.testing_links import LateLink
from farskip.recorder import Recorder
from farskip.testing import assert_close, assert_equal_bits, load_beside, pairwise

if TYPE_CHECKING:
    from farskip.testing import RankPool

steps = load_beside(__file__, "training_step")
LOGITS, Outcome = steps.LOGITS, steps.Outcome


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of the grid. `recompute`: layers per recomputed segment, 0 for none, or ``selective``."""

    family: str = "deepseek_v3"
    wiring: str = "farskip"
    layers: Any = "all"
    world: int = 2
    ep: int = 2
    recompute: int | str = 0
    chunks: int = 1
    routing: str = "free"
    accumulation: int = 1
    kernels: str = "off"
    side_stream: str = "none"
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return steps.label(self, "family", "wiring", "world", "ep")


def base_model(setting: Setting) -> Any:
    return rewire(tiny_model(setting.family, **setting.changes), setting.wiring, setting.layers)


def prepare(model: Any, setting: Setting) -> Recorder:
    """Kernels, recomputation, routing and a recorder on a model that has its final executor."""
    use_kernels(model, setting.kernels)
    attachment, recorder = attachment_of(model), Recorder()
    assert attachment is not None
    attachment.executor.routing_hook = forced_routing(setting.routing, tokens_per_rank=14)
    attachment.executor.observers.append(recorder)
    if setting.recompute == "selective":
        recompute_stages(model)
    elif setting.recompute:
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=lambda *_: pytest.fail("called"))
        attachment.checkpoint_layers = setting.recompute
    return recorder


def micro_batches(setting: Setting, rank: int | None) -> list[torch.Tensor]:
    """Two sequences per rank and micro-batch; those of all ranks for None."""
    chosen = range(setting.world) if rank is None else [rank]
    return [
        torch.cat([token_ids(2, 7, seed=100 * step + each) for each in chosen]) for step in range(setting.accumulation)
    ]


def step(model: Any, setting: Setting, rank: int | None, data_parallel: DataParallel | None) -> Outcome:
    """Forward, backward, reduction, clipping and AdamW, the loss normalized over all ranks and micro-batches."""
    recorder = prepare(model, setting)
    num_targets = setting.world * setting.accumulation * 2 * 6
    logits, losses = [], []
    for ids in micro_batches(setting, rank):
        logits.append(model(ids, use_cache=False).logits)
        loss = next_token_loss(logits[-1], ids, num_targets)
        loss.backward()
        losses.append(loss.detach())
    return steps.finish(model, torch.cat(logits), torch.stack(losses).sum(), recorder, data_parallel)


def parallel_step(setting: Setting, mode: str, link_kind: type[ProcessGroupLink] = LateLink) -> Outcome:
    """The step of this rank under expert parallelism."""
    mesh = build_mesh(setting.ep)
    link = link_kind(mesh.get_group(EP_AXIS))
    model = parallelize(
        base_model(setting), mesh, mode, link=link, chunks=setting.chunks, side_stream=setting.side_stream
    )
    attachment = attachment_of(model)
    assert attachment is not None
    data_parallel = DataParallel(mesh, dict(model.named_parameters()), sharded=attachment.sharded_experts, links=[link])
    return step(model, setting, dist.get_rank(), data_parallel)


def my_slice(tensors: dict[str, torch.Tensor], outcome: Outcome) -> dict[str, torch.Tensor]:
    """The whole model's tensors as this rank holds them: its slice of each expert tensor."""
    attachment = attachment_of(outcome.model)
    assert attachment is not None
    size = axis_size(attachment.mesh, EP_AXIS)
    position = dist.get_rank() % size
    return {
        name: tensor.chunk(size)[position] if name in attachment.sharded_experts else tensor
        for name, tensor in tensors.items()
    }


def run_grid_point(settings: list[Setting]) -> None:
    """On every rank: both proofs of DESIGN.md 3, for each setting."""
    for setting in settings:
        try:
            serial, overlapped = (parallel_step(setting, mode) for mode in ("serial", "overlapped"))
            steps.check_bits(serial, overlapped)
            for outcome in (serial, overlapped):
                runs_again = setting.recompute not in (0, "selective")
                steps.check_recorder(outcome, runs_again=runs_again, times=setting.accumulation)
            one, here = step(base_model(setting), setting, None, None), 2 * dist.get_rank()
            steps.check_against_one(
                overlapped,
                one,
                logits=torch.cat([part[here : here + 2] for part in one.logits.split(2 * setting.world)]),
                gradients=my_slice(one.reduced, overlapped),
                weights=my_slice(one.weights, overlapped),
            )
        except AssertionError as error:
            raise AssertionError(f"{setting}: {error}") from error


def run_corner(changes: dict[str, Any]) -> None:
    """As `run_grid_point`, for the mutations."""
    run_grid_point([Setting(**changes)])


DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "family": ("deepseek_v3", "qwen3_moe"),
    "wiring": ("ordinary", "farskip", "attn_only", "parallel", "ladder"),
    "layers": ("all", "last:2", [0, 2]),
    "size": ((1, 1), (2, 2), (4, 4), (4, 2)),
    "chunks": (1, 2, 3),
    "recompute": (0, 1, 2, "selective"),
    "routing": ("free", "balanced", "one_expert", "idle_expert", "idle_rank"),
    "accumulation": (1, 2),
    "kernels": ("off", "reference"),
    "side_stream": ("none", "merge", "merge_and_route"),
}


def pairwise_settings() -> list[Setting]:
    """Settings that together hold every pair of values of two dimensions."""
    found = []
    for point in pairwise(DIMENSIONS):
        world, ep = point.pop("size")
        if ep == 1:
            point["side_stream"] = "none"  # no rows travel, so there is nothing to put aside
        found.append(Setting(world=world, ep=ep, **point))
    return found


CORNERS = [
    Setting(world=4, ep=4, routing="one_expert", recompute=4),
    Setting(world=4, ep=4, routing="idle_rank", wiring="ladder", recompute=2),
    Setting(world=4, ep=2, routing="idle_rank", accumulation=2),
    Setting(world=2, ep=2, changes={"first_k_dense_replace": 0, "q_lora_rank": None}),
    Setting(family="qwen3_moe", wiring="ladder", world=2, ep=2, changes={"mlp_only_layers": [1, 2]}),
    Setting(family="qwen3_moe", world=2, ep=2, changes={"tie_word_embeddings": True}),
    Setting(family="qwen3_moe", world=2, ep=2, changes={"mlp_only_layers": [0, 1, 2, 3]}),
    Setting(world=2, ep=1, wiring="farskip"),
    Setting(world=4, ep=4, routing="idle_rank", chunks=3, recompute=2),
    Setting(world=2, ep=2, wiring="ordinary", chunks=2),
    # One renormalized weight is 1 whatever the logits are, and the gate's gradient would be nothing but rounding.
    Setting(world=2, ep=2, changes={"num_experts_per_tok": 1, "norm_topk_prob": False}, routing="free"),
    Setting(world=4, ep=4, changes={"num_experts_per_tok": 3, "n_group": 1, "topk_group": 1}),
]
GRID = [*pairwise_settings(), *CORNERS]


@pytest.mark.parametrize("setting", GRID, ids=str)
def test_serial_equals_overlapped_and_k_ranks_equal_one(setting: Setting, rank_pool: "RankPool") -> None:
    rank_pool.run(run_grid_point, setting.world, [setting])


# -- single properties ------------------------------------------------------------------------------------------------


def real_link_equals_late_link() -> None:
    setting = Setting(world=2, ep=2)
    late, real = (parallel_step(setting, "overlapped", kind) for kind in (LateLink, ProcessGroupLink))
    steps.check_bits(late, real)


def test_the_test_link_changes_no_bit(rank_pool: "RankPool") -> None:
    rank_pool.run(real_link_equals_late_link, 2)


def dropout_is_drawn_alike() -> None:
    setting = Setting(world=2, ep=2, changes={"attention_dropout": 0.3})
    outcomes = []
    for mode in ("serial", "overlapped"):
        torch.manual_seed(7 + dist.get_rank())
        outcomes.append(parallel_step(setting, mode))
    steps.check_bits(*outcomes)


def test_attention_dropout_is_drawn_alike_in_serial_and_overlapped(rank_pool: "RankPool") -> None:
    rank_pool.run(dropout_is_drawn_alike, 2)


def low_precision(kind: str, routing: str) -> None:
    """bf16: equal bits of the modes only; against one rank the roundings differ."""
    setting = Setting(world=2, ep=2, routing=routing)
    outcomes = []
    for mode in ("serial", "overlapped"):
        mesh = build_mesh(2)
        model = parallelize(base_model(setting), mesh, mode)
        if kind == "bf16":
            model.to(torch.bfloat16)
        prepare(model, setting)
        ids = micro_batches(setting, dist.get_rank())[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            logits = model(ids, use_cache=False).logits
            next_token_loss(logits.float(), ids).backward()
        outcomes.append((logits.detach(), gradients(model)))
    assert_equal_bits(outcomes[1][0], outcomes[0][0])
    assert_equal_bits(outcomes[1][1], outcomes[0][1])
    one = prepare_one(setting, kind)
    mine = one(torch.cat([micro_batches(setting, rank)[0] for rank in range(2)]), kind)[2 * dist.get_rank() :][:2]
    # 2 ** -8 relative rounding per operation, a dozen operations deep: a wrong row would be off by 1.
    assert_close(outcomes[0][0].float(), mine.float(), rel_norm=0.05)


def prepare_one(setting: Setting, kind: str) -> Any:
    model = base_model(setting)
    if kind == "bf16":
        model.to(torch.bfloat16)
    prepare(model, setting)

    def logits(ids: torch.Tensor, kind: str) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            return model(ids, use_cache=False).logits

    return logits


@pytest.mark.parametrize("routing", ["free", "idle_rank"])
@pytest.mark.parametrize("kind", ["bf16", "autocast"])
def test_low_precision(kind: str, routing: str, rank_pool: "RankPool") -> None:
    """A rank that gets no token must send the dtype that the others send."""
    rank_pool.run(low_precision, 2, kind, routing)


def evaluation_agrees(chunks: int) -> None:
    setting = Setting(world=2, ep=2, family="qwen3_moe")
    model = parallelize(base_model(setting), build_mesh(2), chunks=chunks).eval()
    one = base_model(setting).eval()
    ids = token_ids(1 + dist.get_rank(), 5 + dist.get_rank(), seed=dist.get_rank())
    with torch.no_grad():
        assert_close(model(ids).logits, one(ids).logits, **LOGITS)
        states = model(ids, output_hidden_states=True).hidden_states
        for ours, theirs in zip(states, one(ids, output_hidden_states=True).hidden_states, strict=True):
            assert_close(ours, theirs, **LOGITS)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), one.generate(ids, **options))


@pytest.mark.parametrize("chunks", [1, 3])
def test_evaluation_with_batches_of_different_shapes(chunks: int, rank_pool: "RankPool") -> None:
    """Generation feeds one token per sequence: with three chunks there are more chunks than tokens."""
    rank_pool.run(evaluation_agrees, 2, chunks)


def whole_state_comes_back(path: str) -> None:
    import farskip

    setting = Setting(world=2, ep=2)
    whole = base_model(setting)
    model = parallelize(copy.deepcopy(whole), build_mesh(2))
    assert_equal_bits(full_state_dict(model), dict(whole.state_dict()))
    farskip.save(model, path)
    loaded = farskip.load(path)
    assert wiring_of(loaded) == wiring_of(whole)
    assert_equal_bits(dict(loaded.state_dict()), dict(whole.state_dict()))
    spread = farskip.load(path, mesh=build_mesh(2))
    assert_equal_bits(dict(spread.state_dict()), dict(model.state_dict()))
    ids = token_ids(2, 5)
    assert_equal_bits(spread.eval()(ids).logits, model.eval()(ids).logits)


def test_a_parallel_model_is_saved_whole_and_loaded_in_slices(rank_pool: "RankPool", tmp_path: Any) -> None:
    rank_pool.run(whole_state_comes_back, 2, str(tmp_path / "model"))


def rewired_afterwards() -> None:
    setting = Setting(world=2, ep=2)
    mesh, ids = build_mesh(2), token_ids(2, 5, seed=dist.get_rank())
    ordinary = parallelize(base_model(replace(setting, wiring="ordinary")), mesh, side_stream="merge")
    late = rewire(ordinary, "farskip")
    attachment = attachment_of(late)
    assert attachment is not None and attachment.executor.wait_meter is not None
    assert attachment.executor.side_stream == "merge", "it is lost with the old executor"
    early = parallelize(base_model(setting), mesh)
    assert_equal_bits(late(ids).logits, early(ids).logits)


def test_a_parallel_model_can_be_rewired(rank_pool: "RankPool") -> None:
    rank_pool.run(rewired_afterwards, 2)


# -- refusals ---------------------------------------------------------------------------------------------------------


def refusals() -> dict[str, str]:
    """What each mistake says; all ranks make it."""
    said = {}

    def attempt(name: str, call: Any) -> None:
        try:
            call()
        except (ValueError, RuntimeError) as error:
            said[name] = str(error)

    mesh = build_mesh(dist.get_world_size())
    attempt("world", lambda: build_mesh(2))
    model = base_model(Setting())
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    attempt("experts", lambda: parallelize(model, mesh))
    attempt("mode", lambda: parallelize(base_model(Setting()), build_mesh(1), "overlaped"))
    attempt("side stream", lambda: parallelize(base_model(Setting()), build_mesh(1), side_stream="merge"))
    attempt("family", lambda: parallelize(torch.nn.Linear(2, 2), mesh))
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == before
    spread = parallelize(base_model(Setting()), build_mesh(1))
    attempt("twice", lambda: parallelize(spread, build_mesh(1)))
    different = rewire(tiny_model("deepseek_v3"), "farskip" if dist.get_rank() == 0 else "ladder")
    attempt("wiring", lambda: parallelize(different, build_mesh(1)))
    return said


def test_mistakes_are_refused_on_every_rank(rank_pool: "RankPool") -> None:
    for rank, said in enumerate(rank_pool.run(refusals, 3)):
        assert "ep=2 does not divide 3 ranks: choose a divisor of 3" in said["world"]
        assert "expert parallelism of 3 does not divide 8 experts" in said["experts"]
        assert "'overlaped' is unknown; use overlapped" in said["mode"]
        assert "'Linear' is not supported" in said["family"]
        assert "side_stream='merge' has nothing to put aside: no rows travel" in said["side stream"]
        assert "parallel already" in said["twice"]
        assert "wiring" in said.get("wiring", "nothing"), f"rank {rank} did not hear of it: {said}"
        assert not any("\n" in text for text in said.values())


def dropped_while_tuning() -> tuple[tuple[int, int], tuple[int, int]]:
    model = parallelize(rewire(tiny_model("qwen3_moe"), "farskip"), build_mesh(2), capacity=1)
    attachment = attachment_of(model)
    assert attachment is not None
    dispatcher: Any = attachment.executor.dispatcher
    ids = token_ids(2, 7)

    def once() -> None:
        next_token_loss(model(ids, use_cache=False).logits, ids).backward()

    assert tune_schedule(model, once) is not None
    after_tuning = dispatcher.take_dropped()
    once()
    return after_tuning, dispatcher.take_dropped()


def test_rows_dropped_while_the_schedule_is_chosen_are_not_counted(rank_pool: "RankPool") -> None:
    """They are no training's: the first step would report those of the warm-up."""
    for after_tuning, (dropped, total) in rank_pool.run(dropped_while_tuning, 2):
        assert after_tuning == (0, 0)
        assert 0 < dropped < total
