"""Speed and memory of the trace inspector beside HolisticTraceAnalysis: same files, same run, interleaved.

    python benchmarks/trace_speed.py --megabytes 50 500 --ranks 8 --rounds 3

Writes the files itself (Kineto's layout, a training run with two collectives per layer), installs the other tool from
the package index into an environment of its own unless --hta-python names one that has it, and runs both in fresh
processes, in turn. Timed is what a user waits for after the imports: reading the files, the overlap and the breakdown.
Both are given all processor cores. Memory is the highest sum of resident memory over the process and its children,
sampled. CPU seconds are given as well, because wall time says little on a busy machine. Our overlap is the exact one;
the other tool rounds stamps to microseconds, so the two differ by a few points.
Prints one line per measurement and a summary; with --out it also writes everything as JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from farskip.testing_traces import training_trace

COMMON = """
import json, logging, resource, sys, time

def cpu_seconds():
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime

def finish(started, cpu_started, overlap):
    result = {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu_started, "overlap": overlap}
    print(json.dumps(result))
"""
OURS = (
    COMMON
    + """
from farskip.trace import inspect
if __name__ == "__main__":
    started, cpu_started = time.perf_counter(), cpu_seconds()
    report = inspect(json.loads(sys.argv[1]))
    report.to_json()
    finish(started, cpu_started, [r.overlap_percent for r in report.ranks])
"""
)
HTA = (
    COMMON
    + """
logging.disable(logging.CRITICAL)
from hta.trace_analysis import TraceAnalysis
if __name__ == "__main__":
    started, cpu_started = time.perf_counter(), cpu_seconds()
    files = dict(enumerate(json.loads(sys.argv[1])))
    analysis = TraceAnalysis(trace_files=files, trace_dir="/", include_last_profiler_step=True)
    overlap = analysis.get_comm_comp_overlap(visualize=False)["comp_comm_overlap_pctg"]
    analysis.get_temporal_breakdown(visualize=False)
    finish(started, cpu_started, [float(value) for value in overlap])
"""
)


def write_trace(path: Path, megabytes: int, rank: int) -> int:
    """Writes a trace of about this size, step by step; returns its size in bytes."""
    with open(path, "w") as file:
        info = json.dumps({"backend": "nccl", "rank": rank, "world_size": 8})
        file.write(f'{{"schemaVersion": 1, "distributedInfo": {info},\n"traceEvents": [\n')
        step, start, correlation = 0, 4_344_994_097_173_810, 0
        while file.tell() < megabytes << 20:
            part = training_trace(
                rank=rank,
                steps=1,
                layers=24,
                kernels=60,
                seed=step,
                start=start,
                first_step=step,
                correlation=correlation,
            )
            texts = part.event_texts()
            file.write(("  " if step == 0 else ",\n  ") + ",\n  ".join(texts))
            start = max(event["ts"] + event["dur"] for event in part.events) + 1_000_000
            correlation = max(event["args"].get("correlation", 0) for event in part.events)
            step += 1
        file.write("\n]}\n")
    return path.stat().st_size


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all its descendants, as of now."""
    total = 0
    try:
        status = Path(f"/proc/{pid}/statm").read_text().split()
        total += int(status[1]) * os.sysconf("SC_PAGE_SIZE")
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += resident_bytes(int(child))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total


def run(python: str, script: str, paths: list[str]) -> dict[str, float]:
    """Runs one tool in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.py"
        file.write_text(script)
        command = [python, "-P", str(file), json.dumps(paths)]
        # To files: a full pipe would stop the process that is being timed.
        with open(Path(folder) / "out", "w+") as out, open(Path(folder) / "error", "w+") as error:
            process = subprocess.Popen(command, stdout=out, stderr=error, cwd=folder)
            peak = 0
            while process.poll() is None:
                peak = max(peak, resident_bytes(process.pid))
                time.sleep(0.05)
            out.seek(0)
            error.seek(0)
            if process.returncode != 0:
                raise RuntimeError(f"{python} ended with {process.returncode}: {error.read()[-2000:]}")
            return {**json.loads(out.read().splitlines()[-1]), "peak_bytes": peak}


def hta_python(folder: Path) -> str:
    """An environment with the other tool in it."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "HolisticTraceAnalysis"], check=True)
    return python


def measure(name: str, paths: list[str], size: int, python: str, rounds: int) -> dict[str, object]:
    """One line of the table: both tools in turn on the same files."""
    times: dict[str, list[float]] = {"ours": [], "hta": []}
    cpu: dict[str, list[float]] = {"ours": [], "hta": []}
    peaks: dict[str, list[float]] = {"ours": [], "hta": []}
    for round_number in range(rounds):
        found = {}
        for tool, interpreter, script in (("ours", sys.executable, OURS), ("hta", python, HTA)):
            result = run(interpreter, script, paths)
            times[tool].append(result["seconds"])
            cpu[tool].append(result["cpu_seconds"])
            peaks[tool].append(result["peak_bytes"] / size)
            found[tool] = [round(value, 1) for value in result["overlap"]]  # type: ignore[attr-defined]
            print(
                f"{name} round {round_number} {tool}: {result['seconds']:.2f} s, CPU {result['cpu_seconds']:.2f} s, "
                f"{size / 1e6 / result['seconds']:.0f} MB/s, {result['peak_bytes'] / 1e6:.0f} MB resident",
                flush=True,
            )
    ours, hta = statistics.median(times["ours"]), statistics.median(times["hta"])
    cpu_ratio = statistics.median(cpu["hta"]) / statistics.median(cpu["ours"])
    row = {
        "files": name,
        "bytes": size,
        "ours_s": times["ours"],
        "hta_s": times["hta"],
        "ours_cpu_s": cpu["ours"],
        "hta_cpu_s": cpu["hta"],
        "ratio": hta / ours,
        "cpu_ratio": cpu_ratio,
        "ours_memory_per_byte": max(peaks["ours"]),
        "hta_memory_per_byte": max(peaks["hta"]),
        "overlap_percent": found,
    }
    print(
        f"{name}: {hta / ours:.1f} times the speed (median {ours:.2f} s against {hta:.2f} s; by CPU {cpu_ratio:.1f}), "
        f"memory {max(peaks['ours']):.2f} bytes per byte against {max(peaks['hta']):.2f}; overlap {found}",
        flush=True,
    )
    return row


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Speed of farskip trace beside HolisticTraceAnalysis.")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--ranks", type=int, default=8, help="files of the smallest size, read as one job; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hta-python", help="an interpreter that has HolisticTraceAnalysis")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = options.hta_python or hta_python(Path(folder) / "hta")
        rows = []
        for megabytes in options.megabytes:
            path = Path(folder) / f"rank0_{megabytes}.json"
            size = write_trace(path, megabytes, 0)
            rows.append(measure(f"{megabytes} MB", [str(path)], size, python, options.rounds))
            path.unlink()
        if options.ranks:
            smallest = min(options.megabytes)
            paths = [Path(folder) / f"rank{rank}.json" for rank in range(options.ranks)]
            size = sum(write_trace(path, smallest, rank) for rank, path in enumerate(paths))
            name = f"{options.ranks} ranks of {smallest} MB"
            rows.append(measure(name, [str(path) for path in paths], size, python, options.rounds))
    result = {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
