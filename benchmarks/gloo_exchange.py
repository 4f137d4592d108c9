"""gloo's all-to-all against the one that sends each direction in a process group of its own (`DuplexGlooLink`).

Two hosts as network namespaces over a rate-limited veth pair (Linux, root). Exchanges are timed in turn, each after a
barrier, one of the two ranks late by a random time below `--late-ms` or not at all; a time is that of the slower rank's
launch until its result is there. Prints a table and writes JSON.

    python benchmarks/gloo_exchange.py [--rounds 20] [--out benchmarks/results/gloo_exchange.json]
"""

import argparse
import random
import time

import torch
import torch.distributed as dist
from between_hosts import parser_of, row_of, run, write

from farskip.launch.ranks import Ranks
from farskip.parallel.collectives import AllToAll, ProcessGroupLink
from farskip.parallel.duplex_link import DuplexGlooLink

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
    rows = [row_of(name, found, second_rank=when) for (name, when), found in times.items()]
    write(rows, options, bytes_each_way=options.rows // 2 * WIDTH * 4, late_ms=options.late_ms)


def main() -> None:
    parser = parser_of(__doc__, rounds=20, rate="500mbit")
    parser.add_argument("--rows", type=int, default=1280, help="of 2 kB each, half of them for the other rank")
    parser.add_argument("--late-ms", type=float, default=10.0)
    run(measure, parser.parse_args())


if __name__ == "__main__":
    main()
