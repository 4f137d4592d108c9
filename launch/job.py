"""What pretrain, distill and demo have in common: from a configuration and ranks to a model that is ready to train.

Order matters and is the same everywhere: text, model, wiring, parallel, balancer, training, best weights, export.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from farskip.checkpoint import CheckpointStore, latest_checkpoint, read_manifest
from farskip.data import TextData, build_data, build_tokenizer
from farskip.data_config import DataConfig
from farskip.data_sources import find_source
from farskip.evaluation import Evaluation, autocast, evaluate
from farskip.lanes import SideStream
from farskip.launch.config import (
    BalanceConfig,
    DistillConfig,
    FreshModelConfig,
    LinkKind,
    ParallelConfig,
    PretrainConfig,
    Recompute,
    WiringConfig,
)
from farskip.launch.ranks import Ranks
from farskip.launch.run_folder import STAGE_TIMES, check_run_folder, write_config, write_text
from farskip.launch.staged_rewiring import StagedRewiring
from farskip.metrics import StepReport
from farskip.models.attach import attachment_of, layers_of
from farskip.models.balancing import DroppedRows, balance_model
from farskip.models.fresh import build_model
from farskip.models.kernels import kernels_line, use_kernels
from farskip.models.language_model import HFLanguageModel
from farskip.models.parallelize import Spread, parallelize, tune_schedule
from farskip.models.pretrained import load, save
from farskip.models.rank_slices import places_here
from farskip.models.recompute import recompute_stages
from farskip.models.surgery import rewire, wiring_of
from farskip.optimizer import build_optimizer
from farskip.parallel.collectives import ProcessGroupLink
from farskip.parallel.data_parallel import DataParallel
from farskip.parallel.duplex_link import real_link
from farskip.parallel.emulated_link import EmulatedLink
from farskip.parallel.gloo_threads import set_gloo_threads
from farskip.parallel.mesh import EP_AXIS, TP_AXIS, axis_group, axis_size, build_mesh
from farskip.parallel.together import barrier, first_rank_says
from farskip.profiling import StepTracer
from farskip.schedule import Schedule
from farskip.shutdown import ShutdownRequest
from farskip.simulator import StageTimes, explain
from farskip.trainer import CHECKPOINTS, StopReason, TrainResult, train, trained_loss
from farskip.training_config import Precision, TrainingConfig
from farskip.training_protocols import Balancer, Communicator, Objective, SingleProcess
from farskip.training_state import tensors_to_fill
from farskip.wiring import Wiring
from farskip.wiring_stages import WiringStages


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A model that is attached, parallel and ready to train or to teach.

    Attributes:
        model: the transformers model.
        language_model: the same for the training loop.
        communicator: its ranks.
        balancer: moves its routers' biases, if asked for.
    """

    model: Any
    language_model: HFLanguageModel
    communicator: Communicator
    balancer: Any


def check_run(config: PretrainConfig | DistillConfig, folder: Path, ranks: Ranks, *, needs_heldout: bool) -> None:
    """Refuse what cannot be run or resumed, before a model or a text is read; say what a resumed run does otherwise.

    Args:
        config: of the command.
        folder: of the run.
        ranks: this process among the others.
        needs_heldout: whether something will be measured on held-out text.

    Raises:
        ValueError: a setting that no later step can use, a folder that is in use, or a run that is past its last step.
    """
    config.training.check()
    config.parallel.check()
    config.data.check()
    Wiring.named(config.wiring.name, 0)
    if needs_heldout:
        config.data.check_heldout()
    if ranks.rank != 0:
        return
    find_source(config.data.path, config.data)
    if config.data.heldout_path is not None:
        find_source(config.data.heldout_path, config.data, "data.heldout_path")
    resume = config.run.resume
    changed = check_run_folder(folder, resume=resume, config=config)
    newest = latest_checkpoint(folder / CHECKPOINTS) if resume else None
    step = 0 if newest is None else read_manifest(newest).step
    if step > config.training.num_steps:
        raise ValueError(
            f"training.num_steps={config.training.num_steps}, and the run in {folder} is at step {step}: give "
            f"{step} or more, or another run.folder"
        )
    if newest is not None:
        print(f"{folder}: goes on after step {step}{', with ' * bool(changed)}{', '.join(changed)}", flush=True)


def build_text(config: DataConfig, parallel: ParallelConfig, ranks: Ranks) -> tuple[Any, TextData]:
    """Tokenizer and text of this rank; ranks that share tensors see the same text. A collective."""
    if ranks.world_size % parallel.tp:
        raise ValueError(f"parallel.tp={parallel.tp} does not divide {ranks.world_size} ranks: choose a divisor")
    tokenizer = build_tokenizer(config, config.cache_dir)
    data = build_data(
        config,
        tokenizer,
        rank=ranks.rank // parallel.tp,
        world_size=ranks.world_size // parallel.tp,
        barrier=first_rank_says if ranks.world_size > 1 else lambda: None,
        packs=ranks.rank == 0,
    )
    if ranks.rank == 0:
        print(data.describe(), flush=True)
    return tokenizer, data


def build_job_mesh(parallel: ParallelConfig, ranks: Ranks) -> DeviceMesh | None:
    """The mesh of all ranks; None for a world of one."""
    if ranks.world_size == 1:
        if parallel.ep > 1:
            raise ValueError(f"parallel.ep={parallel.ep} needs as many ranks: start with torchrun --nproc-per-node")
        if parallel.side_stream is not SideStream.none:
            raise ValueError(
                f"parallel.side_stream={parallel.side_stream} has nothing to put aside on one rank: no rows travel; "
                "start with torchrun --nproc-per-node, or set it to none"
            )
        if parallel.capacity:
            raise ValueError(
                f"parallel.capacity={parallel.capacity} has nothing to bound on one rank: no rows travel and none is "
                "dropped; start with torchrun --nproc-per-node, or set it to 0"
            )
        if parallel.link.kind is LinkKind.emulated:
            raise ValueError(
                "parallel.link.kind=emulated has nothing to slow down on one rank: nothing travels; start with "
                "torchrun --nproc-per-node, or set it to real"
            )
        return None
    return build_mesh(parallel.ep or ranks.world_size, ranks.device.partition(":")[0], tp=parallel.tp)


def load_spread(
    path: str | Path,
    parallel: ParallelConfig,
    ranks: Ranks,
    mesh: DeviceMesh | None,
    *,
    wiring: str | None = None,
    layers: str = "all",
    dtype: torch.dtype | None = None,
) -> Any:
    """A checkpoint's model, of which this rank reads and holds its slices only. A collective.

    Args:
        path: of the checkpoint.
        parallel: how the model is spread.
        ranks: this process among the others.
        mesh: of all ranks; None for a world of one.
        wiring: how to wire it; None for what the checkpoint says.
        layers: which layers, for a wiring.
        dtype: of the parameters; None for that of the checkpoint.
    """
    chosen = None if wiring is None else layers
    if mesh is None:
        return load(path, wiring, chosen, dtype, ranks.device)
    return load(path, wiring, chosen, dtype, ranks.device, mesh, **spread(parallel, mesh))


def build_spread(
    config: FreshModelConfig,
    tokenizer: Any,
    wiring: WiringConfig,
    parallel: ParallelConfig,
    ranks: Ranks,
    mesh: DeviceMesh | None,
) -> Any:
    """A model with random weights, of which this rank builds and holds its slices only. A collective.

    Args:
        config: of the model.
        tokenizer: its vocabulary.
        wiring: how to wire it.
        parallel: how it is spread.
        ranks: this process among the others.
        mesh: of all ranks; None for a world of one.
    """
    model = build_model(
        config.family,
        config.config,
        vocab_size=len(tokenizer),
        end_of_document_id=tokenizer.eos_token_id,
        seed=config.seed,
        here=None if mesh is None else places_here(mesh),
    ).to(ranks.device)
    rewire(model, wiring.name, wiring.layers)
    return model if mesh is None else parallelize(model, mesh, already_cut=True, **spread(parallel, mesh))


def spread(parallel: ParallelConfig, mesh: DeviceMesh) -> Spread:
    """The configuration's settings of `parallelize`. Makes links: a collective."""
    link, tensor_link = (build_link(parallel, mesh, axis) for axis in (EP_AXIS, TP_AXIS))
    return {
        "schedule": parallel.schedule.value,
        "link": link,
        "tensor_link": tensor_link,
        "chunks": parallel.chunks,
        "capacity": parallel.capacity or None,
        "sequence_parallel": parallel.sequence_parallel,
        "side_stream": parallel.side_stream.value,
    }


def prepare(
    model: Any,
    parallel: ParallelConfig,
    balance: BalanceConfig,
    ranks: Ranks,
    mesh: DeviceMesh | None,
    *,
    precision: Precision = Precision.fp32,
    frozen: bool = False,
) -> Prepared:
    """Move a rewired model to its device, spread it unless it is, attach recomputation and balancing, and put the
    threads of gloo groups that are there by then ahead of compute. A collective."""
    model.to(ranks.device)
    model.requires_grad_(not frozen)
    model.train(not frozen)
    if attachment_of(model) is None:
        rewire(model, wiring_of(model))
    attachment = attachment_of(model)
    assert attachment is not None
    if mesh is not None and attachment.mesh is None:
        parallelize(model, mesh, **spread(parallel, mesh))
    if parallel.side_stream is not SideStream.none and ranks.rank == 0 and not frozen and ranks.device == "cpu":
        print(f"side stream: {parallel.side_stream} has no effect on CPU, which has no streams", flush=True)
    use_kernels(model, parallel.kernels.value)
    if ranks.rank == 0 and not frozen:
        with autocast(torch.device(ranks.device), precision):
            print(kernels_line(model, parallel.kernels.value), flush=True)
    attachment = attachment_of(model)
    assert attachment is not None
    if parallel.recompute is Recompute.selective and not frozen:
        recompute_stages(model)
    if parallel.recompute is Recompute.full and not frozen:
        _checkpoint_activations(model)
        attachment.checkpoint_layers = parallel.recompute_layers
    communicator: Communicator = SingleProcess(model)
    if mesh is not None:
        dispatcher: Any = attachment.executor.dispatcher
        tensor_parallel: Any = attachment.executor.tensor_parallel
        communicator = DataParallel(
            mesh,
            dict(model.named_parameters()),
            sharded=attachment.sharded_experts,
            layout=attachment.tensor_layout,
            overlap=parallel.overlap_gradients,
            shard_optimizer=parallel.shard_optimizer and not frozen,
            links=[each.link for each in (dispatcher, tensor_parallel) if each is not None],
        )
    balancer: Balancer | None = None
    if not frozen:
        balancer = balance_model(
            model,
            aux_coefficient=balance.aux_coefficient,
            bias_rate=balance.bias_rate,
            # Over processes: under tensor parallelism each of them routes its share of the same tokens.
            launch_sum=communicator.launch_sum_over_processes,
        )
        if mesh is not None and dispatcher is not None and dispatcher.capacity is not None:
            balancer = DroppedRows(dispatcher, balancer, communicator.sum_over_processes, device=ranks.device)
    if mesh is not None and ranks.device == "cpu":
        realtime = set_gloo_threads(parallel.gloo_threads)
        if ranks.rank == 0 and not frozen:
            print(f"gloo's threads: {'realtime, ahead of compute' if realtime else 'ordinary'}", flush=True)
    return Prepared(model=model, language_model=HFLanguageModel(model), communicator=communicator, balancer=balancer)


def _checkpoint_activations(model: Any) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # from transformers 5.23 on, which deprecates the other name
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def build_link(parallel: ParallelConfig, mesh: DeviceMesh, axis: str) -> ProcessGroupLink | None:
    """The link over the ranks of an axis; None where there is but one."""
    if axis_size(mesh, axis) == 1:
        return None
    group, config = axis_group(mesh, axis), parallel.link
    if config.kind is LinkKind.emulated:
        return EmulatedLink(group, bandwidth_gbit_s=config.bandwidth_gbit_s, latency_us=config.latency_us)
    exchanges_rows = axis == EP_AXIS or parallel.sequence_parallel
    return real_link(group) if exchanges_rows else ProcessGroupLink(group)


def run_training(
    prepared: Prepared,
    objective: Objective,
    data: TextData,
    config: TrainingConfig,
    folder: Path,
    ranks: Ranks,
    *,
    on_start: Callable[[], None],
    resume: bool,
    trace_steps: Sequence[int] = (),
    stages: WiringStages | None = None,
) -> TrainResult:
    """Train, then leave the best weights (the last ones without evaluation) in the model. A collective.

    With `stages` the model takes its wiring on in them, and weights before the last stage are none of the best.
    `on_start` is called when all that a resumed run reads has been read.

    Returns:
        How it ended; with `StopReason.shutdown` the caller has to leave at once, the checkpoint is written.
    """
    late = [step for step in trace_steps if step > config.num_steps]
    if late:
        raise ValueError(
            f"profile.steps={list(trace_steps)}: step {late[0]} is beyond training.num_steps={config.num_steps}; leave "
            "it out"
        )
    shutdown = ShutdownRequest()
    attachment = attachment_of(prepared.model)
    assert attachment is not None
    newest = latest_checkpoint(folder / CHECKPOINTS) if resume else None
    first_step = 1 if newest is None else read_manifest(newest).step + 1
    with (
        StepTracer(
            attachment.executor, folder / "traces", trace_steps, rank=ranks.rank, first_step=first_step
        ) as tracer,
        ExitStack() as stack,
    ):
        on_step: list[Callable[[StepReport], None]] = [tracer]
        if stages is not None:
            say = partial(print, flush=True) if ranks.rank == 0 else lambda line: None
            on_step.append(stack.enter_context(StagedRewiring(prepared.model, stages, first_step=first_step, say=say)))
        shutdown.install()
        try:
            result = train(
                objective,
                data,
                prepared.communicator,
                config,
                folder,
                balancer=prepared.balancer,
                shutdown=shutdown,
                on_start=on_start,
                on_step=on_step,
                resume=newest,
                judged_from=1 if stages is None else stages.last_begins,
            )
        finally:
            shutdown.uninstall()
    stopped = result.reason is StopReason.shutdown
    if ranks.rank == 0:
        more = "; the same command with run.resume=true goes on from there" if stopped else ""
        print(f"{folder}: {result.reason} after step {result.progress.step}{more}", flush=True)
    if stopped:
        return result
    if result.best_checkpoint is not None and result.best_checkpoint != result.last_checkpoint:
        _load_weights(prepared, config, folder, result.best_checkpoint)
    return result


def measure(
    prepared: Prepared, data: TextData, config: TrainingConfig, num_batches: int, teacher: Prepared | None = None
) -> Evaluation:
    """Held-out cross entropy, and KL to the teacher. A collective."""
    was_training = prepared.model.training
    prepared.model.eval()
    result = evaluate(
        prepared.language_model,
        data.heldout_batches(num_batches),
        prepared.communicator,
        teacher=teacher.language_model if teacher is not None else None,
        precision=config.precision,
        positions=config.distilled_positions,
        chunk_tokens=config.loss_chunk_tokens,
    )
    prepared.model.train(was_training)
    return result


def tune(
    prepared: Prepared, objective: Objective, data: TextData, parallel: ParallelConfig, precision: Precision
) -> StageTimes | None:
    """Choose the schedule by stage times measured in the precision that is trained in; None where there is nothing to
    choose. A collective."""
    if parallel.warmup_steps < 0:
        raise ValueError(f"parallel.warmup_steps={parallel.warmup_steps} is too small; use 0 for no warm-up")
    if parallel.warmup_steps == 0:
        return None
    device = next(prepared.model.parameters()).device
    batch = next(data.train_batches()).to(device)

    def step() -> None:
        trained_loss(objective, batch, device, precision).loss.backward()
        prepared.model.zero_grad(set_to_none=True)

    return tune_schedule(prepared.model, step, parallel.warmup_steps)


def write_plan(prepared: Prepared, config: Any, folder: Path, ranks: Ranks, times: StageTimes | None) -> None:
    """The resolved configuration, the schedule and what it was chosen by, beside the run."""
    if ranks.rank != 0:
        return
    write_config(config, folder)
    schedule = schedule_of(prepared)
    write_text(folder / "schedule.json", json.dumps(schedule.to_dict(), indent=1) + "\n")
    if times is not None:
        measured = {"forward": dict(times.forward), "backward": dict(times.backward)}
        write_text(folder / STAGE_TIMES, json.dumps(measured, indent=1) + "\n")
    text = [f"{wiring_of(prepared.model)}, {schedule.mode}"]
    attachment = attachment_of(prepared.model)
    if attachment is not None and attachment.executor.graph.is_sequence_parallel:
        text += [
            "besides, once per pass and exposed: an all-gather behind the last layer, in backward before the first"
        ]
    for direction, steps in (("forward", schedule.forward), ("backward", schedule.backward)):
        text += ["", direction, schedule.timeline(direction)]
        if times is not None:
            text += ["", "measured stage times (ms) say, no contention assumed:", explain(steps, times, direction)]
    write_text(folder / "schedule.txt", "\n".join(text) + "\n")


def schedule_of(prepared: Prepared) -> Schedule:
    """The schedule that training steps of a model follow."""
    attachment = attachment_of(prepared.model)
    assert attachment is not None
    recompute = any(layer.gradient_checkpointing for layer in layers_of(prepared.model))
    return attachment.executor.schedule(attachment.segments(recompute=recompute))


def export(prepared: Prepared, tokenizer: Any, path: Path, ranks: Ranks) -> None:
    """Write the model with its tokenizer, loadable by `farskip.load`. A collective."""
    save(prepared.model, path)
    if ranks.rank == 0:
        tokenizer.save_pretrained(path)
    if ranks.world_size > 1:
        barrier(ranks.device)


def _load_weights(prepared: Prepared, config: TrainingConfig, folder: Path, checkpoint: Path) -> None:
    module = prepared.model
    device = next(module.parameters()).device
    store = CheckpointStore(folder / CHECKPOINTS, prepared.communicator, keep_last=1, device=device)
    optimizer = build_optimizer(module, config.optimizer, prepared.communicator.shares)
    store.load(checkpoint, lambda names: tensors_to_fill(names, module, optimizer, prepared.communicator))
