"""How much of an emulated exchange one GPU hides: DeepSeek-V2-Lite layer shapes in bf16, forward and backward.

One GPU cannot hold two ranks of NCCL, so the exchange is a paced copy on a side stream, of a bandwidth that makes
communication a given share of the blocking step (`farskip.parallel.paced_copy_link`). All variants run in turn in one
process; times are of the device, by events. Prints a table and writes JSON. Needs a CUDA device. The variants called
side have merges, or merges and routers, on a stream beside compute (`farskip.lanes`).

    python benchmarks/gpu_overlap.py [--layers 4] [--tokens 8192] [--share 0.25] [--rounds 12] [--out FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from farskip.executor import Executor
from farskip.models.attach import attach, layers_of
from farskip.models.family import backbone_of, family_of_model
from farskip.models.fresh import build_model
from farskip.models.kernels import kernels_line, use_kernels
from farskip.models.surgery import rewire, wiring_of
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.paced_copy_link import PacedCopyLink

LITE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 0,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 8192,
}
NO_LINK_GBYTE_S = 1e6
"""So fast that no exchange is seen: what the same launches and copies cost without a wire."""


class Variant:
    """One model under a wiring, a schedule and a wire."""

    def __init__(
        self, base: dict[str, Any], layers: int, wiring: str, mode: str, link: PacedCopyLink, side_stream: str = "none"
    ) -> None:
        config = {**LITE, "num_hidden_layers": layers}
        model = build_model("deepseek_v2", config, vocab_size=1024, end_of_document_id=0, seed=0)
        self.model = rewire(model.to("cuda", torch.bfloat16).train(), wiring)
        self.model.load_state_dict(base)
        blocks = [family_of_model(self.model).sub_blocks(layer) for layer in layers_of(self.model)]
        dispatcher = AllToAllDispatcher(link, LITE["n_routed_experts"])
        wired = wiring_of(self.model)
        attach(self.model, Executor(blocks, wired, dispatcher=dispatcher, mode=mode, side_stream=side_stream))
        use_kernels(self.model, "auto")

    def step_ms(self, ids: torch.Tensor, *, backward: bool) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        with torch.set_grad_enabled(backward):
            hidden = backbone_of(self.model)(input_ids=ids, use_cache=False).last_hidden_state
            if backward:
                hidden.backward(torch.ones_like(hidden))
        end.record()
        end.synchronize()
        self.model.zero_grad(set_to_none=True)
        return begin.elapsed_time(end)


Times = dict[str, list[float]]


def interleaved(variants: dict[str, Variant], ids: torch.Tensor, rounds: int, *, backward: bool) -> Times:
    for variant in variants.values():
        variant.step_ms(ids, backward=backward)
    times: Times = {name: [] for name in variants}
    names = list(variants)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(variants[name].step_ms(ids, backward=backward))
    return times


def summary(times: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_ms": middle, "p25_ms": low, "p75_ms": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--share", type=float, default=0.25, help="of communication in the blocking step")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_overlap: torch sees no CUDA device here; nothing is measured")
    device = torch.device("cuda")
    base = build_model(
        "deepseek_v2", {**LITE, "num_hidden_layers": options.layers}, vocab_size=1024, end_of_document_id=0, seed=0
    ).state_dict()
    sequence = min(options.tokens, 4096)
    ids = torch.randint(1024, (options.tokens // sequence, sequence), device=device)
    no_link = PacedCopyLink(device, bandwidth_gbyte_s=NO_LINK_GBYTE_S)
    free = Variant(base, options.layers, "ordinary", "serial", no_link)
    print(kernels_line(free.model, "auto"))
    free.step_ms(ids, backward=True)
    compute_ms = statistics.median(free.step_ms(ids, backward=True) for _ in range(5))
    # each layer sends its rows four times: dispatch and combine, forward and backward
    exchanged = 4 * options.layers * options.tokens * LITE["num_experts_per_tok"] * LITE["hidden_size"] * 2
    wanted_ms = compute_ms * options.share / (1 - options.share)
    link = PacedCopyLink(device, bandwidth_gbyte_s=exchanged / wanted_ms / 1e6)
    variants = {
        "ordinary_blocking": Variant(base, options.layers, "ordinary", "serial", link),
        "ordinary_shared": Variant(base, options.layers, "ordinary", "overlapped", link),
        "farskip_serial": Variant(base, options.layers, "farskip", "serial", link),
        "farskip_overlapped": Variant(base, options.layers, "farskip", "overlapped", link),
        **{
            f"farskip_overlapped_side_{each}": Variant(base, options.layers, "farskip", "overlapped", link, each)
            for each in ("merge", "merge_and_route")
        },
        "no_communication": free,
        "farskip_no_communication": Variant(base, options.layers, "farskip", "overlapped", no_link),
    }
    passes = {}
    for name, backward in (("forward", False), ("forward_backward", True)):
        times = interleaved(variants, ids, options.rounds, backward=backward)
        rows = {variant: summary(found) for variant, found in times.items()}
        blocking, floor = rows["ordinary_blocking"]["median_ms"], rows["no_communication"]["median_ms"]
        print(f"\n{name}, emulated link of {exchanged / wanted_ms / 1e6:.1f} GB/s")
        for variant, row in rows.items():
            row["speedup"] = blocking / row["median_ms"]
            row["hidden_share"] = (blocking - row["median_ms"]) / (blocking - floor)
            print(
                f"{variant:<39} {row['median_ms']:8.2f} ms ({row['p25_ms']:.2f} - {row['p75_ms']:.2f})  "
                f"{row['speedup']:.2f}x  {100 * row['hidden_share']:.0f} % hidden"
            )
        passes[name] = rows
    if options.out is not None:
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "link": "emulated",
            "bandwidth_gbyte_s": exchanged / wanted_ms / 1e6,
            "layers": options.layers,
            "tokens": options.tokens,
            "passes": passes,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
