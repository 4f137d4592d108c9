"""`farskip demo`: the whole conversion loop on real text, on this machine's CPU, in minutes.

(a) pretrain a small mixture-of-experts model, (b) rewire it, (c) measure the damage, (d) repair it by distillation from
its own original, (e) time and trace a serial and an overlapped step over an emulated link, (f) report.
"""

import statistics
import sysconfig
import time
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
    WiringConfig,
)
from farskip.launch.distill import distill
from farskip.launch.hydra_command import run_hydra
from farskip.launch.pretrain import pretrain
from farskip.launch.ranks import Ranks, run_on_local_ranks
from farskip.report import Overlap, damage_sentence, write_conversion_report

INTRO = """
usage: farskip demo [key=value ...]

Pretrains a small mixture-of-experts model on the source of the Python standard library, rewires it, measures the damage
on held-out text, repairs it by self-distillation on two ranks with expert parallelism, and traces what was hidden.
Needs no GPU and no network. Leaves a report in <run.folder>/report.md.
"""


def main(argv: list[str]) -> int:
    """Entry of the command."""
    return run_hydra("demo", DemoConfig, _start, argv, intro=INTRO)


def _start(config: DemoConfig) -> None:
    folder = Path(config.run.folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"run.folder={folder} is not empty: give another one, e.g. farskip demo run.folder=runs/demo2")
    if not config.data.path:
        config.data.path = sysconfig.get_path("stdlib")
    config.data.check()
    for training in (config.pretrain, config.distill):
        training.check()
    run_on_local_ranks(demo, config, config.run, config.ranks)
    print((folder / "report.md").read_text())
    print(f"report:  {folder / 'report.md'}\nmodel:   {folder / 'repaired' / 'model'}\ntraces:  {folder / 'traces'}")


def demo(ranks: Ranks, config: DemoConfig) -> None:
    """All stages on one rank of the demo. A collective."""
    from farskip.models.attach import attachment_of
    from farskip.models.pretrained import load

    folder, minutes = Path(config.run.folder), {}
    original, repaired = folder / "original", folder / "repaired"

    def announce(stage: str) -> None:
        if ranks.rank == 0:
            print(f"\n== {stage}", flush=True)

    announce(f"pretrain a {config.model.family} model on {config.data.path}")
    started = time.monotonic()
    pretrain(
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
    minutes["measure and repair"] = (time.monotonic() - started) / 60

    announce("time and trace a serial and an overlapped step over an emulated link")
    started = time.monotonic()
    overlaps = show_overlap(ranks, config, repaired / "model", folder / "traces") if ranks.world_size > 1 else ()
    minutes["overlap"] = (time.monotonic() - started) / 60
    if ranks.rank != 0:
        return
    attachment = attachment_of(load(repaired / "model"))
    assert attachment is not None
    write_conversion_report(
        folder,
        conversion.measured,
        conversion.wiring,
        link=_link_words(config),
        overlaps=overlaps,
        metrics={"pretrain": original, "distill": repaired},
        minutes=minutes,
        schedule=(repaired / "schedule.txt").read_text() if ranks.world_size > 1 else "",
    )
    print(damage_sentence(conversion.measured), flush=True)


def show_overlap(ranks: Ranks, config: DemoConfig, model_path: Path, folder: Path) -> tuple[Overlap, ...]:
    """Timed steps of both schedules in turn, the last of each traced and inspected. A collective."""
    import torch
    import torch.distributed as dist

    from farskip.launch import job
    from farskip.models.attach import attachment_of
    from farskip.models.pretrained import load
    from farskip.objectives import PretrainObjective
    from farskip.profiling import TraceSession

    _, data = job.build_text(replace(config.data, tokenizer=str(model_path)), ranks)
    batch = next(data.train_batches())
    mesh = job.build_job_mesh(config.parallel, ranks)
    folder.mkdir(parents=True, exist_ok=True)
    link = LinkConfig(
        kind=LinkKind.emulated,
        bandwidth_gbit_s=config.parallel.link.bandwidth_gbit_s,
        latency_us=config.parallel.link.latency_us,
    )
    variants: dict[str, Any] = {}
    for schedule in ("serial", "overlapped"):
        parallel = ParallelConfig(ep=config.parallel.ep, schedule=schedule, link=link)
        variants[schedule] = job.prepare(load(model_path), parallel, config.balance, ranks, mesh)

    def step(prepared: Any) -> float:
        objective = PretrainObjective(prepared.language_model, chunk_tokens=config.pretrain.loss_chunk_tokens)
        prepared.model.zero_grad(set_to_none=True)
        dist.barrier()
        started = time.perf_counter()
        (objective.loss(batch).loss / batch.num_labels()).backward()
        slowest = torch.tensor([1e3 * (time.perf_counter() - started)])
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest)

    times: dict[str, list[float]] = {schedule: [] for schedule in variants}
    for prepared in variants.values():
        step(prepared)  # the first step allocates; it is not timed
    for _ in range(config.show.timed_steps):
        for schedule, prepared in variants.items():
            times[schedule].append(step(prepared))
    for schedule, prepared in variants.items():
        attachment = attachment_of(prepared.model)
        assert attachment is not None
        with TraceSession(attachment.executor, folder / f"{schedule}_rank{ranks.rank}.json.gz") as session:
            step(prepared)
            session.step()
        dist.barrier()
    if ranks.rank != 0:
        return ()
    return tuple(_inspected(schedule, times[schedule], folder, ranks.world_size) for schedule in variants)


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


def _link_words(config: DemoConfig) -> str:
    link = config.parallel.link
    return f"an emulated link of {link.bandwidth_gbit_s:g} Gbit/s and {link.latency_us:g} us (a paced transfer)"


def _run(run: RunConfig, folder: Path) -> RunConfig:
    return replace(run, folder=str(folder))
