"""What overlap costs where nothing is in flight: the overlapped schedule against the serial one, over a link that is
done at once.

One rank exchanges with itself, so routing, permutation, launches, waits and both directions of autograd run as they do
between ranks, and no time is spent in transfers. Both sides run in one process, in turn, on the same batch, forward and
backward; the ratio is taken pair by pair. Prints a table and writes JSON.

    python benchmarks/machinery_overhead.py [--pairs 30] [--out benchmarks/results/machinery_overhead.json]
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from paired import parse_options, report, time_pairs
from rewired_overhead import SETTINGS

from farskip.executor import Executor
from farskip.models.attach import attach, layers_of
from farskip.models.family import family_of_model
from farskip.models.fresh import build_model
from farskip.models.surgery import rewire, wiring_of
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.pending import Pending, Work
from farskip.wait_meter import WaitMeter

SIDES = ("serial", "overlapped")


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


def step(model: Any, ids: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(ids, use_cache=False).logits.sum().backward()


def measure(family: str, wiring: str, shape: tuple[int, int], pairs: int) -> dict[str, Any]:
    base = build_model(family, SETTINGS[family], vocab_size=4096, end_of_document_id=0, seed=0).train()
    models = {}
    for mode in SIDES:
        model = rewire(copy.deepcopy(base), wiring)
        blocks = [family_of_model(model).sub_blocks(layer) for layer in layers_of(model)]
        dispatcher = AllToAllDispatcher(InstantLink(), SETTINGS[family].get("n_routed_experts", 12))
        attach(model, Executor(blocks, wiring_of(model), dispatcher=dispatcher, mode=mode))
        models[mode] = model
    ids = torch.randint(4096, shape)
    with torch.no_grad():
        if not torch.equal(*(model(ids).logits for model in models.values())):
            raise RuntimeError(f"{family}, {wiring}: overlapped does not equal serial; no time is reported")
    times = time_pairs({mode: partial(step, model, ids) for mode, model in models.items()}, pairs)
    return {"family": family, "wiring": wiring, "batch": list(shape), **times}


def main() -> None:
    options = parse_options(__doc__, pairs=30)
    torch.set_num_threads(1)
    rows = [
        measure(family, wiring, shape, options.pairs)
        for family in SETTINGS
        for wiring in ("ordinary", "farskip", "ladder")
        for shape in ((1, 64), (4, 256))
    ]
    report(rows, SIDES, options.out)


if __name__ == "__main__":
    main()
