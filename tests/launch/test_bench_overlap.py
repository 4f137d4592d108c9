"""`farskip bench overlap` without root: what it refuses, what it writes, and that a wrong variant is not reported."""

import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from farskip.benchmarking import Repeat
from farskip.launch import bench_overlap, network_hosts
from farskip.launch.bench_config import BenchOverlapConfig, Compute, Parallelism, RoutingKind, SizeConfig, TimedConfig
from farskip.launch.bench_report import report
from farskip.launch.bench_run import Bench
from farskip.launch.bench_variants import kinds
from farskip.launch.hydra_command import documented_keys
from farskip.launch.ranks import Ranks
from farskip.parallel.collectives import ProcessGroupLink
from farskip.parallel.gloo_threads import gloo_threads_are_realtime, set_gloo_threads
from farskip.parallel.local_copy import LocalCopyLink
from farskip.testing import RankPool

Command = Callable[[list[str]], tuple[int, str, str]]
PASSES = ("forward", "forward_backward")
FIGURES = {"median_ms", "p25_ms", "p75_ms", "clean_repeats", "speedup", "hidden_share", "window_share"}


def small(**changes: Any) -> BenchOverlapConfig:
    """A run of moments: two layers that do not sleep, and no repeat is rejected."""
    settings: dict[str, Any] = {
        "link": "local",
        "compute": Compute.timed,
        "repeats": 1,
        "delay_limit": 1e9,
        "size": SizeConfig(layers=2, hidden=16, experts=8, batch=1, sequence=12),
        "timed": TimedConfig(attention_ms=0.0, shared_ms=0.0, experts_ms=0.0),
    }
    return BenchOverlapConfig(**settings | changes)


def test_keys_and_defaults_are_frozen(check_snapshot: Callable[[str, str], None]) -> None:
    lines = [
        f"{key}={value.value if isinstance(value, Enum) else value!r}"
        for key, value, _ in documented_keys(BenchOverlapConfig())
    ]
    check_snapshot("\n".join(lines) + "\n", "bench_overlap_keys.txt")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["link=wifi"], "link=wifi is unknown; use a rate such as 500mbit or 1gbit, local or emulated"),
        (["link=10gbit"], "10000 Mbit/s is outside 100..1000"),
        (["hosts=1"], "hosts=1 is too small; use at least 2"),
        (["hosts=3"], "hosts=3 does not divide size.experts=8"),
        (["hosts=3", "parallel=tensor"], "hosts=3 does not divide size.heads=8"),
        (["parallel=tensor", "size.mlp_width=7"], "hosts=2 does not divide size.mlp_width=7"),
        (["parallel=tensor", "size.hidden=24"], "size.hidden=24 is no multiple of twice size.heads=8"),
        (["size.layers=-1"], "size.layers=-1 is too small; use at least 1"),
        (["size.experts=0"], "size.experts=0 is too small; use at least 1"),
        (["chunks=0"], "chunks=0 is too small"),
        (["repeats=0"], "repeats=0 is too small"),
        (["delay_limit=0"], "delay_limit=0.0 must be above 0"),
        (["compute=timed", "timed.attention_ms=-4"], "timed.attention_ms=-4.0 is no time; use 0 or more milliseconds"),
        (["link=emulated", "emulated.bandwidth_gbit_s=0"], "emulated.bandwidth_gbit_s=0.0 must be above 0"),
        (["link=emulated", "emulated.latency_us=-1"], "emulated.latency_us=-1.0 must be at least 0"),
        (["delay_limit=nan"], "delay_limit=nan must be above 0"),
        (["size.top_k=9"], "size.top_k=9 is outside 1..8"),
        (["wirings=[farship]", "link=local"], "wiring 'farship' is unknown; did you mean 'farskip'?"),
        (["out=/dev/null/x.json", "link=local"], "out=/dev/null/x.json"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_refused_in_one_line_before_anything_starts(
    words: list[str], says: str, farskip_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run_on_hosts", "run_on_local_ranks"):
        monkeypatch.setattr(bench_overlap, name, lambda *arguments: pytest.fail("ranks were started"))
    code, _, error = farskip_command(["bench", "overlap", *words])
    assert (code, error.count("\n")) == (2, 1)
    assert says in error


def test_hosts_need_root_and_iproute2(farskip_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_hosts.sys, "platform", "linux")
    monkeypatch.setattr(network_hosts.os, "geteuid", lambda: 1000)
    code, _, error = farskip_command(["bench", "overlap"])
    assert code == 2 and error.count("\n") == 1
    assert "link=500mbit needs root" in error and "use link=emulated" in error
    monkeypatch.setattr(network_hosts.os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    code, _, error = farskip_command(["bench", "overlap"])
    assert code == 2 and error.count("\n") == 1
    assert "needs the command 'tc' of iproute2" in error


@pytest.mark.parametrize(
    ("link", "rate"), [("500mbit", "500mbit"), ("1gbit", "1000mbit"), ("local", None), ("emulated", None)]
)
def test_a_rate_is_recognized(link: str, rate: str | None) -> None:
    assert network_hosts.rate_of(link) == rate


def test_the_variants_are_those_that_are_promised() -> None:
    found = {kind.name: kind for kind in kinds(BenchOverlapConfig())}
    assert list(found) == [
        "ordinary_blocking",
        "ordinary_shared",
        "ordinary_chunked",
        "farskip_serial",
        "farskip_overlapped",
        "farskip_chunked",
    ]
    assert found["farskip_overlapped"].reference == "farskip_serial"
    assert found["ordinary_shared"].reference == "ordinary_blocking"
    assert (found["farskip_chunked"].chunks, found["farskip_chunked"].reference) == (2, "farskip_serial")
    more = [kind.name for kind in kinds(BenchOverlapConfig(wirings=["ladder"], chunks=1))]
    assert more == ["ordinary_blocking", "ordinary_shared", "ladder_serial", "ladder_overlapped"]


def bench_on_this_rank(config: BenchOverlapConfig, sabotage: str = "") -> dict[str, Any]:
    """The rank's part of a run; `sabotage` names a variant whose experts are changed on the last rank."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    class Sabotaged(Bench):
        def _check(self) -> None:
            if sabotage and rank == size - 1:
                with torch.no_grad():
                    parameters = self.variants[sabotage].parameters
                    next(p for name, p in parameters.items() if "expert" in name).mul_(1.01)
            super()._check()

    said: list[str] = []
    bench = Sabotaged(config, Ranks(rank=rank, world_size=size, device="cpu"), say=said.append)
    try:
        set_gloo_threads("ordinary")
        raw = {**bench.run(PASSES), "said": said, "are_realtime": gloo_threads_are_realtime()}
        return {**raw, "may_be_realtime": set_gloo_threads("auto")}
    finally:
        bench.close()


@pytest.mark.parametrize("hosts", [2, 4])
def test_a_whole_run_of_sleeps(
    hosts: int, rank_pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(hosts=hosts, repeats=2, out=str(tmp_path / "new" / "result.json"), routing=RoutingKind.skewed)
    raw = rank_pool.run(bench_on_this_rank, hosts, config)
    assert all(other["passes"] == raw[0]["passes"] for other in raw), "ranks disagree about a repeat"
    assert all(other["are_realtime"] == other["may_be_realtime"] for other in raw)
    assert report(config, json.loads(json.dumps(raw[0])))
    document = json.loads((tmp_path / "new" / "result.json").read_text())
    assert document["machine"]["gloo_threads"] == ("realtime" if raw[0]["may_be_realtime"] else "ordinary")
    assert set(document) == {"link", "hosts", "parallel", "compute", "routing", "passes", "machine"}
    assert (document["link"], document["hosts"], document["compute"]) == ("local", hosts, "timed")
    assert tuple(document["passes"]) == PASSES
    for figures in document["passes"].values():
        assert set(figures) == {*(kind.name for kind in kinds(config)), "no_communication"}
        assert all(set(row) == FIGURES and row["clean_repeats"] == 2 for row in figures.values())
        assert figures["ordinary_blocking"]["speedup"] == 1.0
        assert figures["ordinary_blocking"]["window_share"] is None
    assert (tmp_path / "new" / "result.png").stat().st_size > 1000
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["result.json", "result.png"]
    printed = capsys.readouterr().out
    assert "farskip_overlapped" in printed and "combine.1" in printed
    assert any("left out, compute is timed" in line for line in raw[0]["said"])


def test_real_compute_over_an_emulated_link_hides_what_sleeps_cannot_fake(rank_pool: RankPool) -> None:
    size = SizeConfig(layers=2, hidden=32, heads=2, experts=4, expert_width=8, shared_experts=1, batch=1, sequence=16)
    config = small(compute=Compute.real, link="emulated", size=size, chunks=2, megatron="")
    raw = rank_pool.run(bench_on_this_rank, 2, config, timeout_s=100)[0]
    assert raw["not_reported"] == {}
    assert set(raw["passes"]["forward"]) == {*(kind.name for kind in kinds(config)), "no_communication"}
    for repeats in raw["passes"].values():
        assert repeats["no_communication"][0]["exposed_ms"] == 0.0
        blocking, free = repeats["ordinary_blocking"][0], repeats["no_communication"][0]
        assert 0.0 < blocking["exposed_ms"] < blocking["ms"]
        if raw["run_queue_is_known"]:
            assert free["others_ran_ms"] < blocking["others_ran_ms"], "bytes move in threads of their own"


TENSOR_VARIANTS = [
    "tp_ordinary_blocking",
    "tp_parallel",
    "tp_ladder_serial",
    "tp_ladder_overlapped",
    "tp_sequence_parallel_serial",
    "tp_sequence_parallel_overlapped",
    "tp_no_communication",
]


@pytest.mark.parametrize("compute", [Compute.timed, Compute.real])
def test_a_whole_run_of_tensor_parallelism(
    compute: Compute, rank_pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over a link that is held back; the last pass is one token at a time, with a cache."""
    config = small(
        parallel=Parallelism.tensor,
        compute=compute,
        link="emulated",
        size=SizeConfig(layers=2, hidden=32, heads=2, mlp_width=16, batch=1, sequence=8),
        timed=TimedConfig(attention_ms=0.0, mlp_ms=0.0),
        out=str(tmp_path / "result.json"),
    )
    raw = rank_pool.run(bench_on_this_rank, 2, config, timeout_s=100)[0]
    assert raw["not_reported"] == {} and report(config, json.loads(json.dumps(raw)))
    passes = [*PASSES, "decode"] if compute is Compute.real else [*PASSES]
    document = json.loads((tmp_path / "result.json").read_text())
    assert all(document["machine"]["exposed_ms"][name]["tp_ordinary_blocking"] > 0.0 for name in passes)
    assert list(document["passes"]) == passes and document["parallel"] == "tensor"
    for name, figures in document["passes"].items():
        assert list(figures) == TENSOR_VARIANTS
        assert figures["tp_ordinary_blocking"]["speedup"] == 1.0
        for overlapped in ("tp_ladder_overlapped", "tp_sequence_parallel_overlapped"):
            assert (overlapped in raw["allowed"].get(name, {})) == (name != "decode")
    printed = capsys.readouterr().out
    assert "2 hosts, emulated link of 0.5 Gbit/s (loopback, held back)" in printed and "tensor parallel" in printed
    assert "reduce_attention.1" in printed and "gather_attention.1" in printed


def test_a_tensor_variant_that_forgets_a_sum_is_not_reported(
    rank_pool: RankPool,
) -> None:
    config = small(parallel=Parallelism.tensor, size=SizeConfig(layers=2, hidden=32, heads=2, batch=1, sequence=8))
    with pytest.raises(RuntimeError, match="tp_ordinary_blocking: its output is"):
        rank_pool.run(without_all_reduces, 2, config)


def without_all_reduces(config: BenchOverlapConfig) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessGroupLink, "all_reduce", LocalCopyLink.all_reduce)
        patch.setattr(ProcessGroupLink, "num_bytes", 0, raising=False)
        return bench_on_this_rank(config)


@pytest.mark.parametrize("variant", ["farskip_overlapped", "ordinary_chunked", "farskip_serial"])
def test_a_variant_that_computes_something_else_is_not_reported(
    variant: str, rank_pool: RankPool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small()
    raw = rank_pool.run(bench_on_this_rank, 2, config, variant)[0]
    wrong = {variant} if variant != "farskip_serial" else {"farskip_serial", "farskip_overlapped", "farskip_chunked"}
    assert set(raw["not_reported"]) == wrong
    assert not report(config, raw)
    printed = capsys.readouterr().out
    assert f"{variant} is not reported: its " in printed
    table = printed[printed.index("forward: 2 hosts") :]
    assert not any(line.startswith(tuple(f"{name}  " for name in wrong)) for line in table.splitlines())


def with_megatron(config: BenchOverlapConfig) -> dict[str, Any]:
    warnings.simplefilter("ignore")  # those of megatron-core at import
    return bench_on_this_rank(config)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
def test_megatrons_own_layer_computes_the_same(rank_pool: RankPool) -> None:
    size = SizeConfig(layers=2, hidden=32, heads=2, experts=4, expert_width=8, shared_experts=2, batch=2, sequence=8)
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "megatron_moe.py"
    config = small(compute=Compute.real, size=size, chunks=1, megatron=str(file))
    raw = rank_pool.run(with_megatron, 2, config, timeout_s=100)[0]
    assert raw["not_reported"] == {}
    assert {"megatron_blocking", "megatron_shared"} <= set(raw["passes"]["forward_backward"])


def test_a_wrong_baseline_ends_the_run(rank_pool: RankPool) -> None:
    with pytest.raises(RuntimeError, match="no figure would mean anything"):
        rank_pool.run(bench_on_this_rank, 2, small(), "ordinary_blocking")


def test_a_variant_without_a_clean_repeat_is_not_reported(capsys: pytest.CaptureFixture[str]) -> None:
    clean = [asdict(Repeat(ms=2.0, delay_share=0.0, is_clean=True, exposed_ms=0.5, others_ran_ms=1.25))]
    busy = [asdict(Repeat(ms=9.0, delay_share=0.5, is_clean=False))]
    raw = {
        "passes": {"forward": {"ordinary_blocking": clean, "no_communication": busy}},
        "allowed": {"forward": {}},
        "stage_ms": {},
        "timelines": {},
        "not_reported": {},
        "run_queue_is_known": True,
        "gloo_threads": "ordinary",
    }
    assert not report(small(), raw)
    said = capsys.readouterr().out
    assert "no_communication is not reported: no clean repeat of forward" in said
    header, row = (line.split("  ") for line in said.splitlines() if line.startswith(("variant", "ordinary_blocking")))
    assert [word.strip() for word in header if word][-3:] == ["exposed ms", "others ran ms", "others queued ms"]
    assert [word.strip() for word in row if word][-3:] == ["0.5", "1.2", "-"]


@pytest.mark.parametrize(("complete", "code"), [([True], 0), ([False], 1)])
def test_exit_code(complete: list[bool], code: int, farskip_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_overlap, "_start", lambda config: complete[0])
    assert farskip_command(["bench", "overlap", "link=local"])[0] == code


def test_an_emulation_is_named_one(capsys: pytest.CaptureFixture[str]) -> None:
    from farskip.launch.bench_report import title

    assert "emulated link of 0.5 Gbit/s" in title(small(link="emulated"), "forward")
    assert "sleeps instead of compute" in title(small(), "forward")
    assert "network namespaces on one machine" in title(small(link="500mbit"), "forward")
