"""What `farskip bench overlap` measured, as a table, JSON and a picture. Computes shares from medians, nothing else."""

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from farskip.benchmarking import Gained, Repeat, Summary, gained, summarize
from farskip.launch.bench_config import BenchOverlapConfig, Parallelism
from farskip.launch.run_folder import write_text

_PARTS_OF_STEP = ("exposed_ms", "others_ran_ms", "others_queued_ms")
"""Fields of `Summary`."""

_COLUMNS = (
    *("variant", "median ms", "p25", "p75", "clean", "rejected", "speedup", "hidden", "of windows"),
    *(field.replace("_", " ") for field in _PARTS_OF_STEP),
)
_BAR, _BLOCKING_LINE, _FREE_LINE = "#4c72b0", "#c44e52", "#55a868"


def report(config: BenchOverlapConfig, raw: Mapping[str, Any]) -> bool:
    """Print the table, write the files. Whether every variant is reported in every pass."""
    rows = {name: _rows(config, of_pass, raw["allowed"][name]) for name, of_pass in raw["passes"].items()}
    missing = dict(raw["not_reported"])
    for pass_name, of_pass in raw["passes"].items():
        for variant in of_pass:
            if variant not in rows[pass_name]:
                missing[variant] = f"no clean repeat of {pass_name} among {len(of_pass[variant])}: the machine is busy"
    for timeline in raw["timelines"].values():
        print(f"\n{timeline}", end="")
    for pass_name, of_pass in rows.items():
        print(f"\n{title(config, pass_name)}\n{_table(of_pass)}")
    print(f"\nothers: the threads that move bytes, on a core and waiting for one; gloo's are {raw['gloo_threads']}")
    if not raw["run_queue_is_known"]:
        print("\nthis system keeps no account of the run queue: no repeat was rejected")
    for variant, why in missing.items():
        print(f"\n{variant} is not reported: {why}")
    if config.out:
        path = Path(config.out)
        document = to_json(config, raw, rows, missing)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(document, indent=1) + "\n")
        picture = draw(config, rows, path.with_suffix(".png"))
        print(f"\nwrote {path} and {picture}")
    return not missing


def title(config: BenchOverlapConfig, pass_name: str) -> str:
    """One line that says what was measured; names an emulation one."""
    link = config.link
    if link == "emulated":
        link = f"emulated link of {config.emulated.bandwidth_gbit_s:g} Gbit/s (loopback, held back)"
    elif link == "local":
        link = "loopback"
    else:
        link = f"{link} (network namespaces on one machine)"
    compute = "sleeps instead of compute" if config.compute == "timed" else "real compute"
    how = "tensor parallel" if config.parallel is Parallelism.tensor else f"{config.routing} routing"
    return f"{pass_name}: {config.hosts} hosts, {link}, {compute}, {how}"


def to_json(
    config: BenchOverlapConfig,
    raw: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, tuple[Summary, Gained]]],
    missing: Mapping[str, str],
) -> dict[str, Any]:
    """The result file: figures per pass and variant, and under `machine` all it takes to judge them."""
    figures = {
        pass_name: {
            variant: {
                "median_ms": summary.median_ms,
                "p25_ms": summary.p25_ms,
                "p75_ms": summary.p75_ms,
                "clean_repeats": summary.clean_repeats,
                **asdict(gain),
            }
            for variant, (summary, gain) in of_pass.items()
        }
        for pass_name, of_pass in rows.items()
    }
    rejected = {
        pass_name: {
            variant: sum(not Repeat(**repeat).is_clean for repeat in of_one) for variant, of_one in of_pass.items()
        }
        for pass_name, of_pass in raw["passes"].items()
    }
    return {
        "link": config.link,
        "hosts": config.hosts,
        "parallel": str(config.parallel),
        "compute": str(config.compute),
        "routing": str(config.routing),
        "passes": figures,
        "machine": {
            **machine(),
            "settings": asdict(config),
            "rejected_repeats": rejected,
            "run_queue_is_known": raw["run_queue_is_known"],
            "gloo_threads": raw["gloo_threads"],
            "not_reported": dict(missing),
            "stage_ms": raw["stage_ms"],
            "share_windows_allow": raw["allowed"],
            **{
                field: {
                    pass_name: {variant: getattr(summary, field) for variant, (summary, _) in of_pass.items()}
                    for pass_name, of_pass in rows.items()
                }
                for field in _PARTS_OF_STEP
            },
        },
    }


def machine() -> dict[str, Any]:
    """Date, processor and versions."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    for name in ("torch", "transformers", "megatron-core"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    if congestion.exists():
        found["tcp_congestion_control"] = congestion.read_text().strip()
    return found


def draw(config: BenchOverlapConfig, rows: Mapping[str, Mapping[str, tuple[Summary, Gained]]], path: Path) -> Path:
    """Bars of the medians with their quartiles, one panel per pass."""
    from matplotlib.figure import Figure

    most = max(len(of_pass) for of_pass in rows.values())
    figure = Figure(figsize=(9, 1.2 + len(rows) * (0.8 + 0.34 * most)), layout="constrained")
    for axes, (pass_name, of_pass) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows.items(), strict=True):
        names = list(of_pass)[::-1]
        summaries = [of_pass[name][0] for name in names]
        medians = [summary.median_ms for summary in summaries]
        spread = [
            [summary.median_ms - summary.p25_ms for summary in summaries],
            [summary.p75_ms - summary.median_ms for summary in summaries],
        ]
        axes.barh(names, medians, xerr=spread, color=_BAR, ecolor="black", capsize=3, height=0.7)
        for name, color in ((config.blocking, _BLOCKING_LINE), (config.free, _FREE_LINE)):
            if name in of_pass:
                axes.axvline(of_pass[name][0].median_ms, color=color, linestyle="--", linewidth=1)
        for position, name in enumerate(names):
            speedup = of_pass[name][1].speedup
            if speedup is not None:
                axes.text(0.01 * max(medians), position, f"{speedup:.2f}x", va="center", color="white", fontsize=8)
        axes.set_title(title(config, pass_name), fontsize=9)
        axes.set_xlabel("milliseconds per step on the slowest host (median, quartiles)", fontsize=8)
        axes.tick_params(labelsize=8)
    part = path.with_name(f".{path.name}.part.png")
    figure.savefig(part, dpi=130)
    part.rename(path)
    return path


def _rows(
    config: BenchOverlapConfig, of_pass: Mapping[str, Any], allowed: Mapping[str, float]
) -> dict[str, tuple[Summary, Gained]]:
    summaries = {}
    for variant, repeats in of_pass.items():
        summary = summarize([Repeat(**repeat) for repeat in repeats])
        if summary is not None:
            summaries[variant] = summary
    blocking, free = summaries.get(config.blocking), summaries.get(config.free)
    return {
        variant: (
            summary,
            gained(
                summary.median_ms,
                blocking_ms=blocking.median_ms if blocking else None,
                free_ms=free.median_ms if free else None,
                allowed_share=allowed.get(variant),
            ),
        )
        for variant, summary in summaries.items()
    }


def _table(of_pass: Mapping[str, tuple[Summary, Gained]]) -> str:
    lines = [_COLUMNS]
    for variant, (summary, gain) in of_pass.items():
        lines.append(
            (
                variant,
                f"{summary.median_ms:.1f}",
                f"{summary.p25_ms:.1f}",
                f"{summary.p75_ms:.1f}",
                str(summary.clean_repeats),
                str(summary.rejected_repeats),
                f"{gain.speedup:.2f}x" if gain.speedup is not None else "-",
                _percent(gain.hidden_share),
                _percent(gain.window_share),
                *(_ms(getattr(summary, field)) for field in _PARTS_OF_STEP),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def _ms(time: float | None) -> str:
    return f"{time:.1f}" if time is not None else "-"


def _percent(share: float | None) -> str:
    return f"{100 * share:.0f} %" if share is not None else "-"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
