"""A fresh model built in slices: in bits the slices of the one that is built whole, and never more memory than it
says.
"""

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from farskip.models.attach import attachment_of, layers_of
from farskip.models.fresh_slices import fresh_model
from farskip.models.parallelize import full_state_dict, parallelize
from farskip.models.rank_slices import RankSlices, Share, places_here
from farskip.models.surgery import rewire
from farskip.models.testing_families import CASES, SMALL, family_of, is_dense
from farskip.models.testing_models import token_ids
from farskip.parallel.mesh import build_mesh
from farskip.testing import assert_close, assert_equal_bits

if TYPE_CHECKING:
    from farskip.testing import RankPool

all_cases = pytest.mark.parametrize("case", CASES)


def built(case: str, here: RankSlices | None = None, seed: int = 3, **changes: Any) -> Any:
    family = family_of(CASES[case])
    config = AutoConfig.for_model(family.model_type, **{**SMALL, **CASES[case].config, **changes})
    config._attn_implementation = CASES[case].attention
    return fresh_model(family, config, seed, here or RankSlices())


@all_cases
def test_values_are_those_that_transformers_draws(case: str) -> None:
    """Into a model that has memory from the start, module by module, but not twice into a head that is tied."""
    ours = built(case)
    theirs = type(ours)(ours.config)
    is_tied = theirs.lm_head.weight is theirs.get_input_embeddings().weight
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == is_tied
    for module in theirs.modules():
        module._is_hf_initialized = is_tied and module is theirs.lm_head
    torch.manual_seed(3)
    theirs.initialize_weights()
    for kind in ("named_parameters", "named_buffers"):
        here, there = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert_equal_bits(here, there)
        assert [tensor.requires_grad for tensor in here.values()] == [t.requires_grad for t in there.values()]
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    ids = token_ids(1, 5)
    with torch.no_grad():
        assert_equal_bits(ours.eval()(ids).logits, theirs.eval()(ids).logits)


@all_cases
def test_slices_are_those_of_the_whole(case: str) -> None:
    """Put together again, for every place among two ranks of experts and two of tensors."""
    whole = built(case)
    experts = set() if is_dense(CASES[case]) else expert_names(whole, case)
    for rank, size, tp in itertools.product(range(2), (1, 2), (1, 2) if case in CUT_BY_TP else (1,)):
        here = RankSlices(experts=Share(rank=rank % size, size=size), tensors=Share(rank=rank % tp, size=tp))
        sliced = built(case, here)
        for name, tensor in whole.named_parameters():
            mine = sliced.get_parameter(name)
            dims = [dim for dim in range(tensor.dim()) if mine.shape[dim] != tensor.shape[dim]]
            assert (dims == [0]) == (size == 2) or name not in experts, name
            cut = tensor
            for dim in dims:
                cut = cut.chunk(tensor.shape[dim] // mine.shape[dim], dim)[rank]
            assert torch.equal(mine, cut), name
        for name, buffer in whole.named_buffers():
            assert torch.equal(sliced.get_buffer(name), buffer), name


def test_no_gpu_is_asked_for_its_random_numbers(monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    expected, asked = built("llama").state_dict(), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("get_rng_state", "set_rng_state", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))
    before = torch.get_rng_state()
    assert_equal_bits(built("llama").state_dict(), expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert asked == [] and not recwarn.list


def test_a_tensor_without_a_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.15 has it, whose routers of ERNIE stay at what their constructor says: zero."""
    base = next(each for each in type(built("ernie4_5_moe")).__mro__ if "_init_weights" in vars(each))
    initialize = base._init_weights

    def but_routers(self: Any, module: nn.Module) -> None:
        if not type(module).__name__.endswith("Router"):
            initialize(self, module)

    monkeypatch.setattr(base, "_init_weights", but_routers)
    with pytest.raises(
        ValueError, match=r"transformers [\d.]+ leaves model\.layers\.1\.mlp\.gate\.weight without .* newer"
    ):
        built("ernie4_5_moe")


CUT_BY_TP = ("deepseek_v3", "gpt_oss", "llama", "llama-biased-tied", "qwen3_moe")


def expert_names(model: Any, case: str) -> set[str]:
    """Of the parameters that hold all experts of a layer."""
    family = family_of(CASES[case])
    found = [family.sub_blocks(layer).experts for layer in layers_of(model)]
    of_experts = {id(p) for experts in found if experts is not None for p in experts.parameters(recurse=False)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in of_experts}


def spread_equals_whole(case: str, ep: int, tp: int) -> None:
    mesh, whole = build_mesh(ep, tp=tp), built(case)
    rewire(whole, "farskip")
    sliced = parallelize(rewire(built(case, places_here(mesh)), "farskip"), mesh, already_cut=True)
    attachment = attachment_of(sliced)
    assert attachment is not None
    assert bool(attachment.sharded_experts) == (ep > 1) and bool(attachment.tensor_layout.sharded) == (tp > 1)
    assert_equal_bits(dict(full_state_dict(sliced)), dict(whole.state_dict()))
    cut = parallelize(rewire(built(case), "farskip"), mesh)
    ids = token_ids(2, 6)
    with torch.no_grad():
        assert_equal_bits(sliced(ids).logits, cut(ids).logits)
        assert_close(sliced(ids).logits, whole(ids).logits, max_error=5e-5)


@pytest.mark.parametrize(("case", "ep", "tp"), [("deepseek_v3", 2, 1), ("llama-biased-tied", 1, 2), ("gpt_oss", 2, 2)])
def test_a_spread_model_is_the_whole_one(case: str, ep: int, tp: int, rank_pool: "RankPool") -> None:
    rank_pool.run(spread_equals_whole, 2, case, ep, tp)


def peak_bytes(call: Any) -> tuple[Any, int]:
    """What a call returns, and the most bytes that it had of torch's CPU memory at a time, by the allocator's book."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    assert recorded.profiler is not None
    events = [each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]"]
    changes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    assert changes, "nothing was counted"
    return result, max(itertools.accumulate(changes))


def num_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in {id(p): p for p in module.parameters()}.values())


def test_the_peak_is_the_slices_and_one_layers_experts() -> None:
    size = {"num_hidden_layers": 6, "moe_intermediate_size": 96, "mlp_only_layers": []}
    whole, whole_peak = peak_bytes(lambda: built("qwen3_moe", **size))
    assert num_bytes(whole) <= whole_peak < 1.2 * num_bytes(whole), "the count does not see the model"
    here = RankSlices(experts=Share(rank=1, size=4))
    sliced, peak = peak_bytes(lambda: built("qwen3_moe", here, **size))
    largest = max(num_bytes(layer.mlp.experts) for layer in layers_of(whole))
    own = num_bytes(sliced)
    assert own < 0.4 * num_bytes(whole) and own + largest < 0.6 * num_bytes(whole)
    assert peak < 1.05 * (own + largest)
