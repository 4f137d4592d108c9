"""A transformers model as the training loop sees it: hidden states inside documents, the head, greedy continuation."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from farskip.batch import Batch
from farskip.models.language_model import HFLanguageModel, continue_text
from farskip.models.parallelize import parallelize
from farskip.models.surgery import rewire
from farskip.models.testing_models import FAMILIES, VOCABULARY, tiny_model, token_ids
from farskip.parallel.mesh import build_mesh

if TYPE_CHECKING:
    from farskip.testing import RankPool


def batch(num_sequences: int, *, packed: bool) -> Batch:
    position_ids_S = torch.cat([torch.arange(5), torch.arange(7)]) if packed else torch.arange(12)
    ids_BS = token_ids(num_sequences, 12)
    return Batch(input_ids_BS=ids_BS, labels_BS=ids_BS, position_ids_BS=position_ids_S.expand(num_sequences, -1))


@pytest.mark.parametrize("wiring", [None, "farskip"])
@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_hidden_is_the_logits_of_each_document_alone(family: str, wiring: str | None) -> None:
    """fp32 on CPU: max |dlogit| <= 5e-5 * max(1, max |ref|)."""
    model = tiny_model(family).eval()
    if wiring is not None:
        rewire(model, wiring)
    ours, packed = HFLanguageModel(model), batch(3, packed=True)
    with torch.no_grad():
        logits_BSV = ours.head(ours.hidden(packed))
        alone = [model(part, use_cache=False).logits for part in packed.input_ids_BS.split([5, 7], dim=1)]
    expected_BSV = torch.cat(alone, dim=1)
    assert (logits_BSV - expected_BSV).abs().max() <= 5e-5 * max(1.0, float(expected_BSV.abs().max()))


class Tokenizer:
    """As much of one as a continuation needs."""

    eos_token_id = 2

    def __call__(self, text: str, **arguments: Any) -> Any:
        from transformers import BatchEncoding

        ids = torch.tensor([[int(word) for word in text.split()]])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, ids: torch.Tensor) -> str:
        return " ".join(str(int(index)) for index in ids)


@pytest.mark.parametrize("wiring", ["ordinary", "farskip"])
def test_the_continuation_is_greedy(wiring: str) -> None:
    model = rewire(tiny_model("deepseek_v3"), wiring)
    assert model.training
    written = continue_text(model, Tokenizer(), "5 6 7", 4)
    assert model.training  # as it was
    ids = [5, 6, 7]
    model.eval()
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert written == " ".join(map(str, ids[3:]))
    assert max(ids) < VOCABULARY


def continued_to_different_ends() -> int:
    """Rank 0 meets its end of text at once, rank 1 never. Returns how many tokens this rank has written."""
    one, prompts = rewire(tiny_model("qwen3_moe"), "farskip"), ("5 6 7", "8 9")
    free = [continue_text(one, Tokenizer(), prompt, 6).split() for prompt in prompts]
    end = int(free[0][0])
    assert len(free[1]) == 6 and str(end) not in free[1]
    model = parallelize(rewire(tiny_model("qwen3_moe"), "farskip"), build_mesh(2))
    for each in (one, model):
        each.generation_config.eos_token_id = end
    mine = prompts[dist.get_rank()]
    written = continue_text(model, Tokenizer(), mine, 6)
    assert written == continue_text(one, Tokenizer(), mine, 6)
    return len(written.split())


def test_a_rank_whose_text_has_ended_goes_on_for_the_others(rank_pool: "RankPool") -> None:
    assert rank_pool.run(continued_to_different_ends, 2) == [1, 6]
