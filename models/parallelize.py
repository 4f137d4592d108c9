"""`parallelize`: spread the experts of a model over ranks and put its collectives under a schedule."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from farskip.executor import Executor
from farskip.models.attach import attach, attachment_of, layers_of
from farskip.models.family import family_of_model
from farskip.models.hf_layer import HFSubBlocks
from farskip.models.surgery import wiring_of
from farskip.parallel.collectives import ProcessGroupLink
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.mesh import EP_AXIS, axis_size
from farskip.simulator import StageTimes
from farskip.stage_timer import StageTimer
from farskip.wiring import Wiring

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    mesh: DeviceMesh,
    schedule: str = "overlapped",
    *,
    link: ProcessGroupLink | None = None,
    chunks: int = 1,
    times: StageTimes | None = None,
) -> Model:
    """Spread the routed experts over the ``ep`` axis of a mesh; every rank keeps everything else.

    Args:
        model: a transformers causal language model of a known family, whole and equal on all ranks.
        mesh: has an axis ``ep``; see `farskip.parallel.mesh.build_mesh`. A collective over all its ranks.
        schedule: ``overlapped`` or ``serial``; both compute the same function, bit for bit.
        link: what carries the rows, over the ranks of ``ep``; torch.distributed's group if None.
        chunks: parts into which the tokens of each layer are cut, so that exchanges also hide under routed experts.
        times: stage times that rank 0 chooses the schedule by.

    Returns:
        The same model, whose routed experts now are this rank's slice.

    Raises:
        ValueError: unknown family, experts that ``ep`` does not divide, a model that is parallel already, or ranks
            that disagree about the wiring. The model is untouched.
    """
    family = family_of_model(model)
    previous = attachment_of(model)
    if previous is not None and previous.mesh is not None:
        raise ValueError("parallelize: the model is parallel already; load it afresh to spread it differently")
    blocks = [family.sub_blocks(layer) for layer in layers_of(model)]
    wiring = wiring_of(model)
    ep = axis_size(mesh, EP_AXIS)
    num_experts = max((_num_experts(block) for block in blocks), default=0)
    dispatcher = None
    if ep > 1 and num_experts:
        dispatcher = AllToAllDispatcher(link or ProcessGroupLink(mesh.get_group(EP_AXIS)), num_experts, chunks)
    _refuse_disagreement(wiring, chunks)
    mode, times = _agree((schedule, times))
    executor = Executor(blocks, wiring, dispatcher=dispatcher, mode=mode, times=times)
    executor.set_schedule(type(executor.schedule()).from_dict(_agree(executor.schedule().to_dict())))
    if previous is not None:
        executor.observers, executor.routing_hook = previous.executor.observers, previous.executor.routing_hook
    attachment = attach(model, executor)
    attachment.mesh = mesh
    if dispatcher is not None:
        attachment.sharded_experts = _shard_experts(model, blocks, dispatcher.link.rank, dispatcher.link.size)
    return model


def tune_schedule(model: Any, step: Callable[[], None], num_steps: int = 2) -> StageTimes | None:
    """Measure the stages of a parallel model and choose its schedule by them. A collective.

    Args:
        model: a parallel model.
        step: runs forward and backward once; called ``1 + num_steps`` times, the first one unmeasured.
        num_steps: measured steps.

    Returns:
        Rank 0's stage times in milliseconds, on every rank; None for a model with nothing to schedule.

    Note: what is computed does not depend on the schedule, so neither does anything that is trained afterwards.
    """
    attachment = attachment_of(model)
    if attachment is None or not attachment.executor.graph.has_collectives or attachment.executor.mode == "serial":
        return None
    executor, timer = attachment.executor, StageTimer()
    mode, hook = executor.mode, executor.routing_hook
    executor.routing_hook = None  # the warm-up's tokens are not the training's
    executor.reschedule("serial", None)
    step()
    executor.observers.append(timer)
    try:
        for _ in range(num_steps):
            step()
    finally:
        executor.observers.remove(timer)
        executor.routing_hook = hook
    times: StageTimes = _agree(timer.times())
    executor.reschedule(mode, times)
    return times


def full_state_dict(model: Any) -> dict[str, torch.Tensor]:
    """The whole model's state dict, experts of all ranks together, on every rank. A collective for a parallel model."""
    state = dict(model.state_dict())
    attachment = attachment_of(model)
    if attachment is None or not attachment.sharded_experts:
        return state
    group = attachment.mesh.get_group(EP_AXIS)
    for name in attachment.sharded_experts:
        local = state[name].contiguous()
        slices = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(slices, local, group=group)
        state[name] = torch.cat(slices)
    return state


def _num_experts(block: HFSubBlocks) -> int:
    return int(block.experts.num_experts) if block.experts is not None else 0  # type: ignore[arg-type]


def _shard_experts(model: nn.Module, blocks: list[HFSubBlocks], rank: int, size: int) -> tuple[str, ...]:
    """Cut every expert parameter to this rank's slice. Returns the names of what was cut."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    cut = []
    for block in blocks:
        experts = block.experts
        if experts is None:
            continue
        local = _num_experts(block) // size
        for name, parameter in list(experts.named_parameters(recurse=False)):
            mine = parameter.detach()[rank * local : (rank + 1) * local].clone()
            setattr(experts, name, nn.Parameter(mine, requires_grad=parameter.requires_grad))
            cut.append(names[id(parameter)])
        experts.num_experts = local  # type: ignore[assignment]
    return tuple(cut)


def _refuse_disagreement(wiring: Wiring, chunks: int) -> None:
    """All ranks hear of it: one that went on alone would wait for the others until the timeout."""
    settings: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(settings, {"wiring": wiring.to_dict(), "chunks": chunks})
    for rank, other in enumerate(settings):
        for name, value in other.items():
            if value != settings[0][name]:
                raise ValueError(
                    f"parallelize: rank {rank} has {name} {value}, rank 0 {settings[0][name]}; give all ranks the same"
                )


def _agree(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
