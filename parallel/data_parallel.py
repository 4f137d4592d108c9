"""The data-parallel world of a training step: gradients summed over the right ranks, a norm that counts experts once.

Every rank computes the gradient of its own share of one global loss sum. A replicated parameter's gradient is the sum
over all ranks. An expert already holds the gradients of all tokens that were dispatched to it, from every rank of its
``ep`` axis; only its replicas are summed. So a step on k ranks is the step of one rank on the concatenated batch.

Under tensor parallelism the ranks of a ``tp`` group share their tokens: only ranks with other tokens are summed, but
for gradients that are terms of a sum over ``tp`` (`farskip.parallel.tensor_parallel.TensorLayout.partial`), which are
summed over all ranks.

Sums are launched while the last backward of a step still runs (`farskip.parallel.gradient_sums`). The update behind
them can be divided over the ranks that hold the same (`farskip.parallel.optimizer_shares`).
"""

from collections.abc import Collection, Iterable, Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from farskip.parallel.collectives import ProcessGroupLink
from farskip.parallel.gradient_sums import GradientSums
from farskip.parallel.mesh import DATA_AXIS, EP_AXIS, REPLICA_AXIS, TP_AXIS, axes_of, axis_group, axis_size
from farskip.parallel.optimizer_shares import OptimizerShares, Slices
from farskip.parallel.tensor_parallel import TensorLayout
from farskip.parallel.together import barrier
from farskip.pending import Pending
from farskip.wait_meter import WaitMeter


class DataParallel:
    """Implements `farskip.training_protocols.Communicator` on a device mesh.

    Args:
        mesh: the mesh from `build_mesh`.
        parameters: the model's trainable parameters by name.
        sharded: names of the expert parameters that lie in slices on the ``ep`` axis.
        layout: how the other parameters lie on the ``tp`` axis.
        links: links whose waiting time counts as exposed communication.
        overlap: sum gradients under the last backward of a step; else behind it. The same bits.
        shard_optimizer: ranks that hold the same parameter divide its update and the optimizer's state. The same bits.
            `farskip.optimizer.build_optimizer` is given ``shares``.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        sharded: Collection[str] = (),
        layout: TensorLayout | None = None,
        links: Iterable[ProcessGroupLink] = (),
        overlap: bool = True,
        shard_optimizer: bool = False,
    ) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._mesh = mesh
        self._sharded = frozenset(sharded)
        self._layout = layout or TensorLayout()
        self._tensor_parallel = axis_size(mesh, TP_AXIS) > 1
        self.data_rank = self.rank // axis_size(mesh, TP_AXIS)  # see the table of farskip.parallel.mesh
        self.data_size = axis_size(mesh, DATA_AXIS) if self._tensor_parallel else self.world_size
        self._data_group = axis_group(mesh, DATA_AXIS) if self._tensor_parallel else dist.group.WORLD
        kinds: dict[str, list[torch.nn.Parameter]] = {"replicated": [], "experts": [], "slices": [], "partial": []}
        for name, parameter in parameters.items():
            kinds[self._kind(name)].append(parameter)
        self._replicated_parameters, self._expert_parameters = kinds["replicated"], kinds["experts"]
        self._sliced_parameters, self._partial_parameters = kinds["slices"], kinds["partial"]
        self._device = next(iter(parameters.values())).device
        self._links = tuple(links)
        self._meter = WaitMeter()
        self._reported_s = 0.0
        # over the ranks whose tokens they do not know yet
        summed: list[tuple[list[torch.nn.Parameter], dist.ProcessGroup | None]] = [
            ([*self._replicated_parameters, *self._sliced_parameters], self._data_group),
            (self._partial_parameters, dist.group.WORLD),
        ]
        if axis_size(mesh, REPLICA_AXIS) > 1:
            summed.append((self._expert_parameters, mesh.get_group(REPLICA_AXIS)))
        self.shares: OptimizerShares | None = None
        if shard_optimizer and self.world_size > 1:
            slices = {name: self._slices(name) for name in parameters}
            self.shares = OptimizerShares(mesh, parameters, slices, self._meter)
        self._sums = [GradientSums(some, group, self._meter, early=overlap) for some, group in summed]

    def expect_last_backward(self) -> None:
        """A step's last backward begins: from here on, gradients that are there are on their way to the other ranks.

        May be left out; then `reduce_gradients` starts all sums.
        """
        for sums in self._sums:
            sums.expect()

    def reduce_gradients(self) -> None:
        """Sum gradients, or wait for the sums that are under way. A collective."""
        for sums in self._sums:
            sums.finish()

    def clip_gradients(self, max_norm: float | None) -> torch.Tensor:
        """Global L2 norm of all gradients, every slice counted once; gradients are scaled down to `max_norm`."""
        everywhere = [*self._replicated_parameters, *self._partial_parameters]
        slices = {EP_AXIS: self._expert_parameters, TP_AXIS: self._sliced_parameters}
        squares = torch.stack([self._squares(parameters) for parameters in (everywhere, *slices.values())])
        for row, (axis, parameters) in enumerate(slices.items(), start=1):
            if parameters and axis_size(self._mesh, axis) > 1:
                dist.all_reduce(squares[row], group=axis_group(self._mesh, axis))
        if self._tensor_parallel:  # equal up to chance on ranks that share tensors; whether to stop hangs on it
            dist.all_reduce(squares, group=axis_group(self._mesh, TP_AXIS))
            squares /= axis_size(self._mesh, TP_AXIS)
        norm = squares.sum().sqrt()
        if max_norm is not None:
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            for parameter in (*everywhere, *self._expert_parameters, *self._sliced_parameters):
                if parameter.grad is not None:
                    parameter.grad.mul_(factor.to(parameter.grad.dtype))
        return norm.float()

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks with tokens of their own, in place: over one rank of each ``tp`` group."""
        if self.data_size > 1 or not self._tensor_parallel:
            dist.all_reduce(tensor, group=self._data_group)
        return tensor

    def sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        dist.all_reduce(tensor)
        return tensor

    def launch_sum_over_processes(self, tensor: torch.Tensor) -> Pending:
        """Start the sum over all ranks, in place."""
        return Pending(tensor, dist.all_reduce(tensor, async_op=True), meter=self._meter)

    def any(self, flag: bool) -> bool:
        """True on every rank if any rank says True."""
        flags = torch.tensor([float(flag)], device=self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        barrier(self._device)

    def wrap_for_checkpoint(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A DTensor over this rank's slice of a parameter or of its optimizer state, else the tensor itself."""
        slices = self._slices(name)
        if not slices.axes or tensor.dim() == 0:
            return tensor
        placements = [
            Shard(slices.dim) if axis in slices.axes else Replicate() for axis in self._mesh.mesh_dim_names or ()
        ]
        return DTensor.from_local(tensor, self._mesh, placements, run_check=False)

    def exposed_communication_s(self) -> float:
        """Seconds this rank stood waiting for collectives since the last call."""
        total = self._meter.seconds() + sum(link.meter.seconds() for link in self._links)
        since, self._reported_s = total - self._reported_s, total
        return since

    def _kind(self, name: str) -> str:
        if name in self._sharded:
            return "experts"
        if name in self._layout.sharded:
            return "slices"
        return "partial" if name in self._layout.partial else "replicated"

    def _slices(self, name: str) -> Slices:
        if name in self._layout.sharded:
            return Slices(axes=(TP_AXIS,), dim=self._layout.sharded[name])
        return Slices(axes=axes_of(self._mesh, EP_AXIS) if name in self._sharded else ())

    def _squares(self, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients]).double().square().sum()
