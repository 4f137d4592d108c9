"""Builds a rank's report out of its activity: sums, groups, and the check that they add up."""

from collections.abc import Callable, Hashable
from typing import TypeVar

import numpy as np

from farskip.trace_activity import (
    Activity,
    Collectives,
    device_activity,
    device_rows,
    no_collectives,
    nothing_to_measure,
)
from farskip.trace_attribute import UNATTRIBUTED, HostIndex
from farskip.trace_exposed import edge_exposed_ns, exposed_stretches
from farskip.trace_host import has_cpu_activity, host_activity
from farskip.trace_hta import HtaFigures
from farskip.trace_intervals import EMPTY, join
from farskip.trace_model import Category, TraceFile
from farskip.trace_options import InspectOptions
from farskip.trace_plan import compare_with_plan
from farskip.trace_price import price_of_overlap
from farskip.trace_report import Figures, RankReport, check_identities

Key = TypeVar("Key", bound=Hashable)


def rank_report(trace: TraceFile, rank: int, options: InspectOptions) -> RankReport:
    """Measures one rank.

    Args:
        trace: its trace.
        rank: its rank, settled over all files of the job.
        options: what the user asked for.

    Returns:
        The report, its identities checked.

    Raises:
        ValueError: rows of several devices, or a device that the file does not have.
    """
    host = HostIndex(trace.rows)
    rows = device_rows(trace, options.device)
    if len(rows):
        if options.mode == "hta":
            return _hta_report(trace, host, rank, options)
        activity = device_activity(trace, host, rows, options.patterns)
    elif options.mode == "hta":
        activity = nothing_to_measure(trace, "no device events: the HTA-compatible mode reads device rows only")
    elif has_cpu_activity(trace):
        activity = host_activity(trace, host, options.patterns)
    else:
        activity = nothing_to_measure(
            trace,
            "no device events: this file has host rows only; profile with ProfilerActivity.CUDA to see the device",
        )
    return _exact_report(trace, host, activity, rank, options)


def _exact_report(
    trace: TraceFile, host: HostIndex, activity: Activity, rank: int, options: InspectOptions
) -> RankReport:
    events = activity.collectives
    communication_ns, compute_ns = activity.communication.length(), activity.compute.length()
    hidden_ns = int(events.hidden_C.sum())
    busy = join(activity.communication, activity.compute)
    window_ns = activity.window[1] - activity.window[0]
    busy_ns, all_ns = busy.length(), join(busy, activity.copies).length()
    notes = list(activity.notes)
    if activity.device != "none" and not len(events):
        notes.append("no communication: no row of this rank was recognized as a collective")
    if options.plan is not None and not any(host.own_range(row) for row in trace.rows.rows_of(Category.RANGE).tolist()):
        notes.append("no schedule to compare: the trace has none of our ranges")
    report = RankReport(
        rank=rank,
        path=trace.path,
        device=activity.device,
        window_start_ns=activity.window[0],
        base_ns=trace.base_ns,
        window_ns=window_ns,
        compute_ns=compute_ns,
        communication_ns=communication_ns,
        hidden_ns=hidden_ns,
        exposed_ns=communication_ns - hidden_ns,
        copies_only_ns=all_ns - busy_ns,
        idle_ns=window_ns - all_ns,
        edge_exposed_ns=edge_exposed_ns(activity),
        figures=_sum(events, np.ones(len(events), dtype=np.bool_)),
        collectives=_grouped(events, events.kind_of),
        phases=_grouped(events, lambda i: events.places[i].phase, without=UNATTRIBUTED),
        layers=_grouped(events, lambda i: events.places[i].layer),
        steps=_grouped(events, lambda i: int(events.step_C[i])),
        unattributed=_sum(events, np.asarray([place.phase == UNATTRIBUTED for place in events.places], dtype=np.bool_)),
        step_ns={number: end - start for start, end, number in host.steps},
        stretches=exposed_stretches(trace, host, activity),
        price=price_of_overlap(trace, host, activity),
        plan=compare_with_plan(trace, host, options.plan) if options.plan is not None else (),
        recognized=activity.recognized,
        event_set={"mode": "exact", **activity.event_set},
        notes=tuple(notes),
        events=events,
        communication=activity.communication,
        compute=activity.compute,
    )
    check_identities(report)
    return report


def _hta_report(trace: TraceFile, host: HostIndex, rank: int, options: InspectOptions) -> RankReport:
    figures = HtaFigures(trace, include_last_step=options.include_last_step)
    exposed_ns = figures.communication_ns - figures.hidden_ns
    none = Figures()
    return RankReport(
        rank=rank,
        path=trace.path,
        device="gpu",
        window_start_ns=figures.window_start_ns,
        base_ns=trace.base_ns,
        window_ns=figures.window_ns,
        compute_ns=figures.compute_ns,
        communication_ns=figures.communication_ns,
        hidden_ns=figures.hidden_ns,
        exposed_ns=exposed_ns,
        copies_only_ns=figures.window_ns - figures.idle_ns - figures.compute_ns - exposed_ns,
        idle_ns=figures.idle_ns,
        edge_exposed_ns=0,
        figures=none,
        collectives={},
        phases={},
        layers={},
        steps={},
        unattributed=none,
        step_ns={number: end - start for start, end, number in host.steps},
        stretches=(),
        price=(),
        plan=(),
        recognized=(),
        event_set={
            "mode": "hta, last step included" if options.include_last_step else "hta",
            "rows": f"{figures.num_rows} device rows kept by the rules of HolisticTraceAnalysis",
            "communication": f"{figures.num_communication} rows that match ^nccl.*Kernel",
            "compute": "all other rows on a stream that are no copy, memset or synchronization",
            "window": "first start to last end of these rows"
            + ("; starts rounded up and ends down to microseconds" if trace.stamps_are_float else ""),
        },
        notes=(*trace.notes, "groups and stretches are left out: rounded stamps do not add up"),
        events=no_collectives(),
        communication=EMPTY,
        compute=EMPTY,
        overlap_percent_override=figures.overlap_percent,
    )


def _sum(events: Collectives, mask: np.ndarray) -> Figures:
    return Figures(
        count=int(mask.sum()),
        summed_ns=int((events.end_C - events.start_C)[mask].sum()),
        total_ns=int((events.owned_end_C - events.owned_start_C)[mask].sum()),
        hidden_ns=int(events.hidden_C[mask].sum()),
    )


def _grouped(events: Collectives, key_of: Callable[[int], Key], without: Key | None = None) -> dict[Key, Figures]:
    """Figures per key, the group with most exposed time first."""
    numbers: dict[Key, int] = {}
    group = np.asarray([numbers.setdefault(key_of(i), len(numbers)) for i in range(len(events))], dtype=np.int64)
    columns = [
        np.ones(len(events), dtype=np.int64),
        events.end_C - events.start_C,
        events.owned_end_C - events.owned_start_C,
        events.hidden_C,
    ]
    sums = [np.zeros(len(numbers), dtype=np.int64) for _ in columns]
    for total, column in zip(sums, columns, strict=True):
        np.add.at(total, group, column)
    found = {
        key: Figures(
            count=int(sums[0][number]),
            summed_ns=int(sums[1][number]),
            total_ns=int(sums[2][number]),
            hidden_ns=int(sums[3][number]),
        )
        for key, number in numbers.items()
        if without is None or key != without
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].exposed_ns))
