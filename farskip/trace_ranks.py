"""Across ranks: which rows are the same collective, who came late, and how much of a collective was waiting.

Rows are matched by what they do, their group, their size where it is the same on all ranks, our step, phase and layer
where known, and then by their ends: a collective ends at nearly the same instant everywhere, while its start is when
a rank arrived. Position in the file is never used, because profilers drop different rows on different ranks. Two rows
are a pair only if each is the other's nearest. What has no partner is listed.

Clocks of different machines differ. The offset that makes most ends coincide is found first and taken out; where no
offset does, the ranks are not compared and the report says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from farskip.trace_exposed import describe
from farskip.trace_model import Int64
from farskip.trace_report import RankReport

_VOTE_WIDTH_NS = 200_000
_MIN_TOLERANCE_NS = 50_000
_MAX_CANDIDATES = 2_000_000
_SIZE_DIFFERS_BY_RANK = ("all_to_all", "dispatch", "combine", "notify", "send_recv", "unknown")
CLOCKS_DISAGREE_FROM_NS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSkew:
    """One rank beside the reference rank.

    Attributes:
        rank: the rank.
        matched, unmatched: how many of its collectives have a partner.
        clock_offset_ns: what its clock is ahead of the reference's.
        mean_late_ns: how much later than the first rank it arrived, on average over matched collectives.
        times_last: how often it arrived last.
        wait_ns: time in matched collectives beyond the shortest duration over ranks, and all time in notify kernels.
        transfer_ns: the shortest duration over ranks, summed over its matched collectives.
        unmatched_names: the first few without a partner, in words.
    """

    rank: int
    matched: int
    unmatched: int
    clock_offset_ns: int
    mean_late_ns: int
    times_last: int
    wait_ns: int
    transfer_ns: int
    unmatched_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SkewedCollective:
    """One collective with the spread of its arrivals."""

    name: str
    step: int
    spread_ns: int
    last_rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Skew:
    """All ranks side by side.

    Attributes:
        reference: the rank the others are matched with.
        ranks: one entry per rank; empty if there is one rank only.
        worst: collectives with the widest spread of arrivals, widest first.
        notes: what could not be judged.
    """

    reference: int
    ranks: tuple[RankSkew, ...]
    worst: tuple[SkewedCollective, ...]
    notes: tuple[str, ...]


def skew_over_ranks(reports: Sequence[RankReport]) -> Skew:
    """Matches the collectives of all ranks.

    Args:
        reports: one per rank.

    Returns:
        The skew; without ranks to compare, an empty one with a note.
    """
    with_events = [report for report in reports if len(report.events)]
    if len(with_events) < 2:
        note = "wait and transfer cannot be told apart on one rank (except notify kernels, which only wait)"
        return Skew(reference=reports[0].rank, ranks=(), worst=(), notes=(note,) if with_events else ())
    reference = with_events[0]
    partners: dict[int, Int64] = {reference.rank: np.arange(len(reference.events))}
    offsets: dict[int, int] = {reference.rank: 0}
    notes: list[str] = []
    for report in with_events[1:]:
        offset = _clock_offset(reference, report)
        if offset is None:
            notes.append(
                f"clocks disagree: no offset makes the collectives of rank {report.rank} end with those of rank "
                f"{reference.rank}; the rank is not compared"
            )
            continue
        if abs(offset) >= CLOCKS_DISAGREE_FROM_NS:
            notes.append(
                f"clocks disagree: rank {report.rank} is {offset / 1e6:+.3f} ms off rank {reference.rank}; taken out"
            )
        offsets[report.rank] = offset
        partners[report.rank] = _match(reference, report, offset)
    compared = [report for report in with_events if report.rank in partners]
    if len(compared) < 2:
        return Skew(reference=reference.rank, ranks=(), worst=(), notes=tuple(notes))
    return _measured(reference, compared, partners, offsets, notes)


def _stamps(reference: RankReport, report: RankReport) -> tuple[Int64, Int64]:
    """Starts and ends on the reference's clock as far as the files' base times say."""
    shift = 0
    if report.base_ns is not None and reference.base_ns is not None:
        shift = report.base_ns - reference.base_ns
    return report.events.start_C + shift, report.events.end_C + shift


def _keys(report: RankReport) -> list[tuple[object, ...]]:
    """What two rows have to share."""
    events = report.events
    keys: list[tuple[object, ...]] = []
    for index in range(len(events)):
        kind, size, place = events.kind_of(index), events.sizes[index], events.places[index]
        where = (int(events.step_C[index]), place.phase, place.layer) if place.layer >= 0 else ()
        keys.append((kind, *where) if kind in _SIZE_DIFFERS_BY_RANK else (*size, *where))
    return keys


def _by_key(keys: Sequence[tuple[object, ...]]) -> dict[tuple[object, ...], Int64]:
    found: dict[tuple[object, ...], list[int]] = {}
    for index, key in enumerate(keys):
        found.setdefault(key, []).append(index)
    return {key: np.asarray(value, dtype=np.int64) for key, value in found.items()}


def _clock_offset(reference: RankReport, report: RankReport) -> int | None:
    """The offset that makes most ends coincide; None if none does for a quarter of them."""
    _, end_a = _stamps(reference, reference)
    _, end_b = _stamps(reference, report)
    differences = []
    groups_a, groups_b = _by_key(_keys(reference)), _by_key(_keys(report))
    budget = _MAX_CANDIDATES // max(len(groups_a), 1)
    common = 0
    for key in groups_a.keys() & groups_b.keys():
        a, b = np.sort(end_a[groups_a[key]]), np.sort(end_b[groups_b[key]])
        common += min(len(a), len(b))
        stride = max(len(a) * len(b) // max(budget, 1), 1)
        differences.append((b[None, :] - a[::stride, None]).ravel())
    if not differences:
        return None
    sorted_differences = np.sort(np.concatenate(differences))
    votes = np.searchsorted(sorted_differences, sorted_differences + _VOTE_WIDTH_NS, side="right") - np.arange(
        len(sorted_differences)
    )
    best = int(votes.max())
    starts = np.flatnonzero(votes == best)
    # Of equal votes the one nearest zero: steps repeat, and a whole step is a worse guess than a small offset.
    centers = sorted_differences[starts] + _VOTE_WIDTH_NS // 2
    start = int(starts[np.argmin(np.abs(centers))])
    offset = int(np.median(sorted_differences[start : start + best]))
    if best * 4 < common and best < 2:
        return None
    return offset


def _match(reference: RankReport, report: RankReport, offset: int) -> Int64:
    """For each collective of the reference: its partner on another rank, or -1."""
    _, end_a = _stamps(reference, reference)
    _, end_b = _stamps(reference, report)
    end_b = end_b - offset
    partner = np.full(len(end_a), -1, dtype=np.int64)
    groups_a, groups_b = _by_key(_keys(reference)), _by_key(_keys(report))
    for key in groups_a.keys() & groups_b.keys():
        a, b = groups_a[key], groups_b[key]
        a, b = a[np.argsort(end_a[a], kind="stable")], b[np.argsort(end_b[b], kind="stable")]
        nearest_b, nearest_a = _nearest(end_a[a], end_b[b]), _nearest(end_b[b], end_a[a])
        mutual = nearest_a[nearest_b] == np.arange(len(a))
        distance = np.abs(end_b[b][nearest_b] - end_a[a])
        gaps = np.diff(end_a[a])
        tolerance = max(int(np.median(gaps)) // 4, _MIN_TOLERANCE_NS) if len(gaps) else np.iinfo(np.int64).max
        good = mutual & (distance <= tolerance)
        partner[a[good]] = b[nearest_b[good]]
    return partner


def _nearest(sorted_a: Int64, sorted_b: Int64) -> Int64:
    """For each value of a: the position of the nearest value of b."""
    right = np.minimum(np.searchsorted(sorted_b, sorted_a), len(sorted_b) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(np.abs(sorted_b[left] - sorted_a) <= np.abs(sorted_b[right] - sorted_a), left, right)


def _measured(
    reference: RankReport,
    compared: Sequence[RankReport],
    partners: Mapping[int, Int64],
    offsets: Mapping[int, int],
    notes: Sequence[str],
) -> Skew:
    count, num_ranks = len(reference.events), len(compared)
    start = np.full((num_ranks, count), np.iinfo(np.int64).max, dtype=np.int64)
    length = np.full((num_ranks, count), np.iinfo(np.int64).max, dtype=np.int64)
    for number, report in enumerate(compared):
        partner = partners[report.rank]
        here = partner >= 0
        starts, _ = _stamps(reference, report)
        start[number, here] = starts[partner[here]] - offsets[report.rank]
        length[number, here] = (report.events.end_C - report.events.start_C)[partner[here]]
    present = length < np.iinfo(np.int64).max
    shared = present.sum(axis=0) >= 2
    first = start.min(axis=0)
    late = np.where(present & shared, start - first, -1)
    last = late.argmax(axis=0)
    shortest = length.min(axis=0)
    is_notify = np.asarray([reference.events.kind_of(index) == "notify" for index in range(count)], dtype=np.bool_)
    ranks = []
    for number, report in enumerate(compared):
        here = present[number] & shared
        own = partners[report.rank]
        unmatched = np.setdiff1d(np.arange(len(report.events)), own[(own >= 0) & shared])
        wait = np.where(is_notify, length[number], length[number] - shortest)[here]
        transfer = np.where(is_notify, 0, shortest)[here]
        ranks.append(
            RankSkew(
                rank=report.rank,
                matched=int(here.sum()),
                unmatched=len(unmatched),
                clock_offset_ns=offsets[report.rank],
                mean_late_ns=int(late[number, here].mean()) if here.any() else 0,
                times_last=int(((last == number) & shared & (late.max(axis=0) > 0)).sum()),
                wait_ns=int(wait.sum()),
                transfer_ns=int(transfer.sum()),
                unmatched_names=tuple(
                    f"{describe(report.events.kind_of(i), report.events.places[i])} at "
                    f"{(int(report.events.start_C[i]) - report.window_start_ns) / 1e6:.3f} ms"
                    for i in unmatched[:5].tolist()
                ),
            )
        )
    spread = np.where(shared, late.max(axis=0), -1)
    order = [index for index in np.argsort(-spread, kind="stable")[:20].tolist() if spread[index] > 0]
    worst = tuple(
        SkewedCollective(
            name=describe(reference.events.kind_of(index), reference.events.places[index]),
            step=int(reference.events.step_C[index]),
            spread_ns=int(spread[index]),
            last_rank=compared[int(last[index])].rank,
        )
        for index in order
    )
    return Skew(reference=reference.rank, ranks=tuple(ranks), worst=worst, notes=tuple(notes))
