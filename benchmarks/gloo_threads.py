"""What gloo's threads cost when they wait for a core like compute does, and what realtime ones gain.

Two hosts as network namespaces over a rate-limited veth pair (Linux, root), one core each, both of them computing.

    token    an all-reduce of 16 kB behind a millisecond of compute, waited for at once: the decoding of one token
    layer    an all-to-all of 1.3 MB each way under as much compute as it takes to hide it: a dispatch under attention
    pair     the same bytes by isend and irecv instead of a collective, without compute

Each case is timed with ordinary and with realtime threads in turn, from a barrier to the end on the slower host. For
`layer`, `compute alone` is the same without the exchange. Prints a table and writes JSON.

    python benchmarks/gloo_threads.py [--rounds 40] [--out benchmarks/results/gloo_threads.json]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from between_hosts import parser_of, row_of, run, write

from farskip.launch.ranks import Ranks
from farskip.parallel.collectives import AllToAll
from farskip.parallel.duplex_link import DuplexGlooLink
from farskip.parallel.gloo_threads import GlooThreads, set_gloo_threads

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

    def pair() -> None:
        works = [dist.irecv(rows[half:], 1 - ranks.rank), dist.isend(rows[:half], 1 - ranks.rank)]
        for work in works:
            assert work is not None
            work.wait()

    cases: dict[str, Callable[[], None]] = {
        "token": one_token,
        "layer": layer,
        "pair": pair,
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
    rows = [row_of(case, found, threads=str(mode)) for (case, mode), found in times.items()]
    write(rows, options, bytes_each_way=ROWS // 2 * WIDTH * 4, compute_ms=options.compute_ms)


def main() -> None:
    parser = parser_of(__doc__, rounds=40, rate="500mbit")
    parser.add_argument("--compute-ms", type=float, default=25.0)
    run(measure, parser.parse_args())


if __name__ == "__main__":
    main()
