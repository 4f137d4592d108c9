"""Steps on one GPU, timed in turn by events of the device: what the benchmarks over an emulated link share."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], object]


def elapsed_ms(step: Step) -> float:
    """Milliseconds between two events around a step, on an idle device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def interleaved(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Times of every step: rounds of one run of each, every round beginning with another one.

    A first run of each, which allocates and compiles, is not counted."""
    for step in steps.values():
        elapsed_ms(step)
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds):
        start = number % len(names)
        for name in (*names[start:], *names[:start]):
            times[name].append(elapsed_ms(steps[name]))
    return times


def summaries(times: Mapping[str, Sequence[float]], blocking: str, free: str) -> dict[str, dict[str, float]]:
    """Quartiles in milliseconds of each variant, its speed-up over `blocking`, and the share of what communication
    costs, `blocking` less `free`, that is gone."""
    rows = {}
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found, n=4)
        rows[name] = {"median_ms": middle, "p25_ms": low, "p75_ms": high}
    slow, fast = rows[blocking]["median_ms"], rows[free]["median_ms"]
    for row in rows.values():
        row["speedup"] = slow / row["median_ms"]
        row["hidden_share"] = (slow - row["median_ms"]) / (slow - fast)
    return rows


def print_table(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """One line per variant."""
    print(f"\n{title}")
    for name, row in rows.items():
        print(
            f"{name:<39} {row['median_ms']:8.2f} ms ({row['p25_ms']:.2f} - {row['p75_ms']:.2f})  "
            f"{row['speedup']:.2f}x  {100 * row['hidden_share']:.0f} % hidden"
        )


def parse_options(about: str | None, **defaults: Any) -> argparse.Namespace:
    """An option per default, and --out, with the benchmark's docstring as help. Ends where there is no GPU."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds} is too small for quartiles; use 2 or more")
    if not torch.cuda.is_available():
        raise SystemExit(f"{Path(parser.prog).stem}: torch sees no CUDA device here; nothing is measured")
    return options


def write(out: Path | None, passes: Mapping[str, Any], **about: Any) -> None:
    """The result file, where one is asked for."""
    if out is None:
        return
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "link": "emulated",
        **about,
        "passes": passes,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
