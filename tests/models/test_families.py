"""Conformance: what every model family has to do under every wiring. A new adapter passes by being listed in
models/testing_families.py; docs/adding_a_family.md says how.
"""

import copy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

import farskip
from farskip.executor import Executor
from farskip.models.attach import attach, attachment_of
from farskip.models.family import families, family_of_architecture, family_of_model
from farskip.models.parallelize import parallelize
from farskip.models.surgery import rewire, wiring_of
from farskip.models.testing_families import CASES, FAMILIES, SMALL, build, is_dense
from farskip.models.testing_models import gradients, next_token_loss, run_backward, token_ids
from farskip.parallel.data_parallel import DataParallel
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.mesh import EP_AXIS, build_mesh
from farskip.parallel.testing_links import FakeLink, LateLink
from farskip.stage import WeightOn
from farskip.testing import assert_close, assert_equal_bits, load_beside

if TYPE_CHECKING:
    from farskip.testing import RankPool


reference = load_beside(__file__, "family_reference")

LOGITS = {"max_error": 5e-5}
"""DESIGN.md 4: fp32, the reference forms some sums in another order."""
GRADIENTS = {"rel_norm": 1e-4}
"""DESIGN.md 4."""
WIRINGS = ("ordinary", "farskip", "attn_only", "parallel", "ladder")
LAYERS: dict[str, tuple[Any, list[int]]] = {
    "last": ("last:2", [2, 3]),
    "first": ("first:2", [0, 1]),
    "range": ("1:3", [1, 2]),
    "list": ([0, 2], [0, 2]),
}
LENGTH = 9

all_cases = pytest.mark.parametrize("case", CASES)
all_families = pytest.mark.parametrize("case", FAMILIES)
moe_families = pytest.mark.parametrize("case", [name for name in FAMILIES if not is_dense(CASES[name])])


def topologies(wiring: str, layers: list[int] | None = None) -> list[str]:
    """What the reference calls a wiring on these layers, on all if None."""
    return [wiring if layers is None or layer in layers else "ordinary" for layer in range(4)]


def pair(case: str, wiring: str = "ordinary", layers: Any = "all", **changes: Any) -> tuple[Any, Any]:
    """The untouched model, and its rewired copy."""
    untouched = build(CASES[case], **changes)
    return untouched, rewire(copy.deepcopy(untouched), wiring, layers)


def test_every_family_is_listed() -> None:
    assert sorted(FAMILIES) == sorted(family.name for family in families())
    assert {type(build(CASES[name])).__name__ for name in FAMILIES} == {family.architecture for family in families()}


# -- ordinary wiring: transformers itself -----------------------------------------------------------------------------


@all_cases
def test_ordinary_equals_untouched(case: str) -> None:
    untouched, ours = pair(case)
    ids = token_ids(2, LENGTH)
    expected_logits, expected = run_backward(untouched, ids)
    logits, seen = run_backward(ours, ids)
    assert_equal_bits(logits, expected_logits)
    if CASES[case].same_order:
        assert_equal_bits(seen, expected)
    else:
        assert_close(seen, expected, **GRADIENTS)
    theirs, mine = (model(ids, output_hidden_states=True).hidden_states for model in (untouched, ours))
    assert len(mine) == len(theirs) == 5
    for our_BSD, their_BSD in zip(mine, theirs, strict=True):
        assert_equal_bits(our_BSD, their_BSD)
    assert list(ours.state_dict()) == list(untouched.state_dict())


@all_families
def test_bf16(case: str) -> None:
    """Ordinary wiring in bits; rewired, the gradients of every parameter exist and are finite."""
    untouched, ours = (model.to(torch.bfloat16) for model in pair(case))
    ids = token_ids(2, LENGTH)
    assert_equal_bits(ours(ids).logits, untouched(ids).logits)
    logits, seen = run_backward(rewire(ours, "farskip"), ids)
    assert logits.dtype is torch.bfloat16
    assert seen.keys() == {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert all(tensor.isfinite().all() for tensor in [logits, *seen.values()])


# -- every wiring: the two-stream reference ---------------------------------------------------------------------------


@pytest.mark.parametrize("wiring", WIRINGS)
@all_cases
def test_wirings(case: str, wiring: str) -> None:
    """Logits and every gradient; and references that read the other stream are far off, so the comparison has teeth."""
    untouched, ours = pair(case, wiring)
    ids = token_ids(2, LENGTH)
    expected = reference.logits(untouched, ids, topologies(wiring))
    next_token_loss(expected, ids).backward()
    logits, seen = run_backward(ours, ids)
    assert_close(logits, expected, **LOGITS)
    assert_close(seen, gradients(untouched), **GRADIENTS)
    for confused in ("attention", "mlp"):
        if confused == "attention" and is_dense(CASES[case]) and wiring != "ladder":
            continue  # without experts nothing is left out there
        with torch.no_grad():
            swapped = reference.logits(untouched, ids, topologies(wiring), confused=confused)
        with pytest.raises(AssertionError, match="max_error"):
            assert_close(logits, swapped, max_error=100 * LOGITS["max_error"])


@all_families
def test_layers_in_every_form(case: str) -> None:
    untouched = build(CASES[case])
    ours, ids = rewire(copy.deepcopy(untouched), "ordinary"), token_ids(2, LENGTH)
    with torch.no_grad():
        for form, numbers in LAYERS.values():
            for wiring in ("farskip", "ladder"):
                rewire(ours, wiring, form)
                assert wiring_of(ours).rewired_layers == tuple(numbers)
                assert_close(ours(ids).logits, reference.logits(untouched, ids, topologies(wiring, numbers)), **LOGITS)


@all_families
def test_hidden_states_of_a_rewired_model(case: str) -> None:
    untouched, ours = pair(case, "farskip")
    ids = token_ids(2, LENGTH)
    with torch.no_grad():
        expected = reference.hidden_states(untouched, ids, topologies("farskip"))
        for mine, theirs in zip(ours(ids, output_hidden_states=True).hidden_states, expected, strict=True):
            assert_close(mine, theirs, **LOGITS)


def check_generation(case: str, wiring: str) -> None:
    untouched, ours = (model.eval() for model in pair(case, wiring))
    ids = token_ids(3, 6)
    ids[0, :3] = ids[1, :1] = untouched.config.pad_token_id
    mask = (ids != untouched.config.pad_token_id).long()
    seen = ours.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert seen.shape == (3, 22)
    assert torch.equal(seen, reference.greedy(untouched, ids, topologies(wiring), 16, mask))


@all_families
def test_generation_with_a_cache_equals_recomputation(case: str) -> None:
    """Greedy, 16 tokens, a left-padded batch."""
    check_generation(case, "farskip")


@pytest.mark.slow
@pytest.mark.parametrize("wiring", [name for name in WIRINGS if name != "farskip"])
@all_cases
def test_generation_under_every_wiring(case: str, wiring: str) -> None:
    check_generation(case, wiring)


@all_families
def test_gradient_checkpointing(case: str) -> None:
    _, ours = pair(case, "farskip")
    ids = token_ids(2, LENGTH)
    expected_logits, expected = run_backward(ours, ids, use_cache=False)
    ours._set_gradient_checkpointing(  # the public name changed between versions of transformers
        enable=True, gradient_checkpointing_func=lambda *_: pytest.fail("transformers checkpointed a layer by itself")
    )
    attachment = attachment_of(ours)
    assert attachment is not None
    for layers in (1, 3):
        attachment.checkpoint_layers = layers
        logits, seen = run_backward(ours, ids, use_cache=False)
        assert_equal_bits(logits, expected_logits)
        # Gradients of a value with many uses are summed in another order where a segment begins.
        assert_close(seen, expected, **GRADIENTS)


# Dynamo itself looks whether a tensor that it reads has a gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_sub_blocks() -> None:
    """Compiled in place: same function, and nothing of the MoE side is traced into the attention's graphs."""
    _, ours = pair("deepseek_v3", "farskip")
    ids = token_ids(2, LENGTH)
    attachment = attachment_of(ours)
    assert attachment is not None
    # Collectives to itself, so that the router has its place in the seam.
    before, dispatcher = attachment.executor, AllToAllDispatcher(FakeLink(), num_experts=8)
    attach(ours, Executor(before.sub_blocks, before.wiring, dispatcher=dispatcher))
    expected_logits, expected = run_backward(ours, ids, use_cache=False)
    operators: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        operators.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    layer = ours.model.layers[2]  # the first whose seam has anything to run
    layer.self_attn.compile(backend=backend)
    logits, seen = run_backward(ours, ids, use_cache=False)
    assert any("scaled_dot_product" in name for name in operators) and not any("topk" in name for name in operators)
    assert_close(logits, expected_logits, **LOGITS)
    assert_close(seen, expected, **GRADIENTS)
    for module in (layer.mlp.shared_experts, layer.mlp.gate, layer.post_attention_layernorm):
        module.compile(backend=backend)
    logits, seen = run_backward(ours, ids, use_cache=False)
    assert any("topk" in name for name in operators)
    assert_close(logits, expected_logits, **LOGITS)
    assert_close(seen, expected, **GRADIENTS)


# -- the MoE side, sub-block by sub-block -----------------------------------------------------------------------------


def moe_blocks(case: str) -> tuple[Any, Any]:
    """A model, and the sub-blocks of its last layer but one that has experts."""
    model = build(CASES[case])
    blocks = [family_of_model(model).sub_blocks(layer) for layer in model.model.layers]
    return model, [block for block in blocks if block.experts is not None][-1]


@moe_families
def test_the_router_decides_by_its_bias_and_weighs_without_it(case: str) -> None:
    """Every tensor that is called a correction bias is found, and moving it moves the choice of experts."""
    model, block = moe_blocks(case)
    normed_BSD = torch.randn(2, LENGTH, 32)
    routing = block.route(normed_BSD)
    assert routing.logits_TE.shape == (2 * LENGTH, 8)
    assert routing.experts_TK.shape == routing.weights_TK.shape == (2 * LENGTH, model.config.num_experts_per_tok)
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()] if "correction_bias" in name]
    assert (block.selection_bias is not None) == bool(names)
    if block.selection_bias is None:
        return
    assert block.selection_bias.shape == (8,) and not block.selection_bias.requires_grad
    block.selection_bias[5] += 100.0
    moved = block.route(normed_BSD)
    assert (moved.experts_TK == 5).any(dim=1).all() and not (routing.experts_TK == 5).any(dim=1).all()
    assert bool((moved.weights_TK < 10.0).all())


@moe_families
def test_rows_go_through_the_expert_they_are_for(case: str) -> None:
    """Rows with one expert each, weighted as the router says, add up to what the routed experts make of the tokens."""
    _, block = moe_blocks(case)
    normed_BSD = torch.randn(2, LENGTH, 32)
    routing = block.route(normed_BSD)
    rows = normed_BSD.reshape(-1, 32).repeat_interleave(routing.experts_TK.shape[1], dim=0)
    weights = routing.weights_TK.reshape(-1, 1)
    if routing.weight_on is WeightOn.INPUT:
        outputs = block.expert_rows(rows * weights, routing.experts_TK.reshape(-1))
    else:
        outputs = block.expert_rows(rows, routing.experts_TK.reshape(-1)) * weights
    summed_BSD = outputs.view(*routing.experts_TK.shape, 32).sum(1).view_as(normed_BSD)
    assert_close(summed_BSD, block.routed(normed_BSD, routing), **LOGITS)


@moe_families
def test_experts_without_a_row_keep_the_graph_whole(case: str) -> None:
    """Else this rank would launch fewer exchanges in backward than the others, and they would wait for ever."""
    _, block = moe_blocks(case)
    rows = torch.zeros(0, 32, requires_grad=True)
    output = block.expert_rows(rows * 1.0, torch.zeros(0, dtype=torch.int64))
    assert output.shape == (0, 32)
    output.sum().backward()
    assert rows.grad is not None and rows.grad.shape == (0, 32)
    for name, parameter in block.experts.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), f"{name}: zero, not none"


# -- checkpoints and documents ----------------------------------------------------------------------------------------


@all_cases
def test_round_trip(case: str, tmp_path: Path) -> None:
    _, ours = pair(case, "farskip", "last:3")
    ids = token_ids(2, LENGTH)
    farskip.save(ours.eval(), tmp_path / "model")
    loaded = farskip.load(tmp_path / "model")
    assert wiring_of(loaded) == wiring_of(ours) and type(loaded).__name__ == type(ours).__name__
    assert_equal_bits(dict(loaded.state_dict()), dict(ours.state_dict()))
    # A loaded weight lies where the file has it; products of one row round by the alignment of their operands.
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    assert_equal_bits(loaded(ids).logits, ours(ids).logits)


@all_families
def test_documents_of_a_packed_batch_do_not_see_each_other(case: str) -> None:
    """Another first document changes nothing in the second one; the control shows that within one it does."""
    from farskip.batch import Batch
    from farskip.models.language_model import HFLanguageModel

    _, ours = pair(case, "farskip")
    model = HFLanguageModel(ours.eval())
    ids, others = token_ids(2, 12), token_ids(2, 12, seed=2)
    others[:, 5:] = ids[:, 5:]
    packed = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)

    def hidden(ids_BS: torch.Tensor, positions_BS: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.hidden(Batch(input_ids_BS=ids_BS, position_ids_BS=positions_BS, labels_BS=ids_BS))[:, 5:]

    # Not in bits: the other tokens choose other experts, and products of other shapes round differently.
    assert_close(hidden(others, packed), hidden(ids, packed), **LOGITS)
    whole = torch.arange(12).expand(2, -1)
    assert not torch.allclose(hidden(others, whole), hidden(ids, whole), atol=1e-3)


# -- expert parallelism -----------------------------------------------------------------------------------------------


def parallel_step(case: str, wiring: str, mode: str, chunks: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and reduced gradients of this rank, its expert slices only; two sequences per rank."""
    mesh = build_mesh(2)
    link = LateLink(mesh.get_group(EP_AXIS))
    model: Any = parallelize(rewire(build(CASES[case]), wiring), mesh, mode, link=link, chunks=chunks)
    attachment = attachment_of(model)
    assert attachment is not None and attachment.sharded_experts
    data_parallel = DataParallel(mesh, dict(model.named_parameters()), sharded=attachment.sharded_experts, links=[link])
    ids = token_ids(2, LENGTH, seed=10 + dist.get_rank())
    logits = model(ids, use_cache=False).logits
    next_token_loss(logits, ids, 4 * (LENGTH - 1)).backward()
    raw = gradients(model)
    data_parallel.reduce_gradients()
    return logits.detach(), {**{f"{name} before": tensor for name, tensor in raw.items()}, **gradients(model)}


def expert_parallel(case: str, wiring: str, chunks: int) -> None:
    serial, overlapped = (parallel_step(case, wiring, mode, chunks) for mode in ("serial", "overlapped"))
    assert_equal_bits(overlapped[0], serial[0])
    assert_equal_bits(overlapped[1], serial[1])
    one = rewire(build(CASES[case]), wiring)
    ids = torch.cat([token_ids(2, LENGTH, seed=10 + rank) for rank in range(2)])
    logits = one(ids, use_cache=False).logits
    next_token_loss(logits, ids, 4 * (LENGTH - 1)).backward()
    rank = dist.get_rank()
    assert_close(overlapped[0], logits.detach()[2 * rank :][:2], **LOGITS)
    for name, whole in gradients(one).items():
        mine = overlapped[1][name]
        expected = whole if mine.shape == whole.shape else whole.chunk(2)[rank]
        assert_close(mine, expected, **GRADIENTS, name=name)


@moe_families
def test_expert_parallelism(case: str, rank_pool: "RankPool") -> None:
    """Two ranks: serial equals overlapped in bits, and both equal one rank on the whole batch."""
    rank_pool.run(expert_parallel, 2, case, "farskip", 1)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("case", [name for name in CASES if not is_dense(CASES[name])])
def test_expert_parallelism_under_every_wiring(case: str, wiring: str, chunks: int, rank_pool: "RankPool") -> None:
    rank_pool.run(expert_parallel, 2, case, wiring, chunks)


IN_ANOTHER_PROCESS = """
import sys, torch, farskip
folder, ids = sys.argv[1], torch.load(sys.argv[2])
seen = {}
for name in sys.argv[3:]:
    model = farskip.load(f"{folder}/{name}")
    seen[name] = {"logits": model(ids).logits.detach(), "wiring": str(farskip.wiring_of(model))}
torch.save(seen, f"{folder}/seen.pt")
"""


@pytest.mark.slow
def test_a_fresh_process_computes_the_same_bits(tmp_path: Path) -> None:
    ids, models = token_ids(2, LENGTH), {name: pair(name, "farskip", "last:3")[1].eval() for name in FAMILIES}
    for name, model in models.items():
        farskip.save(model, tmp_path / name)
    torch.save(ids, tmp_path / "ids.pt")
    subprocess.run(
        [sys.executable, "-P", "-c", IN_ANOTHER_PROCESS, str(tmp_path), str(tmp_path / "ids.pt"), *models],
        check=True,
        cwd=tmp_path,
    )
    seen = torch.load(tmp_path / "seen.pt")
    for name, model in models.items():
        assert seen[name]["wiring"] == "farskip on 3 of 4 layers (1-3)"
        assert_equal_bits(seen[name]["logits"], model(ids).logits, name=name)


@all_families
def test_a_fresh_model_of_every_family(case: str) -> None:
    """`family` of the configuration is the family's name; its settings are those of its config class."""
    from farskip.models.fresh import build_model

    settings = {key: value for key, value in SMALL.items() if not key.endswith(("_id", "vocab_size"))}
    settings.update({"num_hidden_layers": 2, **CASES[case].config})
    model = build_model(case, settings, vocab_size=50, end_of_document_id=2, seed=0)
    assert family_of_model(model).name == case and model.config.vocab_size == 50


# -- families that are not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "closest"),
    [
        ("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
        ("DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM"),
        ("MistralForCausalLM", "MixtralForCausalLM"),
    ],
)
def test_an_unknown_family_is_refused_by_name(architecture: str, closest: str) -> None:
    with pytest.raises(ValueError, match=f"'{architecture}' is not supported; closest: {closest}; known: .*Qwen3Moe"):
        family_of_architecture(architecture)


def test_a_model_that_transformers_knows_and_we_do_not_is_refused() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**{**SMALL, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="'Qwen2ForCausalLM' is not supported"):
        rewire(model)
    with pytest.raises(ValueError, match="'Qwen2ForCausalLM' is not supported"):
        family_of_model(model)
