"""Gradients summed under backward against the same sums behind it, between two hosts over a link that costs time.

Two hosts as network namespaces over a rate-limited veth pair (Linux, root), a dense Llama of random weights that is
data-parallel. A step is forward, backward and the sums, without optimizer; both ways run in turn, each after a barrier,
and a time is that of the slower rank. Before anything is timed, both give the same bits. `no_sums` leaves the sums out.
Prints a table and writes JSON.

    python benchmarks/gradient_sums.py [--rounds 12] [--rate 1000mbit] [--out benchmarks/results/gradient_sums.json]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from between_hosts import parser_of, row_of, run, write

from farskip.launch.ranks import Ranks
from farskip.models.family import backbone_of
from farskip.models.fresh import build_model
from farskip.parallel.data_parallel import DataParallel
from farskip.parallel.mesh import build_mesh

LLAMA: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
WARM_UP = 2


def measure(ranks: Ranks, options: argparse.Namespace) -> None:
    """All ways, in turn."""
    model = build_model("llama", LLAMA, vocab_size=1024, end_of_document_id=0, seed=0).train()
    backbone, mesh = backbone_of(model), build_mesh(1)
    parameters = dict(backbone.named_parameters())
    ids_BS = torch.randint(1024, (2, options.tokens // 2), generator=torch.Generator().manual_seed(ranks.rank))
    ways: dict[str, DataParallel | None] = {
        "behind": DataParallel(mesh, parameters, overlap=False),
        "under_backward": DataParallel(mesh, parameters),
        "no_sums": None,
    }

    def step(world: DataParallel | None) -> None:
        backbone.zero_grad(set_to_none=True)
        loss = backbone(input_ids=ids_BS, use_cache=False).last_hidden_state.square().mean()
        if world is not None:
            world.expect_last_backward()
        loss.backward()
        if world is not None:
            world.reduce_gradients()

    found: dict[str, list[float]] = {name: [] for name in ways}
    check_bits(lambda name: step(ways[name]), parameters)
    for number in range(-WARM_UP, options.rounds):
        names = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in names:
            dist.barrier()
            start = time.perf_counter()
            step(ways[name])
            took_ms = torch.tensor(1e3 * (time.perf_counter() - start))
            dist.all_reduce(took_ms, dist.ReduceOp.MAX)
            if number >= 0:
                found[name].append(took_ms.item())
    if ranks.rank == 0:
        report(found, sum(parameter.nbytes for parameter in parameters.values()), options)


def check_bits(step: Callable[[str], None], parameters: dict[str, torch.nn.Parameter]) -> None:
    """Refuse to time ways that differ."""
    seen: list[list[torch.Tensor]] = []
    for name in ("behind", "under_backward"):
        step(name)
        seen.append([parameter.grad.clone() for parameter in parameters.values() if parameter.grad is not None])
    if len(seen[0]) != len(parameters) or not all(map(torch.equal, *seen)):
        raise RuntimeError("gradients summed under backward have other bits: nothing is timed")


def report(found: dict[str, list[float]], num_bytes: int, options: argparse.Namespace) -> None:
    """Print a table and, where asked, write JSON."""
    medians = {name: statistics.median(times) for name, times in found.items()}
    cost = medians["behind"] - medians["no_sums"]
    rows = [
        row_of(name, times, hidden_share=(medians["behind"] - medians[name]) / cost) for name, times in found.items()
    ]
    write(rows, options, bytes=num_bytes, tokens=options.tokens)


def main() -> None:
    parser = parser_of(__doc__, rounds=12, rate="1000mbit")
    parser.add_argument("--tokens", type=int, default=1024, help="of each host, in two sequences")
    run(measure, parser.parse_args())


if __name__ == "__main__":
    main()
