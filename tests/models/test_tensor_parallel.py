"""Tensor parallelism on real ranks: serial equals overlapped in bits, and k ranks equal one on the whole batch.

The tensor-parallel half of the parity grid; the expert-parallel half is test_expert_parallel.py.
"""

import copy
import itertools
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from farskip.models.attach import attachment_of
from farskip.models.family import family_of_model
from farskip.models.kernels import use_kernels
from farskip.models.parallelize import full_state_dict, parallelize, tune_schedule
from farskip.models.recompute import recompute_stages
from farskip.models.surgery import rewire, wiring_of
from farskip.models.tensor_parallel import check_tensor_parallel
from farskip.models.testing_families import CASES, build
from farskip.models.testing_models import forced_routing, gradients, next_token_loss, token_ids
from farskip.parallel.collectives import ProcessGroupLink
from farskip.parallel.data_parallel import DataParallel
from farskip.parallel.mesh import EP_AXIS, TP_AXIS, axis_group, axis_size, build_mesh
from farskip.parallel.testing_links import LateLink
from farskip.recorder import Recorder
from farskip.testing import assert_close, assert_equal_bits, load_beside, pairwise, poison_empty

if TYPE_CHECKING:
    from farskip.testing import RankPool


steps = load_beside(__file__, "training_step")
LOGITS, Outcome = steps.LOGITS, steps.Outcome


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of the grid. `recompute`: layers per recomputed segment, 0 for none; `sequences` per data rank."""

    case: str = "deepseek_v3"
    wiring: str = "ladder"
    layers: Any = "all"
    world: int = 2
    tp: int = 2
    ep: int = 1
    recompute: int = 0
    chunks: int = 1
    routing: str = "free"
    sequences: int = 2
    length: int = 7
    kernels: str = "off"
    sequence_parallel: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return steps.label(self, "case", "wiring", "world", "tp", "ep")


def base_model(setting: Setting) -> Any:
    return rewire(build(CASES[setting.case], **setting.changes), setting.wiring, setting.layers)


def step(model: Any, setting: Setting, data: range, data_parallel: DataParallel | None) -> Outcome:
    """Forward, backward, reduction, clipping and AdamW on the sequences of some data-parallel ranks."""
    attachment, recorder = attachment_of(model), Recorder()
    assert attachment is not None
    use_kernels(model, setting.kernels)
    share = setting.sequences * setting.length // setting.tp
    attachment.executor.routing_hook = forced_routing(setting.routing, tokens_per_rank=share)
    attachment.executor.observers.append(recorder)
    if setting.recompute:
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=lambda *_: pytest.fail("called"))
        attachment.checkpoint_layers = setting.recompute
    ids = torch.cat([token_ids(setting.sequences, setting.length, seed=each) for each in data])
    num_targets = setting.world // setting.tp * setting.sequences * (setting.length - 1)
    with poison_empty():
        logits = model(ids, use_cache=False).logits
        loss = next_token_loss(logits, ids, num_targets)
        loss.backward()
    return steps.finish(model, logits, loss.detach().clone(), recorder, data_parallel)


def data_rank(setting: Setting) -> int:
    return dist.get_rank() // setting.tp


def parallel_step(setting: Setting, mode: str, link_kind: type[ProcessGroupLink] = LateLink) -> Outcome:
    """The step of this rank under tensor parallelism."""
    mesh = build_mesh(setting.ep, tp=setting.tp)
    link = link_kind(axis_group(mesh, EP_AXIS)) if setting.ep > 1 else None
    tensor_link = link_kind(axis_group(mesh, TP_AXIS)) if setting.tp > 1 else None
    model = parallelize(
        base_model(setting),
        mesh,
        mode,
        link=link,
        tensor_link=tensor_link,
        chunks=setting.chunks,
        sequence_parallel=setting.sequence_parallel,
    )
    attachment = attachment_of(model)
    assert attachment is not None
    data_parallel = DataParallel(
        mesh,
        dict(model.named_parameters()),
        sharded=attachment.sharded_experts,
        layout=attachment.tensor_layout,
        links=[each for each in (link, tensor_link) if each is not None],
    )
    mine = data_rank(setting)
    return step(model, setting, range(mine, mine + 1), data_parallel)


def my_slice(tensors: dict[str, torch.Tensor], outcome: Outcome) -> dict[str, torch.Tensor]:
    """The whole model's tensors as this rank holds them."""
    attachment = attachment_of(outcome.model)
    assert attachment is not None
    mesh, layout = attachment.mesh, attachment.tensor_layout
    ep, tp = axis_size(mesh, EP_AXIS), axis_size(mesh, TP_AXIS)
    mine = {}
    for name, tensor in tensors.items():
        if name in attachment.sharded_experts:
            tensor = tensor.chunk(ep)[dist.get_rank() % ep]
        elif name in layout.sharded:
            tensor = tensor.chunk(tp, layout.sharded[name])[dist.get_rank() % tp]
        mine[name] = tensor
    return mine


def run_grid_point(setting: Setting) -> None:
    """On every rank: both proofs of DESIGN.md 3."""
    serial, overlapped = (parallel_step(setting, mode) for mode in ("serial", "overlapped"))
    steps.check_bits(serial, overlapped)
    for outcome in (serial, overlapped):
        steps.check_recorder(outcome, runs_again=bool(setting.recompute))
    one = step(base_model(setting), setting, range(setting.world // setting.tp), None)
    steps.check_against_one(
        overlapped,
        one,
        logits=one.logits[setting.sequences * data_rank(setting) :][: setting.sequences],
        gradients=my_slice(one.reduced, overlapped),
        weights=my_slice(one.weights, overlapped),
    )


def run_corner(changes: dict[str, Any]) -> None:
    """As `run_grid_point`, for the mutations."""
    run_grid_point(Setting(**changes))


DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "case": ("llama", "qwen3", "qwen3_moe", "deepseek_v3"),
    "wiring": ("ordinary", "farskip", "attn_only", "parallel", "ladder"),
    "layers": ("all", "last:2", [0, 2]),
    "size": ((2, 2, 1), (2, 2, 2), (4, 2, 1), (4, 2, 2), (4, 2, 4)),
    "recompute": (0, 1, 2),
    "routing": ("free", "idle_rank"),
}
"""`size`: world, tp, ep."""


def pairwise_settings() -> list[Setting]:
    """Settings that together hold every pair of values of two dimensions."""
    found = []
    for point in pairwise(DIMENSIONS):
        world, tp, ep = point.pop("size")
        found.append(Setting(world=world, tp=tp, ep=ep, **point))
    return found


CORNERS = [
    Setting(case="llama-biased-tied"),
    Setting(case="llama", world=4, tp=4, changes={"num_key_value_heads": 4}),
    Setting(case="deepseek_v2", wiring="farskip", ep=2),
    Setting(case="deepseek_v3", wiring="farskip", ep=2, chunks=2),
    Setting(case="deepseek_v3", wiring="farskip", ep=2, changes={"q_lora_rank": None}),
    Setting(case="qwen2_moe", wiring="farskip", ep=2),
    Setting(case="mixtral", ep=2),
    Setting(case="deepseek_v3", wiring="farskip", ep=2, recompute=2, kernels="reference"),
    Setting(case="glm4_moe", wiring="parallel"),
    Setting(case="ernie4_5_moe", wiring="farskip"),
    Setting(case="llama4_text", ep=2),
    Setting(case="gpt_oss", wiring="farskip"),
    Setting(case="olmoe"),
    Setting(case="olmoe-clipped-normed", wiring="farskip", ep=2, chunks=2, recompute=1),
    Setting(case="olmoe", world=4, tp=4, changes={"num_key_value_heads": 4}),
    Setting(case="olmoe", wiring="attn_only", world=4, ep=4, routing="idle_rank", changes={"attention_bias": True}),
    Setting(case="olmoe", sequences=1, length=3, wiring="ordinary"),
    Setting(case="instella_moe", wiring="farskip", ep=2),
    Setting(case="qwen3_moe", sequences=1, length=5, ep=2),
    Setting(case="qwen3_moe", sequences=1, length=5, world=4, tp=2, ep=1),
]
GRID = [*pairwise_settings(), *CORNERS]


@pytest.mark.parametrize("setting", GRID, ids=str)
def test_serial_equals_overlapped_and_k_ranks_equal_one(setting: Setting, rank_pool: "RankPool") -> None:
    rank_pool.run(run_grid_point, setting.world, setting)


# -- generation -------------------------------------------------------------------------------------------------------


def generation_agrees(settings: list[Setting]) -> None:
    """Prefill and one token at a time, over a link that is late; the same tokens as one rank."""
    for setting in settings:
        mesh = build_mesh(setting.ep, tp=setting.tp)
        one = base_model(setting).eval()
        ids = token_ids(setting.sequences, setting.length)
        options: dict[str, Any] = {
            "max_new_tokens": 5,
            "do_sample": False,
            "eos_token_id": None,
            "attention_mask": torch.ones_like(ids),
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        for mode, cache in itertools.product(("serial", "overlapped"), (None, "static")):
            tensor_link = LateLink(axis_group(mesh, TP_AXIS))
            more: dict[str, Any] = {"tensor_link": tensor_link, "sequence_parallel": setting.sequence_parallel}
            model = parallelize(base_model(setting), mesh, mode, **more).eval()
            ours, theirs = (each.generate(ids, cache_implementation=cache, **options) for each in (model, one))
            assert torch.equal(ours.sequences, theirs.sequences), f"{setting} {mode} {cache}"
            for mine, other in zip(ours.logits, theirs.logits, strict=True):
                assert_close(mine, other, **LOGITS)


@pytest.mark.parametrize(
    ("case", "wiring", "ep"),
    [
        ("llama", "ladder", 1),
        ("qwen3_moe", "ladder", 2),
        ("deepseek_v3", "farskip", 2),
        ("deepseek_v3", "ladder", 1),
        ("olmoe-clipped-normed", "ladder", 1),
    ],
)
def test_generation_gives_the_tokens_of_one_rank(case: str, wiring: str, ep: int, rank_pool: "RankPool") -> None:
    """One token of one sequence: then one rank of two has no token for its experts."""
    settings = [Setting(case=case, wiring=wiring, ep=ep, sequences=sequences, length=4) for sequences in (1, 3)]
    rank_pool.run(generation_agrees, 2, settings)


def hidden_states_agree(sequence_parallel: bool) -> None:
    setting = Setting(case="deepseek_v3", wiring="farskip", ep=2)
    model = parallelize(base_model(setting), build_mesh(2, tp=2), sequence_parallel=sequence_parallel).eval()
    one, ids = base_model(setting).eval(), token_ids(2, 5)
    with torch.no_grad():
        ours, theirs = (each(ids, output_hidden_states=True).hidden_states for each in (model, one))
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, **LOGITS)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_hidden_states_of_every_layer_are_those_of_one_rank(sequence_parallel: bool, rank_pool: "RankPool") -> None:
    rank_pool.run(hidden_states_agree, 2, sequence_parallel)


# -- the model as a whole ---------------------------------------------------------------------------------------------


def whole_state_comes_back(path: str, setting: Setting) -> None:
    import farskip

    mesh = build_mesh(setting.ep, tp=setting.tp)
    whole = base_model(setting)
    model = parallelize(copy.deepcopy(whole), mesh)
    assert_equal_bits(full_state_dict(model), dict(whole.state_dict()))
    farskip.save(model, path)
    loaded = farskip.load(path)
    assert wiring_of(loaded) == wiring_of(whole)
    assert_equal_bits(dict(loaded.state_dict()), dict(whole.state_dict()))
    spread = farskip.load(path, mesh=mesh)
    assert_equal_bits(dict(spread.state_dict()), dict(model.state_dict()))
    ids = token_ids(2, 5)
    assert_equal_bits(spread.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(case="llama-biased-tied"),
        Setting(case="deepseek_v3", ep=2, wiring="farskip"),
        Setting(case="gpt_oss", ep=4, world=4),
        Setting(case="olmoe"),
    ],
    ids=str,
)
def test_a_parallel_model_is_saved_whole_and_loaded_in_slices(
    setting: Setting, rank_pool: "RankPool", tmp_path: Path
) -> None:
    rank_pool.run(whole_state_comes_back, setting.world, str(tmp_path / "model"), setting)


def state_of_the_first_rank() -> tuple[int, int]:
    setting = Setting(case="deepseek_v3", ep=2, wiring="farskip")
    whole = base_model(setting)
    state = full_state_dict(parallelize(copy.deepcopy(whole), build_mesh(2, tp=2)), first_rank_only=True)
    if dist.get_rank() == 0:
        assert_equal_bits(state, dict(whole.state_dict()))
    return len(state), len(whole.state_dict())


def test_the_whole_state_for_the_first_rank_only(rank_pool: "RankPool") -> None:
    """The others gather with it, and hold nothing of it."""
    (first, num_tensors), (second, _) = rank_pool.run(state_of_the_first_rank, 2)
    assert (first, second) == (num_tensors, 0)


def rewired_afterwards(more: dict[str, Any]) -> None:
    setting, mesh, ids = Setting(case="qwen3"), build_mesh(1, tp=2), token_ids(2, 5)
    late = rewire(parallelize(base_model(Setting(case="qwen3", wiring="ordinary")), mesh, **more), "ladder")
    expected = parallelize(base_model(setting), mesh, **more)
    assert_equal_bits(late(ids).logits, expected(ids).logits)
    graphs = [attachment_of(model).executor.graph for model in (late, expected)]  # type: ignore[union-attr]
    assert graphs[0] == graphs[1] and graphs[0].is_sequence_parallel == bool(more)


@pytest.mark.parametrize("more", [{}, {"sequence_parallel": True, "chunks": 2}], ids=str)
def test_a_parallel_model_can_be_rewired(more: dict[str, Any], rank_pool: "RankPool") -> None:
    rank_pool.run(rewired_afterwards, 2, more)


def schedule_by_measured_times(case: str, wiring: str, ep: int, more: dict[str, Any]) -> list[str]:
    setting = Setting(case=case, wiring=wiring, ep=ep)
    model = parallelize(base_model(setting), build_mesh(ep, tp=2), **more)
    ids = token_ids(2, 7)

    def once() -> None:
        next_token_loss(model(ids, use_cache=False).logits, ids).backward()

    times = tune_schedule(model, once)
    assert times is not None
    once()
    return sorted({*times.forward, *times.backward})


@pytest.mark.parametrize(("case", "wiring", "ep"), [("deepseek_v3", "farskip", 2), ("llama", "parallel", 1)])
def test_the_schedule_can_be_chosen_by_measured_times(case: str, wiring: str, ep: int, rank_pool: "RankPool") -> None:
    """Backward reduces at other points than forward, under names that forward may not have."""
    seen = rank_pool.run(schedule_by_measured_times, 2, case, wiring, ep, {})
    assert seen[0] == seen[1] and "reduce_mlp" in seen[0]
    assert ("reduce_attention" in seen[0]) == (wiring == "farskip")


def selective_recomputation_changes_no_bit(case: str, ep: int, **more: Any) -> None:
    setting, found = Setting(case=case, wiring="farskip", ep=ep), []
    for selective in (False, True):
        mesh = build_mesh(ep, tp=2)
        model = parallelize(base_model(setting), mesh, tensor_link=LateLink(axis_group(mesh, TP_AXIS)), **more)
        if selective:
            recompute_stages(model)
        ids = token_ids(2, 7)
        next_token_loss(model(ids, use_cache=False).logits, ids).backward()
        found.append(gradients(model))
    assert_equal_bits(found[1], found[0])


@pytest.mark.parametrize(("case", "ep"), [("llama", 1), ("deepseek_v3", 2)])
def test_selective_recomputation_changes_no_bit(case: str, ep: int, rank_pool: "RankPool") -> None:
    """Partial outputs are reduced in place; what is computed again must not need them."""
    rank_pool.run(selective_recomputation_changes_no_bit, 2, case, ep)


def low_precision(kind: str, case: str, ep: int, **more: Any) -> None:
    """bf16: equal bits of the modes; against one rank the roundings differ."""
    setting = Setting(case=case, wiring="ladder", ep=ep)
    ids, found = token_ids(2, 7), []

    def run(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if kind == "bf16":
            model.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            logits = model(ids, use_cache=False).logits
            next_token_loss(logits.float(), ids).backward()
        return logits.detach(), gradients(model)

    for mode in ("serial", "overlapped"):
        mesh = build_mesh(ep, tp=2)
        link = LateLink(axis_group(mesh, TP_AXIS))
        found.append(run(parallelize(base_model(setting), mesh, mode, tensor_link=link, **more)))
    assert_equal_bits(found[1][0], found[0][0])
    assert_equal_bits(found[1][1], found[0][1])
    # 2 ** -8 relative rounding per operation, a dozen operations deep: a missing term would be off by 1.
    assert_close(found[0][0].float(), run(base_model(setting))[0].float(), rel_norm=0.05)


@pytest.mark.parametrize(("case", "ep"), [("llama", 1), ("qwen3_moe", 2), ("olmoe", 1), ("gpt_oss", 1)])
@pytest.mark.parametrize("kind", ["bf16", "autocast"])
def test_low_precision(kind: str, case: str, ep: int, rank_pool: "RankPool") -> None:
    rank_pool.run(low_precision, 2, kind, case, ep)


def frozen_parts(frozen: str, case: str, **more: Any) -> None:
    """What stands behind frozen parameters (their names are found by an expression) gets the gradients of one rank, and
    nobody waits for the others."""
    setting, ids, found = Setting(case=case), token_ids(2, 7), []
    for mode in ("serial", "overlapped", None):
        model = base_model(setting)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.search(frozen, name) is None)
        mesh = build_mesh(1, tp=2)
        if mode is not None:
            parallelize(model, mesh, mode, tensor_link=LateLink(axis_group(mesh, TP_AXIS)), **more)
        for _ in range(2):  # accumulated
            next_token_loss(model(ids, use_cache=False).logits, ids).backward()
        found.append((gradients(model), model))
    assert_equal_bits(found[1][0], found[0][0])
    attachment = attachment_of(found[1][1])
    assert attachment is not None
    parameters = {name: each for name, each in found[1][1].named_parameters() if each.requires_grad}
    DataParallel(attachment.mesh, parameters, layout=attachment.tensor_layout).reduce_gradients()
    reduced = gradients(found[1][1])
    layout = attachment.tensor_layout
    for name, gradient in found[2][0].items():
        whole = gradient
        if name in layout.sharded:
            whole = gradient.chunk(2, layout.sharded[name])[dist.get_rank()]
        assert_close(reduced[name], whole, **steps.GRADIENTS, name=name)
    assert reduced.keys() == found[2][0].keys()


@pytest.mark.parametrize(
    ("frozen", "case"),
    [
        ("embed_tokens", "qwen3"),
        (r"embed_tokens|layers\.[01]", "qwen3"),
        ("mlp", "qwen3"),
        ("self_attn|layernorm", "qwen3"),
        ("embed_tokens|q_proj|k_proj|input_layernorm", "olmoe"),  # what the first norms over heads read is frozen
        (r"^(?!.*bias$)", "gpt_oss"),  # all but biases
        (r"^(?!.*o_proj\.bias$)", "gpt_oss"),  # the first rank adds it, and others need to know of its gradient
        (r"^(?!.*_proj\.bias$)", "llama-biased-tied"),
    ],
)
def test_frozen_parts_keep_nobody_waiting(frozen: str, case: str, rank_pool: "RankPool") -> None:
    rank_pool.run(frozen_parts, 2, frozen, case)


def checkpoint_state(case: str, ep: int) -> None:
    """Slices go into a distributed checkpoint as DTensors that know the whole."""
    setting = Setting(case=case, wiring="farskip", ep=ep, world=dist.get_world_size())
    whole = base_model(setting)
    mesh = build_mesh(ep, tp=2)
    model = parallelize(copy.deepcopy(whole), mesh)
    attachment = attachment_of(model)
    assert attachment is not None
    parameters = dict(model.named_parameters())
    data_parallel = DataParallel(mesh, parameters, sharded=attachment.sharded_experts, layout=attachment.tensor_layout)
    for name, parameter in whole.named_parameters():
        wrapped = data_parallel.wrap_for_checkpoint(name, parameters[name].detach())
        is_slice = name in attachment.sharded_experts or name in attachment.tensor_layout.sharded
        assert isinstance(wrapped, DTensor) == is_slice, name
        assert_equal_bits(wrapped.full_tensor() if isinstance(wrapped, DTensor) else wrapped, parameter.detach())


@pytest.mark.parametrize(("world", "case", "ep"), [(2, "llama", 1), (2, "deepseek_v3", 2), (4, "qwen3_moe", 4)])
def test_a_checkpoint_knows_which_slice_a_rank_has(world: int, case: str, ep: int, rank_pool: "RankPool") -> None:
    rank_pool.run(checkpoint_state, world, case, ep)


# -- refusals ---------------------------------------------------------------------------------------------------------


def refusals() -> dict[str, str]:
    """What each mistake says; all ranks make it, and the model is as it was."""
    said = {}

    def attempt(name: str, call: Any) -> None:
        with pytest.raises(ValueError) as caught:
            call()
        said[name] = str(caught.value)

    def attempt_model(name: str, case: str, size: int, **changes: Any) -> None:
        model = build(CASES[case], **changes)
        before = {each: parameter.shape for each, parameter in model.named_parameters()}
        attempt(name, lambda: parallelize(model, build_mesh(1, tp=size)))
        assert {each: parameter.shape for each, parameter in model.named_parameters()} == before

    attempt("tp", lambda: build_mesh(1, tp=3))
    attempt("ep", lambda: build_mesh(2, tp=4))
    attempt_model("kv heads", "llama", 4)
    attempt_model("heads", "deepseek_v3", 4, num_attention_heads=6, num_key_value_heads=4)
    attempt_model("width", "llama", 4, intermediate_size=50, num_key_value_heads=4)
    attempt_model("dropout", "llama", 2, attention_dropout=0.1)
    attempt_model("noise", "mixtral", 2, router_jitter_noise=0.1)
    beside = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    attempt("mesh", lambda: parallelize(base_model(Setting()), beside))
    attempt("no tp", lambda: parallelize(base_model(Setting()), build_mesh(4), sequence_parallel=True))
    disagree = dist.get_rank() == 2
    attempt("ranks", lambda: parallelize(base_model(Setting()), build_mesh(1, tp=2), sequence_parallel=disagree))
    return said


def test_what_cannot_be_cut_is_refused_with_the_reason(rank_pool: "RankPool") -> None:
    said = rank_pool.run(refusals, 4)[0]
    assert said == {
        "tp": "tp=3 does not divide 4 ranks: choose a divisor of 4",
        "ep": "ep=2 is not a multiple of tp=4: experts are spread over whole tensor-parallel groups; choose ep=1 or a "
        "multiple of 4",
        "kv heads": "tensor parallelism of 4 does not divide num_key_value_heads=2: choose a divisor of it",
        "heads": "tensor parallelism of 4 does not divide num_attention_heads=6: choose a divisor of it",
        "width": "tensor parallelism of 4 does not divide model.layers.0.mlp.gate_proj.weight of shape (50, 32) along "
        "dimension 0: choose a divisor",
        "dropout": "tensor parallelism: attention_dropout=0.1 draws other random numbers on every rank; set it to 0",
        "noise": "tensor parallelism: router_jitter_noise=0.1 draws other random numbers on every rank; set it to 0",
        "mesh": "mesh ('ep', 'tp'): experts are spread over whole tensor-parallel groups, not beside them; make the "
        "mesh with build_mesh(ep, tp=...)",
        "no tp": "parallelize: sequence_parallel=True with tp=1 has no ranks to share tokens among; make the mesh with "
        "build_mesh(ep, tp=2) or more, or leave sequence_parallel out",
        "ranks": "parallelize: rank 2 has sequence_parallel True, rank 0 False; give all ranks the same",
    }


def test_a_family_without_a_plan_is_refused() -> None:
    model = build(CASES["gpt_oss"])
    family = replace(family_of_model(model), tensor_plan={})
    blocks = [family.sub_blocks(layer) for layer in model.model.layers]
    with pytest.raises(ValueError, match="gpt_oss has no plan for the attention of layer 0; use tp=1"):
        check_tensor_parallel(model, family, blocks, 2)


def test_no_mesh_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^mesh=None is no device mesh; make one with .*build_mesh"):
        parallelize(build(CASES["llama"]), None)  # type: ignore[arg-type]


def test_a_plan_that_gathers_is_refused() -> None:
    """As transformers' own plan of OLMoE does for the norms over all heads."""
    model = build(CASES["olmoe"])
    family = replace(family_of_model(model), tensor_plan={})
    blocks = [family.sub_blocks(layer) for layer in model.model.layers]
    with pytest.raises(ValueError, match="q_proj of olmoe is colwise_gather_output, because a norm reads all heads"):
        check_tensor_parallel(model, family, blocks, 2)
