"""`farskip bench kernels`: every op against its floor on this machine and against what else one could pick.

Decides how a kernel is timed (in a CUDA graph, over inputs that together exceed the second-level cache, median of
several replays) and that nothing is timed before its results agree with plain torch. Refuses a machine without CUDA:
there is no figure to be had there, and none is made up. Writes JSON and a PNG of the share of the floor per op.
"""

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farskip.launch.kernel_cases import MODELS, KernelCase, ModelShape, build_cases

TOLERANCE = 8e-3
"""Norm of the difference over norm of the result: bf16 with a few roundings in other places (2**-8 each)."""

CACHE_BYTES = 256 << 20
"""Inputs in rotation take at least this much, several times the largest second-level cache."""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: The words after `farskip bench kernels`.

    Returns:
        0; 1 if an op's results disagree with plain torch.

    Raises:
        ValueError: this machine has no CUDA device, or a word is wrong.
    """
    options = _parse(argv)
    names = [shape.name for shape in MODELS]
    for name in options.models:
        if name not in names:
            raise ValueError(f"--models {name} is unknown; choose from {', '.join(names)}")
    for count in options.tokens:
        if count < 1:
            raise ValueError(f"--tokens {count} is too small; use at least 1")
    if not torch.cuda.is_available():
        raise ValueError("this machine has no CUDA device, so there is nothing to time; use one that has")
    ceilings = measure_ceilings()
    print(f"copy {ceilings['copy_tb_per_s']:.2f} TB/s, bf16 matmul {ceilings['matmul_tflop_per_s']:.0f} TFLOP/s")
    results, wrong = [], []
    for shape in MODELS:
        if shape.name in options.models:
            for num_tokens in options.tokens:
                found, disagreeing = bench_shape(shape, num_tokens, options.ops, ceilings)
                results += found
                wrong += disagreeing
    write_report({"ceilings": ceilings, "machine": machine(), "argv": list(argv), "results": results}, options.out)
    for line in wrong:
        print(f"farskip bench kernels: {line}; not timed", file=sys.stderr)
    return 1 if wrong else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="farskip bench kernels",
        description="Time every kernel on this GPU against what the hardware allows and against plain torch.",
        epilog="Nothing is timed before its results agree with plain torch. Needs a CUDA device.",
    )
    names = ", ".join(shape.name for shape in MODELS)
    models = ["deepseek_v3", "qwen3_30b", "moonlight_16b"]
    add = parser.add_argument
    add(
        "--models", nargs="+", default=models, metavar="NAME", help=f"whose sizes: {names}; default: {' '.join(models)}"
    )
    add("--ops", nargs="+", metavar="OP", help="time only these, as permute or swiglu (default: all)")
    add("--tokens", nargs="+", type=int, default=[8192], metavar="N", help="of one call, one or more (default: 8192)")
    add(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        metavar="FOLDER",
        help="for JSON and PNG (default: %(default)s)",
    )
    return parser.parse_args(argv)


def bench_shape(
    shape: ModelShape, num_tokens: int, ops: Sequence[str] | None, ceilings: dict[str, float]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Time all ops at one shape; returns rows of results, and lines about what disagreed."""
    results: list[dict[str, Any]] = []
    wrong: list[str] = []
    for case in build_cases(shape, num_tokens, "cuda", importlib.util.find_spec("liger_kernel") is not None):
        if ops is not None and case.op not in ops:
            continue
        variants = dict(case.variants)
        if not case.synchronizing:
            variants["compile"] = compiled(case.variants["eager"])
        disagreement = {name: compare(case, run) for name, run in variants.items() if name != "eager"}
        for backward in (False, True) if case.backward_bytes else (False,):
            for name, run in variants.items():
                if disagreement.get(name) is not None:
                    wrong += [f"{shape.name} {case.op} {name}: {disagreement[name]}"] if not backward else []
                    continue
                makers = [partial(prepare, run, case.inputs, backward) for _ in range(rotations(case))]
                us = time_us(makers, graph=name not in case.synchronizing)
                floor = case.floor_us(
                    ceilings["copy_tb_per_s"] * 1e12, ceilings["matmul_tflop_per_s"] * 1e12, backward=backward
                )
                op = f"{case.op}_backward" if backward else case.op
                row = {"model": shape.name, "tokens": num_tokens, "op": op, "variant": name, "us": us}
                results.append(row | {"floor_us": floor, "share_of_floor": floor / us})
                print(f"{shape.name:18}{num_tokens:7} {op:28}{name:10}{us:10.1f} us {100 * floor / us:5.0f} % of floor")
    return results, wrong


def compiled(run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """What torch.compile makes of it; its backward must leave the saved tensors alone, since it is run many times."""

    def kept(*inputs: Any) -> tuple[Tensor, ...]:
        with torch._functorch.config.patch(donated_buffer=False):
            return program(*inputs)

    program = torch.compile(run, dynamic=False)
    return kept


def rotations(case: KernelCase) -> int:
    """How many sets of inputs together exceed the cache; few for the large ones."""
    return max(2, min(32, CACHE_BYTES // max(1, case.forward_bytes)))


def prepare(run: Callable[..., tuple[Tensor, ...]], make: Callable[[], list[Any]], backward: bool) -> Callable[[], Any]:
    """The work to be timed, on fresh inputs; a backward's forward is done here."""
    inputs = make()
    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return run(*inputs)

        return forward
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    outputs = [t for t in run(*inputs) if t.requires_grad]
    grads = [torch.randn_like(t) for t in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def compare(case: KernelCase, run: Callable[..., tuple[Tensor, ...]]) -> str | None:
    """What differs between an implementation and plain torch, values or gradients; None if nothing does."""
    torch.manual_seed(0)
    inputs = case.inputs()
    expected, got = case.variants["eager"](*inputs), run(*inputs)
    found = [_difference(f"output {i}", a, b) for i, (a, b) in enumerate(zip(got, expected, strict=True))]
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if leaves and case.backward_bytes:
        grads = [torch.randn_like(t) for t in expected if t.requires_grad]
        sides = [
            torch.autograd.grad([t for t in results if t.requires_grad], leaves, grads) for results in (got, expected)
        ]
        found += [_difference(f"gradient {i}", a, b) for i, (a, b) in enumerate(zip(*sides, strict=True))]
    return next((line for line in found if line is not None), None)


def _difference(name: str, got: Tensor, expected: Tensor) -> str | None:
    """Indices must agree but for a few near ties, which eager topk and ours may order differently."""
    if not expected.is_floating_point():
        share = float((got.long() != expected.long()).float().mean())
        return f"{name} differs in {share:.2%} of its integers, at most 1 % may" if share > 0.01 else None
    got, expected = got.detach().float(), expected.detach().float()
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-30))
    return None if error <= TOLERANCE else f"{name} is off by {error:.1e}, at most {TOLERANCE:.0e} may be"


def time_us(makers: Sequence[Callable[[], Callable[[], Any]]], *, graph: bool = True, replays: int = 20) -> float:
    """Median microseconds of one call: all calls in one CUDA graph, so that no launch waits for Python.

    A backward runs on the stream of its forward, so the makers, which run the forwards, run on the stream that is
    captured. Without `graph` the calls are timed as Python issues them.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    times = []
    with torch.cuda.stream(side):
        work = [make() for make in makers]
        for call in work:
            call()  # compiles, and fills caches that must not be filled during a capture

        def run_all() -> None:
            for call in work:
                call()

        side.synchronize()
        replay = run_all
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=side):
                kept = [call() for call in work]  # alive as long as the graph: it writes there
            replay = captured.replay
        for _ in range(replays):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            end.synchronize()
            times.append(1e3 * start.elapsed_time(end) / len(work))
        if graph:
            del kept
    return statistics.median(times)


def measure_ceilings() -> dict[str, float]:
    """This machine's own copy and bf16 matmul rates, against which floors are computed."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy_us = time_us([lambda: lambda: target.copy_(source)])
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul_us = time_us([lambda: lambda: left @ right])
    return {"copy_tb_per_s": 2 * source.numel() / copy_us / 1e6, "matmul_tflop_per_s": 2 * 8192**3 / matmul_us / 1e6}


def machine() -> dict[str, str]:
    """What the figures belong to."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "date": datetime.date.today().isoformat(),
    }


def write_report(report: dict[str, Any], folder: Path) -> None:
    """JSON, and a PNG of the share of the floor; each under a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    gpu = report["machine"]["gpu"].replace(" ", "-").lower()
    stem = f"kernels-{gpu}-{report['machine']['date']}"
    temporary = folder / f".{stem}.json"
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / f"{stem}.json")
    temporary = folder / f".{stem}.png"
    draw(report["results"], temporary)
    os.replace(temporary, folder / f"{stem}.png")
    print(f"wrote {folder / stem}.json and .png")


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """One group of bars per model and op, one bar per implementation, 1 being the floor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row["model"], row["tokens"], row["op"]) for row in results))
    variants = list(dict.fromkeys(row["variant"] for row in results))
    figure = Figure(figsize=(max(6.0, 0.5 * len(groups)), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(variants))
    for index, variant in enumerate(variants):
        shares = {(r["model"], r["tokens"], r["op"]): r["share_of_floor"] for r in results if r["variant"] == variant}
        places = [i + index * width for i, group in enumerate(groups) if group in shares]
        axes.bar(places, [shares[group] for group in groups if group in shares], width, label=variant)
    axes.set_xticks(range(len(groups)), [f"{m} {t} {op}" for m, t, op in groups], rotation=90, fontsize=7)
    axes.set_ylabel("share of floor")
    axes.axhline(1.0, color="black", linewidth=0.5)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
