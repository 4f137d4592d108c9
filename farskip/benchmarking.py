"""Time variants of one step so that their differences can be believed. Knows no link, no model and no process group.

Decides the order of measurement (interleaved: one repeat of every variant per round, each round starting with another
one, so that a machine whose speed drifts moves all of them), which repeats count (those whose process did not stand in
the run queue, because of other processes, for more than a share of the step), how repeats are summed up (median and
quartiles), and what a variant must prove before it is timed at all (`difference`).

Legend: T tokens, K experts per token, E experts.
"""

import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch

from farskip.executor import RoutingHook
from farskip.stage import Routing

OUTPUT_TOLERANCE = 5e-5
"""Largest difference of an output in units of max(1, largest reference): fp32, sums in another order."""

GRADIENT_TOLERANCE = 1e-4
"""Largest |difference| / |gradient| per parameter: fp32, sums in another order."""

SKEW = 1.5
"""Under skewed routing the experts of the first rank are this much more likely than the even share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeat:
    """One timed step.

    Attributes:
        ms: its duration on the slowest rank.
        delay_share: time in the run queue because of other processes (`CoreTimes.delay`) over duration, on the rank
            where that is largest.
        is_clean: whether it counts: the share is within the limit that the caller has set.
        exposed_ms: how long compute stood still for communication, on the rank where that is longest; None where
            nobody could tell.
        others_ran_ms: how long the threads that move bytes had a core, on the rank where that is longest; None where
            the system keeps no account.
        others_queued_ms: how long they waited for one, likewise.
    """

    ms: float
    delay_share: float
    is_clean: bool
    exposed_ms: float | None = None
    others_ran_ms: float | None = None
    others_queued_ms: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The clean repeats of one variant: quartiles of the duration, medians of the other times of `Repeat`."""

    median_ms: float
    p25_ms: float
    p75_ms: float
    exposed_ms: float | None
    others_ran_ms: float | None
    others_queued_ms: float | None
    clean_repeats: int
    rejected_repeats: int


def summarize(repeats: Sequence[Repeat]) -> Summary | None:
    """Median and quartiles of the clean repeats; None if there is no clean one."""
    clean = [repeat for repeat in repeats if repeat.is_clean]
    if not clean:
        return None
    times = [repeat.ms for repeat in clean]
    p25, median, p75 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Summary(
        median_ms=median,
        p25_ms=p25,
        p75_ms=p75,
        exposed_ms=_median(repeat.exposed_ms for repeat in clean),
        others_ran_ms=_median(repeat.others_ran_ms for repeat in clean),
        others_queued_ms=_median(repeat.others_queued_ms for repeat in clean),
        clean_repeats=len(clean),
        rejected_repeats=len(repeats) - len(clean),
    )


def _median(times: Iterable[float | None]) -> float | None:
    """Of those that are known; None if none is."""
    known = [time for time in times if time is not None]
    return statistics.median(known) if known else None


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreTimes:
    """What the threads of a process had of the cores, in milliseconds: since it started, or between two readings.

    Attributes:
        main_queued: of the main thread in the run queue.
        others_ran: of all other threads on a core. In a benchmark they are those that move bytes.
        others_queued: of all other threads in the run queue.
    """

    main_queued: float = 0.0
    others_ran: float = 0.0
    others_queued: float = 0.0

    def since(self, before: Self) -> Self:
        """Between an earlier reading and this one."""
        return replace(
            self,
            main_queued=self.main_queued - before.main_queued,
            others_ran=self.others_ran - before.others_ran,
            others_queued=self.others_queued - before.others_queued,
        )

    @property
    def delay(self) -> float:
        """How long the main thread waited for a core beyond what the other threads ran; at least 0.

        Where it computes and they move bytes, some of its waiting is their doing and part of the step. The rest of the
        time somebody else had the core.
        """
        return max(0.0, self.main_queued - self.others_ran)


class CoreAccount:
    """The kernel's account of who had a core, of the threads of this process.

    Args:
        tasks: where Linux has a folder per thread, in it an account: time on a core, time waiting for one (both ns),
            number of turns.
        main: the main thread among them.
    """

    def __init__(self, tasks: Path = Path("/proc/self/task"), main: int | None = None) -> None:
        self._tasks = tasks
        self._main = str(os.getpid() if main is None else main)
        self.is_known = self._read(tasks / self._main) is not None

    def times(self) -> CoreTimes:
        """Since the process started. Zeros where the system keeps no account."""
        if not self.is_known:
            return CoreTimes()
        accounts = {task.name: self._read(task) or (0, 0) for task in self._tasks.iterdir()}
        _, main_queued = accounts.pop(self._main, (0, 0))
        return CoreTimes(
            main_queued=main_queued / 1e6,
            others_ran=sum(ran for ran, _ in accounts.values()) / 1e6,
            others_queued=sum(queued for _, queued in accounts.values()) / 1e6,
        )

    @staticmethod
    def _read(task: Path) -> tuple[int, int] | None:
        """Nanoseconds of one thread on a core, and waiting for one; None if it has ended, or nobody counts."""
        try:
            on_core, waiting, *_ = (task / "schedstat").read_text().split()
        except (OSError, ValueError):
            return None
        return int(on_core), int(waiting)


Timed = Callable[[str], Repeat]
"""Runs one step of the variant of this name. Its answer is the same on all ranks."""


def interleave(
    names: Sequence[str],
    timed: Timed,
    *,
    clean_repeats: int,
    max_rounds: int,
    after_round: Callable[[int, Mapping[str, Sequence[Repeat]]], None] = lambda number, repeats: None,
) -> dict[str, list[Repeat]]:
    """Rounds of one repeat per variant, until every variant has enough clean ones.

    Args:
        names: the variants.
        timed: runs and times one step of one of them.
        clean_repeats: how many clean repeats every variant should have.
        max_rounds: after which to stop all the same.
        after_round: called with the number of rounds so far and all repeats.

    Returns:
        All repeats of every variant, clean or not.
    """
    repeats: dict[str, list[Repeat]] = {name: [] for name in names}
    for number in range(max_rounds):
        start = number % len(names)
        for name in (*names[start:], *names[:start]):
            repeats[name].append(timed(name))
        after_round(number + 1, repeats)
        if all(sum(repeat.is_clean for repeat in of_one) >= clean_repeats for of_one in repeats.values()):
            break
    return repeats


@dataclass(frozen=True, kw_only=True, slots=True)
class Gained:
    """What a variant gained over the blocking one. None where the question makes no sense.

    Attributes:
        speedup: blocking over variant.
        hidden_share: (blocking - variant) / (blocking - no communication).
        window_share: hidden share over the share that the windows of its schedule allow.
    """

    speedup: float | None
    hidden_share: float | None
    window_share: float | None


def gained(
    ms: float, *, blocking_ms: float | None, free_ms: float | None, allowed_share: float | None = None
) -> Gained:
    """Speed-up and shares from medians.

    Args:
        ms: the variant.
        blocking_ms: the blocking variant, if it was measured.
        free_ms: the one without communication, if it was measured.
        allowed_share: of the communication, how much the windows of the variant's schedule can hide.
    """
    if blocking_ms is None:
        return Gained(speedup=None, hidden_share=None, window_share=None)
    hidden = None
    if free_ms is not None and blocking_ms > free_ms:
        hidden = (blocking_ms - ms) / (blocking_ms - free_ms)
    window = hidden / allowed_share if hidden is not None and allowed_share else None
    return Gained(speedup=blocking_ms / ms, hidden_share=hidden, window_share=window)


@dataclass(frozen=True, kw_only=True, slots=True)
class Computed:
    """What one step of a variant computed on this rank.

    Attributes:
        output: hidden states.
        gradients: by parameter name; empty if only the output is to be compared.
    """

    output: torch.Tensor
    gradients: Mapping[str, torch.Tensor] = field(default_factory=dict)


def difference(variant: Computed, reference: Computed, *, exact: bool) -> str:
    """What makes a variant differ from its reference, in words; empty if nothing does.

    Args:
        variant: what is checked.
        reference: what it should be.
        exact: equal bits of the output and of every gradient; otherwise within the two tolerances of this file, for
            the gradients of the parameters that both have.
    """
    if exact:
        if variant.gradients.keys() != reference.gradients.keys():
            return "other parameters have a gradient"
        if not torch.equal(variant.output, reference.output):
            return "its output has other bits"
        for name, gradient in variant.gradients.items():
            if not torch.equal(gradient, reference.gradients[name]):
                return f"its gradient of {name} has other bits"
        return ""
    limit = OUTPUT_TOLERANCE * max(1.0, float(reference.output.abs().max()))
    apart = float((variant.output - reference.output).abs().max())
    if not apart <= limit:  # NaN is no pass
        return f"its output is {apart:.2g} away, above {limit:.2g}"
    common = variant.gradients.keys() & reference.gradients.keys()
    if reference.gradients and not common:
        return "it has no parameter of its reference"
    for name in sorted(common):
        gradient = variant.gradients[name]
        norm = float(reference.gradients[name].norm())
        apart = float((gradient - reference.gradients[name]).norm())
        if not apart <= GRADIENT_TOLERANCE * norm:
            return f"its gradient of {name} is {apart:.2g} away, its norm is {norm:.2g}"
    return ""


def fixed_experts(
    kind: str, *, num_tokens: int, top_k: int, num_experts: int, num_ranks: int, layer: int
) -> torch.Tensor:
    """Which experts every token goes to, the same in every step and on every rank.

    Args:
        kind: ``balanced``: every expert equally often; ``skewed``: the first rank's experts `SKEW` times as likely as
            their even share.
        num_tokens: T.
        top_k: K.
        num_experts: E.
        num_ranks: over which the experts are spread in order.
        layer: shifts or reseeds the pattern.

    Returns:
        int64 [T, K]; the experts of a token differ from each other.
    """
    if kind == "balanced":
        slots = torch.arange(num_tokens * top_k) + layer
        return (slots % num_experts).view(num_tokens, top_k)
    if kind != "skewed":
        raise ValueError(f"routing={kind!r} is unknown; use balanced or skewed")
    local = num_experts // num_ranks
    share = min(SKEW / num_ranks, 1.0)
    odds_E = torch.full((num_experts,), (1.0 - share) / max(num_experts - local, 1))
    odds_E[:local] = share / local
    generator = torch.Generator().manual_seed(layer)
    return torch.multinomial(odds_E.expand(num_tokens, num_experts), top_k, generator=generator)


def fixed_routing(kind: str, num_experts: int, num_ranks: int) -> RoutingHook:
    """A routing hook of the executor: the experts of `fixed_experts`, the weights of the router."""
    chosen: dict[tuple[int, torch.Size], torch.Tensor] = {}

    def hook(layer: int, routing: Routing, recomputing: bool) -> Routing:
        shape = routing.experts_TK.shape
        if (layer, shape) not in chosen:
            chosen[layer, shape] = fixed_experts(
                kind,
                num_tokens=shape[0],
                top_k=shape[1],
                num_experts=num_experts,
                num_ranks=num_ranks,
                layer=layer,
            )
        return replace(routing, experts_TK=chosen[layer, shape])

    return hook
