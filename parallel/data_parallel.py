"""The data-parallel world of a training step: gradients summed over the right ranks, a norm that counts experts once.

Every rank computes the gradient of its own share of one global loss sum. A replicated parameter's gradient is the sum
over all ranks. An expert already holds the gradients of all tokens that were dispatched to it, from every rank of its
``ep`` axis; only its replicas are summed. So a step on k ranks is the step of one rank on the concatenated batch.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from farskip.parallel.collectives import ProcessGroupLink
from farskip.parallel.mesh import EP_AXIS, REPLICA_AXIS, axis_size

_BUCKET_BYTES = 32 << 20


class DataParallel:
    """Implements `farskip.training_protocols.Communicator` on a device mesh.

    Args:
        mesh: the mesh from `build_mesh`.
        parameters: the model's trainable parameters by name.
        sharded: names of the expert parameters that lie in slices on the ``ep`` axis.
        links: links whose waiting time counts as exposed communication.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        sharded: Collection[str] = (),
        links: Iterable[ProcessGroupLink] = (),
    ) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._mesh = mesh
        self._sharded = frozenset(sharded)
        self._replicated_parameters = [p for name, p in parameters.items() if name not in self._sharded]
        self._expert_parameters = [p for name, p in parameters.items() if name in self._sharded]
        self._device = next(iter(parameters.values())).device
        self._links = tuple(links)
        self._waited_s = 0.0
        self._reported_s = 0.0

    def reduce_gradients(self) -> None:
        """Sum gradients: replicated ones over all ranks, expert ones over the replicas. A collective."""
        self._timed(lambda: self._sum(self._replicated_parameters, dist.group.WORLD, self.world_size))
        if axis_size(self._mesh, REPLICA_AXIS) > 1:
            group = self._mesh.get_group(REPLICA_AXIS)
            self._timed(lambda: self._sum(self._expert_parameters, group, axis_size(self._mesh, REPLICA_AXIS)))

    def clip_gradients(self, max_norm: float | None) -> torch.Tensor:
        """Global L2 norm of all gradients, every expert counted once; gradients are scaled down to `max_norm`."""
        squares = torch.stack([self._squares(self._replicated_parameters), self._squares(self._expert_parameters)])
        if self._expert_parameters and axis_size(self._mesh, EP_AXIS) > 1:
            dist.all_reduce(squares[1], group=self._mesh.get_group(EP_AXIS))
        norm = squares.sum().sqrt()
        if max_norm is not None:
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            for parameter in (*self._replicated_parameters, *self._expert_parameters):
                if parameter.grad is not None:
                    parameter.grad.mul_(factor.to(parameter.grad.dtype))
        return norm.float()

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on every rank if any rank says True."""
        flags = torch.tensor([float(flag)], device=self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def wrap_for_checkpoint(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A DTensor over this rank's slice for an expert parameter or its optimizer state, else the tensor itself."""
        if name not in self._sharded or tensor.dim() == 0:
            return tensor
        placements = [Shard(0) if axis == EP_AXIS else Replicate() for axis in self._mesh.mesh_dim_names or ()]
        return DTensor.from_local(tensor, self._mesh, placements, run_check=False)

    def exposed_communication_s(self) -> float:
        """Seconds this rank stood waiting for collectives since the last call."""
        total = self._waited_s + sum(link.waited_s for link in self._links)
        since, self._reported_s = total - self._reported_s, total
        return since

    def _timed(self, call: Callable[[], Any]) -> None:
        start = time.perf_counter()
        call()
        self._waited_s += time.perf_counter() - start

    def _sum(self, parameters: list[torch.nn.Parameter], group: dist.ProcessGroup | None, size: int) -> None:
        if size == 1 or not parameters:
            return
        # A parameter without a gradient here may have one elsewhere; one that has none anywhere keeps none.
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=self._device)
        dist.all_reduce(present, op=dist.ReduceOp.MAX, group=group)
        used = [parameter for parameter, flag in zip(parameters, present.tolist(), strict=True) if flag]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in used if parameter.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat, group=group)
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def _squares(self, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients]).double().square().sum()


def _buckets(gradients: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Neighbors of one dtype, up to `_BUCKET_BYTES` each, in a fixed order."""
    buckets: list[list[torch.Tensor]] = []
    size = 0
    for gradient in gradients:
        if not buckets or buckets[-1][0].dtype != gradient.dtype or size + gradient.nbytes > _BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.nbytes
    return buckets
