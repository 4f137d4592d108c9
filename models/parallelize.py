"""`parallelize`: spread a model over ranks and put its collectives under a schedule.

Experts are spread over the ``ep`` axis of a mesh; attention, dense MLPs and shared experts are cut over its ``tp``
axis. Where a mesh has both, ``ep`` goes over whole ``tp`` groups: each rank of such a group routes and dispatches its
share of the tokens that they all see, and its routed output, zero for the tokens of the others, is reduced like any
other. Under sequence parallelism such a rank holds the stream of its share only, and nothing is filled with zeros.
"""

from collections.abc import Callable
from typing import Any, TypedDict, TypeVar, Unpack

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from farskip.executor import Executor
from farskip.lanes import SideStream
from farskip.models.attach import attach, attachment_of, layers_of
from farskip.models.family import family_of_model
from farskip.models.forward_guards import ForwardGuards
from farskip.models.hf_layer import HFSubBlocks
from farskip.models.kernels import dispatcher_backend, setting_of
from farskip.models.sliced_norm import spread_norms
from farskip.models.surgery import wiring_of
from farskip.models.tensor_parallel import check_tensor_parallel, cut_tensors, head_norms
from farskip.parallel.collectives import ProcessGroupLink
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.mesh import EP_AXIS, TP_AXIS, another_group, axis_group, axis_size, check_mesh
from farskip.parallel.tensor_parallel import TensorParallelRanks, gather_slices
from farskip.schedule import check_mode
from farskip.simulator import StageTimes
from farskip.stage_timer import StageTimer

Model = TypeVar("Model", bound=nn.Module)


class Spread(TypedDict, total=False):
    """The settings of `parallelize`, as keyword arguments of whoever passes them on."""

    schedule: str
    link: ProcessGroupLink | None
    tensor_link: ProcessGroupLink | None
    chunks: int
    capacity: int | None
    times: StageTimes | None
    sequence_parallel: bool
    side_stream: str


def check_spread(mesh: DeviceMesh, **spread: Unpack[Spread]) -> None:
    """Refuse what no model can be spread by, before one is read or touched.

    Raises:
        ValueError: a mesh of other axes, sequence parallelism without ``tp``, or an unknown name.
    """
    check_mesh(mesh)
    check_mode(spread.get("schedule", "overlapped"))
    SideStream.named(spread.get("side_stream", SideStream.none))
    if spread.get("sequence_parallel") and axis_size(mesh, TP_AXIS) == 1:
        raise ValueError(
            "parallelize: sequence_parallel=True with tp=1 has no ranks to share tokens among; make the mesh with "
            "build_mesh(ep, tp=2) or more, or leave sequence_parallel out"
        )


def parallelize(
    model: Model,
    mesh: DeviceMesh,
    schedule: str = "overlapped",
    *,
    link: ProcessGroupLink | None = None,
    tensor_link: ProcessGroupLink | None = None,
    chunks: int = 1,
    capacity: int | None = None,
    times: StageTimes | None = None,
    sequence_parallel: bool = False,
    side_stream: str = "none",
    already_cut: bool = False,
) -> Model:
    """Spread the routed experts over the ``ep`` axis of a mesh, and cut the other sub-blocks over its ``tp`` axis.

    Args:
        model: a transformers causal language model of a known family, whole and equal on all ranks.
        mesh: has an axis ``ep``, ``tp`` or both; see `farskip.parallel.mesh.build_mesh`. A collective over all its
            ranks. The ranks of one ``tp`` group have to be given the same tokens; the first forward pass checks it.
        schedule: ``overlapped`` or ``serial``; both compute the same function, bit for bit.
        link: what carries the rows, over the ranks of ``ep``; torch.distributed's group if None.
        tensor_link: what carries the collectives of ``tp``, over its ranks; torch.distributed's group if None.
        chunks: parts into which the tokens of each layer are cut, so that exchanges also hide under routed experts;
            with sequence parallelism so are those of MLPs and shared experts.
        capacity: rows that an expert takes from one rank, layer and chunk, later ones are dropped; None drops none.
        times: stage times that rank 0 chooses the schedule by.
        sequence_parallel: each rank of ``tp`` holds the stream of its share of the tokens only; norms and adds stand
            between reduce-scatter and all-gather instead of behind an all-reduce. Another bracketing of the same sums.
        side_stream: which stages of an overlapped schedule run on a CUDA stream of their own beside compute: ``none``,
            ``merge`` or ``merge_and_route`` (`farskip.lanes`). The same bits; on CPU they run in place.
        already_cut: the parameters are this rank's slices already, as `farskip.load` reads them.

    Returns:
        The same model, whose routed experts and projections now are this rank's slices. Its ``generate`` wants
        ``synced_gpus=True`` on all ranks where their texts may end at different lengths.

    Raises:
        ValueError: unknown family, experts that ``ep`` does not divide, heads or widths that ``tp`` does not divide, a
            model that is parallel already, sequence parallelism without ``tp``, a side stream with ``tp`` or without
            rows that travel, or ranks that disagree about the wiring. The model is untouched.
    """
    family = family_of_model(model)
    previous = attachment_of(model)
    if previous is not None and previous.mesh is not None:
        raise ValueError("parallelize: the model is parallel already; load it afresh to spread it differently")
    blocks = [family.sub_blocks(layer) for layer in layers_of(model)]
    wiring = wiring_of(model)
    check_spread(mesh, schedule=schedule, sequence_parallel=sequence_parallel, side_stream=side_stream)
    ep = axis_size(mesh, EP_AXIS)
    num_experts = max((_num_experts(block) for block in blocks), default=0)
    dispatcher = None
    if ep > 1 and num_experts:
        backend = dispatcher_backend(setting_of(model))
        rows_link = link or ProcessGroupLink(axis_group(mesh, EP_AXIS))
        dispatcher = AllToAllDispatcher(rows_link, num_experts, chunks, capacity=capacity, backend=backend)
    tensor_parallel = None
    if axis_size(mesh, TP_AXIS) > 1:
        if not already_cut:
            check_tensor_parallel(model, family, blocks, axis_size(mesh, TP_AXIS))
        tensor_link = tensor_link or ProcessGroupLink(axis_group(mesh, TP_AXIS))
        tensor_parallel = TensorParallelRanks(tensor_link, sequence_parallel=sequence_parallel, chunks=chunks)
    settings = {"chunks": chunks, "capacity": capacity, "sequence_parallel": sequence_parallel}
    _refuse_disagreement({"wiring": wiring.to_dict(), **settings, "side_stream": side_stream})
    mode, times = _agree((schedule, times))
    executor = Executor(
        blocks,
        wiring,
        dispatcher=dispatcher,
        tensor_parallel=tensor_parallel,
        mode=mode,
        times=times,
        side_stream=side_stream,
    )
    if dispatcher is not None:
        executor.wait_meter = dispatcher.link.meter
    executor.set_schedule(type(executor.schedule()).from_dict(_agree(executor.schedule().to_dict())))
    if previous is not None:
        executor.observers, executor.routing_hook = previous.executor.observers, previous.executor.routing_hook
    attachment = attach(model, executor)
    attachment.mesh = mesh
    if dispatcher is not None:
        attachment.sharded_experts = _shard_experts(
            model, blocks, dispatcher.link.rank, dispatcher.link.size, cut=already_cut
        )
    if tensor_parallel is not None:
        assert tensor_link is not None
        layout = cut_tensors(model, family, tensor_parallel.rank, tensor_parallel.size, already_cut=already_cut)
        attachment.tensor_layout = layout.without(attachment.sharded_experts)
        norms = head_norms(model, family)
        if norms:
            spread_norms(norms, TensorParallelRanks(tensor_link.over(another_group(axis_group(mesh, TP_AXIS)))))
    attachment.guards = ForwardGuards(
        model,
        [*attachment.sharded_experts, *attachment.tensor_layout.sharded],
        axis_group(mesh, TP_AXIS) if tensor_parallel is not None else None,
    )
    return model


def set_sequence_parallel(model: Any, enabled: bool = True, *, chunks: int = 1) -> None:
    """Switch sequence parallelism of a parallel model on or off; its parameters lie alike in both. A collective.

    For example for generation, where one all-reduce is quicker than two exchanges.

    Args:
        model: cut over the ``tp`` axis of a mesh.
        enabled: see `parallelize`.
        chunks: of MLPs and shared experts; those of routed experts stay as they are.

    Raises:
        ValueError: a model that is not cut, no chunk, or ranks that disagree.

    Note: the schedule is chosen afresh, by relative stage times; `tune_schedule` measures them.
    """
    attachment = attachment_of(model)
    ranks = attachment.executor.tensor_parallel if attachment is not None else None
    if attachment is None or not isinstance(ranks, TensorParallelRanks):
        raise ValueError(
            "set_sequence_parallel: the model is not cut; call parallelize with a mesh of tp=2 or more first"
        )
    changed = TensorParallelRanks(ranks.link, sequence_parallel=enabled, chunks=chunks)
    _refuse_disagreement({"sequence_parallel": enabled, "chunks": chunks})
    before = attachment.executor
    executor = Executor(
        before.sub_blocks, before.wiring, dispatcher=before.dispatcher, tensor_parallel=changed, mode=before.mode
    )
    executor.observers, executor.routing_hook = before.observers, before.routing_hook
    attach(model, executor)


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
    executor, timer = attachment.executor, StageTimer(next(model.parameters()).device)
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
        if isinstance(executor.dispatcher, AllToAllDispatcher):
            executor.dispatcher.take_dropped()
    times: StageTimes = _agree(timer.times())
    executor.reschedule(mode, times)
    return times


def full_state_dict(model: Any, *, first_rank_only: bool = False) -> dict[str, torch.Tensor]:
    """The whole model's state dict, slices of all ranks together. A collective for a parallel model.

    Args:
        model: a model, parallel or not.
        first_rank_only: rank 0 of a parallel model gets what was gathered, in CPU memory, and the others nothing, so
            that no device has to hold the whole model.
    """
    state = dict(model.state_dict())
    attachment = attachment_of(model)
    if attachment is None or attachment.mesh is None:
        return state
    cut = dict.fromkeys(attachment.sharded_experts, (0, EP_AXIS))
    cut |= {name: (dim, TP_AXIS) for name, dim in attachment.tensor_layout.sharded.items()}
    for name, (dim, axis) in cut.items():
        whole = gather_slices(state[name], dim, axis_group(attachment.mesh, axis))
        if not first_rank_only:
            state[name] = whole
        elif dist.get_rank() == 0:
            state[name] = whole.cpu()
    return {} if first_rank_only and dist.get_rank() != 0 else state


def _num_experts(block: HFSubBlocks) -> int:
    return int(block.experts.num_experts) if block.experts is not None else 0  # type: ignore[arg-type]


def _shard_experts(model: nn.Module, blocks: list[HFSubBlocks], rank: int, size: int, *, cut: bool) -> tuple[str, ...]:
    """Cut every expert parameter to this rank's slice, unless they are. Returns the names of what is a slice."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sliced = []
    for block in blocks:
        experts = block.experts
        if experts is None:
            continue
        local = _num_experts(block) // size
        for name, parameter in list(experts.named_parameters(recurse=False)):
            sliced.append(names[id(parameter)])
            if cut:
                assert parameter.shape[0] == local, f"{sliced[-1]} has {parameter.shape[0]} experts instead of {local}"
                continue
            mine = parameter.detach()[rank * local : (rank + 1) * local].clone()
            setattr(experts, name, nn.Parameter(mine, requires_grad=parameter.requires_grad))
        experts.num_experts = local  # type: ignore[assignment]
    return tuple(sliced)


def _refuse_disagreement(mine: dict[str, Any]) -> None:
    """All ranks hear of it: one that went on alone would wait for the others until the timeout."""
    settings: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(settings, mine)
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
