"""What a wiring and a schedule would gain, before a run: the simulator asked about several of them. No torch.

What everything is compared with is the ordinary wiring with the same degrees of parallelism, every collective waited
for at once; the bound is its compute alone. Schedules are chosen as a run chooses them, by the same
stage times, without contention; contention then slows what overlaps (`farskip.simulator.Timeline.contended`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from farskip.schedule import MODES, Do, Schedule
from farskip.simulator import StageTimes, choose_schedule, simulate
from farskip.stage_graph import StageGraph, build_stage_graph
from farskip.wiring import LayerBlocks, Wiring

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A model over ranks, but for its wiring.

    Attributes:
        blocks: the sub-blocks of each layer.
        layers: which of them get the wiring; see `Wiring.named`.
        expert_parallel: whether experts lie on other ranks.
        tensor_parallel: whether attention, dense MLPs and shared experts are cut.
        sequence_parallel: whether the stream is, too.
        chunks: parts into which tokens are cut on their way.
    """

    blocks: tuple[LayerBlocks, ...]
    layers: str | Sequence[int] = "all"
    expert_parallel: bool = False
    tensor_parallel: bool = False
    sequence_parallel: bool = False
    chunks: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One wiring under one schedule. Times are in the unit of the stage times, of all layers together.

    Attributes:
        wiring: its name.
        mode: ``serial`` or ``overlapped``.
        schedule: what was played.
        forward: time of a forward pass.
        total: of forward and backward.
        communication: of both, summed duration of all collectives without contention.
        exposed: of that, what nothing hid.
    """

    wiring: str
    mode: str
    schedule: Schedule
    forward: float
    total: float
    communication: float
    exposed: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Several wirings, and what they are compared with.

    Attributes:
        blocking: ordinary, every collective waited for.
        forward_bound: its compute, forward.
        bound: its compute, forward and backward.
        outcomes: of the wirings, serial and overlapped.
    """

    blocking: Outcome
    forward_bound: float
    bound: float
    outcomes: tuple[Outcome, ...]

    def speedup(self, outcome: Outcome) -> float:
        """Over blocking, forward and backward."""
        return self.blocking.total / outcome.total if outcome.total else 1.0

    def forward_speedup(self, outcome: Outcome) -> float:
        """Over blocking, forward."""
        return self.blocking.forward / outcome.forward if outcome.forward else 1.0

    def hidden_share(self, outcome: Outcome) -> float | None:
        """Of what communication costs under blocking, the share that is gone; None where it costs nothing."""
        cost = self.blocking.total - self.bound
        return (self.blocking.total - outcome.total) / cost if cost else None


def needed_stages(setting: Setting, wiring: str) -> dict[str, tuple[str, ...]]:
    """The stages and collectives of each direction that times are needed for, as they come."""
    schedule = choose_schedule(_graph(setting, wiring), "serial")
    return {
        direction: tuple(dict.fromkeys(step.key.stage for step in getattr(schedule, direction)))
        for direction in DIRECTIONS
    }


def play(setting: Setting, wiring: str, mode: str, times: StageTimes, *, contention: float = 0.0) -> Outcome:
    """One wiring under one schedule.

    Raises:
        ValueError: an unknown wiring, layers outside the model, or a stage without a time.
    """
    schedule = choose_schedule(_graph(setting, wiring), mode, times=times)
    timelines = [simulate(getattr(schedule, direction), times, direction) for direction in DIRECTIONS]
    return Outcome(
        wiring=wiring,
        mode=mode,
        schedule=schedule,
        forward=timelines[0].contended(contention),
        total=sum(timeline.contended(contention) for timeline in timelines),
        communication=sum(timeline.communication_total for timeline in timelines),
        exposed=sum(timeline.exposed_total for timeline in timelines),
    )


def compare(
    setting: Setting,
    wirings: Sequence[str],
    times: StageTimes,
    *,
    plain: tuple[Setting, StageTimes] | None = None,
    modes: Sequence[str] = MODES,
    contention: float = 0.0,
) -> Comparison:
    """Several wirings against ordinary blocking.

    Args:
        setting: model and ranks.
        wirings: their names.
        times: how long stages take.
        plain: under what ordinary blocking is played, and by which times, if not by the same: without chunks and with
            the stream on all ranks.
        modes: of the schedules to play.
        contention: see `Timeline.contended`.
    """
    plain_setting, plain_times = plain or (setting, times)
    blocking = play(plain_setting, "ordinary", "serial", plain_times)
    compute = {
        direction: sum(
            plain_times.of(step.key.stage, direction)
            for step in getattr(blocking.schedule, direction)
            if step.do is Do.RUN
        )
        for direction in DIRECTIONS
    }
    return Comparison(
        blocking=blocking,
        forward_bound=compute["forward"],
        bound=sum(compute.values()),
        outcomes=tuple(
            play(setting, wiring, mode, times, contention=contention) for wiring in wirings for mode in modes
        ),
    )


def _graph(setting: Setting, wiring: str) -> StageGraph:
    inputs = Wiring.named(wiring, len(setting.blocks), setting.layers).resolve(setting.blocks)
    return build_stage_graph(
        inputs,
        expert_parallel=setting.expert_parallel,
        chunks=setting.chunks,
        tensor_parallel=setting.tensor_parallel,
        sequence_chunks=setting.chunks if setting.sequence_parallel else 0,
    )
