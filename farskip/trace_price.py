"""The price of overlap: the same kernel of the same shape, alone and under communication.

Communication takes processor cores, memory bandwidth and (CPU) whole cores from the compute that it runs under. A
kernel counts as alone if no communication ran during any of it, and as under communication if it ran during at least
half of it; what lies between is left out, because it would blur both sides.
"""

import numpy as np

from farskip.trace_activity import Activity
from farskip.trace_attribute import HostIndex
from farskip.trace_intervals import overlap_of
from farskip.trace_model import Category, Int64, TraceFile
from farskip.trace_recognize import function_name
from farskip.trace_report import PriceRow


def price_of_overlap(trace: TraceFile, host: HostIndex, activity: Activity) -> tuple[PriceRow, ...]:
    """Compares durations alone and under communication.

    Args:
        trace: the rank's trace.
        host: its host side.
        activity: its activity.

    Returns:
        One row per kernel and launch shape (device) or per stage of our run ranges (CPU) seen both ways, dearest first.
    """
    rows, keys, labels = _device_keys(trace, activity) if activity.device == "gpu" else _stage_keys(trace, host)
    if not len(rows) or not len(activity.communication):
        return ()
    table = trace.rows
    length = table.end_R[rows] - table.start_R[rows]
    under = overlap_of(activity.communication, table.start_R[rows], table.end_R[rows])
    usable = length > 0
    is_alone, is_under = usable & (under == 0), usable & (2 * under >= length)
    both = np.intersect1d(keys[is_alone], keys[is_under])
    priced = [_row(length, keys, is_alone, is_under, key, labels[key]) for key in both.tolist()]
    return tuple(sorted(priced, key=lambda row: -row.extra_ns))


def _row(
    length: Int64, keys: Int64, is_alone: np.ndarray, is_under: np.ndarray, key: int, label: tuple[str, str]
) -> PriceRow:
    alone, under = length[is_alone & (keys == key)], length[is_under & (keys == key)]
    alone_ns, under_ns = int(np.median(alone)), int(np.median(under))
    return PriceRow(
        name=label[0],
        shape=label[1],
        count_alone=len(alone),
        count_under=len(under),
        alone_ns=alone_ns,
        under_ns=under_ns,
        extra_ns=int(under.sum()) - alone_ns * len(under),
    )


def _device_keys(trace: TraceFile, activity: Activity) -> tuple[Int64, Int64, dict[int, tuple[str, str]]]:
    table, rows = trace.rows, activity.compute_pieces.row_K
    if not len(rows):
        return rows, rows, {}
    keys = table.name_R[rows].astype(np.int64) * (int(table.shape_R.max()) + 2) + table.shape_R[rows] + 1
    first = dict(zip(keys[::-1].tolist(), rows[::-1].tolist(), strict=True))
    labels = {key: (function_name(table.name_of(row)), table.shape_of(row)) for key, row in first.items()}
    return rows, keys, labels


def _stage_keys(trace: TraceFile, host: HostIndex) -> tuple[Int64, Int64, dict[int, tuple[str, str]]]:
    """On a CPU trace the operators are too small to tell; our run ranges of one stage have one shape."""
    found, keys, labels = [], [], {}
    numbers: dict[str, int] = {}
    for row in trace.rows.rows_of(Category.RANGE).tolist():
        own = host.own_range(row)
        if own is not None and own.verb == "run":
            key = numbers.setdefault(own.phase, len(numbers))
            labels[key] = (own.phase, "all layers")
            found.append(row)
            keys.append(key)
    return np.asarray(found, dtype=np.int64), np.asarray(keys, dtype=np.int64), labels
