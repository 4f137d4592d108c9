"""The executor: runs a schedule over the sub-blocks of a model. It owns the layer loop.

    for instruction in schedule.forward:                 stream of instructions, one cursor
        run(stage)      compute with the family's own sub-modules
        launch(c)       start the collective, keep it in flight
        wait(c)         take its result

Attention is one call of the model's own module, but two stages: the module calls back between its projections and its
core (the seam), and there the executor goes on with the list until the core's turn comes.

The backward pass needs no code here: autograd runs, of the nodes that are ready, the one created last, so it follows
`schedule.backward`. Observers can check that (`farskip.recorder`) and see it (`farskip.profiling`).

Stages of a side lane (`farskip.lanes`) are issued on a stream of their own, where the device has streams; how their
values cross over is in `farskip.side_stream`.

What this file refuses: an attention that never reaches the seam. It knows no process group and no model family.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from farskip.async_autograd import Collective, Ended, InFlight, mark_backward
from farskip.fusion import FusionPlan, landed_layers, plan_fusions
from farskip.lanes import SideStream
from farskip.reduced_residual import ReducedResidual
from farskip.residual import GATE, MLP_NORM, ROWS, Residual, stream_uses
from farskip.schedule import Do, Instruction, Schedule, Segment
from farskip.side_stream import SideLane, make_side_lane, tensors_in
from farskip.simulator import StageTimes, choose_schedule
from farskip.stage import Dispatcher, DispatchPlan, Norm, Routing, StreamKernels, SubBlocks, TensorParallel
from farskip.stage_graph import (
    ATTENTION_CORE,
    ATTENTION_IN,
    BLOCK_OF,
    COMBINE,
    DISPATCH,
    EXPERTS,
    GATHER,
    MERGE,
    NORM,
    REDUCTIONS,
    ROUTE,
    SCATTER,
    Key,
    build_stage_graph,
)
from farskip.token_shards import TokenShards
from farskip.wait_meter import WaitMeter
from farskip.wiring import ATTENTION, MLP, ROUTED, SHARED, Source, Wiring

Arguments = Sequence[Mapping[str, Any]]
"""What each layer's attention is called with besides its input: masks, rotary embeddings, cache."""


class Observer(Protocol):
    """Told when an instruction begins; returns what to call when it has ended."""

    def __call__(self, instruction: Instruction, direction: str) -> Ended:
        """`direction` is ``forward`` or ``backward``."""
        ...


RoutingHook = Callable[[int, Routing, bool], Routing]
"""Called with (layer, routing, whether this is a recomputation); what it returns is used."""


class Executor:
    """Runs the layers of one model under a wiring.

    Args:
        sub_blocks: one entry per layer.
        wiring: what the sub-blocks leave out.
        dispatcher: sends rows between ranks; None when all experts lie on this rank.
        tensor_parallel: the ranks over which the sub-blocks are cut; None when they are whole.
        mode: ``serial`` or ``overlapped``.
        times: stage times by which the overlapped schedule is chosen.
        side_stream: which stages of the overlapped schedule have a lane of their own: ``none``, ``merge`` or
            ``merge_and_route``.

    Attributes:
        make_side_lane: called once per device, when a schedule has a side lane; None from it: stages run in place.
        wait_meter: told how long compute stood still for the side lane.
        stream_kernels: ops that form sums of the stream together with their norms; None: plain adds, the model's norms.

    Raises:
        ValueError: the wiring does not fit the model, the mode is unknown, or the model can have no such side lane.
    """

    def __init__(
        self,
        sub_blocks: Sequence[SubBlocks],
        wiring: Wiring,
        *,
        dispatcher: Dispatcher | None = None,
        tensor_parallel: TensorParallel | None = None,
        mode: str = "overlapped",
        times: StageTimes | None = None,
        side_stream: str = SideStream.none,
    ) -> None:
        self.sub_blocks = tuple(sub_blocks)
        self.wiring = wiring
        self.dispatcher = dispatcher
        self.tensor_parallel = tensor_parallel
        self.mode = mode
        self.times = times
        self.side_stream = SideStream.named(side_stream)
        self.inputs = wiring.resolve([block.blocks for block in self.sub_blocks])
        sharded = tensor_parallel is not None and tensor_parallel.sequence_parallel
        self.graph = build_stage_graph(
            self.inputs,
            expert_parallel=dispatcher is not None,
            chunks=dispatcher.chunks if dispatcher else 1,
            tensor_parallel=tensor_parallel is not None,
            sequence_chunks=tensor_parallel.chunks if tensor_parallel is not None and sharded else 0,
        )
        self.uses = stream_uses(self.inputs)
        self.observers: list[Observer] = []
        self.routing_hook: RoutingHook | None = None
        self.stream_kernels: StreamKernels | None = None
        self.make_side_lane: Callable[[torch.device, WaitMeter | None], SideLane | None] = make_side_lane
        self.wait_meter: WaitMeter | None = None
        self._side_lanes: dict[torch.device, SideLane | None] = {}
        self._schedules: dict[tuple[Segment, ...], Schedule] = {}
        self._fusion_plans: dict[Segment, tuple[Schedule, frozenset[Norm], FusionPlan]] = {}
        self.schedule()  # refuses an unknown mode now, not at the first batch

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.sub_blocks)

    def schedule(self, segments: Sequence[Segment] | None = None) -> Schedule:
        """The schedule for these segments; for the model in one piece if None. Chosen once, then kept."""
        key = tuple(segments) if segments is not None else (Segment(0, self.num_layers),)
        if key not in self._schedules:
            self._schedules[key] = choose_schedule(
                self.graph, self.mode, segments=key, times=self.times, side_stream=self.side_stream
            )
        return self._schedules[key]

    def reschedule(self, mode: str, times: StageTimes | None) -> None:
        """Choose schedules anew from here on, for example after the stage times were measured."""
        self.mode, self.times = mode, times
        self._schedules = {}
        self.schedule()

    def set_schedule(self, schedule: Schedule) -> None:
        """Use this schedule for its segments, for example the one that rank 0 has chosen."""
        self._schedules[schedule.segments] = schedule

    def shard_tokens(self, shape_BSD: torch.Size) -> TokenShards | None:
        """Which tokens of a batch lie on which rank; None where every rank holds the whole stream."""
        ranks = self.tensor_parallel
        return TokenShards(ranks, shape_BSD) if ranks is not None and ranks.sequence_parallel else None

    def run_segment(
        self,
        schedule: Schedule,
        segment: Segment,
        x_BSD: torch.Tensor,
        n_BSD: torch.Tensor,
        arguments: Arguments,
        *,
        recompute: bool = False,
        shards: TokenShards | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one segment.

        Args:
            schedule: a schedule that has this segment.
            segment: which layers.
            x_BSD: full stream at the segment's entry.
            n_BSD: the stream that leaves something out there; the same tensor where nothing is left out.
            arguments: one mapping per layer of the model; those of the segment are read.
            recompute: keep only the two streams, and run the segment again in backward.
            shards: `shard_tokens` of the whole stream; where there are some, `x_BSD` and `n_BSD` are this rank's share
                of it [1, N, D], and so is what is returned.

        Returns:
            Both streams behind the segment, nothing in flight.
        """
        steps = schedule.of_segment(segment)
        plan = self._fusion_plan(schedule, segment, x_BSD)
        ranks = self.tensor_parallel
        assert (shards is not None) == (ranks is not None and ranks.sequence_parallel), (
            "ask shard_tokens for the shares"
        )
        lane = self._side_lane(steps, x_BSD.device)
        home = lane.mark() if lane is not None else None
        runs = 0

        def run(x_BSD: torch.Tensor, n_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal runs
            runs += 1
            with nullcontext() if lane is None else lane.at(home):
                return _SegmentRun(
                    self,
                    steps,
                    plan,
                    segment,
                    x_BSD,
                    n_BSD,
                    arguments,
                    recomputing=runs > 1,
                    serial=schedule.mode == "serial",
                    shards=shards,
                    lane=lane,
                ).run()

        if not recompute:
            return run(x_BSD, n_BSD)
        # Without early stop the recomputation ends where the forward ended: every launch has met its wait.
        with set_checkpoint_early_stop(False):
            return checkpoint(run, x_BSD, n_BSD, use_reentrant=False)

    def _side_lane(self, steps: Sequence[Instruction], device: torch.device) -> SideLane | None:
        """What the side lane of these steps runs in; None if they have none, or if it runs in place."""
        if not any(step.side for step in steps):
            return None
        if device not in self._side_lanes:
            self._side_lanes[device] = self.make_side_lane(device, self.wait_meter)
        return self._side_lanes[device]

    def kernels_for(self, stream_BSD: torch.Tensor) -> StreamKernels | None:
        """The ops that form sums of a stream like this one. All-reduces of tensor parallelism end in plain adds."""
        kernels = self.stream_kernels
        return kernels if kernels is not None and self.graph.chain is None and kernels.run_on(stream_BSD) else None

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def _fusion_plan(self, schedule: Schedule, segment: Segment, x_BSD: torch.Tensor) -> FusionPlan:
        """Which sums a segment forms together with their norms. The last plan is kept: generation asks every token."""
        kernels = self.kernels_for(x_BSD)
        if kernels is None:
            return FusionPlan(self.uses, {})
        fusible = kernels.fusible(segment.start, segment.stop, x_BSD)
        known = self._fusion_plans.get(segment)
        if known is not None and known[0] is schedule and known[1] == fusible:
            return known[2]
        landed = landed_layers(schedule.of_segment(segment))
        as_rows = self.dispatcher is not None and self.dispatcher.chunks == 1
        aside = self.side_stream is SideStream.merge
        plan = plan_fusions(
            self.inputs, self.uses, segment.start, segment.stop, fusible, landed, as_rows=as_rows, merged_aside=aside
        )
        self._fusion_plans[segment] = schedule, fusible, plan
        return plan


class _SegmentRun:
    """The state of one pass over one segment: a cursor, the streams, and what is in flight."""

    def __init__(
        self,
        executor: Executor,
        steps: tuple[Instruction, ...],
        plan: FusionPlan,
        segment: Segment,
        x_BSD: torch.Tensor,
        n_BSD: torch.Tensor,
        arguments: Arguments,
        *,
        recomputing: bool,
        serial: bool,
        shards: TokenShards | None,
        lane: SideLane | None,
    ) -> None:
        self._executor = executor
        self._steps = steps
        self._position = 0
        self._arguments = arguments
        self._recomputing = recomputing
        self._shards = shards
        self._lane = lane
        self._marks: dict[Key, Any] = {}
        self._residual: Any
        stream = (executor.inputs, plan.uses, segment.start, segment.stop, x_BSD, n_BSD)
        if executor.graph.chain is None:
            self._residual = Residual(
                *stream,
                fixed_order=executor.graph.has_collectives,
                fusions=plan.fusions,
                kernels=executor.kernels_for(x_BSD),
                lane=lane,
            )
        else:
            assert executor.tensor_parallel is not None
            self._residual = ReducedResidual(
                executor.graph, *stream, ranks=executor.tensor_parallel, blocking=serial, notify=self._notify
            )
        self._routing: dict[int, Routing] = {}
        self._plans: dict[int, list[DispatchPlan]] = {}
        self._shape_BSD = x_BSD.shape
        self._rows: dict[Key, torch.Tensor] = {}
        self._in_flight: dict[Key, InFlight] = {}
        self._scattered: dict[Key, dict[int, torch.Tensor]] = {}
        self._backward_ended: Ended | None = None

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._advance(until=None)
        streams = self._residual.leave()
        del self._residual  # it knows whom to notify, and that is this object
        return streams

    def _advance(self, until: Key | None) -> None:
        """Execute instructions up to, not including, the run of `until`."""
        while self._position < len(self._steps):
            step = self._steps[self._position]
            if step.do is Do.RUN and step.key == until:
                return
            self._position += 1
            if step.side and self._lane is not None:
                with self._lane.entered():
                    self._execute(step)
            else:
                self._execute(step)

    def _execute(self, step: Instruction) -> None:
        if step.do is Do.LAUNCH:
            self._launch(step.key)
        elif step.do is Do.WAIT:
            self._wait(step.key)
        else:
            _STAGES[step.key.stage](self, step.key)

    # collectives

    def _launch(self, key: Key) -> None:
        if key.stage in REDUCTIONS:
            self._residual.launch(key)
            return
        keep = self._lane.keep if self._lane is not None else None
        in_flight = InFlight(self._collective(key), self._notify(key), keep)
        self._in_flight[key] = in_flight
        self._rows[key] = in_flight.launch(self._rows.pop(key))
        if self._lane is not None:
            self._marks[key] = self._lane.mark()

    def _wait(self, key: Key) -> None:
        if key.stage in REDUCTIONS:
            self._residual.wait(key)
            return
        if self._lane is not None:
            self._lane.read(self._marks.pop(key))  # what was made for it comes along: its plan
        self._rows[key] = self._in_flight.pop(key).wait(self._rows.pop(key))
        if key.stage in SCATTER.values():
            self._put_part(key)

    def _collective(self, key: Key) -> Collective:
        if self._shards is not None and key.stage in BLOCK_OF:
            gather = self._shards.collective
            return gather if key.stage in GATHER.values() else gather.reverse()
        plan = self._plans[key.layer][key.chunk]
        return plan.collective if key.stage == DISPATCH else plan.collective.reverse()

    # stages

    def _attention(self, key_in: Key) -> None:
        """Both stages of attention; between them, in the seam, whatever the list has there."""
        layer = key_in.layer
        block, core = self._executor.sub_blocks[layer], Key(layer, ATTENTION_CORE)
        ended = self._begin(key_in)
        reached_core: list[Ended] = []

        def seam(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            query, key, value = self._mark_outputs(key_in, query, key, value)
            ended()
            self._advance(until=core)
            reached_core.append(self._begin(core))
            query, key, value = self._mark_inputs(core, query, key, value)
            return query, key, value

        if self._shards is None:
            source = self._executor.inputs[layer].source(ATTENTION)
            (normed_BSD,) = self._normed(key_in, Norm(layer, ATTENTION), source, ATTENTION)
        else:
            (rows_RD,) = self._mark_inputs(key_in, self._rows.pop(Key(layer, GATHER[ATTENTION])))
            normed_BSD = self._shards.whole(rows_RD)
        output_BSD = block.attention(normed_BSD, seam, self._arguments[layer])
        if len(reached_core) != 1:
            raise RuntimeError(
                f"layer {layer}: attention called the seam {len(reached_core)} times instead of once; its attention "
                "implementation was changed after farskip was attached: set it before rewire or parallelize"
            )
        if self._shards is not None:
            output_BSD = self._shards.laid_out(output_BSD)
        (output_BSD,) = self._mark_outputs(core, output_BSD)
        reached_core[0]()
        self._position += 1
        self._put(core, ATTENTION, output_BSD)

    def _mlp(self, key: Key) -> None:
        self._simple(key, MLP, self._executor.sub_blocks[key.layer].mlp)

    def _shared(self, key: Key) -> None:
        self._simple(key, SHARED, self._executor.sub_blocks[key.layer].shared)

    def _simple(self, key: Key, block: str, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """A sub-block that is one stage: normed stream in, output out."""
        source = self._executor.inputs[key.layer].source(block)
        ended = self._begin(key)
        if self._shards is None:
            (normed_BSD,) = self._normed(key, Norm(key.layer, MLP_NORM), source, block)
            output = compute(normed_BSD)
        else:
            (rows_RD,) = self._mark_inputs(key, self._rows.pop(key._replace(stage=GATHER[block])))
            output = compute(rows_RD.unsqueeze(0)).squeeze(0)
        (output,) = self._mark_outputs(key, output)
        ended()
        self._put(key, block, output)

    def _put(self, key: Key, block: str, output: torch.Tensor) -> None:
        """Hand over what a sub-block made: to the stream, or to its scatter."""
        if self._shards is None:
            self._residual.put(key.layer, block, output)
        else:
            self._rows[key._replace(stage=SCATTER[block])] = output

    # sequence parallelism: norms of the rank's tokens, in front of the gathers

    def _norm(self, key: Key) -> None:
        """Of attention, MLP or shared expert."""
        block = BLOCK_OF[key.stage]
        norm = Norm(key.layer, ATTENTION if block == ATTENTION else MLP_NORM)
        ended = self._begin(key)
        (normed_1ND,) = self._normed(key, norm, self._executor.inputs[key.layer].source(block), block)
        self._lay_out(key, normed_1ND, ended)

    def _lay_out(self, key: Key, normed_1ND: torch.Tensor, ended: Ended) -> None:
        """The last act of a norm: one tensor for each gather."""
        assert self._shards is not None
        block = BLOCK_OF[key.stage]
        parts = self._mark_outputs(key, *self._shards.sent(normed_1ND, chunked=block != ATTENTION))
        for chunk, rows_MD in enumerate(parts):
            self._rows[Key(key.layer, GATHER[block], chunk)] = rows_MD
        ended()

    def _put_part(self, key: Key) -> None:
        """Of the output of a sub-block, to the stream when all its scatters have arrived."""
        assert self._shards is not None
        block = BLOCK_OF[key.stage]
        parts = self._scattered.setdefault(key._replace(chunk=0), {})
        parts[key.chunk] = self._rows.pop(key)
        chunked = block != ATTENTION
        if len(parts) == (self._shards.chunks if chunked else 1):
            del self._scattered[key._replace(chunk=0)]
            output_1ND = self._shards.joined([parts[chunk] for chunk in sorted(parts)], chunked=chunked)
            self._residual.put(key.layer, block, output_1ND)

    def _normed(self, key: Key, norm: Norm, source: Source, *uses: str) -> tuple[torch.Tensor, ...]:
        """The normed stream, one alias per use. Whoever comes first does the norm, once per stream that is read."""
        residual, block, layer = self._residual, self._executor.sub_blocks[norm.layer], norm.layer
        which = ATTENTION if norm.name == ATTENTION else source
        first, mark = not residual.has_normed(layer, which), partial(self._mark_inputs, key)
        if first and not residual.form_normed(layer, which, mark):
            compute = block.attention_norm if norm.name == ATTENTION else block.mlp_norm
            residual.put_normed(layer, which, compute(residual.read(layer, source, norm.name, mark)))
        aliases = tuple(residual.read_normed(layer, which, use) for use in uses)
        return aliases if first else self._mark_inputs(key, *aliases)

    def _route(self, key: Key) -> None:
        executor, layer = self._executor, key.layer
        source = executor.inputs[layer].source(ROUTED)
        ended = self._begin(key)
        for_gate_BSD, for_rows_BSD = map(self._share, self._normed(key, Norm(layer, MLP_NORM), source, GATE, ROWS))
        routing = executor.sub_blocks[layer].route(for_gate_BSD)
        if executor.routing_hook is not None:
            routing = executor.routing_hook(layer, routing, self._recomputing)
        if executor.dispatcher is None:
            rows, after = [for_rows_BSD], [Key(layer, EXPERTS)]
        else:
            chunks = executor.dispatcher.prepare(for_rows_BSD, routing, self._residual.rows_gradient(layer, source))
            rows, self._plans[layer] = [chunk for chunk, _ in chunks], [plan for _, plan in chunks]
            after = [Key(layer, DISPATCH, chunk) for chunk in range(len(chunks))]
        *rows, weights_TK = self._mark_outputs(key, *rows, routing.weights_TK)
        self._rows.update(zip(after, rows, strict=True))
        self._routing[layer] = routing if weights_TK is routing.weights_TK else replace(routing, weights_TK=weights_TK)
        ended()

    def _experts(self, key: Key) -> None:
        block = self._executor.sub_blocks[key.layer]
        ended = self._begin(key)
        if self._executor.dispatcher is None:
            (normed_BSD,) = self._mark_inputs(key, self._rows.pop(key))
            routing = self._routing.pop(key.layer)
            if normed_BSD.numel():
                output_BSD = block.routed(normed_BSD, routing)
            else:  # a share of no token
                rows_RD = block.expert_rows(normed_BSD[0], routing.experts_TK.reshape(-1))
                output_BSD = rows_RD + routing.weights_TK.sum()  # of nothing: keeps the router in the graph
            (output_BSD,) = self._mark_outputs(key, self._widened(output_BSD))
            self._residual.put(key.layer, ROUTED, output_BSD)
        else:
            (rows_RD,) = self._mark_inputs(key, self._rows.pop(key._replace(stage=DISPATCH)))
            plan = self._plans[key.layer][key.chunk]
            if self._lane is not None:
                self._lane.keep(plan.expert_R)
            (rows_RD,) = self._mark_outputs(key, block.expert_rows(rows_RD, plan.expert_R))
            self._rows[key._replace(stage=COMBINE)] = rows_RD
        ended()

    def _merge(self, key: Key) -> None:
        """Sum the returned rows; or hand them on to an op of the stream that sums them on the way, and do nothing."""
        dispatcher = self._executor.dispatcher
        assert dispatcher is not None
        plans, routing = self._plans.pop(key.layer), self._routing.pop(key.layer)
        if self._lane is not None:
            self._lane.keep(*tensors_in((plans, routing)))
        ended = self._begin(key)
        rows = self._mark_inputs(key, *(self._rows.pop(Key(key.layer, COMBINE, chunk)) for chunk in range(len(plans))))
        if self._residual.takes_rows(key.layer, rows):
            (rows_RD,) = self._mark_outputs(key, *rows)
            ended()
            self._residual.put_rows(key.layer, dispatcher.unmerged(rows_RD, routing, *plans))
            return
        (output_BSD,) = self._mark_outputs(key, self._widened(dispatcher.merge(rows, routing, plans)))
        ended()
        self._residual.put(key.layer, ROUTED, output_BSD)

    # routed experts under tensor parallelism: each rank routes its share of the tokens

    def _share(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        """The tokens that this rank routes; all that it holds, unless every rank holds the whole stream."""
        if self._executor.graph.chain is None:
            return normed_BSD
        start, stop, total = self._tokens()
        return normed_BSD.reshape(1, total, -1)[:, start:stop]

    def _widened(self, output: torch.Tensor) -> torch.Tensor:
        """The routed output of this rank's share, zero for the tokens of the others."""
        if self._executor.graph.chain is None:
            return output.view(self._shape_BSD)
        start, stop, total = self._tokens()
        rows_TD = output.reshape(stop - start, self._shape_BSD[-1])
        return torch.nn.functional.pad(rows_TD, (0, 0, start, total - stop)).view(self._shape_BSD)

    def _tokens(self) -> tuple[int, int, int]:
        """First, one past the last, and how many there are."""
        ranks, total = self._executor.tensor_parallel, self._shape_BSD[:-1].numel()
        assert ranks is not None
        return total * ranks.rank // ranks.size, total * (ranks.rank + 1) // ranks.size, total

    # observation: free when nobody looks

    def _begin(self, key: Key, do: Do = Do.RUN, direction: str = "forward") -> Ended:
        if not self._executor.observers:
            return _nothing
        ends = [observe(Instruction(do, key), direction) for observe in self._executor.observers]

        def end() -> None:
            for ended in reversed(ends):
                ended()

        return end

    def _notify(self, key: Key) -> Callable[[str, bool], Ended] | None:
        if not self._executor.observers:
            return None

        def notify(do: str, backward: bool) -> Ended:
            if backward:
                self._end_backward()
            return self._begin(key, Do(do), "backward" if backward else "forward")

        return notify

    def _mark_outputs(self, key: Key, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Backward enters a stage through its outputs."""
        if not self._executor.observers:
            return tensors

        def begin() -> None:
            self._end_backward()
            self._backward_ended = self._begin(key, Do.RUN, "backward")

        return mark_backward(begin, *tensors)

    def _mark_inputs(self, key: Key, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Backward leaves a stage through its inputs."""
        if not self._executor.observers:
            return tensors
        return mark_backward(self._end_backward, *tensors)

    def _end_backward(self) -> None:
        """Close the stage that backward is in. A stage whose input needs no gradient is closed by its successor."""
        ended, self._backward_ended = self._backward_ended, None
        if ended is not None:
            ended()


def _nothing() -> None:
    return None


# Not bound to a run: what refers to itself lives until the garbage collector comes, and a run holds the cache.
_STAGES: Mapping[str, Callable[[_SegmentRun, Key], None]] = {
    ATTENTION_IN: _SegmentRun._attention,
    MLP: _SegmentRun._mlp,
    ROUTE: _SegmentRun._route,
    EXPERTS: _SegmentRun._experts,
    SHARED: _SegmentRun._shared,
    MERGE: _SegmentRun._merge,
    **dict.fromkeys(NORM.values(), _SegmentRun._norm),
}
