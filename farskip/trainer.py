"""The training loop, for pretraining and distillation alike: one linear function.

One step, on every rank:

    fetch the micro-batches          agree on: positions in the loss, input tokens, "my data is used up"
    per micro-batch                  loss (a sum) / positions of all ranks and micro-batches, backward
    reduce gradients, global norm    agree on: loss sums, "I was asked to stop", time spent waiting
    stop all ranks if a number is not finite
    AdamW, balancer
    evaluate; write a checkpoint; stop early; stop because somebody was asked to

Decides: that order, and that one step on k ranks is one step on one rank with the concatenated batch. Dividing by the
number of positions known before the first backward makes every gradient a plain sum over ranks and micro-batches.
Refuses: a run folder that already holds checkpoints, unless told to resume; to update weights or write anything after a
number that is not finite; to install signal handlers or start process groups.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from farskip.batch import Batch
from farskip.checkpoint import CheckpointStore, Progress, latest_checkpoint, read_manifest
from farskip.evaluation import Evaluation, autocast, evaluate
from farskip.learning_rate import learning_rate
from farskip.metrics import StepReport, rank_zero_outputs
from farskip.optimizer import build_optimizer
from farskip.shutdown import ShutdownRequest, deadline, peer_errors
from farskip.training_config import Precision, TrainingConfig
from farskip.training_protocols import Balancer, Communicator, LossSums, Objective, TrainBatches, TrainingData
from farskip.training_state import rank_state_to_save, restore_rank_state, tensors_to_fill, tensors_to_save

CHECKPOINTS = "checkpoints"


class StopReason(StrEnum):
    """Why a run ended in order."""

    finished = "finished"
    early_stopped = "early stopped"
    data_used_up = "data used up"
    shutdown = "shutdown requested"


class NonFiniteError(RuntimeError):
    """The loss, the gradient norm or a held-out value is NaN or infinite. Raised on all ranks with the same message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended.

    Attributes:
        reason: why.
        progress: steps taken and the best held-out value.
        last_checkpoint: the newest; None when nothing was trained.
        best_checkpoint: the one ``checkpoints/best`` points to; None without evaluation, or when the best one lies in
            another folder that this run was resumed from.
        heldout: the last evaluation of this process.
    """

    reason: StopReason
    progress: Progress
    last_checkpoint: Path | None
    best_checkpoint: Path | None
    heldout: Evaluation | None


def train(
    objective: Objective,
    data: TrainingData,
    communicator: Communicator,
    config: TrainingConfig,
    run_folder: Path,
    *,
    balancer: Balancer | None = None,
    shutdown: ShutdownRequest | None = None,
    on_start: Callable[[], None] = lambda: None,
    on_step: Sequence[Callable[[StepReport], None]] = (),
    resume: Path | None = None,
    judged_from: int = 1,
) -> TrainResult:
    """Train ``objective.model`` until the steps are done, the data is used up, it gets no better, or somebody asks to
    stop.

    Args:
        objective: loss, model and (when distilling) teacher.
        data: this rank's share.
        communicator: the ranks.
        config: equal on every rank.
        run_folder: gets metrics and checkpoints; on a file system that all ranks share.
        balancer: moves the routers' biases and scales their auxiliary loss.
        shutdown: looked at after every step.
        on_start: called before the first step, when what a resumed run reads has been read and fits.
        on_step: called in order after every step, on every rank; a profiler's ``step`` fits.
        resume: a checkpoint of the run (``farskip.checkpoint.latest_checkpoint`` finds the newest).
        judged_from: the first step whose held-out value may be the best one, or count as getting no better; those of
            steps before, of a model that is not yet what it will be, are only written down.

    Returns:
        How it ended; equal on all ranks.

    Raises:
        ValueError: unusable config, run folder in use, damaged or foreign checkpoint, a step without any position in
            the loss.
        NonFiniteError: with step, rank and value; weights are not updated, checkpoints stay as they are.
        RuntimeError: a rank died or is late, or a checkpoint could not be written.

    Note: the host waits for the device where ranks agree (before the first forward pass, on their numbers of positions;
        before the update, on loss and gradient norm), behind the update for the balancer's metrics and the time that
        compute stood still, and per micro-batch in front of the forward pass for the positions that have a label, when
        distilling once more in front of backward for their number. What a model's own forward pass waits for comes on
        top (docs/training.md).
    """
    config.check()
    module, rank = objective.model.module, communicator.rank
    device = next(module.parameters()).device
    optimizer = build_optimizer(module, config.optimizer, communicator.shares)
    batches = data.train_batches()
    store = CheckpointStore(
        run_folder / CHECKPOINTS, communicator, keep_last=config.checkpoint.keep_last, device=device
    )
    resume = None if resume is None else resume.resolve()
    newest = latest_checkpoint(store.folder)
    if newest is not None and resume != newest.resolve():
        raise ValueError(
            f"{run_folder} already holds a run up to {newest.name}: resume from that checkpoint, choose another "
            "folder, or move the newer checkpoints away"
        )
    torch.manual_seed(config.seed + rank)
    random.seed(config.seed + rank)
    progress = Progress()
    reason, last_checkpoint = StopReason.finished, resume
    heldout: Evaluation | None = None
    report: StepReport | None = None
    update_waited_s = 0.0  # of the step before: what ranks waited for is summed in front of the update

    def save(progress: Progress, is_best: bool) -> Path:
        tensors = tensors_to_save(module, optimizer, communicator)
        return store.save(tensors, rank_state_to_save(batches, device), progress, is_best=is_best)

    judge = partial(_judge, config=config, is_distillation=objective.teacher is not None, judged_from=judged_from)

    with ExitStack() as stack:
        stack.enter_context(
            peer_errors(rank, lambda: f"after step {progress.step}", world_size=communicator.world_size)
        )
        if resume is not None:
            state, progress = store.load(resume, lambda names: tensors_to_fill(names, module, optimizer, communicator))
            own = read_manifest(resume).world_size == communicator.world_size
            restore_rank_state(state, batches, device, generators=own)
        on_start()
        run_folder.mkdir(parents=True, exist_ok=True)
        outputs = rank_zero_outputs(
            stack, rank, run_folder,
            num_steps=config.num_steps, first_step=progress.step, tensorboard=config.tensorboard,
        )  # fmt: skip
        module.train()
        while progress.step < config.num_steps:
            started_s = time.perf_counter()
            # What evaluation, checkpoint and callbacks waited for is not this step's.
            communicator.exposed_communication_s()
            micro_batches, num_loss_tokens = _fetch(objective, batches, config.accumulation, device)
            counts = _agree_on_counts(num_loss_tokens, micro_batches, config.accumulation, communicator, device)
            if counts is None:
                reason = StopReason.data_used_up
                break
            if counts.num_loss_tokens == 0:
                raise ValueError(
                    f"step {progress.step + 1}: no position of any rank has a label; "
                    "check the chat template's roles or raise training.accumulation"
                )
            step = progress.step + 1
            rate = learning_rate(progress.step, config.num_steps, config.optimizer)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            sums = _Sums()
            for number, batch in enumerate(micro_batches, start=1):
                if balancer is not None:
                    # all ranks' micro-batches are of one size, and the auxiliary loss is already a sum over ranks
                    everywhere = communicator.data_size * batch.input_ids_BS.numel()
                    balancer.set_scale(everywhere / counts.num_input_tokens)
                loss_sums = trained_loss(objective, batch, device, config.precision)
                if number == len(micro_batches):
                    communicator.expect_last_backward()
                (loss_sums.loss / counts.num_loss_tokens).backward()
                sums.add("loss", loss_sums.loss.detach(), 0)
                for name, (total, num) in loss_sums.sums.items():
                    sums.add(name, total, num)
            communicator.reduce_gradients()
            norm = communicator.clip_gradients(config.optimizer.max_grad_norm)

            asked_to_stop = shutdown is not None and shutdown.requested
            own_loss = sums.total("loss")
            agreed = sums.reduced(communicator, device, stop=asked_to_stop, waited_s=update_waited_s)
            stop = agreed.stop
            loss = agreed.totals["loss"] / counts.num_loss_tokens
            grad_norm = float(norm)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise _non_finite(step, own_loss, grad_norm, communicator, device, last_checkpoint)
            optimizer.step()
            update_waited_s = communicator.exposed_communication_s()
            means = agreed.means()
            if balancer is not None:
                means.update(balancer.update())
            progress = replace(progress, step=step)
            step_s = time.perf_counter() - started_s

            is_last = step == config.num_steps
            improved, heldout_now = False, None
            every = config.heldout.every_steps
            if every and (step % every == 0 or is_last) and not stop:
                heldout = heldout_now = _evaluate(objective, data, communicator, config)
                progress, improved = judge(progress, heldout, last_checkpoint)
            report = StepReport(
                step=step,
                num_steps=config.num_steps,
                loss=loss,
                means=means,
                grad_norm=grad_norm,
                learning_rate=rate,
                num_loss_tokens=counts.num_loss_tokens,
                tokens_per_s=counts.num_input_tokens / step_s,
                step_s=step_s,
                exposed_share=agreed.exposed_s / communicator.data_size / step_s,
                heldout=heldout_now,
            )
            if outputs is not None:
                files, display = outputs
                log_now = step % config.log_every == 0 or is_last or stop
                if log_now or heldout_now is not None:
                    files.write(report)
                display.show(report, log_now=log_now)
            for callback in on_step:
                callback(report)

            patience = config.heldout.patience
            worn_out = heldout_now is not None and patience > 0 and progress.num_worse >= patience
            due = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
            if due or improved or is_last or stop or worn_out:
                limit_s = config.checkpoint.shutdown_timeout_s
                late = f"rank {rank}: the checkpoint after SIGTERM took longer than {limit_s:g} s; ending without it"
                with deadline(limit_s, late) if stop else nullcontext():
                    last_checkpoint = save(progress, improved)
            if stop or worn_out:
                reason = StopReason.shutdown if stop else StopReason.early_stopped
                break
        if reason is StopReason.data_used_up and report is not None and last_checkpoint != store.path_of(progress.step):
            improved = False
            if config.heldout.every_steps and report.heldout is None:
                heldout = _evaluate(objective, data, communicator, config)
                progress, improved = judge(progress, heldout, last_checkpoint)
                if outputs is not None:
                    files, display = outputs
                    files.write(replace(report, heldout=heldout))
                    display.show(replace(report, heldout=heldout), log_now=True)
            last_checkpoint = save(progress, improved)
    best = None if progress.best_step is None else store.path_of(progress.best_step)
    return TrainResult(
        reason=reason,
        progress=progress,
        last_checkpoint=last_checkpoint,
        best_checkpoint=best if best is not None and best.is_dir() else None,
        heldout=heldout,
    )


def trained_loss(objective: Objective, batch: Batch, device: torch.device, precision: Precision) -> LossSums:
    """A batch's loss as a step computes it: what stands in for steps, to measure them, takes it from here."""
    with autocast(device, precision):
        return objective.loss(batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counts:
    num_loss_tokens: int
    num_input_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Agreed:
    totals: dict[str, float]
    numbers: dict[str, float]
    stop: bool
    exposed_s: float

    def means(self) -> dict[str, float]:
        return {name: self.totals[name] / max(number, 1.0) for name, number in self.numbers.items() if name != "loss"}


class _Sums:
    """Sums of one step on this rank, kept on the device until all are reduced at once."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._numbers: dict[str, int] = {}

    def add(self, name: str, total: Tensor, number: int) -> None:
        total = total.to(torch.float64)
        self._totals[name] = self._totals[name] + total if name in self._totals else total
        self._numbers[name] = self._numbers.get(name, 0) + number

    def total(self, name: str) -> Tensor:
        return self._totals[name]

    def reduced(self, communicator: Communicator, device: torch.device, *, stop: bool, waited_s: float) -> _Agreed:
        """The sums of all ranks, whether any rank wants to stop, and the seconds all ranks waited, `waited_s` more."""
        names = sorted(self._totals)
        waited_s += communicator.exposed_communication_s()
        extras = [*(float(self._numbers[name]) for name in names), float(stop), waited_s]
        packed = torch.cat(
            [
                torch.stack([self._totals[name] for name in names]),
                torch.tensor(extras, dtype=torch.float64, device=device),
            ]
        )
        # Over processes, so that none of them stops alone; those that share tensors have equal sums.
        copies = communicator.world_size // communicator.data_size
        values = (communicator.sum_over_processes(packed) / copies).tolist()
        return _Agreed(
            totals=dict(zip(names, values, strict=False)),
            numbers=dict(zip(names, values[len(names) :], strict=False)),
            stop=values[-2] > 0,
            exposed_s=values[-1],
        )


def _fetch(
    objective: Objective, batches: TrainBatches, accumulation: int, device: torch.device
) -> tuple[list[Batch], int]:
    """The micro-batches of one step, fewer when the data is used up, and how many of their positions count in the loss:
    counted before they move to the device, for which the host would have to wait."""
    fetched: list[Batch] = []
    for _ in range(accumulation):
        batch = next(batches, None)
        if batch is None:
            break
        fetched.append(batch)
    num_loss_tokens = sum(objective.num_tokens(batch) for batch in fetched)
    return fetched if device.type == "cpu" else [batch.to(device) for batch in fetched], num_loss_tokens


def _agree_on_counts(
    num_loss_tokens: int,
    micro_batches: list[Batch],
    accumulation: int,
    communicator: Communicator,
    device: torch.device,
) -> _Counts | None:
    """Positions in the loss and input tokens of the step, all ranks; None when a rank has no full step of data left."""
    own = [
        float(num_loss_tokens),
        float(sum(batch.input_ids_BS.numel() for batch in micro_batches)),
        float(len(micro_batches) < accumulation),
    ]
    agreed = communicator.all_reduce_sum(torch.tensor(own, dtype=torch.float64, device=device)).tolist()
    if agreed[2] > 0:
        return None
    return _Counts(num_loss_tokens=int(agreed[0]), num_input_tokens=int(agreed[1]))


def _evaluate(
    objective: Objective, data: TrainingData, communicator: Communicator, config: TrainingConfig
) -> Evaluation:
    return evaluate(
        objective.model,
        data.heldout_batches(config.heldout.num_batches),
        communicator,
        teacher=objective.teacher,
        precision=config.precision,
        positions=config.distilled_positions,
        chunk_tokens=config.loss_chunk_tokens,
    )


def _judge(
    progress: Progress,
    heldout: Evaluation,
    last: Path | None,
    *,
    config: TrainingConfig,
    is_distillation: bool,
    judged_from: int,
) -> tuple[Progress, bool]:
    """Compare a held-out value (KL when distilling, else cross entropy) with the best one so far."""
    value = heldout.kl if is_distillation and heldout.kl is not None else heldout.cross_entropy
    if not math.isfinite(value):
        raise NonFiniteError(f"step {progress.step}: the held-out value is {value}; {_what_stays(last)}")
    if progress.step < judged_from:
        return progress, False
    best = progress.best_value
    if best is None or value < best - config.heldout.min_improvement:
        return replace(progress, best_value=value, best_step=progress.step, num_worse=0), True
    return replace(progress, num_worse=progress.num_worse + 1), False


def _non_finite(
    step: int,
    own_loss: Tensor,
    grad_norm: float,
    communicator: Communicator,
    device: torch.device,
    last: Path | None,
) -> NonFiniteError:
    """The error that every rank raises, with the same text; a collective."""
    own_value = float(own_loss)
    values_R = torch.zeros(communicator.world_size, dtype=torch.float64, device=device)
    # A NaN would not survive the trip as a place: 1 means NaN, 2 inf, 3 -inf.
    codes = {"nan": 1.0, "inf": 2.0, "-inf": 3.0}
    values_R[communicator.rank] = codes.get(str(own_value), 0.0)
    codes_R = communicator.sum_over_processes(values_R).tolist()
    texts = {code: text for text, code in codes.items()}
    found = [f"{texts[code]} on rank {rank}" for rank, code in enumerate(codes_R) if code]
    # Gradients are summed and scaled by now: which rank's or parameter's was the first cannot be told any more.
    what = "the loss is " + ", ".join(found) if found else f"the gradient norm is {grad_norm} on all ranks"
    return NonFiniteError(
        f"step {step}: {what}; {_what_stays(last)}, "
        "lower training.optimizer.learning_rate or look at the data of this step"
    )


def _what_stays(last: Path | None) -> str:
    return f"the last good checkpoint is {last}" if last is not None else "there is no checkpoint yet"
