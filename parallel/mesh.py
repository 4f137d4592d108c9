"""Degrees of parallelism -> device mesh. All ranks are data-parallel; experts are spread over the axis ``ep``.

rank = replica * ep + position in ep
"""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

EP_AXIS, REPLICA_AXIS = "ep", "replica"


def build_mesh(ep: int, device_type: str = "cpu") -> DeviceMesh:
    """The mesh of the ranks of the default process group, which has to be initialized.

    Args:
        ep: over how many neighboring ranks the experts of a layer are spread.
        device_type: ``cpu`` or ``cuda``.

    Returns:
        A mesh with the axes ``replica`` and ``ep``.

    Raises:
        ValueError: `ep` does not divide the number of ranks.
    """
    world = dist.get_world_size()
    if ep < 1 or world % ep:
        raise ValueError(f"ep={ep} does not divide {world} ranks: choose a divisor of {world}")
    return init_device_mesh(device_type, (world // ep, ep), mesh_dim_names=(REPLICA_AXIS, EP_AXIS))


def axis_size(mesh: DeviceMesh, axis: str) -> int:
    """Number of ranks along an axis; 1 for an axis that the mesh does not have."""
    names = mesh.mesh_dim_names or ()
    return mesh.size(names.index(axis)) if axis in names else 1
