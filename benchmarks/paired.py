"""Two sides of one comparison, timed in turn: pairs whose order alternates, one ratio per pair.

A machine whose speed drifts moves both sides of a pair, so ratios can be believed where times cannot.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from farskip.report import machine_line


def time_pairs(sides: Mapping[str, Callable[[], object]], pairs: int, *, warm_up: int = 3) -> dict[str, Any]:
    """Medians in milliseconds of both sides, as ``NAME_ms``, and quartiles of second over first, pair by pair."""
    (first, run_first), (second, run_second) = sides.items()
    times: dict[str, list[float]] = {first: [], second: []}
    for number in range(-warm_up, pairs):
        order = ((first, run_first), (second, run_second))
        for name, run in order if number % 2 else reversed(order):
            start = time.perf_counter()
            run()
            if number >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    ratios = sorted(b / a for a, b in zip(times[first], times[second], strict=True))
    return {
        "pairs": pairs,
        **{f"{name}_ms": statistics.median(found) for name, found in times.items()},
        "ratio_median": statistics.median(ratios),
        "ratio_p25": ratios[len(ratios) // 4],
        "ratio_p75": ratios[3 * len(ratios) // 4],
    }


def parse_options(about: str | None, pairs: int) -> argparse.Namespace:
    """--pairs and --out, with the benchmark's docstring as help."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=pairs)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def report(rows: Sequence[Mapping[str, Any]], sides: tuple[str, str], out: Path | None) -> None:
    """Print a table and, where asked, write JSON; rows have family, wiring, batch, and what `time_pairs` gives."""
    print(f"{'family':<12} {'wiring':<9} {'batch':<9} {sides[0]:>13} {sides[1]:>13}  ratio (p25 - p75)")
    for row in rows:
        print(
            f"{row['family']:<12} {row['wiring']:<9} {row['batch'][0]} x {row['batch'][1]:<5} "
            f"{row[f'{sides[0]}_ms']:>10.2f} ms {row[f'{sides[1]}_ms']:>10.2f} ms  "
            f"{row['ratio_median']:.3f} ({row['ratio_p25']:.3f} - {row['ratio_p75']:.3f})"
        )
    if out is not None:
        date = time.strftime("%Y-%m-%d")
        text = json.dumps({"date": date, "machine": machine_line(), "threads": 1, "rows": list(rows)}, indent=1)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
