"""Interval arithmetic on int64 nanoseconds: exact, and the only place of the inspector that adds up time.

Intervals are half-open, [start, end). A *union* is a pair of arrays, sorted, disjoint and without empty intervals;
every function here that takes a union relies on that. Nothing is rounded and nothing is converted to floating point.

Legend: N intervals, M intervals of a union, T points in time.
"""

from dataclasses import dataclass

import numpy as np

from farskip.trace_model import Int64


@dataclass(frozen=True, kw_only=True, slots=True)
class Union:
    """Sorted, disjoint, non-empty half-open intervals; touching ones are merged."""

    start_M: Int64
    end_M: Int64

    def length(self) -> int:
        """Total length in nanoseconds."""
        return int((self.end_M - self.start_M).sum())

    def __len__(self) -> int:
        return len(self.start_M)


EMPTY = Union(start_M=np.zeros(0, dtype=np.int64), end_M=np.zeros(0, dtype=np.int64))


def union_of(start_N: Int64, end_N: Int64) -> Union:
    """The union of arbitrary intervals.

    Args:
        start_N: int64 starts, any order.
        end_N: int64 ends; intervals with ``end <= start`` count as empty.

    Returns:
        Their union.
    """
    keep_N = end_N > start_N
    if not keep_N.any():
        return EMPTY
    start_N, end_N = start_N[keep_N], end_N[keep_N]
    order_N = np.argsort(start_N, kind="stable")
    start_N, end_N = start_N[order_N], np.maximum.accumulate(end_N[order_N])
    first_N = np.empty(len(start_N), dtype=np.bool_)
    first_N[0] = True
    np.greater(start_N[1:], end_N[:-1], out=first_N[1:])
    last_N = np.append(first_N[1:], True)
    return Union(start_M=start_N[first_N], end_M=end_N[last_N])


def join(*unions: Union) -> Union:
    """The union of several unions."""
    return union_of(np.concatenate([u.start_M for u in unions]), np.concatenate([u.end_M for u in unions]))


def covered_until(union: Union, time_T: Int64) -> Int64:
    """Length of the part of a union that lies before each point in time.

    Differences of this function are exact overlaps: the part of [a, b) inside the union is ``covered_until(b) -
    covered_until(a)``.

    Args:
        union: M intervals.
        time_T: int64 points in time, any order.

    Returns:
        int64 lengths, one per point.
    """
    if not len(union):
        return np.zeros(len(time_T), dtype=np.int64)
    before_M = np.concatenate(([0], np.cumsum(union.end_M - union.start_M)))
    index_T = np.searchsorted(union.start_M, time_T, side="right")
    inside_T = np.minimum(time_T, union.end_M[np.maximum(index_T - 1, 0)]) - union.start_M[np.maximum(index_T - 1, 0)]
    return np.where(index_T > 0, before_M[np.maximum(index_T - 1, 0)] + inside_T, 0)


def overlap_of(union: Union, start_N: Int64, end_N: Int64) -> Int64:
    """Length of each interval's part inside a union."""
    return covered_until(union, end_N) - covered_until(union, start_N)


def intersect(a: Union, b: Union) -> Union:
    """The intersection of two unions."""
    if not len(a) or not len(b):
        return EMPTY
    edges = distinct(np.concatenate((a.start_M, a.end_M, b.start_M, b.end_M)))
    start, end = edges[:-1], edges[1:]
    keep = _contains(a, start) & _contains(b, start)
    return union_of(start[keep], end[keep])


def subtract(a: Union, b: Union) -> Union:
    """The part of a union that lies outside another one."""
    if not len(a) or not len(b):
        return a
    edges = distinct(np.concatenate((a.start_M, a.end_M, b.start_M, b.end_M)))
    start, end = edges[:-1], edges[1:]
    keep = _contains(a, start) & ~_contains(b, start)
    return union_of(start[keep], end[keep])


def distinct(values: Int64) -> Int64:
    """The distinct values, sorted. (np.unique hashes integers, which is slower than sorting nearly sorted ones.)"""
    ordered = np.sort(values)
    return ordered[np.append(True, ordered[1:] > ordered[:-1])] if len(ordered) else ordered


def _contains(union: Union, time_T: Int64) -> np.ndarray:
    """Whether each point in time lies in a union."""
    index_T = np.searchsorted(union.start_M, time_T, side="right") - 1
    return (index_T >= 0) & (time_T < union.end_M[np.maximum(index_T, 0)])


def owned_pieces(start_N: Int64, end_N: Int64) -> tuple[Int64, Int64]:
    """Gives every instant of a union to the interval that started first among those open at that instant.

    With intervals sorted by start, the one that started first among those open owns what lies after the ends of all
    that started earlier, so each interval owns at most one piece.

    Args:
        start_N: int64 starts, any order; of equal starts the one with the lower index comes first.
        end_N: int64 ends, ``end >= start``.

    Returns:
        Starts and ends of the owned pieces, in the order of the arguments; an interval that owns nothing has
        ``start == end``. The pieces are disjoint and add up to the union.
    """
    order_N = np.argsort(start_N, kind="stable")
    sorted_start_N, sorted_end_N = start_N[order_N], end_N[order_N]
    reached_N = np.maximum.accumulate(sorted_end_N)
    earlier_N = np.concatenate((sorted_start_N[:1], reached_N[:-1]))
    piece_start_N = np.minimum(np.maximum(sorted_start_N, earlier_N), np.maximum(sorted_start_N, sorted_end_N))
    piece_end_N = np.maximum(piece_start_N, sorted_end_N)
    owned_start_N, owned_end_N = np.empty_like(start_N), np.empty_like(end_N)
    owned_start_N[order_N], owned_end_N[order_N] = piece_start_N, piece_end_N
    return owned_start_N, owned_end_N
