"""The optimizer's state divided over the ranks that hold the same parameters (ZeRO stage 1).

When gradients are summed, all copies of a parameter have the same one. Each rank then updates its share of the
parameter only and has state for that share only; afterwards an all-gather brings the shares of the others. AdamW goes
element by element, so bits are those of the undivided update.

    replicated parameters           divided over all ranks
    slices of tensor parallelism    over the ranks that have the same slice
    experts                         over their replicas

A share is a stretch along one dimension, as `torch.chunk` makes them, so that in a checkpoint it is a part of the whole
tensor, to be read by any number of ranks. Of the first dimension it is a view of the parameter and costs nothing; of a
later one, taken where the first would be divided badly, it is a copy during the update. What has no dimension that
gives every rank something stays whole everywhere.

Legend: R ranks that hold the same, N elements of a bucket.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from farskip.parallel.collectives import AllGather, ProcessGroupLink
from farskip.parallel.mesh import COPIES_AXIS, copies_mesh
from farskip.pending import Pending
from farskip.wait_meter import WaitMeter

_BUCKET_BYTES = 32 << 20
"""About so much in one all-gather, all ranks' shares together."""

_IN_FLIGHT = 2
"""So many of them are under way at once: one travels while the one before it is put in its place."""

_MOST_UNEVEN = 1.1
"""How much more than an even share the largest may be before another dimension is looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slices:
    """How a parameter lies: cut along a dimension over axes of the mesh, or whole on every rank (no axes)."""

    axes: tuple[str, ...] = ()
    dim: int = 0


def dimension_to_divide(shape: Sequence[int], size: int) -> int | None:
    """Along which dimension a tensor is divided among `size` ranks; None: along none, it is too small."""
    uneven: dict[int, float] = {}
    for dim, length in enumerate(shape):
        longest = -(-length // size)
        if longest * (size - 1) < length:  # the last rank gets something
            uneven[dim] = longest * size / length
    good = [dim for dim, how in uneven.items() if how <= _MOST_UNEVEN]
    return good[0] if good else min(uneven, key=uneven.__getitem__, default=None)


class _Share:
    """One parameter among the ranks that hold it."""

    def __init__(self, parameter: nn.Parameter, dim: int, rank: int, size: int) -> None:
        self.parameter, self.dim, self._rank = parameter, dim, rank
        self.longest = -(-parameter.shape[dim] // size)
        self.mine = nn.Parameter(self.of(rank))

    def of(self, rank: int) -> torch.Tensor:
        """A rank's share, as a view of the parameter."""
        start, length = rank * self.longest, self.parameter.shape[self.dim]
        return self.parameter.detach().narrow(self.dim, start, min(self.longest, length - start))

    @property
    def most_elements(self) -> int:
        """Of any rank's share."""
        return self.parameter.numel() // self.parameter.shape[self.dim] * self.longest

    def take(self) -> None:
        """Before the update. Fused kernels go through memory from front to back, hence contiguous."""
        gradient, here = self.parameter.grad, self.of(self._rank)
        self.mine.data = here.contiguous()
        if gradient is None:
            self.mine.grad = None
        else:
            self.mine.grad = gradient.narrow(self.dim, self._rank * self.longest, here.shape[self.dim]).contiguous()

    def put_back(self) -> None:
        """After it. Nothing of what was copied stays."""
        here = self.of(self._rank)
        if self.mine.data_ptr() != here.data_ptr():
            here.copy_(self.mine)
        self.mine.data, self.mine.grad = here, None


class _Bucket:
    """Shares that travel in one all-gather: equal ranks, one dtype."""

    def __init__(self, link: ProcessGroupLink) -> None:
        self.link = link
        self.shares: list[_Share] = []
        self._pending: Pending | None = None

    def num_elements(self) -> int:
        """That each rank sends."""
        return sum(share.most_elements for share in self.shares)

    def launch(self) -> None:
        """Copy this rank's shares together and start the exchange."""
        flat_N = self.shares[0].mine.new_empty(self.num_elements())
        for share, place in zip(self.shares, self._places(flat_N), strict=True):
            mine = share.of(self.link.rank)
            place[: mine.numel()].view(mine.shape).copy_(mine)
        self._pending = AllGather(link=self.link).launch(flat_N)

    def finish(self) -> None:
        """Wait, and put the shares of the others where they belong."""
        assert self._pending is not None, "shares were waited for before they were sent"
        all_RN, self._pending = self._pending.wait().view(self.link.size, -1), None
        for rank, row_N in enumerate(all_RN):
            if rank == self.link.rank:
                continue
            for share, place in zip(self.shares, self._places(row_N), strict=True):
                theirs = share.of(rank)
                theirs.copy_(place[: theirs.numel()].view(theirs.shape))

    def _places(self, flat_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return flat_N.split([share.most_elements for share in self.shares])


class OptimizerShares:
    """Implements `farskip.training_protocols.UpdateShares` on a device mesh.

    Making one is a collective: groups of ranks are made.

    Args:
        mesh: of all ranks.
        parameters: by name.
        slices: how each of them lies.
        meter: sums how long compute stood still for the shares of other ranks.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        parameters: Mapping[str, nn.Parameter],
        slices: Mapping[str, Slices],
        meter: WaitMeter,
    ) -> None:
        self._parameters, self._slices = dict(parameters), dict(slices)
        self._meshes = {axes: copies_mesh(mesh, axes) for axes in sorted({each.axes for each in slices.values()})}
        self._links: dict[tuple[str, ...], ProcessGroupLink] = {}
        for axes, copies in self._meshes.items():
            self._links[axes] = ProcessGroupLink(copies.get_group(COPIES_AXIS))
            self._links[axes].meter = meter
        self._shares: dict[str, _Share] = {}
        self._buckets: list[_Bucket] = []

    def of(self, name: str) -> nn.Parameter:
        """See `UpdateShares.of`."""
        if name in self._shares:
            return self._shares[name].mine
        parameter, link = self._parameters[name], self._links[self._slices[name].axes]
        dim = dimension_to_divide(parameter.shape, link.size)
        if link.size == 1 or dim is None:
            return parameter
        share = self._shares[name] = _Share(parameter, dim, link.rank, link.size)
        self._put_into_bucket(share, link)
        return share.mine

    @torch.no_grad()
    def begin(self) -> None:
        """See `UpdateShares.begin`."""
        for share in self._shares.values():
            share.take()

    @torch.no_grad()
    def finish(self) -> None:
        """See `UpdateShares.finish`."""
        for share in self._shares.values():
            share.put_back()
        under_way: deque[_Bucket] = deque()
        for bucket in self._buckets:
            if len(under_way) == _IN_FLIGHT:
                under_way.popleft().finish()
            bucket.launch()
            under_way.append(bucket)
        for bucket in under_way:
            bucket.finish()

    def wrap_for_checkpoint(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """See `UpdateShares.wrap_for_checkpoint`."""
        share, slices = self._shares[name], self._slices[name]
        mesh, whole = self._meshes[slices.axes], list(share.parameter.shape)
        if slices.axes:
            whole[slices.dim] *= mesh.size(0)
        placements = [Shard(slices.dim) if slices.axes else Replicate(), Shard(share.dim)]
        stride = torch.empty(whole, device="meta").stride()
        return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=torch.Size(whole), stride=stride)

    def is_divided(self, name: str) -> bool:
        """See `UpdateShares.is_divided`."""
        return name in self._shares

    def _put_into_bucket(self, share: _Share, link: ProcessGroupLink) -> None:
        """Into the last one of its kind, unless that is full."""
        dtype, most = share.mine.dtype, _BUCKET_BYTES // (share.mine.element_size() * link.size)
        alike = [each for each in self._buckets if each.link is link and each.shares[0].mine.dtype == dtype]
        if not alike or alike[-1].num_elements() + share.most_elements > most:
            alike.append(_Bucket(link))
            self._buckets.append(alike[-1])
        alike[-1].shares.append(share)
