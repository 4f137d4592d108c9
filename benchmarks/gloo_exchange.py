"""gloo's all-to-all against the one that sends each direction in a process group of its own (`DuplexGlooLink`).

Two hosts as network namespaces over a rate-limited veth pair (Linux, root). Exchanges are timed in turn, each after a
barrier, one of the two ranks late by a random time below `--late-ms` or not at all; a time is that of the slower rank's
launch until its result is there. Prints a table and writes JSON.

    python benchmarks/gloo_exchange.py [--rounds 20] [--out benchmarks/results/gloo_exchange.json]
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from farskip.launch.config import RunConfig
from farskip.launch.network_hosts import run_on_hosts
from farskip.launch.ranks import Ranks
from farskip.parallel.collectives import AllToAll, ProcessGroupLink
from farskip.parallel.duplex_link import DuplexGlooLink
from farskip.report import machine_line

WIDTH, WARM_UP = 512, 3


def measure(ranks: Ranks, options: argparse.Namespace) -> None:
    """Both links, on time and late, in turn."""
    links = {"all_to_all_single": ProcessGroupLink(), "duplex": DuplexGlooLink()}
    rows, half = torch.randn(options.rows, WIDTH), options.rows // 2
    late = random.Random(0)
    times: dict[tuple[str, str], list[float]] = {(name, when): [] for when in ("on time", "late") for name in links}
    for number in range(-WARM_UP, options.rounds):
        for (name, when), found in times.items():
            delay_s = late.uniform(0.0, 1e-3 * options.late_ms)
            dist.barrier()
            if when == "late" and ranks.rank == 1:
                time.sleep(delay_s)
            start = time.perf_counter()
            AllToAll(link=links[name], input_splits=(half, half), output_splits=(half, half)).launch(rows).wait()
            took_ms = torch.tensor(1e3 * (time.perf_counter() - start))
            dist.all_reduce(took_ms, dist.ReduceOp.MAX)
            if number >= 0:
                found.append(took_ms.item())
    if ranks.rank == 0:
        report(times, options)


def report(times: dict[tuple[str, str], list[float]], options: argparse.Namespace) -> None:
    """Print a table and, where asked, write JSON."""
    table: list[dict[str, Any]] = []
    for (name, when), found in times.items():
        p25, median, p75 = statistics.quantiles(found, n=4)
        table.append({"link": name, "second_rank": when, "median_ms": median, "p25_ms": p25, "p75_ms": p75})
        print(f"{when:<8} {name:<18} {median:6.1f} ms ({p25:.1f} - {p75:.1f})")
    if options.out is not None:
        about = {"rate": options.rate, "bytes_each_way": options.rows // 2 * WIDTH * 4, "late_ms": options.late_ms}
        found_on = {"date": time.strftime("%Y-%m-%d"), "machine": machine_line(), "rounds": options.rounds}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**found_on, **about, "rows": table}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=1280, help="of 2 kB each, half of them for the other rank")
    parser.add_argument("--rate", default="500mbit")
    parser.add_argument("--late-ms", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    run_on_hosts(measure, options, RunConfig(device="cpu", threads=1), 2, options.rate)


if __name__ == "__main__":
    main()
