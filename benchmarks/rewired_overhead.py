"""What the executor costs when there is nothing to hide: forward of a rewired model against the untouched one.

Both run in one process, in turn, on the same batch; the ratio is taken pair by pair, so that a machine whose speed
drifts moves both sides. Prints a table and writes JSON.

    python benchmarks/rewired_overhead.py [--pairs 40] [--out benchmarks/results/rewired_overhead.json]
"""

import copy
from functools import partial
from typing import Any

import torch
from paired import parse_options, report, time_pairs

from farskip.models.fresh import build_model
from farskip.models.surgery import rewire

SIDES = ("untouched", "rewired")

SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "hidden_size": 192,
        "intermediate_size": 576,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 6,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 12,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 48,
    },
    "qwen3_moe": {
        "hidden_size": 192,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "num_experts": 12,
        "num_experts_per_tok": 2,
    },
}


@torch.no_grad()
def measure(family: str, wiring: str, shape: tuple[int, int], pairs: int) -> dict[str, Any]:
    untouched = build_model(family, SETTINGS[family], vocab_size=4096, end_of_document_id=0, seed=0).eval()
    rewired = rewire(copy.deepcopy(untouched), wiring)
    ids = torch.randint(4096, shape)
    if wiring == "ordinary" and not torch.equal(untouched(ids).logits, rewired(ids).logits):
        raise RuntimeError(f"{family}: the ordinary wiring does not equal the untouched model; no time is reported")
    models = zip(SIDES, (untouched, rewired), strict=True)
    times = time_pairs({side: partial(model, ids, use_cache=False) for side, model in models}, pairs)
    return {"family": family, "wiring": wiring, "batch": list(shape), **times}


def main() -> None:
    options = parse_options(__doc__, pairs=40)
    torch.set_num_threads(1)
    rows = [
        measure(family, wiring, shape, options.pairs)
        for family in SETTINGS
        for wiring in ("ordinary", "farskip")
        for shape in ((1, 64), (4, 256))
    ]
    report(rows, SIDES, options.out)


if __name__ == "__main__":
    main()
