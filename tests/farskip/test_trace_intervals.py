"""Interval arithmetic against sets of instants, counted one by one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from farskip.trace_intervals import (
    Union,
    covered_until,
    intersect,
    join,
    overlap_of,
    owned_pieces,
    subtract,
    union_of,
)

INTERVALS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12)


def columns(intervals: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    start = np.asarray([start for start, _ in intervals], dtype=np.int64)
    return start, start + np.asarray([length for _, length in intervals], dtype=np.int64)


def instants(intervals: list[tuple[int, int]]) -> set[int]:
    return {at for start, length in intervals for at in range(start, start + length)}


def instants_of(union: Union) -> list[int]:
    return [at for a, b in zip(union.start_M.tolist(), union.end_M.tolist(), strict=True) for at in range(a, b)]


@given(INTERVALS)
def test_union_covers_exactly_the_instants(intervals: list[tuple[int, int]]) -> None:
    union = union_of(*columns(intervals))
    assert instants_of(union) == sorted(instants(intervals))
    assert union.length() == len(instants(intervals))
    # Disjoint, not even touching, and never empty: the other functions rely on it.
    assert (union.end_M > union.start_M).all()
    assert (union.start_M[1:] > union.end_M[:-1]).all()


@given(INTERVALS, INTERVALS)
def test_set_operations(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    union_a, union_b = union_of(*columns(a)), union_of(*columns(b))
    assert instants_of(intersect(union_a, union_b)) == sorted(instants(a) & instants(b))
    assert instants_of(subtract(union_a, union_b)) == sorted(instants(a) - instants(b))
    assert instants_of(join(union_a, union_b)) == sorted(instants(a) | instants(b))


@given(INTERVALS, st.lists(st.integers(-5, 90), min_size=1, max_size=8))
def test_covered_until_counts_the_instants_before(intervals: list[tuple[int, int]], times: list[int]) -> None:
    union = union_of(*columns(intervals))
    expected = [sum(at < time for at in instants(intervals)) for time in times]
    assert covered_until(union, np.asarray(times, dtype=np.int64)).tolist() == expected


@given(INTERVALS, INTERVALS)
def test_overlap_of_each_interval(cover: list[tuple[int, int]], intervals: list[tuple[int, int]]) -> None:
    expected = [len(instants([interval]) & instants(cover)) for interval in intervals]
    assert overlap_of(union_of(*columns(cover)), *columns(intervals)).tolist() == expected


@given(INTERVALS)
def test_every_instant_belongs_to_the_one_that_started_first(intervals: list[tuple[int, int]]) -> None:
    owned_start, owned_end = owned_pieces(*columns(intervals))
    owners: dict[int, int] = {}
    for index, (a, b) in enumerate(zip(owned_start.tolist(), owned_end.tolist(), strict=True)):
        for at in range(a, b):
            assert at not in owners, "an instant has two owners"
            owners[at] = index
    expected = {
        at: min(
            (i for i, (start, length) in enumerate(intervals) if start <= at < start + length),
            key=lambda i: (intervals[i][0], i),
        )
        for at in instants(intervals)
    }
    assert owners == expected


def test_large_stamps_stay_exact() -> None:
    epoch = 1_763_600_000_123_456_789
    union = union_of(np.asarray([epoch, epoch + 5]), np.asarray([epoch + 3, epoch + 6]))
    assert union.length() == 4
    assert covered_until(union, np.asarray([epoch + 2, epoch + 6])).tolist() == [2, 4]
