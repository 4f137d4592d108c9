"""Over ranks: robust matching, clocks, waits and transfers; price of overlap; the planned schedule."""

import json
from pathlib import Path

import pytest

from farskip.testing_traces import ALL_REDUCE, GEMM, TraceBuilder
from farskip.trace import TraceReport, inspect

US = 1_000


def two_ranks(
    tmp_path: Path,
    starts: list[tuple[int, int, int]],
    *,
    offset: int = 0,
    drop: tuple[int, ...] = (),
    name: str = ALL_REDUCE,
    base_ns: int | None = None,
) -> TraceReport:
    """All-reduces that rank 0 and rank 1 reach at different times and leave together: (arrival 0, arrival 1, end)."""
    paths = []
    for rank in range(2):
        trace = TraceBuilder(rank=rank)
        trace.kernel(GEMM, rank * offset, rank * offset + 5)
        if base_ns is not None:
            trace.meta["baseTimeNanoseconds"] = base_ns - rank * offset
        for index, arrivals in enumerate(starts):
            if rank == 1 and index in drop:
                continue
            shift = offset if rank else 0
            trace.kernel(name, arrivals[rank] + shift, arrivals[2] + shift, stream=20)
        paths.append(trace.write(tmp_path / f"rank{rank}.json"))
    return inspect(paths)


IRREGULAR = [
    (1_000 * US, 1_020 * US, 1_100 * US),
    (2_000 * US, 2_000 * US, 2_090 * US),
    (3_500 * US, 3_450 * US, 3_600 * US),
    (6_000 * US, 6_070 * US, 6_200 * US),
    (7_100 * US, 7_100 * US, 7_150 * US),
]


def test_wait_and_transfer_apart(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path, IRREGULAR).skew.ranks
    # Shortest over ranks: 80, 90, 100, 130 and 50 us; what a rank spent beyond that it waited.
    assert first.transfer_ns == second.transfer_ns == 450 * US
    assert (first.wait_ns, second.wait_ns) == (90 * US, 50 * US)
    assert (first.matched, first.unmatched) == (5, 0)
    assert (first.times_last, second.times_last) == (1, 2)
    assert (first.mean_late_ns, second.mean_late_ns) == (10 * US, 18 * US)


def test_the_widest_arrivals_name_the_last_rank(tmp_path: Path) -> None:
    worst = two_ranks(tmp_path, IRREGULAR).skew.worst
    assert [(row.spread_ns, row.last_rank) for row in worst] == [(70 * US, 1), (50 * US, 0), (20 * US, 1)]


@pytest.mark.parametrize("drop", [(0,), (2,), (1, 3)])
def test_dropped_rows_do_not_shift_the_others(tmp_path: Path, drop: tuple[int, ...]) -> None:
    report = two_ranks(tmp_path, IRREGULAR, drop=drop)
    first, second = report.skew.ranks
    assert (first.matched, first.unmatched, second.unmatched) == (5 - len(drop), len(drop), 0)
    assert first.transfer_ns == sum((80, 90, 100, 130, 50)[i] for i in range(5) if i not in drop) * US
    at = (IRREGULAR[drop[0]][0]) / 1e6
    assert first.unmatched_names[0] == f"all_reduce at {at:.3f} ms"


def many(tmp_path: Path, ends: list[int], dropped: dict[int, set[int]]) -> TraceReport:
    paths = []
    for rank in range(2):
        trace = TraceBuilder(rank=rank)
        for index, end in enumerate(ends):
            if index not in dropped[rank]:
                trace.kernel(ALL_REDUCE, (end - 10) * US, end * US, stream=20)
        paths.append(trace.write(tmp_path / f"rank{rank}.json"))
    return inspect(paths)


def test_one_row_is_nobody_s_partner_twice(tmp_path: Path) -> None:
    """Two collectives 20 us apart, one of them dropped on the other rank: nearer than the tolerance, still no pair."""
    report = many(tmp_path, [1_000, 1_700, 1_720, 2_900, 4_400], {0: set(), 1: {1}})
    first, second = report.skew.ranks
    assert (first.matched, first.unmatched, second.unmatched) == (4, 1, 0)


def test_each_rank_dropped_another_row(tmp_path: Path) -> None:
    """What is left over on both sides is each other's nearest, but far away: listed on both, not paired."""
    ends = [1_100, 1_300, 1_500, 1_700, 2_400, 2_600, 2_900, 3_110]
    report = many(tmp_path, ends, {0: {4}, 1: {5}})
    assert [(rank.matched, rank.unmatched) for rank in report.skew.ranks] == [(6, 1), (6, 1)]


@pytest.mark.parametrize("offset", [0, 777 * US, 40_000_000 * US])
def test_clocks_that_disagree_are_found_and_taken_out(tmp_path: Path, offset: int) -> None:
    report = two_ranks(tmp_path, IRREGULAR, offset=offset)
    _, second = report.skew.ranks
    # The ends agree to the vote's width at worst; the median of the winning vote is exact here.
    assert second.clock_offset_ns == offset
    assert second.wait_ns == 50 * US
    assert any("clocks disagree" in note for note in report.skew.notes) == (offset >= 1_000 * US)


def test_base_times_of_the_files_are_used(tmp_path: Path) -> None:
    report = two_ranks(tmp_path, IRREGULAR, offset=5_000 * US, base_ns=10**15)
    assert report.skew.ranks[1].clock_offset_ns == 0 and report.skew.notes == ()


def test_ranks_that_share_nothing_are_not_compared(tmp_path: Path) -> None:
    a, b = TraceBuilder(rank=0), TraceBuilder(rank=1)
    a.kernel(ALL_REDUCE, 0, 50, stream=20)
    b.kernel("ncclDevKernel_AllGather_RING_LL(x)", 0, 50, stream=20)
    report = inspect([a.write(tmp_path / "a.json"), b.write(tmp_path / "b.json")])
    assert report.skew.ranks == ()
    assert "clocks disagree" in report.skew.notes[0]


def test_sizes_keep_different_reductions_apart(tmp_path: Path) -> None:
    paths = []
    for rank in range(2):
        trace = TraceBuilder(rank=rank)
        for at, elements in ((0, 10 + rank), (300 * US, 99)):
            details = {"Collective name": "allreduce", "In msg nelems": elements, "Process Group Name": "0"}
            trace.kernel(ALL_REDUCE, at, at + 100 * US, stream=20, **details)
        paths.append(trace.write(tmp_path / f"rank{rank}.json"))
    assert [rank.matched for rank in inspect(paths).skew.ranks] == [1, 1]


def test_notify_kernels_only_wait(tmp_path: Path) -> None:
    name = "void deep_ep::intranode::notify_dispatch<8>(x)"
    first, second = two_ranks(tmp_path, IRREGULAR, name=name).skew.ranks
    assert (first.transfer_ns, second.transfer_ns) == (0, 0)
    assert first.wait_ns == 540 * US


def test_one_rank_cannot_tell_wait_from_transfer(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(ALL_REDUCE, 0, 50, stream=20)
    skew = inspect(trace.write(tmp_path / "rank0.json")).skew
    assert skew.ranks == () and "cannot be told apart on one rank" in skew.notes[0]


def test_price_of_overlap(tmp_path: Path) -> None:
    trace = TraceBuilder()
    for at, length in ((0, 100), (200, 110), (400, 104), (1_000, 150), (1_200, 170), (1_500, 120)):
        trace.kernel(GEMM, at, at + length)
    # Runs under the last three: wholly, wholly, and for less than half, which counts neither way.
    trace.kernel(ALL_REDUCE, 1_000, 1_400, stream=20)
    trace.kernel(ALL_REDUCE, 1_590, 1_620, stream=20)
    (row,) = inspect(trace.write(tmp_path / "rank0.json")).ranks[0].price
    assert (row.count_alone, row.count_under, row.alone_ns, row.under_ns) == (3, 2, 104, 160)
    assert row.extra_ns == 150 + 170 - 2 * 104


def test_other_shapes_are_other_kernels(tmp_path: Path) -> None:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 100)
    trace.kernel(GEMM, 1_000, 1_150)
    trace.events[-1]["args"]["grid"] = [16, 1, 1]
    trace.kernel(ALL_REDUCE, 1_000, 1_400, stream=20)
    assert inspect(trace.write(tmp_path / "rank0.json")).ranks[0].price == ()


PLAN = {
    "mode": "overlapped",
    "forward": [
        {"do": "run", "layer": 0, "stage": "route"},
        {"do": "launch", "layer": 0, "stage": "dispatch"},
        {"do": "run", "layer": 0, "stage": "shared"},
        {"do": "wait", "layer": 0, "stage": "dispatch"},
        {"do": "run", "layer": 0, "stage": "experts"},
    ],
    "backward": [{"do": "run", "layer": 0, "stage": "experts"}],
}


def planned(tmp_path: Path, order: list[str], rounds: int = 1) -> dict[str, tuple[str, int]]:
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 10)
    at = 0
    for _ in range(rounds):
        for name in order:
            trace.range(f"farskip::L000::{name}", at, at + 50)
            at += 100
    (tmp_path / "schedule.json").write_text(json.dumps(PLAN))
    report = inspect(trace.write(tmp_path / "rank0.json"), schedule=tmp_path / "schedule.json").ranks[0]
    return {f"{line.direction} {line.text}": (line.status, line.count) for line in report.plan}


def test_a_run_as_planned(tmp_path: Path) -> None:
    order = [
        "route::run",
        "dispatch::launch",
        "shared::run",
        "dispatch::wait",
        "experts::run",
        "experts::run::backward",
    ]
    lines = planned(tmp_path, order, rounds=3)
    assert len(lines) == 6 and set(lines.values()) == {("as planned", 3)}


def test_what_was_left_out_and_what_was_added(tmp_path: Path) -> None:
    lines = planned(tmp_path, ["route::run", "dispatch::launch", "dispatch::wait", "merge::run", "experts::run"])
    assert lines["forward run shared L000"] == ("missing", 0)
    assert lines["forward run merge L000"] == ("unplanned", 1)
    assert lines["backward run experts L000"] == ("missing", 0)
    assert lines["forward run experts L000"] == ("as planned", 1)


def test_a_serial_run_against_an_overlapped_plan(tmp_path: Path) -> None:
    order = ["route::run", "dispatch::launch", "dispatch::wait", "shared::run", "experts::run"]
    lines = planned(tmp_path, order)
    off = {text for text, (status, _) in lines.items() if status != "as planned"}
    assert off & {"forward run shared L000", "forward wait dispatch L000"}


def test_a_file_that_is_no_schedule(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    trace = TraceBuilder()
    trace.kernel(GEMM, 0, 10)
    file = trace.write(tmp_path / "rank0.json")
    for text in ("[]", "{", '{"forward": [1], "backward": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="no planned schedule"):
            inspect(file, schedule=path)
    with pytest.raises(ValueError, match=r"elsewhere\.json: no planned schedule \(No such file or directory\)"):
        inspect(file, schedule=tmp_path / "elsewhere.json")
    path.write_text(json.dumps(PLAN))
    assert any("no schedule to compare" in note for note in inspect(file, schedule=path).ranks[0].notes)
