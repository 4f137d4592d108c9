"""Sums of gradients over ranks, launched while backward still runs.

Parameters are put into buckets once, from the last of the model to the first, which is about the order in which
backward finishes them. In a step's last backward a bucket whose gradients are all there is copied together and its
all-reduce launched, if those before it are launched, so that all ranks launch in one order. What is left when backward
ends is launched then, and all are waited for; sums that have arrived by the time the next one is launched are put in
place at once, so that few copies of gradients are there at a time. Which parameters share a bucket depends on nothing
that happens in a step, so neither does a bit of the sums: launched early or at the end, under a serial or an overlapped
schedule.

A gradient that no rank has stays away; one that some rank has counts as zero on the others. Behind a bucket's gradients
travels a number for each, one where there is one: what is still zero when it arrives is missing everywhere. Only a rank
that lacks a gradient looks, so the host waits for nothing else.

Refuses: a gradient that changes after it was sent. The sum, which knows nothing of the change, would be put over it.
"""

import warnings
import weakref
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from farskip.parallel.mesh import another_group
from farskip.pending import Pending
from farskip.wait_meter import WaitMeter

_BUCKET_BYTES = 32 << 20
"""At most this much in one all-reduce: a larger one takes as long as its bytes do, and starts later."""

_LEAST_BUCKET_BYTES, _NUM_BUCKETS = 1 << 20, 8
"""A small model is cut in about so many parts all the same, unless they would be so small that latency counts."""

_IN_FLIGHT = 4
"""So many of those that are left when backward ends are under way at once: each holds a copy of its gradients."""


class _Bucket:
    """Neighbors of one dtype, summed in one all-reduce."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.num_bytes = 0
        self.unfinished: set[int] = set()
        self.finished: list[torch.cuda.Event] = []
        self.left: list[tuple[torch.Tensor | None, int]] = []
        """The gradients as they were when they were sent, then as their sums were put in place."""
        self.pending: Pending | None = None
        self.work: dist.Work | None = None

    def expect(self) -> None:
        """A backward begins in which every gradient becomes what it has to be."""
        self.unfinished, self.finished = {id(parameter) for parameter in self.parameters}, []

    def launch(self, group: dist.ProcessGroup, meter: WaitMeter) -> None:
        """Copy the gradients together and start their sum."""
        for event in self.finished:
            event.wait()  # backward runs an op on the stream of its forward, and here may be another one
        self._note()
        first = self.parameters[0]
        parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in self.parameters]
        if all(p.grad is not None for p in self.parameters):
            counts = [first.new_ones(len(self.parameters))]
        else:  # not from a list of Python's: the host would wait for its copy
            counts = [first.new_zeros(1) if p.grad is None else first.new_ones(1) for p in self.parameters]
        with torch.no_grad():
            flat = torch.cat([*parts, *counts])
        self.work = dist.all_reduce(flat, group=group, async_op=True)
        self.pending = Pending(flat, self.work, meter=meter)

    def has_arrived(self) -> bool:
        """Whether a sum is there that has not been put in place."""
        return self.work is not None and self.work.is_completed()

    def put(self) -> list[nn.Parameter]:
        """Wait for the sum and put it where the gradients are, or should be.

        Returns:
            The parameters whose gradient is not the one that was sent. They keep what they have.
        """
        assert self.pending is not None, "a bucket of gradients was waited for before it was launched"
        summed, self.pending, self.work = self.pending.wait(), None, None
        changed = self.changed()
        if changed:
            return changed
        if summed.is_cuda:  # it may come from the memory of another stream
            summed.record_stream(torch.cuda.current_stream(summed.device))
        sizes = [parameter.numel() for parameter in self.parameters]
        *sums, counts = summed.split([*sizes, len(sizes)])
        for parameter, one, count in zip(self.parameters, sums, counts, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(one.view_as(parameter))
            elif bool(count):
                parameter.grad = one.view_as(parameter).clone()
        self._note()
        return []

    def changed(self) -> list[nn.Parameter]:
        """The parameters whose gradient is not what this bucket left there."""
        return [
            parameter
            for parameter, (gradient, version) in zip(self.parameters, self.left, strict=True)
            if parameter.grad is not gradient or (gradient is not None and gradient._version != version)
        ]

    def _note(self) -> None:
        self.left = [(p.grad, 0 if p.grad is None else p.grad._version) for p in self.parameters]


class GradientSums:
    """Sums the gradients of some parameters over the ranks of a group, in place.

    Making one is a collective where a parameter needs a gradient.

    Args:
        parameters: equal shapes and dtypes in an equal order on all ranks; those that need no gradient are left out.
        group: the ranks; None is all. The sums have a process group of their own, so that nothing that the schedule has
            in flight waits for them. It is there from the start, so that its threads can be put ahead of compute.
        meter: sums how long compute stood still for them.
        early: whether `expect` does anything; if not, every sum is launched by `finish`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: dist.ProcessGroup | None,
        meter: WaitMeter,
        *,
        early: bool = True,
    ) -> None:
        self._parameters = tuple(parameters)
        self._meter = meter
        self._early = early
        self._ranks, self._is_alone = group, dist.get_world_size(group) == 1
        self._group: dist.ProcessGroup | None = None
        self._needed: tuple[bool, ...] = ()
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[int, _Bucket] = {}
        self._hooked: set[int] = set()
        self._num_launched = self._num_put = 0
        self._changed: list[nn.Parameter] = []
        self._expecting = self._warned = False
        if not self._is_alone:
            self._plan()

    def expect(self) -> None:
        """A step's last backward begins: from here on a bucket that is complete is launched. A collective.

        Raises:
            RuntimeError: sums of an earlier backward were never waited for.
        """
        if self._is_alone or not self._early:
            return
        if self._num_launched:
            raise RuntimeError(
                f"{self._num_launched} sums of gradients of an earlier backward were not waited for, which probably "
                "failed: reduce_gradients first, on all ranks, then drop the gradients"
            )
        self._plan()
        for bucket in self._buckets:
            bucket.expect()
        self._expecting = True

    def finish(self) -> None:
        """After backward: launch what is left, and wait. A collective.

        Raises:
            RuntimeError: a gradient changed after it was sent.
        """
        if self._is_alone:
            return
        self._warn_if_late()
        self._expecting = False
        self._plan()
        for bucket in self._buckets[: self._num_put]:
            self._changed += bucket.changed()
        while self._num_put < len(self._buckets):
            while self._num_launched < min(self._num_put + _IN_FLIGHT, len(self._buckets)):
                self._launch_next()
            self._put_next()
        for bucket in self._buckets:
            bucket.left = []
        changed, self._changed = self._changed, []
        self._num_launched = self._num_put = 0
        if changed:
            raise RuntimeError(
                f"a gradient of shape {list(changed[0].shape)} changed after it was sent to be summed over ranks: "
                "change gradients after reduce_gradients, or do without expect_last_backward "
                "(parallel.overlap_gradients=false)"
            )

    def _warn_if_late(self) -> None:
        """Say once, on the first rank, that nothing was hidden: results are right, so nobody would notice."""
        if not self._expecting or self._num_launched or len(self._buckets) < 2 or self._warned:
            return
        self._warned = True
        if dist.get_rank() == 0:
            missing = [
                parameter for parameter in self._buckets[0].parameters if id(parameter) in self._buckets[0].unfinished
            ]
            warnings.warn(
                "no sum of gradients could start under backward, all of them stand behind it: a parameter of shape "
                f"{list(missing[0].shape)}, one of the last of the model, got no gradient in the step's last backward; "
                "freeze it if it is not used (requires_grad_(False))",
                stacklevel=3,
            )

    def _plan(self) -> None:
        """Buckets for the parameters that need a gradient now."""
        needed = tuple(parameter.requires_grad for parameter in self._parameters)
        if needed == self._needed:
            return
        assert self._num_launched == 0, "requires_grad of a parameter changed while gradients were being summed"
        self._needed, self._buckets = needed, []
        num_bytes = sum(each.nbytes for each, is_needed in zip(self._parameters, needed, strict=True) if is_needed)
        most = min(_BUCKET_BYTES, max(num_bytes // _NUM_BUCKETS, _LEAST_BUCKET_BYTES))
        for parameter, is_needed in zip(reversed(self._parameters), reversed(needed), strict=True):
            if not is_needed:
                continue
            last = self._buckets[-1] if self._buckets else None
            if last is None or last.parameters[0].dtype != parameter.dtype or last.num_bytes + parameter.nbytes > most:
                last = _Bucket()
                self._buckets.append(last)
            last.parameters.append(parameter)
            last.num_bytes += parameter.nbytes
        if self._buckets and self._group is None:
            self._group = another_group(self._ranks)
            # NCCL connects ranks in the first call, and the host waits for it: now, not in the middle of a backward.
            dist.all_reduce(self._buckets[0].parameters[0].new_zeros(1), group=self._group)
        self._bucket_of = {id(parameter): bucket for bucket in self._buckets for parameter in bucket.parameters}
        if self._early:
            for parameter in self._parameters:
                if id(parameter) in self._bucket_of and id(parameter) not in self._hooked:
                    self._hooked.add(id(parameter))
                    parameter.register_post_accumulate_grad_hook(_Finished(self))

    def _launch_next(self) -> None:
        assert self._group is not None
        self._buckets[self._num_launched].launch(self._group, self._meter)
        self._num_launched += 1

    def _put_next(self) -> None:
        self._changed += self._buckets[self._num_put].put()
        self._num_put += 1

    def _gradient_is_there(self, parameter: nn.Parameter) -> None:
        """Called by autograd."""
        bucket = self._bucket_of.get(id(parameter))
        if not self._expecting or bucket is None:
            return
        if bucket.left:
            raise RuntimeError(
                f"a gradient of shape {list(parameter.shape)} changed while its sum over ranks was under way: only one "
                "backward may follow the call that announces a step's last one"
            )
        bucket.unfinished.discard(id(parameter))
        if parameter.is_cuda:
            bucket.finished.append(torch.cuda.current_stream(parameter.device).record_event())
        while self._num_launched < len(self._buckets) and not self._buckets[self._num_launched].unfinished:
            while self._num_put < self._num_launched and self._buckets[self._num_put].has_arrived():
                self._put_next()
            self._launch_next()


class _Finished:
    """The hook of a parameter. Does not keep its `GradientSums` alive: parameters live longer."""

    def __init__(self, sums: GradientSums) -> None:
        self._sums = weakref.ref(sums)

    def __call__(self, parameter: torch.Tensor) -> None:
        sums = self._sums()
        if sums is not None:
            assert isinstance(parameter, nn.Parameter)
            sums._gradient_is_there(parameter)
