"""What overlap costs where nothing is in flight: the overlapped schedule against the serial one, over a link that is
done at once.

One rank exchanges with itself, so routing, permutation, launches, waits and both directions of autograd run as they do
between ranks, and no time is spent in transfers. Both sides run in one process, in turn, on the same batch, forward and
backward; the ratio is taken pair by pair. Prints a table and writes JSON.

    python benchmarks/machinery_overhead.py [--pairs 30] [--out benchmarks/results/machinery_overhead.json]
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rewired_overhead import SETTINGS

from farskip.executor import Executor
from farskip.models.attach import attach, layers_of
from farskip.models.family import family_of_model
from farskip.models.fresh import build_model
from farskip.models.surgery import rewire, wiring_of
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.pending import Pending, Work
from farskip.report import machine_line
from farskip.wait_meter import WaitMeter


class Done:
    """Work that was done when it was launched."""

    def wait(self) -> object:
        return None


class InstantLink:
    """One rank that sends to itself; everything has arrived at once."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.meter = WaitMeter()

    def all_to_all(
        self, output: torch.Tensor, tensor: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int]
    ) -> Work:
        output.copy_(tensor)
        return Done()

    def all_reduce(self, tensor: torch.Tensor) -> Work:
        return Done()

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        output.copy_(tensor)
        return Done()

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> Work:
        output.copy_(tensor)
        return Done()

    def exchange_counts(self, counts: torch.Tensor) -> Pending:
        return Pending(counts.clone(), Done())


def step_ms(model: Any, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(ids, use_cache=False).logits.sum().backward()
    elapsed = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return 1e3 * elapsed


def measure(family: str, wiring: str, shape: tuple[int, int], pairs: int) -> dict[str, Any]:
    """Interleaved pairs; the order inside a pair alternates."""
    base = build_model(family, SETTINGS[family], vocab_size=4096, end_of_document_id=0, seed=0).train()
    models = {}
    for mode in ("serial", "overlapped"):
        model = rewire(copy.deepcopy(base), wiring)
        blocks = [family_of_model(model).sub_blocks(layer) for layer in layers_of(model)]
        dispatcher = AllToAllDispatcher(InstantLink(), SETTINGS[family].get("n_routed_experts", 12))
        attach(model, Executor(blocks, wiring_of(model), dispatcher=dispatcher, mode=mode))
        models[mode] = model
    ids = torch.randint(4096, shape)
    with torch.no_grad():
        if not torch.equal(*(model(ids).logits for model in models.values())):
            raise RuntimeError(f"{family}, {wiring}: overlapped does not equal serial; no time is reported")
    for _ in range(2):
        for model in models.values():
            step_ms(model, ids)
    times: dict[str, list[float]] = {mode: [] for mode in models}
    for pair in range(pairs):
        order = list(models.items())
        for mode, model in order if pair % 2 else reversed(order):
            times[mode].append(step_ms(model, ids))
    ratios = sorted(b / a for a, b in zip(times["serial"], times["overlapped"], strict=True))
    return {
        "family": family,
        "wiring": wiring,
        "batch": list(shape),
        "pairs": pairs,
        "serial_ms": statistics.median(times["serial"]),
        "overlapped_ms": statistics.median(times["overlapped"]),
        "ratio_median": statistics.median(ratios),
        "ratio_p25": ratios[len(ratios) // 4],
        "ratio_p75": ratios[3 * len(ratios) // 4],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(family, wiring, shape, options.pairs)
        for family in SETTINGS
        for wiring in ("ordinary", "farskip", "ladder")
        for shape in ((1, 64), (4, 256))
    ]
    print(f"{'family':<12} {'wiring':<9} {'batch':<9} {'serial':>10} {'overlapped':>13}  ratio (p25 - p75)")
    for row in rows:
        print(
            f"{row['family']:<12} {row['wiring']:<9} {row['batch'][0]} x {row['batch'][1]:<5} "
            f"{row['serial_ms']:>7.2f} ms {row['overlapped_ms']:>10.2f} ms  "
            f"{row['ratio_median']:.3f} ({row['ratio_p25']:.3f} - {row['ratio_p75']:.3f})"
        )
    if options.out is not None:
        text = json.dumps(
            {"date": time.strftime("%Y-%m-%d"), "machine": machine_line(), "threads": 1, "rows": rows}, indent=1
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
