"""`farskip demo` in miniature: two ranks, all stages, and a report in which every number has its source."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import farskip
from farskip.trace import inspect

SMALL_DEMO = [
    "show.heldout_batches=2",
    "show.new_tokens=4",
    "show.timed_steps=2",
    "parallel.link.latency_us=2000",
    "run.timeout_s=60",
]


def words(workshop: Any, folder: Path, *more: str) -> list[str]:
    model = workshop.pretrain(folder)[1:]
    settings = [word for word in model if word.startswith(("model", "data.", "run.device"))]
    training = [*workshop.training(section="pretrain"), *workshop.training(section="distill")]
    return ["demo", *settings, 'data.patterns=["*.txt"]', *training, *SMALL_DEMO, f"run.folder={folder}", *more]


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    script = "import sys; from farskip.launch.main import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-P", "-W", "error::UserWarning:farskip", "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def row(report: str, name: str) -> list[str]:
    found = re.search(rf"^\| {name} \| (.*) \|$", report, re.MULTILINE)
    assert found is not None, name
    return found.group(1).split(" | ")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo(workshop: Any, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with start(words(workshop, folder)) as process:
        out, error = process.communicate(timeout=200)
    assert (process.returncode, error) == (0, "")
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "damage.png",
        "loss.png",
        "original",
        "overlap.png",
        "repaired",
        "report.md",
        "traces",
    }
    report = (folder / "report.md").read_text()
    assert report in out

    # the table, against what training wrote while it ran
    pretrained, distilled = metrics(folder / "original"), metrics(folder / "repaired")
    heldout = [line for line in pretrained if "heldout_cross_entropy" in line]
    best = min((line for line in distilled if "heldout_kl" in line), key=lambda line: line["heldout_kl"])
    original = min(line["heldout_cross_entropy"] for line in heldout)
    assert row(report, "original")[0].startswith(f"{original:.4f} ± ")
    assert row(report, "repaired")[0].startswith(f"{best['heldout_cross_entropy']:.4f} ± ")
    assert row(report, "repaired")[2] == f"{best['heldout_kl']:.4f} ± {best['heldout_kl_ci95']:.4f}"
    differences = {name: float(row(report, name)[0].split(" ")[0]) - original for name in ("rewired", "repaired")}
    share = re.search(r"closed (-?\d+) % of it", report)
    if share is not None:
        expected = 100 * (1 - differences["repaired"] / differences["rewired"])
        assert int(share.group(1)) == pytest.approx(expected, abs=1)
    else:
        assert "no share of a damage is given" in report

    # the overlap, against the traces
    for schedule in ("serial", "overlapped"):
        traced = inspect([folder / "traces" / f"{schedule}_rank{rank}.json.gz" for rank in range(2)])
        communication = sum(rank.communication_ns for rank in traced.ranks) / 2e6
        hidden = sum(rank.hidden_ns for rank in traced.ranks) / 2e6
        cells = row(report, schedule)
        assert [float(cell) for cell in cells[1:4]] == pytest.approx(
            [communication, hidden, communication - hidden], abs=0.51
        )
        # four exchanges per expert layer and step, none faster than the link's latency
        assert communication >= 2 * 4 * 2.0
    assert "over an emulated link of 1 Gbit/s and 2000 us (a paced transfer)" in report
    assert "equal, bit for bit" in report

    # the model, and the pictures
    repaired = farskip.load(folder / "repaired" / "model")
    assert str(farskip.wiring_of(repaired)) in report.splitlines()[0]
    assert farskip.wiring_of(farskip.load(folder / "original" / "model")).name == "ordinary"
    for name in re.findall(r"!\[\w+\]\((\S+)\)", report):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    minutes = [
        float(cell) for cell in re.findall(r"^\| (?:pretrain|measure and repair|overlap) \| ([\d.]+) \|", report, re.M)
    ]
    assert len(minutes) == 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_is_stopped_and_goes_on(workshop: Any, tmp_path: Path) -> None:
    """SIGTERM to the command: both ranks save, exit code 0, and the same command goes on."""
    folder = tmp_path / "demo"
    arguments = words(
        workshop,
        folder,
        "pretrain.num_steps=120",
        "pretrain.heldout.every_steps=0",
        "pretrain.checkpoint.every_steps=0",
        "distill.num_steps=2",
    )
    with start(arguments) as process:
        deadline = time.monotonic() + 120
        while len(metrics(folder / "original")) < 5:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (143, "")
    assert "stopped before the end; the same command with run.resume=true goes on" in out
    assert not (folder / "report.md").exists() and not (folder / "original" / "model").exists()
    with start([*arguments, "run.resume=true"]) as process:
        out, error = process.communicate(timeout=200)
    assert (process.returncode, error) == (0, "")
    assert (folder / "report.md").exists()
    assert [line["step"] for line in metrics(folder / "original")] == list(range(1, 121))
    assert load_file(folder / "repaired" / "model" / "model.safetensors")


def test_a_folder_in_use_is_refused_before_any_rank_starts(workshop: Any, tmp_path: Path, farskip_command: Any) -> None:
    (tmp_path / "notes.txt").touch()
    code, out, error = farskip_command(words(workshop, tmp_path))
    assert (code, out) == (2, "")
    assert error == (
        f"farskip demo: run.folder={tmp_path} is not empty: give another folder, or run.resume=true to continue\n"
    )


BAD = {
    "ranks": ("ranks=0", "ranks=0 is too small; use at least 1"),
    "steps": ("distill.num_steps=0", "training.num_steps=0 is too small"),
    "text": ("data.vocab_size=3", "data.vocab_size=3 cannot hold the 256 bytes"),
    "link": ("parallel.link.bandwidth_gbit_s=0", "parallel.link.bandwidth_gbit_s=0.0 must be above 0"),
    "timed steps": ("show.timed_steps=0", "show.timed_steps=0 is too small"),
    "held-out batches": ("show.heldout_batches=0", "show.heldout_batches=0 is too small"),
    "device": ("run.device=cuda", "run.device=cuda, but the demo computes and times on CPU; use run.device=cpu"),
    "new tokens": ("show.new_tokens=0", "show.new_tokens=0 is too small"),
}


@pytest.mark.parametrize(("word", "answer"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_any_rank_starts(
    word: str, answer: str, workshop: Any, tmp_path: Path, farskip_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", lambda self: pytest.fail("a rank was started"))
    code, _, error = farskip_command(words(workshop, tmp_path / "run", word))
    assert code == 2
    assert error.startswith(f"farskip demo: {answer}")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_gpu_is_left_alone(
    workshop: Any, tmp_path: Path, farskip_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []
    monkeypatch.setattr("farskip.launch.demo.run_on_local_ranks", lambda _, __, run, ___: devices.append(run.device))
    for device in ("auto", "cpu"):
        farskip_command(words(workshop, tmp_path / "run", f"run.device={device}"))
    assert devices == ["cpu", "cpu"]
