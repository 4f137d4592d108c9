"""Selective recomputation: the same bits, less kept, and nothing recomputed without need."""

from typing import Any

import pytest
import torch

from farskip.models.attach import attachment_of
from farskip.models.recompute import RecomputedSubBlocks, recompute_stages
from farskip.models.surgery import rewire
from farskip.models.testing_models import next_token_loss, run_backward, tiny_model, token_ids
from farskip.testing import assert_equal_bits

FAMILIES = ("qwen3_moe", "deepseek_v3")


def kept_bytes(model: Any, ids: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = next_token_loss(model(ids, use_cache=False).logits, ids)
    loss.backward()
    return sum(storages.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("wiring", ["ordinary", "farskip", "ladder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_those_without_it(family: str, wiring: str, attention: str) -> None:
    ids = token_ids(2, 7)
    expected = run_backward(rewire(tiny_model(family, attention=attention), wiring), ids, use_cache=False)
    model = rewire(tiny_model(family, attention=attention), wiring)
    recompute_stages(model)
    found = run_backward(model, ids, use_cache=False)
    assert_equal_bits({"logits": found[0], **found[1]}, {"logits": expected[0], **expected[1]})


@pytest.mark.parametrize("family", FAMILIES)
def test_less_is_kept(family: str) -> None:
    ids = token_ids(4, 64)
    model = rewire(tiny_model(family, attention="eager"), "farskip")
    everything = kept_bytes(model, ids)
    recompute_stages(model)
    assert kept_bytes(model, ids) < 0.6 * everything


def test_the_core_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in forward and once in backward, per layer; and not at all where no gradient is wanted."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    calls = []
    real = modeling_qwen3_moe.eager_attention_forward
    monkeypatch.setattr(
        modeling_qwen3_moe, "eager_attention_forward", lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    )
    model = rewire(tiny_model("qwen3_moe", attention="eager"), "farskip")
    recompute_stages(model)
    ids = token_ids(2, 7)
    loss = next_token_loss(model(ids, use_cache=False).logits, ids)
    assert len(calls) == 4
    loss.backward()
    assert len(calls) == 8
    with torch.no_grad():
        model(ids)
    assert len(calls) == 12


def test_a_cache_still_works() -> None:
    model = rewire(tiny_model("qwen3_moe"), "farskip").eval()
    ids = token_ids(1, 4)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    recompute_stages(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_twice_is_once() -> None:
    model = rewire(tiny_model("qwen3_moe"), "farskip")
    recompute_stages(model)
    attachment = attachment_of(model)
    assert attachment is not None
    blocks = attachment.executor.sub_blocks
    recompute_stages(model)
    assert all(a is b for a, b in zip(attachment.executor.sub_blocks, blocks, strict=True))


def test_a_model_without_farskip_is_refused() -> None:
    with pytest.raises(ValueError, match="not attached to this model; call rewire or parallelize first"):
        recompute_stages(tiny_model("qwen3_moe"))


def test_it_survives_rewire() -> None:
    model = rewire(tiny_model("qwen3_moe"), "farskip")
    recompute_stages(model)
    rewire(model, "ladder")
    attachment = attachment_of(model)
    assert attachment is not None
    assert all(isinstance(block, RecomputedSubBlocks) for block in attachment.executor.sub_blocks)
