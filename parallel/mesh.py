"""Degrees of parallelism -> device mesh. Experts are spread over the axis ``ep``, sub-blocks over the axis ``tp``.

    without tensor parallelism    axes replica, ep          rank = replica * ep + position in ep
    with it, experts whole        axes replica, tp          rank = replica * tp + position in tp
    with it, experts spread       axes replica, ep_groups, tp
                                  rank = replica * ep + ep_group * tp + position in tp

Neighbors in ``tp`` see the same tokens; all other ranks are data-parallel. Experts are spread over whole ``tp`` groups,
so ``ep`` is the two last axes together, and ``data``, the ranks with other tokens, the two first.
"""

import math
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from farskip.parallel.degrees import check_degrees

EP_AXIS, REPLICA_AXIS, TP_AXIS, EP_GROUPS_AXIS, DATA_AXIS = "ep", "replica", "tp", "ep_groups", "data"
SLICES_AXIS, COPIES_AXIS = "slices", "copies"
_TOGETHER = {EP_AXIS: (EP_GROUPS_AXIS, TP_AXIS), DATA_AXIS: (REPLICA_AXIS, EP_GROUPS_AXIS)}


def build_mesh(ep: int, device_type: str = "cpu", *, tp: int = 1) -> DeviceMesh:
    """The mesh of the ranks of the default process group, which has to be initialized.

    Args:
        ep: over how many neighboring ranks the experts of a layer are spread.
        device_type: ``cpu`` or ``cuda``.
        tp: over how many neighboring ranks attention, dense MLPs and shared experts are cut.

    Returns:
        A mesh with the axes of the module's table. Its groups wait for a rank that does not answer as long as the
        default group does; torch by itself gives new groups half an hour under gloo.

    Raises:
        ValueError: `ep` or `tp` does not divide the number of ranks, or `ep` would cut a tensor-parallel group.
    """
    world = dist.get_world_size()
    check_degrees(world, ep, tp)
    if tp == 1:
        mesh = init_device_mesh(device_type, (world // ep, ep), mesh_dim_names=(REPLICA_AXIS, EP_AXIS))
    elif ep == 1:
        mesh = init_device_mesh(device_type, (world // tp, tp), mesh_dim_names=(REPLICA_AXIS, TP_AXIS))
    else:
        mesh = init_device_mesh(
            device_type, (world // ep, ep // tp, tp), mesh_dim_names=(REPLICA_AXIS, EP_GROUPS_AXIS, TP_AXIS)
        )
        for name, axes in _TOGETHER.items():
            mesh[axes]._flatten(name)
    timeout = timeout_of(None)
    if timeout is not None:
        for axis in {*(mesh.mesh_dim_names or ()), *(_TOGETHER if ep > 1 and tp > 1 else ())}:
            _set_pg_timeout(timeout, mesh.get_group(axis))
    return mesh


def copies_mesh(mesh: DeviceMesh, axes: tuple[str, ...]) -> DeviceMesh:
    """All ranks of a mesh by what they hold of something that is cut over some of its axes.

    Args:
        mesh: of all ranks.
        axes: over which it is cut, in the order of the mesh; none: every rank holds the whole.

    Returns:
        A mesh with the axes ``slices``, in the order of the cut, and ``copies``, the ranks that hold the same slice.
        A collective; its groups wait as long as those of `build_mesh`.
    """
    names = mesh.mesh_dim_names or ()
    cut = [names.index(axis) for axis in axes]
    others = [number for number in range(len(names)) if number not in cut]
    num_slices = math.prod(mesh.size(number) for number in cut)
    ranks = mesh.mesh.permute(*cut, *others).reshape(num_slices, -1)
    copies = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=(SLICES_AXIS, COPIES_AXIS))
    timeout = timeout_of(None)
    if timeout is not None:
        for axis in (SLICES_AXIS, COPIES_AXIS):
            _set_pg_timeout(timeout, copies.get_group(axis))
    return copies


def axis_size(mesh: DeviceMesh, axis: str) -> int:
    """Number of ranks along an axis; 1 for an axis that the mesh does not have."""
    size = 1
    for name in axes_of(mesh, axis):
        size *= mesh.size((mesh.mesh_dim_names or ()).index(name))
    return size


def axes_of(mesh: DeviceMesh, axis: str) -> tuple[str, ...]:
    """The axes of the mesh that make up an axis: itself, two together, or none."""
    names = mesh.mesh_dim_names or ()
    if axis in names:
        return (axis,)
    if axis in _TOGETHER and EP_GROUPS_AXIS in names:
        return _TOGETHER[axis]
    return (REPLICA_AXIS,) if axis == DATA_AXIS and TP_AXIS in names and REPLICA_AXIS in names else ()


def axis_group(mesh: DeviceMesh, axis: str) -> dist.ProcessGroup:
    """The process group along an axis that the mesh has."""
    axes = axes_of(mesh, axis)
    if not axes:
        raise ValueError(f"mesh {mesh.mesh_dim_names} has no axis for {axis!r}; make it with build_mesh(ep, tp=...)")
    return mesh.get_group(axes[0] if len(axes) == 1 else axis)


def another_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A new process group of the ranks of a group, of all ranks if None. Its collectives wait for none of the other's,
    and as long as those for a rank that does not answer.

    A collective of the group.
    """
    ranks, timeout = dist.get_process_group_ranks(group), timeout_of(group)
    return dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)


def timeout_of(group: dist.ProcessGroup | None) -> timedelta | None:
    """How long collectives of a group, of the default group if None, wait for a rank that does not answer; None where
    the backend does not say."""
    whole: Any = group or dist.group.WORLD
    options: list[Any] = [getattr(whole._get_backend(device), "options", None) for device in whole._device_types]
    return next((each._timeout for each in options if hasattr(each, "_timeout")), None)


def check_mesh(mesh: DeviceMesh) -> None:
    """Refuse a mesh whose axes this project would read otherwise than its maker meant.

    Raises:
        TypeError: no mesh at all.
        ValueError: an axis ``ep`` beside an axis ``tp``.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh={mesh!r} is no device mesh; make one with farskip.parallel.mesh.build_mesh(ep, tp=...), and leave "
            "parallelize out on one rank"
        )
    names = mesh.mesh_dim_names or ()
    if TP_AXIS in names and EP_AXIS in names:
        raise ValueError(
            f"mesh {names}: experts are spread over whole tensor-parallel groups, not beside them; make the mesh with "
            "build_mesh(ep, tp=...)"
        )
