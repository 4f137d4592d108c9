"""The conversion report: every number in it is one that was handed in, and nothing is claimed that is within noise."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from farskip.evaluation import NORMAL_95, Evaluation, paired_difference
from farskip.report import Measured, Overlap, damage_sentence, machine_line, speed_sentence, write_conversion_report

TOKENS = (10, 20, 30, 40)


def evaluation(losses: list[float], *, kl: float | None = None) -> Evaluation:
    """From the mean cross entropy of each of four sequences."""
    sums = [loss * count for loss, count in zip(losses, TOKENS, strict=True)]
    mean = sum(sums) / sum(TOKENS)
    return Evaluation(
        cross_entropy=mean,
        cross_entropy_ci95=0.125,
        kl=kl,
        kl_ci95=None if kl is None else 0.0625,
        num_tokens=sum(TOKENS),
        sequence_losses=tuple(sums),
        sequence_tokens=TOKENS,
    )


def measured(*losses: list[float]) -> tuple[Measured, ...]:
    kls = (None, 0.5, 0.25)
    return tuple(
        Measured(name=name, evaluation=evaluation(loss, kl=kl), prompt="the prompt", continuation=f"{name} went on")
        for name, loss, kl in zip(("original", "rewired", "repaired"), losses, kls, strict=True)
    )


BASE = [2.0, 3.0, 4.0, 5.0]


def shifted(by: list[float]) -> list[float]:
    return [base + shift for base, shift in zip(BASE, by, strict=True)]


CLEAR = measured(BASE, shifted([1.0, 1.1, 0.9, 1.0]), shifted([0.25, 0.25, 0.25, 0.25]))


def test_a_clear_damage_is_put_in_numbers() -> None:
    sentence = damage_sentence(CLEAR)
    original, rewired, repaired = (model.evaluation for model in CLEAR)
    damage, ci95 = paired_difference(original, rewired)
    left = repaired.cross_entropy - original.cross_entropy
    assert f"Rewiring cost {damage:.4f} ± {ci95:.4f} nats per token" in sentence
    assert f"closed {100 * (damage - left) / damage:.0f} % of it, {left:+.4f} ± 0.0000 remain" in sentence


def test_damage_is_compared_with_the_noise_of_the_pairs_not_of_the_sequences() -> None:
    """Sequences differ by nats, the difference of each pair hardly at all: a damage of 0.01 is real."""
    assert "closed" in damage_sentence(measured(BASE, shifted([0.01, 0.011, 0.009, 0.01]), BASE))


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_no_share_within_noise(noise: float) -> None:
    sentence = damage_sentence(measured(BASE, shifted([noise, -noise, noise, -noise / 2]), shifted([-0.1] * 4)))
    assert "no share of a damage is given" in sentence
    assert "%" not in sentence


def test_where_rewiring_helps_there_is_no_share_and_no_talk_of_noise() -> None:
    sentence = damage_sentence(measured(BASE, shifted([-1.0, -1.1, -0.9, -1.0]), BASE))
    assert "no damage of which a share could be closed" in sentence
    assert "%" not in sentence and "within" not in sentence


def test_the_border_is_three_standard_errors() -> None:
    """A damage just above and just below three times its own standard error."""
    spread = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)

    def with_damage(damage: float) -> tuple[Measured, ...]:
        return measured(BASE, shifted((spread + damage).tolist()), BASE)

    def ratio(damage: float) -> float:
        difference, ci95 = paired_difference(*(model.evaluation for model in with_damage(damage)[:2]))
        return difference / (ci95 / NORMAL_95)

    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < 3.0 else (low, middle)
    assert "no share" in damage_sentence(with_damage(low * 0.999))
    assert "closed" in damage_sentence(with_damage(high * 1.001))


def test_other_text_is_refused() -> None:
    other = evaluation(BASE)
    changed = Evaluation(
        **{name: getattr(other, name) for name in Evaluation.__slots__} | {"sequence_tokens": (1,) * 4}
    )
    models = (*CLEAR[:2], Measured(name="repaired", evaluation=changed, prompt="", continuation=""))
    with pytest.raises(ValueError, match="different text"):
        damage_sentence(models)


SERIAL = Overlap(
    schedule="serial", step_ms=(300.0, 310.0, 290.0), communication_ms=120.0, hidden_ms=12.0, exposed_ms=108.0
)
FAST = Overlap(
    schedule="overlapped", step_ms=(200.0, 205.0, 210.0), communication_ms=125.0, hidden_ms=100.0, exposed_ms=25.0
)
SAME = Overlap(
    schedule="overlapped", step_ms=(295.0, 320.0, 285.0), communication_ms=125.0, hidden_ms=100.0, exposed_ms=25.0
)


def test_speed_is_claimed_only_where_every_pair_agrees() -> None:
    assert speed_sentence(SERIAL, FAST) == (
        "Overlapped is 1.50 times as fast as serial (1.38 to 1.51 in 3 pairs of steps)."
    )
    assert "no difference in speed is claimed" in speed_sentence(SERIAL, SAME)
    slower = speed_sentence(FAST, SERIAL)
    assert slower.startswith("Overlapped is 0.67 times as fast as serial (0.66 to 0.72")


def write_metrics(folder: Path, *, kl: bool) -> Path:
    folder.mkdir()
    rows = [{"step": step, "loss": 5.0 - step, **({"kl": 1.0} if kl else {})} for step in (1, 2, 3)]
    rows[-1] |= {"heldout_cross_entropy": 2.0, "heldout_cross_entropy_ci95": 0.1}
    if kl:
        rows[-1] |= {"heldout_kl": 0.5, "heldout_kl_ci95": 0.01}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def report(tmp_path: Path) -> str:
    runs = {"pretrain": write_metrics(tmp_path / "one", kl=False), "distill": write_metrics(tmp_path / "two", kl=True)}
    path = write_conversion_report(
        tmp_path,
        CLEAR,
        "farskip on 3 of 3 layers (0-2)",
        link="a link of 1 Gbit/s",
        overlaps=(SERIAL, FAST),
        same_bits=True,
        metrics=runs,
        minutes={"pretrain": 1.25},
        schedule="compute | a |\n",
    )
    assert path == tmp_path / "report.md"
    return path.read_text()


def test_every_number_is_one_that_was_handed_in(report: str) -> None:
    for model in CLEAR:
        result = model.evaluation
        kl = "-" if result.kl is None else f"{result.kl:.4f} ± 0.0625"
        perplexity = math.exp(result.cross_entropy)
        assert f"| {model.name} | {result.cross_entropy:.4f} ± 0.1250 | {perplexity:.2f} | {kl} |" in report
        assert f"{model.name}:\n\n```text\n{model.name} went on\n```" in report
    assert "Held-out text, 100 predicted tokens" in report
    assert damage_sentence(CLEAR) in report
    assert "| serial | 300, 290 - 310 | 120 | 12 | 108 | 10 |" in report
    assert "| overlapped | 205, 200 - 210 | 125 | 100 | 25 | 80 |" in report
    assert "over a link of 1 Gbit/s. Step times are medians over 3 steps of each" in report
    assert speed_sentence(SERIAL, FAST) in report
    assert "equal, bit for bit" in report
    assert "| pretrain | 1.2 |" in report
    assert machine_line() in report


def test_pictures_that_are_named_exist(report: str, tmp_path: Path) -> None:
    names = re.findall(r"!\[\w+\]\((\S+)\)", report)
    assert sorted(names) == ["damage.png", "loss.png", "overlap.png"]
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_what_was_not_measured_is_not_mentioned(tmp_path: Path) -> None:
    text = write_conversion_report(tmp_path, CLEAR, "ladder").read_text()  # without any metrics file, too
    for word in ("hidden", "overlap", "bit for bit", "minutes", "schedule"):
        assert word not in text


def test_different_bits_are_not_called_equal(tmp_path: Path) -> None:
    text = write_conversion_report(tmp_path, CLEAR, "ladder", link="x", overlaps=(SERIAL, FAST)).read_text()
    assert "equal, bit for bit" not in text
    assert "differ, which they must not" in text


def test_a_continuation_with_a_fence_of_its_own(tmp_path: Path) -> None:
    text = "```python\nprint()\n```"
    models = tuple(
        Measured(name=model.name, evaluation=model.evaluation, prompt="p", continuation=text) for model in CLEAR
    )
    assert f"````text\n{text}\n````" in write_conversion_report(tmp_path, models, "ladder").read_text()


def test_no_communication_is_no_division_by_zero(tmp_path: Path) -> None:
    none = Overlap(schedule="serial", step_ms=(1.0,), communication_ms=0.0, hidden_ms=0.0, exposed_ms=0.0)
    text = write_conversion_report(tmp_path, CLEAR, "ladder", link="x", overlaps=(none, none)).read_text()
    assert "| serial | 1, 1 - 1 | 0 | 0 | 0 | - |" in text


@pytest.mark.parametrize("evaluations", [0, 1, 3])
def test_a_choice_by_the_held_out_text_is_said(evaluations: int, tmp_path: Path) -> None:
    run = write_metrics(tmp_path / "distill", kl=True)
    rows = [{"step": 1, "loss": 1.0, "kl": 1.0}] * 3
    for row in range(evaluations):
        rows[row] = rows[row] | {
            "heldout_kl": 0.5,
            "heldout_kl_ci95": 0.01,
            "heldout_cross_entropy": 2.0,
            "heldout_cross_entropy_ci95": 0.1,
        }
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_conversion_report(tmp_path, CLEAR, "farskip", metrics={"distill": run}).read_text()
    sentence = f"The repaired model is the best of {evaluations} evaluations on this held-out text"
    assert (sentence in text) == (evaluations > 1)
    assert ("is the best of" in text) == (evaluations > 1)
