"""Emulated hosts for real: they are slow as told, and nothing of them stays, however the command ends. Needs root."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from farskip.launch import bench_overlap

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SMALL = [
    "link=500mbit",
    "compute=timed",
    "repeats=2",
    "rounds=2",
    "delay_limit=1e9",
    "size.layers=1",
    "size.hidden=64",
    "size.batch=1",
    "size.sequence=64",
]


def command(*words: str) -> list[str]:
    start = "import sys; from farskip.launch.main import main; sys.exit(main())"
    return [sys.executable, "-P", "-c", start, "bench", "overlap", *SMALL, *words]


@pytest.fixture
def network(require: Callable[..., str]) -> None:
    for name in ("root", "ip", "tc"):
        require(name)


def traces() -> tuple[list[str], list[str]]:
    """What hosts could leave: devices of the machine's own network, and named namespaces."""
    return tuple(  # type: ignore[return-value]
        sorted(line.split()[column] for line in subprocess.check_output(words, text=True).splitlines() if line)
        for words, column in ((["ip", "-o", "link"], 1), (["ip", "netns", "list"], 0))
    )


def members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, _, of_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(of_group) == group and state != "Z":
                found.append(int(entry.name))
    return found


def other_namespaces(group: int) -> set[str]:
    """Network namespaces of a process group besides ours."""
    found = set()
    for pid in members(group):
        try:
            found.add(os.readlink(f"/proc/{pid}/ns/net"))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found - {os.readlink("/proc/self/ns/net")}


def until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.usefixtures("network")
def test_two_hosts_end_to_end(tmp_path: Path) -> None:
    before = traces()
    out = tmp_path / "result.json"
    done = subprocess.run(command(f"out={out}"), capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(out.read_text())["passes"]["forward_backward"]
    assert figures["ordinary_blocking"]["clean_repeats"] == 2
    assert "farskip_chunked" in figures
    assert traces() == before


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_nothing_stays_however_the_command_ends(number: signal.Signals, code: int, tmp_path: Path) -> None:
    before = traces()
    out = tmp_path / "result.json"
    words = command("hosts=4", "repeats=1000", "rounds=1000", f"out={out}")
    with subprocess.Popen(
        words, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert any(line.startswith("round 1:") for line in process.stdout)
        assert len(other_namespaces(process.pid)) == 5  # four hosts and the switch between them
        process.send_signal(number)
        assert process.wait(timeout=60) == code
        assert until(lambda: not members(process.pid), 20), "a rank outlived the command"
    assert traces() == before
    assert not out.exists()
    # a folder in the place for temporary files is left by SIGKILL alone, and only until the next run
    left = list(Path(tempfile.gettempdir()).glob(f"farskip-bench-{process.pid}-*"))
    assert len(left) == (number == signal.SIGKILL)
    bench_overlap._sweep()
    assert not any(folder.exists() for folder in left)


def on_hosts(job: str, hosts: int, rate: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Runs ``job(ranks, config)``, given as source, on emulated hosts: they find it by file, not in this test."""
    program = tmp_path / "program.py"
    program.write_text(
        "import time\n"
        "from farskip.launch.config import RunConfig\nfrom farskip.launch.network_hosts import run_on_hosts\n"
        f"{textwrap.dedent(job)}\n"
        'if __name__ == "__main__":\n'
        '    run = RunConfig(device="cpu", threads=1, timeout_s=60)\n'
        f'    run_on_hosts(job, None, run, {hosts}, "{rate}")\n'
    )
    return subprocess.run([sys.executable, "-P", str(program)], capture_output=True, text=True, timeout=150)


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(("hosts", "rate"), [(2, "500mbit"), (4, "1000mbit")])
def test_a_transfer_takes_what_the_rate_says(hosts: int, rate: str, tmp_path: Path) -> None:
    job = """
        def job(ranks, config):
            import torch
            import torch.distributed as dist

            sent = torch.ones(ranks.world_size * 250_000)  # one megabyte to every rank
            best = float("inf")
            for _ in range(6):
                dist.barrier()
                start = time.perf_counter()
                dist.all_to_all_single(torch.empty_like(sent), sent)
                best = min(best, time.perf_counter() - start)
            if ranks.rank == 0:
                print(best)
        """
    done = on_hosts(job, hosts, rate, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    ideal = (hosts - 1) * 8e6 / (1e6 * int(rate.removesuffix("mbit")))
    # The bucket of the rate limit lets 128 kB of each transfer through at once; a busy machine only makes it slower.
    assert float(done.stdout) > 0.8 * ideal


@pytest.mark.usefixtures("network")
def test_a_host_that_fails_ends_the_others(tmp_path: Path) -> None:
    before = traces()
    job = """
        def job(ranks, config):
            if ranks.rank == 1:
                raise ValueError("this host has no luck")
            time.sleep(100)
        """
    start = time.monotonic()
    done = on_hosts(job, 2, "500mbit", tmp_path)
    assert time.monotonic() - start < 95
    assert done.returncode == 1
    assert "host 1: this host has no luck (ValueError in __mp_main__" in done.stderr
    assert "host 1 of 2 ended with exit code 1; its message stands above" in done.stderr
    assert traces() == before
