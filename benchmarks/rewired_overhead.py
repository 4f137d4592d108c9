"""What the executor costs when there is nothing to hide: forward of a rewired model against the untouched one.

Both run in one process, in turn, on the same batch; the ratio is taken pair by pair, so that a machine whose speed
drifts moves both sides. Prints a table and writes JSON.

    python benchmarks/rewired_overhead.py [--pairs 40] [--out benchmarks/results/rewired_overhead.json]
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from farskip.models.fresh import build_model
from farskip.models.surgery import rewire
from farskip.report import machine_line

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


def forward_ms(model: Any, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(ids, use_cache=False)
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def measure(family: str, wiring: str, shape: tuple[int, int], pairs: int) -> dict[str, Any]:
    """Interleaved pairs; the order inside a pair alternates."""
    untouched = build_model(family, SETTINGS[family], vocab_size=4096, end_of_document_id=0, seed=0).eval()
    rewired = rewire(copy.deepcopy(untouched), wiring)
    ids = torch.randint(4096, shape)
    if wiring == "ordinary" and not torch.equal(untouched(ids).logits, rewired(ids).logits):
        raise RuntimeError(f"{family}: the ordinary wiring does not equal the untouched model; no time is reported")
    for _ in range(3):
        forward_ms(untouched, ids), forward_ms(rewired, ids)
    times: dict[str, list[float]] = {"untouched": [], "rewired": []}
    for pair in range(pairs):
        order = (("untouched", untouched), ("rewired", rewired))
        for name, model in order if pair % 2 else reversed(order):
            times[name].append(forward_ms(model, ids))
    ratios = sorted(b / a for a, b in zip(times["untouched"], times["rewired"], strict=True))
    return {
        "family": family,
        "wiring": wiring,
        "batch": list(shape),
        "pairs": pairs,
        "untouched_ms": statistics.median(times["untouched"]),
        "rewired_ms": statistics.median(times["rewired"]),
        "ratio_median": statistics.median(ratios),
        "ratio_p25": ratios[len(ratios) // 4],
        "ratio_p75": ratios[3 * len(ratios) // 4],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(family, wiring, shape, options.pairs)
        for family in SETTINGS
        for wiring in ("ordinary", "farskip")
        for shape in ((1, 64), (4, 256))
    ]
    print(f"{'family':<12} {'wiring':<9} {'batch':<9} {'untouched':>10} {'rewired':>10}  ratio (p25 - p75)")
    for row in rows:
        print(
            f"{row['family']:<12} {row['wiring']:<9} {row['batch'][0]} x {row['batch'][1]:<5} "
            f"{row['untouched_ms']:>7.2f} ms {row['rewired_ms']:>7.2f} ms  "
            f"{row['ratio_median']:.3f} ({row['ratio_p25']:.3f} - {row['ratio_p75']:.3f})"
        )
    if options.out is not None:
        date = time.strftime("%Y-%m-%d")
        text = json.dumps({"date": date, "machine": machine_line(), "threads": 1, "rows": rows}, indent=1)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
