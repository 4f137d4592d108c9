"""What benchmarks between two hosts share: options, the start, quartiles and the file of results.

The hosts are network namespaces on one machine over a rate-limited veth pair (Linux, root), with one core each.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from farskip.launch.config import RunConfig
from farskip.launch.network_hosts import run_on_hosts
from farskip.launch.ranks import Ranks
from farskip.report import machine_line


def parser_of(about: str | None, *, rounds: int, rate: str) -> argparse.ArgumentParser:
    """--rounds, --rate and --out, with the benchmark's docstring as help."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--rate", default=rate)
    parser.add_argument("--out", type=Path)
    return parser


def run(measure: Callable[[Ranks, Any], None], options: argparse.Namespace) -> None:
    """Call a module-level function on both hosts, with their rank and the options."""
    run_on_hosts(measure, options, RunConfig(device="cpu", threads=1), 2, options.rate)


def row_of(name: str, times_ms: Sequence[float], **about: Any) -> dict[str, Any]:
    """Median and quartiles, printed and returned."""
    p25, median, p75 = statistics.quantiles(times_ms, n=4)
    more = "".join(f"  {key} {value:.0%}" if isinstance(value, float) else f"  {value}" for key, value in about.items())
    print(f"{name:<20} {median:7.1f} ms ({p25:.1f} - {p75:.1f}){more}")
    return {"name": name, **about, "median_ms": median, "p25_ms": p25, "p75_ms": p75}


def write(rows: Sequence[dict[str, Any]], options: argparse.Namespace, **about: Any) -> None:
    """The rows as JSON where --out says, with machine and versions."""
    if options.out is None:
        return
    found_on = {"date": time.strftime("%Y-%m-%d"), "machine": machine_line(), "torch": torch.__version__}
    document = {**found_on, "rounds": options.rounds, "rate": options.rate, **about, "rows": list(rows)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
