"""`farskip demo`: the whole conversion loop on real text, on this machine's CPU, in minutes.

(a) pretrain a small mixture-of-experts model, (b) rewire it, (c) measure the damage, (d) repair it by distillation from
its own original, (e) time and trace a serial and an overlapped step over an emulated link, (f) report.
"""

import json
import statistics
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from farskip.launch.config import (
    CheckpointModelConfig,
    DemoConfig,
    DistillConfig,
    LinkConfig,
    LinkKind,
    ParallelConfig,
    PretrainConfig,
    RunConfig,
    ScheduleMode,
    WiringConfig,
)
from farskip.launch.distill import distill
from farskip.launch.hydra_command import run_hydra
from farskip.launch.pretrain import pretrain
from farskip.launch.ranks import Ranks, run_on_local_ranks
from farskip.launch.run_folder import check_run_folder, held_folder, write_config
from farskip.report import Overlap, damage_sentence, write_conversion_report
from farskip.schedule import Schedule

INTRO = """
usage: farskip demo [key=value ...]

Pretrains a small mixture-of-experts model on the source of the Python standard library, rewires it, measures the damage
on held-out text, repairs it by self-distillation on two ranks with expert parallelism, and traces what was hidden.
Needs no GPU and no network. Leaves a report in <run.folder>/report.md. Stopped by Ctrl-C or SIGTERM during training it
saves, and goes on from there with run.resume=true.
"""


def main(argv: list[str]) -> int:
    """Entry of the command."""
    return run_hydra("demo", DemoConfig, _start, argv, intro=INTRO)


def _start(config: DemoConfig) -> bool:
    with held_folder(Path(config.run.folder)):
        return _run_all(config)


def _run_all(config: DemoConfig) -> bool:
    folder = Path(config.run.folder)
    check_run_folder(folder, resume=config.run.resume)
    if config.run.device == "cuda":
        raise ValueError("run.device=cuda, but the demo computes and times on CPU; use run.device=cpu or leave it out")
    if config.run.device == "auto":
        config.run.device = "cpu"
    if not config.data.path:
        config.data.path = sysconfig.get_path("stdlib")
    config.data.check()
    config.parallel.check()
    config.show.check()
    for training in (config.pretrain, config.distill):
        training.check()
    report = folder / "report.md"
    report.unlink(missing_ok=True)
    run_on_local_ranks(demo, config, config.run, config.ranks)
    if not report.exists():
        print(f"stopped before the end; the same command with run.resume=true goes on in {folder}")
        return False
    print(report.read_text())
    print(f"report:  {report}\nmodel:   {folder / 'repaired' / 'model'}\ntraces:  {folder / 'traces'}")
    return True


def demo(ranks: Ranks, config: DemoConfig) -> None:
    """All stages on one rank of the demo. A collective."""
    folder, minutes = Path(config.run.folder), {}
    original, repaired = folder / "original", folder / "repaired"

    def announce(stage: str) -> None:
        if ranks.rank == 0:
            print(f"\n== {stage}", flush=True)

    if ranks.rank == 0:
        write_config(config, folder)
    announce(f"pretrain a {config.model.family} model on {config.data.path}")
    started = time.monotonic()
    finished = pretrain(
        ranks,
        PretrainConfig(
            model=config.model,
            wiring=WiringConfig(name="ordinary"),
            data=replace(config.data),
            training=config.pretrain,
            balance=config.balance,
            parallel=config.parallel,
            run=_run(config.run, original),
        ),
    )
    if not finished:
        return
    minutes["pretrain"] = (time.monotonic() - started) / 60

    announce(f"rewire to {config.wiring.name}, measure, repair by distillation")
    started = time.monotonic()
    heldout = replace(config.distill.heldout, num_batches=config.show.heldout_batches)
    conversion = distill(
        ranks,
        DistillConfig(
            model=CheckpointModelConfig(path=str(original / "model")),
            wiring=config.wiring,
            data=replace(config.data),
            training=replace(config.distill, heldout=heldout),
            parallel=config.parallel,
            run=_run(config.run, repaired),
        ),
        prompt=config.show.prompt,
        new_tokens=config.show.new_tokens,
    )
    if conversion is None:
        return
    minutes["measure and repair"] = (time.monotonic() - started) / 60

    announce("time and trace a serial and an overlapped step over an emulated link")
    started = time.monotonic()
    overlaps: tuple[Overlap, ...] = ()
    same_bits = False
    if ranks.world_size > 1:
        overlaps, same_bits = show_overlap(ranks, config, repaired / "model", folder / "traces")
    minutes["overlap"] = (time.monotonic() - started) / 60
    if ranks.rank != 0:
        return
    write_conversion_report(
        folder,
        conversion.measured,
        conversion.wiring,
        link=_link_words(config),
        overlaps=overlaps,
        same_bits=same_bits,
        metrics={"pretrain": original, "distill": repaired},
        minutes=minutes,
        schedule=_two_layers(repaired / "schedule.json") if ranks.world_size > 1 else "",
    )
    print(damage_sentence(conversion.measured), flush=True)


def show_overlap(ranks: Ranks, config: DemoConfig, model_path: Path, folder: Path) -> tuple[tuple[Overlap, ...], bool]:
    """Timed steps of both schedules in turn, one more of each traced and inspected. A collective.

    Returns:
        What was seen (on rank 0), and whether loss and gradients of the two were equal bit for bit on every rank.
    """
    import torch
    import torch.distributed as dist

    from farskip.launch import job
    from farskip.models.attach import attachment_of
    from farskip.objectives import PretrainObjective
    from farskip.parallel.together import barrier
    from farskip.profiling import TraceSession

    _, data = job.build_text(replace(config.data, tokenizer=str(model_path)), config.parallel, ranks)
    batch = next(data.train_batches())
    mesh = job.build_job_mesh(config.parallel, ranks)
    folder.mkdir(parents=True, exist_ok=True)
    link = LinkConfig(
        kind=LinkKind.emulated,
        bandwidth_gbit_s=config.parallel.link.bandwidth_gbit_s,
        latency_us=config.parallel.link.latency_us,
    )
    variants: dict[str, Any] = {}
    for mode in (ScheduleMode.serial, ScheduleMode.overlapped):
        parallel = ParallelConfig(
            ep=config.parallel.ep,
            tp=config.parallel.tp,
            sequence_parallel=config.parallel.sequence_parallel,
            schedule=mode,
            link=link,
        )
        variants[mode.value] = job.prepare(
            job.load_spread(model_path, parallel, ranks, mesh), parallel, config.balance, ranks, mesh
        )

    results: dict[Any, list[torch.Tensor | None]] = {}

    def step(prepared: Any) -> float:
        objective = PretrainObjective(prepared.language_model, chunk_tokens=config.pretrain.loss_chunk_tokens)
        prepared.model.zero_grad(set_to_none=True)
        barrier(ranks.device)
        started = time.perf_counter()
        loss = objective.loss(batch).loss / batch.num_labels()
        loss.backward()
        slowest = torch.tensor([1e3 * (time.perf_counter() - started)])
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        results[prepared.model] = [loss.detach(), *(parameter.grad for parameter in prepared.model.parameters())]
        return float(slowest)

    times: dict[str, list[float]] = {schedule: [] for schedule in variants}
    for prepared in variants.values():
        step(prepared)  # the first step allocates; it is not timed
    for _ in range(config.show.timed_steps):
        for schedule, prepared in variants.items():
            times[schedule].append(step(prepared))
    same_bits = torch.tensor([float(_equal(*results.values()))])
    dist.all_reduce(same_bits, op=dist.ReduceOp.MIN)
    for schedule, prepared in variants.items():
        attachment = attachment_of(prepared.model)
        assert attachment is not None
        with TraceSession(attachment.executor, folder / f"{schedule}_rank{ranks.rank}.json.gz"):
            step(prepared)
        barrier(ranks.device)
    if ranks.rank != 0:
        return (), bool(same_bits)
    seen = tuple(_inspected(schedule, times[schedule], folder, ranks.world_size) for schedule in variants)
    return seen, bool(same_bits)


def _equal(one: Sequence[Any], other: Sequence[Any]) -> bool:
    import torch

    def bits(tensor: Any) -> Any:
        return tensor.reshape(-1).view(torch.uint8)

    return all(
        a is b if a is None or b is None else torch.equal(bits(a), bits(b)) for a, b in zip(one, other, strict=True)
    )


def _inspected(schedule: str, step_ms: list[float], folder: Path, world_size: int) -> Overlap:
    from farskip.trace import inspect

    report = inspect([folder / f"{schedule}_rank{rank}.json.gz" for rank in range(world_size)])

    def mean_ms(values: list[int]) -> float:
        return statistics.fmean(values) / 1e6

    return Overlap(
        schedule=schedule,
        step_ms=tuple(step_ms),
        communication_ms=mean_ms([rank.communication_ns for rank in report.ranks]),
        hidden_ms=mean_ms([rank.hidden_ns for rank in report.ranks]),
        exposed_ms=mean_ms([rank.communication_ns - rank.hidden_ns for rank in report.ranks]),
    )


def _two_layers(path: Path) -> str:
    return Schedule.from_dict(json.loads(path.read_text())).timeline("forward", layers=range(1, 3))


def _link_words(config: DemoConfig) -> str:
    link = config.parallel.link
    return f"an emulated link of {link.bandwidth_gbit_s:g} Gbit/s and {link.latency_us:g} us (a paced transfer)"


def _run(run: RunConfig, folder: Path) -> RunConfig:
    return replace(run, folder=str(folder))
