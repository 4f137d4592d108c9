"""Does rewiring in stages repair more than rewiring all layers at once, for the same number of steps?

    python benchmarks/staged_rewiring.py --folder runs/staged --out benchmarks/results/staged_rewiring.json

Pretrains the demo's model (6 layers, 11 million parameters) on the source of the Python standard library, once. Then
converts it to farskip by self-distillation: all layers at once, and in stages of 1, 2 and 3 layers that take half of
the steps. Every conversion sees the same text in the same order and is judged on the same held-out text by its
divergence from the original; seeds change the order of the text. Runs several conversions side by side, as many as
--jobs; nothing here is timed. Prints a table and writes JSON.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from farskip.report import machine_line

LAYERS = 6
DATA = [
    f"data.path={sysconfig.get_path('stdlib')}",
    "data.patterns=[*.py]",
    "data.exclude=[.*,__pycache__,test,tests,idlelib,lib2to3,site-packages,dist-packages]",
    "data.sequence_length=256",
    "data.batch_size=4",
    "data.heldout_fraction=0.06",
]
RUN = ["run.device=cpu", "run.threads=1"]


def farskip(*words: str, log: Path) -> None:
    """One command; what it says goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        command = [str(Path(sys.executable).with_name("farskip")), *words]
        if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
            raise SystemExit(f"staged_rewiring: farskip {words[0]} failed; see {log}")


def pretrain(options: argparse.Namespace) -> Path:
    """The original, unless it is there from an earlier call."""
    folder: Path = options.folder / "original"
    if not (folder / "model" / "config.json").exists():
        steps = [
            f"training.num_steps={options.pretrain_steps}",
            "training.optimizer.learning_rate=2e-3",
            "training.optimizer.warmup_steps=40",
        ]
        more = ["model=demo", "data.vocab_size=4096", "balance.bias_rate=1e-3", f"run.folder={folder}"]
        farskip("pretrain", *more, *steps, *DATA, *RUN, log=options.folder / "pretrain.log")
    return folder / "model"


def convert(original: Path, stage_layers: int, seed: int, options: argparse.Namespace) -> list[tuple[int, float]]:
    """One conversion: (step, held-out divergence from the original in nats per token), ascending."""
    folder: Path = options.folder / f"stages_of_{stage_layers or LAYERS}_seed_{seed}"
    words = ["wiring.name=farskip", f"model.path={original}", f"run.folder={folder}", f"data.seed={seed}"]
    if stage_layers:
        changes = math.ceil(LAYERS / stage_layers) - 1
        words += [f"wiring.stage_layers={stage_layers}", f"wiring.stage_steps={options.steps // 2 // changes}"]
    training = [
        f"training.num_steps={options.steps}",
        f"training.optimizer.learning_rate={options.learning_rate}",
        f"training.heldout.every_steps={options.steps // 8}",
        "training.heldout.num_batches=24",
        "training.optimizer.warmup_steps=20",
    ]
    metrics = folder / "metrics.jsonl"
    if not metrics.exists() or _found(metrics)[-1][0] < options.steps:
        farskip("distill", *words, *training, *DATA, *RUN, log=options.folder / f"{folder.name}.log")
    return _found(metrics)


def _found(metrics: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(line["step"], line["heldout_kl"]) for line in lines if "heldout_kl" in line] or [(0, math.nan)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/staged_rewiring"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    original = pretrain(options)
    cases = [(stage_layers, seed) for seed in range(options.seeds) for stage_layers in (0, 3, 2, 1)]
    with ThreadPoolExecutor(options.jobs) as pool:
        curves = list(pool.map(lambda case: convert(original, *case, options), cases))
    rows: list[dict[str, Any]] = []
    for stage_layers in (0, 3, 2, 1):
        found = [curve for case, curve in zip(cases, curves, strict=True) if case[0] == stage_layers]
        last = [curve[-1][1] for curve in found]
        rows.append({"stage_layers": stage_layers, "heldout_kl": last, "curves": found})
        name = f"stages of {stage_layers}" if stage_layers else "all at once"
        print(f"{name:<12} held-out KL {statistics.mean(last):.4f} nats ({', '.join(f'{kl:.4f}' for kl in last)})")
    if options.out is not None:
        settings = {key: value for key, value in vars(options).items() if key not in ("folder", "out", "jobs")}
        about = {"date": time.strftime("%Y-%m-%d"), "machine": machine_line(), "torch": torch.__version__}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**about, "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
