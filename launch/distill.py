"""`farskip distill`: rewire a pretrained model, measure the damage, repair it by distillation from its own original."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from farskip.evaluation import Evaluation
from farskip.launch.config import DistillConfig
from farskip.launch.hydra_command import run_hydra
from farskip.launch.ranks import Ranks, print_on_first_rank, torchrun_ranks
from farskip.launch.run_folder import held_folder
from farskip.report import Measured, write_conversion_report

INTRO = """
usage: farskip distill model.path=DIR data.path=DIR [key=value ...]
       torchrun --nproc-per-node=8 --no-python farskip distill model.path=DIR data.path=DIR [key=value ...]

Rewires the skip connections of a pretrained model and repairs the damage by self-distillation: the frozen original is
the teacher, the loss is the forward KL to it. Leaves the converted model in <run.folder>/model and a report with the
held-out loss of original, rewired and repaired model in <run.folder>/report.md.
"""

DTYPES = ("float32", "bfloat16", "auto")


def main(argv: list[str]) -> int:
    """Entry of the command."""
    return run_hydra("distill", DistillConfig, _start, argv, intro=INTRO, announce=print_on_first_rank)


def _start(config: DistillConfig) -> bool:
    with torchrun_ranks(config.run) as ranks, held_folder(Path(config.run.folder), ranks.rank):
        outcome = distill(ranks, config)
        if outcome is not None and ranks.rank == 0:
            folder = Path(config.run.folder)
            write_conversion_report(folder, outcome.measured, outcome.wiring)
            print(f"report: {folder / 'report.md'}  model: {folder / 'model'}")
        return outcome is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What a conversion has shown. Equal on all ranks.

    Attributes:
        measured: original, rewired and repaired model, in this order.
        wiring: what was converted to, in words.
    """

    measured: tuple[Measured, ...]
    wiring: str


def distill(ranks: Ranks, config: DistillConfig, *, prompt: str = "", new_tokens: int = 48) -> Conversion | None:
    """The conversion loop: rewire, measure, distill, measure, export. A collective.

    Args:
        ranks: this process among the others.
        config: the command's configuration.
        prompt: text that the three models continue; the start of a held-out text if empty.
        new_tokens: length of the continuations.

    Returns:
        What was measured; None when it was asked to stop before the end: nothing is exported, the run can be resumed.
    """
    import torch

    from farskip.launch import job
    from farskip.launch.staged_rewiring import stages_of
    from farskip.models.export_dtype import checkpoint_dtype, round_weights
    from farskip.models.language_model import continue_text
    from farskip.models.surgery import wiring_of
    from farskip.objectives import DistillationObjective
    from farskip.trainer import StopReason

    if not config.model.path:
        raise ValueError("model.path is empty: give the folder of the original, e.g. model.path=/home/me/model")
    for key in ("dtype", "export_dtype"):
        if getattr(config.model, key) not in DTYPES:
            raise ValueError(f"model.{key}={getattr(config.model, key)!r} is unknown; use one of {', '.join(DTYPES)}")
    if config.data.tokenizer is None:
        config.data.tokenizer = config.model.path
    folder = Path(config.run.folder)
    job.check_run(config, folder, ranks, needs_heldout=True)
    dtype = None if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    mesh, wiring = job.build_job_mesh(config.parallel, ranks), config.wiring
    load = partial(job.load_spread, config.model.path, config.parallel, ranks, mesh)
    original, student = load(dtype=dtype), load(wiring=wiring.name, layers=wiring.layers, dtype=torch.float32)
    if wiring_of(student) == wiring_of(original):
        raise ValueError(f"wiring: {config.model.path} is wired as {wiring_of(original)} already: nothing to repair")
    stages = stages_of(config.wiring, wiring_of(original), wiring_of(student), config.training.num_steps)
    tokenizer, data = job.build_text(config.data, config.parallel, ranks)
    _check_vocabulary(tokenizer, student, config.data.tokenizer)
    teacher = job.prepare(original, config.parallel, config.balance, ranks, mesh, frozen=True)
    precision = config.training.precision
    prepared = job.prepare(student, config.parallel, config.balance, ranks, mesh, precision=precision)
    text = prompt or _heldout_prompt(tokenizer, data)
    num_batches = config.training.heldout.num_batches

    def measured(name: str, which: Any, against: Any) -> Measured:
        evaluation: Evaluation = job.measure(which, data, config.training, num_batches, against)
        continuation = continue_text(which.model, tokenizer, text, new_tokens)
        if ranks.rank == 0:
            print(f"{name}: {evaluation.cross_entropy:.4f} nats per token on held-out text", flush=True)
        return Measured(name=name, evaluation=evaluation, prompt=text, continuation=continuation)

    before = (measured("original", teacher, None), measured("rewired", prepared, teacher))
    objective = DistillationObjective(
        prepared.language_model,
        teacher.language_model,
        positions=config.training.distilled_positions,
        chunk_tokens=config.training.loss_chunk_tokens,
    )
    times = job.tune(prepared, objective, data, config.parallel, precision)
    result = job.run_training(
        prepared,
        objective,
        data,
        config.training,
        folder,
        ranks,
        on_start=partial(job.write_plan, prepared, config, folder, ranks, times),
        resume=config.run.resume,
        trace_steps=config.profile.steps,
        stages=stages,
    )
    if result.reason is StopReason.shutdown:
        return None
    says = config.model.export_dtype
    round_weights(student, checkpoint_dtype(Path(config.model.path)) if says == "auto" else getattr(torch, says))
    outcome = (*before, measured("repaired", prepared, teacher))
    job.export(prepared, tokenizer, folder / "model", ranks)
    return Conversion(measured=outcome, wiring=str(wiring_of(student)))


def _check_vocabulary(tokenizer: Any, model: Any, path: str | None) -> None:
    """A token without embedding would end in an index error somewhere in the text, on CUDA without a message."""
    highest, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if highest >= rows:
        raise ValueError(
            f"data.tokenizer={path} has token ids up to {highest}, but the model has {rows} embeddings: "
            "give the tokenizer of the model"
        )


def _heldout_prompt(tokenizer: Any, data: Any) -> str:
    """The first tokens of the held-out text, equal on all ranks up to sharding: rank 0's choice is broadcast."""
    import torch.distributed as dist

    first = data.heldout_batches(1)[0].input_ids_BS[0, :16]
    box = [str(tokenizer.decode(first))]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]
