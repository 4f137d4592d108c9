"""Several hosts on one machine: every rank in a network namespace of its own, joined by links that cost real time.

    2 hosts    one veth pair, an end in each namespace, `tc tbf` on both ends
    more       a namespace with a bridge; a veth pair from each host to it, `tc tbf` on both ends of each pair

so each host sends and receives at most the given rate. Each host is told what torchrun would tell it.

The namespaces have no names: each lives exactly as long as its process, and a process ends with the command that
started it, however that ends. So nothing can be left behind, not even after SIGKILL, and there is nothing to sweep up.

Needs root, because a namespace does, and `ip` and `tc` of iproute2. Never touches the network of the machine itself.
"""

import ctypes
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.context import SpawnProcess
from typing import Any

from farskip.launch.config import RunConfig
from farskip.launch.ranks import Ranks, torchrun_ranks

RATE_PATTERN = re.compile(r"(\d+)(mbit|gbit)")
RATE_RANGE_MBIT = (100, 1000)
"""Below, a step takes minutes; above, the rate limit itself keeps the cores busy."""

_TBF = ("burst", "128kb", "limit", "16mb")
_DEVICE, _HUB = "fs0", "hub"
_SUBNET = "10.77.0"
_PORT = "29500"
_SETUP_S = 60.0
_GRACE_S = 15.0
"""How long the other hosts may take to end by themselves after one has failed."""

_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1


def rate_of(link: str) -> str | None:
    """The rate that a link is named by, for `tc`; None if the name is no rate.

    Raises:
        ValueError: the rate is out of range.
    """
    match = RATE_PATTERN.fullmatch(link)
    if match is None:
        return None
    mbit = int(match[1]) * (1000 if match[2] == "gbit" else 1)
    low, high = RATE_RANGE_MBIT
    if not low <= mbit <= high:
        raise ValueError(
            f"link={link}: {mbit} Mbit/s is outside {low}..{high}, where a rate limit on one machine is real"
        )
    return f"{mbit}mbit"


def check_hosts_possible(link: str) -> None:
    """Refuse before anything is started.

    Raises:
        ValueError: not Linux, not root, or iproute2 is missing.
    """
    instead = "use link=emulated, which needs neither"
    if sys.platform != "linux":
        raise ValueError(f"link={link} joins network namespaces, which only Linux has; {instead}")
    if os.geteuid() != 0:
        raise ValueError(f"link={link} needs root to set up network namespaces, this is user {os.geteuid()}; {instead}")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise ValueError(
                f"link={link} needs the command {tool!r} of iproute2, which is not here: install it; {instead}"
            )


def run_on_hosts(job: Callable[[Ranks, Any], None], config: Any, run: RunConfig, hosts: int, rate: str) -> None:
    """Start one rank per emulated host, run `job` in each, and wait for all of them.

    Args:
        job: a module-level function, called with (ranks, config).
        config: picklable; handed to every rank.
        run: device, timeout and threads.
        hosts: number of hosts, at least 2.
        rate: of each host's link in both directions, as `tc` writes it.

    Raises:
        RuntimeError: a host failed; names it. The others are ended.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    connections: list[Connection] = []
    try:
        for host in range(hosts):
            _start(context, _host, (job, config, run, host, hosts, rate), f"host {host}", processes, connections)
        members = list(processes)
        if hosts > 2:
            _start(context, _switch, (hosts, rate), "switch", processes, connections)
        _expect(connections, processes)
        _join([process.pid or 0 for process in processes], hosts)
        for connection in connections[hosts:]:
            connection.send("joined")
            _expect([connection], processes)
        for connection in connections[:hosts]:
            connection.send("joined")
        _wait_for(members)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for connection in connections:
            connection.close()


def _start(
    context: Any,
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    name: str,
    processes: list[SpawnProcess],
    connections: list[Connection],
) -> None:
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, os.getpid(), *arguments), name=name)
    process.start()
    theirs.close()
    processes.append(process)
    connections.append(ours)


def _expect(connections: Sequence[Connection], processes: Sequence[SpawnProcess]) -> None:
    """Wait until each of these has said that it is ready."""
    deadline = time.monotonic() + _SETUP_S
    for connection in connections:
        try:
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                raise RuntimeError(f"network hosts: a host was not ready within {_SETUP_S:.0f} s")
            connection.recv()
        except EOFError:
            _wait_for([process for process in processes if not process.is_alive()])
            raise RuntimeError("network hosts: a host ended while it was set up; its message stands above") from None


def _join(pids: Sequence[int], hosts: int) -> None:
    """Lay the veth pairs from namespace to namespace."""
    if hosts == 2:
        _veth(pids[0], _DEVICE, pids[1], _DEVICE)
        return
    for host in range(hosts):
        _veth(pids[host], _DEVICE, pids[hosts], f"port{host}")


def _veth(pid: int, device: str, peer_pid: int, peer: str) -> None:
    # Created straight inside the namespaces: the machine's own network never sees them.
    _call(
        "ip",
        "link",
        "add",
        "name",
        device,
        "netns",
        str(pid),
        "type",
        "veth",
        "peer",
        "name",
        peer,
        "netns",
        str(peer_pid),
    )


def _host(
    connection: Connection,
    parent: int,
    job: Callable[[Ranks, Any], None],
    config: Any,
    run: RunConfig,
    host: int,
    hosts: int,
    rate: str,
) -> None:
    from farskip.launch.main import one_line

    try:
        _enter_own_network(connection, parent)
        _call("ip", "address", "add", f"{_SUBNET}.{host + 1}/24", "dev", _DEVICE)
        _bring_up(_DEVICE, rate)
        os.environ.update(
            RANK=str(host),
            LOCAL_RANK="0",
            WORLD_SIZE=str(hosts),
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR=f"{_SUBNET}.1",
            MASTER_PORT=_PORT,  # nobody else is in the namespace
            GLOO_SOCKET_IFNAME=_DEVICE,
        )
        # torch warns on every connection that these hosts have no names
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        with torchrun_ranks(run) as ranks:
            job(ranks, config)
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("FARSKIP_DEBUG", "0") not in ("", "0"):
            raise
        print(f"host {host}: {one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(1)


def _switch(connection: Connection, parent: int, hosts: int, rate: str) -> None:
    """The namespace between more than two hosts; stays until it is killed."""
    try:
        _enter_own_network(connection, parent)
        _call("ip", "link", "add", "name", _HUB, "type", "bridge")
        _call("ip", "link", "set", "dev", _HUB, "up")
        for host in range(hosts):
            _call("ip", "link", "set", "dev", f"port{host}", "master", _HUB)
            _bring_up(f"port{host}", rate)
        connection.send("ready")
        connection.recv()
    except (EOFError, KeyboardInterrupt):
        return
    except (RuntimeError, OSError) as error:
        print(f"switch: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def _bring_up(device: str, rate: str) -> None:
    _call("tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", rate, *_TBF)
    _call("ip", "link", "set", "dev", device, "up")


def _enter_own_network(connection: Connection, parent: int) -> None:
    """End with the parent, move to a fresh network namespace, and wait until its devices are there."""
    # The parent decides about Ctrl-C; a terminal would send it to every process at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl: this process could outlive the command that started it")
    if os.getppid() != parent:  # it died before the call above
        sys.exit(1)
    if libc.unshare(_CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(
            f"a network namespace was refused ({os.strerror(number)}): root inside a container needs CAP_SYS_ADMIN"
        )
    _call("ip", "link", "set", "dev", "lo", "up")
    connection.send("ready")
    try:
        connection.recv()
    except EOFError:
        sys.exit(1)


def _call(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        message = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise RuntimeError(f"network hosts: `{' '.join(words)}` failed: {message}")


def _wait_for(processes: Sequence[SpawnProcess]) -> None:
    running = list(processes)
    failed: SpawnProcess | None = None
    deadline = float("inf")
    while running and time.monotonic() < deadline:
        wait_for_any([process.sentinel for process in running], timeout=min(1.0, deadline - time.monotonic()))
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            if process.exitcode and failed is None:
                failed, deadline = process, time.monotonic() + _GRACE_S
    if failed is not None:
        code = failed.exitcode or 0
        how = f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise RuntimeError(f"{failed.name} of {len(processes)} {how}; its message stands above")
