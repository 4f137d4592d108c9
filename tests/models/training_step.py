"""One training step of a model on ranks, and what has to hold of it: shared by the grids of expert and of tensor
parallelism."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from farskip.models.attach import attachment_of
from farskip.models.testing_models import gradients
from farskip.parallel.data_parallel import DataParallel
from farskip.recorder import Recorder
from farskip.testing import assert_close, assert_equal_bits

LOGITS = {"max_error": 5e-5}
"""DESIGN.md 4: fp32, and sums over ranks are formed in another order."""
GRADIENTS = {"rel_norm": 1e-4}
"""DESIGN.md 4."""
WEIGHTS = {"rel_norm": 1e-4}
"""As the gradients: a step of AdamW is a smooth function of them with the epsilon of `OPTIMIZER`."""
OPTIMIZER = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
"""An epsilon near the size of a gradient; with 1e-8 the first step is the sign of a gradient, noise where that is 0."""
CLIP = 0.5


@dataclass
class Outcome:
    """What one training step of one model gave."""

    logits: torch.Tensor
    raw: dict[str, torch.Tensor]
    reduced: dict[str, torch.Tensor]
    loss: torch.Tensor
    norm: torch.Tensor
    weights: dict[str, torch.Tensor]
    recorder: Recorder
    model: Any


def label(setting: Any, *shown: str) -> str:
    """A name for a point of a grid: the fields `shown`, the first two without their names, and what is no default."""
    default = type(setting)()
    values = {each.name: getattr(setting, each.name) for each in fields(setting)}
    named = {name: values[name] for name in shown}
    named |= {name: value for name, value in values.items() if value != getattr(default, name)}
    return "-".join(str(value) if name in shown[:2] else f"{name}={value}" for name, value in named.items())


def finish(
    model: Any, logits: torch.Tensor, loss: torch.Tensor, recorder: Recorder, data_parallel: DataParallel | None
) -> Outcome:
    """What comes after the last backward: reduction, clipping and AdamW. None: the model is alone."""
    raw = gradients(model)
    if data_parallel is None:
        reduced, norm = raw, torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    else:
        data_parallel.reduce_gradients()
        loss = data_parallel.all_reduce_sum(loss)
        reduced = gradients(model)
        norm = data_parallel.clip_gradients(CLIP)
    torch.optim.AdamW(model.parameters(), **OPTIMIZER).step()
    return Outcome(
        logits=logits.detach(),
        raw=raw,
        reduced=reduced,
        loss=loss,
        norm=norm,
        weights={name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        recorder=recorder,
        model=model,
    )


def check_recorder(outcome: Outcome, *, runs_again: bool, times: int = 1) -> None:
    """Autograd followed the backward list to the letter, in every micro-batch."""
    attachment = attachment_of(outcome.model)
    assert attachment is not None
    schedule = attachment.executor.schedule(attachment.segments(recompute=runs_again))
    again = [each for segment in reversed(schedule.segments) for each in schedule.of_segment(segment)]
    forward = [step.bare for step in (*schedule.forward, *(again if runs_again else []))]
    assert outcome.recorder.forward == forward * times
    assert outcome.recorder.backward == [step.bare for step in schedule.backward] * times


def check_bits(serial: Outcome, overlapped: Outcome) -> None:
    """Everything before reduction, which both do alike."""
    assert_equal_bits(overlapped.logits, serial.logits)
    assert_equal_bits(overlapped.raw, serial.raw)


def check_against_one(
    outcome: Outcome,
    one: Outcome,
    *,
    logits: torch.Tensor,
    gradients: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
) -> None:
    """This rank computed its part (`logits`, `gradients`, `weights`) of what the model alone computed."""
    assert_close(outcome.logits, logits, **LOGITS)
    assert_close(outcome.loss, one.loss, rel_norm=1e-5, name="loss")
    assert_close(outcome.reduced, gradients, **GRADIENTS)
    assert_close(outcome.norm, one.norm, rel_norm=1e-5, name="norm")
    assert float(one.norm) > CLIP, "the clip has to bite"
    assert_close(outcome.weights, weights, **WEIGHTS)
