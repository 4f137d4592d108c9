"""metrics.jsonl, TensorBoard events, the plain line and the bar."""

import io
import json
import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from farskip.evaluation import Evaluation
from farskip.metrics import METRICS_FILE, MetricsFiles, ProgressDisplay, StepReport, rank_zero_outputs

REPORT = StepReport(
    step=3,
    num_steps=10,
    loss=0.25,
    means={"kl": 0.25, "cross_entropy": 2.5},
    grad_norm=1.5,
    learning_rate=1e-3,
    num_loss_tokens=100,
    tokens_per_s=12345.0,
    step_s=2.0,
    exposed_share=0.125,
)
HELDOUT = Evaluation(
    cross_entropy=3.0,
    cross_entropy_ci95=0.5,
    kl=0.5,
    kl_ci95=math.inf,
    num_tokens=2000,
    sequence_losses=(1.0,),
    sequence_tokens=(1,),
)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_one_line_per_report(tmp_path: Path) -> None:
    with MetricsFiles(tmp_path, first_step=0, tensorboard=False) as files:
        files.write(REPORT)
        files.write(replace(REPORT, step=4, heldout=HELDOUT))
    first, second = _lines(tmp_path)
    assert first["step"] == 3 and first["kl"] == 0.25 and first["exposed_share"] == 0.125
    assert "heldout_kl" not in first
    assert second["heldout_cross_entropy"] == 3.0 and second["heldout_kl"] == 0.5
    assert second["heldout_kl_ci95"] is None
    assert not (tmp_path / "tensorboard").exists()


def test_a_resumed_run_drops_what_it_takes_again(tmp_path: Path) -> None:
    with MetricsFiles(tmp_path, first_step=0, tensorboard=False) as files:
        for step in (1, 2, 3, 4):
            files.write(replace(REPORT, step=step))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "lo')
    with MetricsFiles(tmp_path, first_step=2, tensorboard=False) as files:
        files.write(replace(REPORT, step=3, loss=9.0))
    assert [(line["step"], line["loss"]) for line in _lines(tmp_path)] == [(1, 0.25), (2, 0.25), (3, 9.0)]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_tensorboard_gets_every_value(tmp_path: Path) -> None:
    with MetricsFiles(tmp_path, first_step=0, tensorboard=True) as files:
        files.write(replace(REPORT, heldout=HELDOUT))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/kl", "train/learning_rate", "heldout/cross_entropy", "heldout/kl"} <= tags
    (event,) = events.Scalars("train/loss")
    assert (event.step, event.value) == (3, 0.25)


def test_plain_lines_when_the_output_is_no_terminal() -> None:
    stream = io.StringIO()
    with ProgressDisplay(num_steps=10, first_step=0, stream=stream) as display:
        display.show(replace(REPORT, step=2), log_now=False)
        display.show(REPORT, log_now=True)
        display.show(replace(REPORT, step=4, heldout=HELDOUT), log_now=False)
    first, second = stream.getvalue().splitlines()
    assert first == "step 3/10  loss 0.2500  ce 2.5000  kl 0.2500  12,345 tokens/s  exposed 12.5 %  left 0:00:14"
    assert second == "step 4/10  held-out cross-entropy 3.0000 ± 0.5000  kl 0.5000 ± inf  (2,000 tokens)"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = _Terminal()
    with ProgressDisplay(num_steps=10, first_step=2, stream=stream) as display:
        display.show(replace(REPORT, heldout=HELDOUT), log_now=True)
    text = stream.getvalue()
    assert "3/10" in text and "kl 0.2500" in text and "exposed 12.5 %" in text
    assert "held-out cross-entropy 3.0000" in text


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    with ExitStack() as stack:
        assert rank_zero_outputs(stack, 1, tmp_path, num_steps=1, first_step=0, tensorboard=True) is None
    assert list(tmp_path.iterdir()) == []
