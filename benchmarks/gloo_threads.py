"""What gloo's threads cost when they wait for a core like compute does, and what realtime ones gain.

Two hosts as network namespaces over a rate-limited veth pair (Linux, root), one core each, both of them computing.

    token    an all-reduce of 16 kB behind a millisecond of compute, waited for at once: the decoding of one token
    layer    an all-to-all of 1.3 MB each way under as much compute as it takes to hide it: a dispatch under attention

Each case is timed with ordinary and with realtime threads in turn, from a barrier to the end on the slower host. For
`layer`, `compute alone` is the same without the exchange. Prints a table and writes JSON.

    python benchmarks/gloo_threads.py [--rounds 40] [--out benchmarks/results/gloo_threads.json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from farskip.launch.config import RunConfig
from farskip.launch.network_hosts import run_on_hosts
from farskip.launch.ranks import Ranks
from farskip.parallel.collectives import AllToAll
from farskip.parallel.duplex_link import DuplexGlooLink
from farskip.parallel.gloo_threads import GlooThreads, set_gloo_threads
from farskip.report import machine_line

WIDTH, ROWS, TOKEN, WARM_UP = 512, 1280, 4096, 3
SIDE = 256
MODES = (GlooThreads.ordinary, GlooThreads.realtime)


def measure(ranks: Ranks, options: argparse.Namespace) -> None:
    """All cases, with both kinds of threads, in turn."""
    link, matrix, rows, token = DuplexGlooLink(), torch.randn(SIDE, SIDE), torch.randn(ROWS, WIDTH), torch.randn(TOKEN)
    half = ROWS // 2

    def compute(seconds: float) -> None:
        for _ in range(round(seconds / product_s)):
            torch.mm(matrix, matrix)

    product_s = min(_seconds(lambda: torch.mm(matrix, matrix)) for _ in range(200))

    def one_token() -> None:
        compute(1e-3)
        link.all_reduce(token).wait()

    def layer() -> None:
        pending = AllToAll(link=link, input_splits=(half, half), output_splits=(half, half)).launch(rows)
        compute(1e-3 * options.compute_ms)
        pending.wait()

    cases: dict[str, Callable[[], None]] = {
        "token": one_token,
        "layer": layer,
        "compute alone": lambda: compute(1e-3 * options.compute_ms),
    }
    times: dict[tuple[str, GlooThreads], list[float]] = {(case, mode): [] for case in cases for mode in MODES}
    for number in range(-WARM_UP, options.rounds):
        for (case, mode), found in times.items():
            set_gloo_threads(mode)
            dist.barrier()
            took_ms = torch.tensor(1e3 * _seconds(cases[case]))
            dist.all_reduce(took_ms, dist.ReduceOp.MAX)
            if number >= 0:
                found.append(took_ms.item())
    if ranks.rank == 0:
        report(times, options)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def report(times: dict[tuple[str, GlooThreads], list[float]], options: argparse.Namespace) -> None:
    """Print a table and, where asked, write JSON."""
    table: list[dict[str, Any]] = []
    for (case, mode), found in times.items():
        p25, median, p75 = statistics.quantiles(found, n=4)
        table.append({"case": case, "threads": str(mode), "median_ms": median, "p25_ms": p25, "p75_ms": p75})
        print(f"{case:<14} {mode:<9} {median:6.1f} ms ({p25:.1f} - {p75:.1f})")
    if options.out is not None:
        about = {"rate": options.rate, "bytes_each_way": ROWS // 2 * WIDTH * 4, "compute_ms": options.compute_ms}
        found_on = {"date": time.strftime("%Y-%m-%d"), "machine": machine_line(), "rounds": options.rounds}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**found_on, **about, "rows": table}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--compute-ms", type=float, default=25.0)
    parser.add_argument("--rate", default="500mbit")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    run_on_hosts(measure, options, RunConfig(device="cpu", threads=1), 2, options.rate)


if __name__ == "__main__":
    main()
