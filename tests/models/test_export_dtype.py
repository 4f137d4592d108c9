"""What a conversion writes has its original's dtype, as transformers would load it."""

from pathlib import Path

import pytest
import torch

import farskip
from farskip.models.export_dtype import checkpoint_dtype, round_weights
from farskip.models.fresh import build_model

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_weights_are_those_of_a_load_in_that_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_model("deepseek_v3", SMALL, vocab_size=32, end_of_document_id=0, seed=0)
    for name, buffer in model.named_buffers():
        if "e_score" in name:
            torch.nn.init.normal_(buffer)  # what bf16 would round
    farskip.save(model, tmp_path / "whole")
    expected = farskip.load(tmp_path / "whole", dtype=dtype).state_dict()
    round_weights(model, dtype)
    rounded = model.state_dict()
    assert rounded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert rounded[name].dtype == tensor.dtype and torch.equal(rounded[name], tensor), name
    farskip.save(model, tmp_path / "rounded")
    assert checkpoint_dtype(tmp_path / "rounded") == dtype
    again = farskip.load(tmp_path / "rounded").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("text", "dtype"),
    [('{"torch_dtype": "bfloat16"}', torch.bfloat16), ('{"dtype": "float16"}', torch.float16), ("{}", torch.float32)],
)
def test_the_dtype_of_a_checkpoint(text: str, dtype: torch.dtype, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert checkpoint_dtype(tmp_path) == dtype
