"""Collects decoded events into the columns of a ``RowTable``, part by part, so no reader holds a file's events.

This file decides how stamps become integer nanoseconds. It refuses to guess: a stamp that a 64-bit float cannot hold
to the nanosecond is an error here, and the reader decodes that part again with exact stamps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from farskip.trace_model import CollectiveDetails, Int64, RowTable, SyncDetails

FLOAT_HOLDS_NS_BELOW_US = 2.0**43
"""Below this many microseconds two neighboring doubles are less than a nanosecond apart, so the digits survive."""

_DTYPES = {
    "category": np.int8,
    "name": np.int32,
    "lane": np.int32,
    "start": np.int64,
    "end": np.int64,
    "correlation": np.int64,
    "stream": np.int32,
    "device": np.int32,
    "sequence": np.int64,
    "forward_thread": np.int32,
    "shape": np.int32,
}


class Interner(dict[Any, int]):
    """Numbers distinct values in the order in which they are first asked for."""

    def __missing__(self, key: Any) -> int:
        number = len(self)
        self[key] = number
        return number


class InexactStampError(Exception):
    """A fractional stamp is too large for a 64-bit float to hold it to the nanosecond."""


def nanoseconds_from_us(microseconds: Sequence[float]) -> tuple[Int64, bool]:
    """Microseconds as a JSON decoder gives them, as exact integer nanoseconds.

    Args:
        microseconds: integers as written without a point, floats as written with one; at most three digits behind it.

    Returns:
        int64 nanoseconds, and whether any stamp had a fraction.

    Raises:
        InexactStampError: a stamp was written with a point and is too large for a float to hold its digits.
    """
    value = np.asarray(microseconds)
    if value.dtype == np.int64 or not len(value):
        return value.astype(np.int64) * 1000, False
    value = value.astype(np.float64)
    if float(np.abs(value).max()) >= FLOAT_HOLDS_NS_BELOW_US:
        raise InexactStampError
    whole = np.trunc(value)
    fraction = value - whole
    return whole.astype(np.int64) * 1000 + np.rint(fraction * 1000.0).astype(np.int64), bool(fraction.any())


def nanoseconds_from_digits(digits: Sequence[bytes]) -> tuple[Int64, bool]:
    """Microseconds as written in the file, as exact integer nanoseconds; further digits are rounded to the nearest.

    Args:
        digits: JSON numbers as bytes.

    Returns:
        int64 nanoseconds, and whether any stamp had a fraction.
    """
    result = np.empty(len(digits), dtype=np.int64)
    has_fraction = False
    for index, text in enumerate(digits):
        whole, point, fraction = text.strip(b'"').partition(b".")
        if b"e" in text.lower():
            result[index] = round(float(text) * 1000)
        elif not point:
            result[index] = int(whole) * 1000
        else:
            sign = -1 if whole.startswith(b"-") else 1
            result[index] = int(whole) * 1000 + sign * round(int(fraction) * 1000 / 10 ** len(fraction))
            has_fraction = has_fraction or int(fraction) != 0
    return result, has_fraction


class ColumnStore:
    """Grows the columns of a table; ``finish`` hands over the table once."""

    def __init__(self) -> None:
        self.names = Interner()
        self.lanes = Interner()
        self.shapes = Interner()
        self.num_rows = 0
        self._parts: dict[str, list[np.ndarray]] = {key: [] for key in _DTYPES}
        self._collectives: dict[int, CollectiveDetails] = {}
        self._syncs: dict[int, SyncDetails] = {}

    def add(
        self,
        columns: Mapping[str, Sequence[Any] | np.ndarray],
        collectives: Mapping[int, CollectiveDetails],
        syncs: Mapping[int, SyncDetails],
    ) -> None:
        """Appends rows.

        Args:
            columns: one sequence per column of the table, all of the same length; a column left out is -1 everywhere.
            collectives: details by row number within this part.
            syncs: likewise.
        """
        count = len(columns["start"])
        for key, dtype in _DTYPES.items():
            values = columns.get(key)
            self._parts[key].append(
                np.full(count, -1, dtype=dtype) if values is None else np.asarray(values).astype(dtype, copy=False)
            )
        for row, collective in collectives.items():
            self._collectives[self.num_rows + row] = collective
        for row, sync in syncs.items():
            self._syncs[self.num_rows + row] = sync
        self.num_rows += count

    def finish(self) -> RowTable:
        """The table of everything added; the store is empty afterwards."""
        columns = {}
        for key, dtype in _DTYPES.items():
            parts = self._parts.pop(key)
            columns[f"{key}_R"] = np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)
        return RowTable(
            **columns,
            names=tuple(map(str, self.names)),
            shapes=tuple(shape.decode("utf-8", "replace") for shape in self.shapes),
            lanes=tuple((str(process), str(thread)) for process, thread in self.lanes),
            collectives=self._collectives,
            syncs=self._syncs,
        )
