"""What `farskip doctor` finds in the environment: settings that defeat overlap, networks, threads, torchrun.

Decides nothing by itself that another file decides: what defeats overlap is in `farskip.launch.device_queues`.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from farskip.launch.device_queues import overlap_warnings
from farskip.launch.doctor_machine import Finding, error, ok, warning

_SLOWS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "NCCL_P2P_DISABLE": (("1",), "devices of one host exchange through its memory; unset it"),
    "NCCL_SHM_DISABLE": (("1",), "devices of one host without peer access exchange over the network; unset it"),
    "NCCL_IB_DISABLE": (("1",), "hosts exchange over TCP and leave InfiniBand or RoCE alone; unset it if there is any"),
    "NCCL_MAX_NCHANNELS": (("1", "2"), "a collective gets next to no multiprocessor and takes long; unset it"),
    "NCCL_MAX_CTAS": (("1", "2"), "a collective gets next to no multiprocessor and takes long; unset it"),
    "TORCH_NCCL_HIGH_PRIORITY": (("0",), "a collective waits until compute lets it start; unset it"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (("0",), "a job whose rank died hangs instead of ending; unset it"),
    "TORCH_DISTRIBUTED_DEBUG": (("DETAIL",), "each collective waits for another one that checks it; unset it"),
    "TRITON_INTERPRET": (("1",), "kernels are interpreted, thousands of times slower; unset it"),
    "NCCL_SOCKET_IFNAME": (("LO",), "other hosts cannot be reached over the loopback; name a network interface"),
    "GLOO_SOCKET_IFNAME": (("LO",), "other hosts cannot be reached over the loopback; name a network interface"),
}
"""Setting -> values, and what they do. Those that defeat overlap altogether are in `device_queues`."""

_OF_SEVERAL_HOSTS = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """How many ranks there are.

    Attributes:
        ranks: of the job.
        ranks_here: of one host; None if nobody said.
    """

    ranks: int
    ranks_here: int | None

    @property
    def has_several_hosts(self) -> bool:
        """Whether ranks are known to be on more than one host."""
        return self.ranks_here is not None and self.ranks_here < self.ranks


def job_of(environment: Mapping[str, str], ranks: int | None, ranks_here: int | None, least: int) -> Job:
    """The job, from flags, else from torchrun's variables, else the least that the degrees of parallelism need."""

    def said(name: str) -> int | None:
        text = environment.get(name, "")
        return int(text) if text.isdecimal() and int(text) else None

    world = ranks or said("WORLD_SIZE") or least
    here = ranks_here or (said("LOCAL_WORLD_SIZE") if ranks is None else None)
    return Job(ranks=world, ranks_here=None if here is None else min(here, world))


def settings(environment: Mapping[str, str], job: Job) -> list[Finding]:
    """Variables that defeat overlap or slow communication down."""
    found = [warning(line.partition("=")[0], line) for line in overlap_warnings(environment)]
    for name, (values, why) in _SLOWS.items():
        value = environment.get(name, "").strip()
        if value.upper() in values and (name not in _OF_SEVERAL_HOSTS or job.has_several_hosts):
            found.append(warning(name, f"{name}={value}: {why}"))
    return found or [ok("settings", "no variable is set that is known to defeat overlap or to slow collectives down")]


def network(
    environment: Mapping[str, str], job: Job, *, over_gloo: bool, interfaces: Sequence[str] | None = None
) -> list[Finding]:
    """Whether the interfaces that are named exist, and whether gloo would find one that other hosts reach.

    Args:
        environment: the variables.
        job: its ranks.
        over_gloo: whether ranks run over gloo; NCCL does not wait at the loopback.
        interfaces: of this host; the system's if None.
    """
    here = [name for _, name in socket.if_nameindex()] if interfaces is None else list(interfaces)
    others = ", ".join(name for name in here if name != "lo") or "none but the loopback"
    found: list[Finding] = []
    for variable in _OF_SEVERAL_HOSTS:
        # NCCL takes prefixes, several names, and ^ and = in front; only what both understand is looked at.
        names = [name for name in environment.get(variable, "").split(",") if name and name[0] not in "^="]
        for name in names:
            if not any(each.startswith(name) if variable.startswith("NCCL") else each == name for each in here):
                found.append(error(variable, f"{variable}={name}: there is no such interface here; there is {others}"))
    if over_gloo and job.has_several_hosts and not environment.get("GLOO_SOCKET_IFNAME"):
        address = _own_address()
        if address.startswith("127."):
            text = f"this host's name leads to {address}, where gloo would wait and no other host can reach it"
            found.append(warning("GLOO_SOCKET_IFNAME", f"{text}; set it to one of {others}"))
        else:
            found.append(ok("network", f"gloo uses the interface of {address}; GLOO_SOCKET_IFNAME names another one"))
    return found


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"  # what gloo falls back to


def threads(environment: Mapping[str, str], job: Job, cores: int | None = None) -> list[Finding]:
    """Whether the ranks of this host share its cores out."""
    if job.ranks_here is None or job.ranks_here == 1:
        return []
    count = cores or os.cpu_count() or 1
    share = max(1, count // job.ranks_here)
    value = environment.get("OMP_NUM_THREADS", "")
    if not value:
        text = f"unset with {job.ranks_here} ranks on {count} cores: pretrain and distill share cores out themselves"
        return [warning("OMP_NUM_THREADS", f"{text}, a loop of your own does not; set it to {share}")]
    if not value.isdecimal() or int(value) * job.ranks_here > max(count, job.ranks_here):
        text = f"OMP_NUM_THREADS={value} times {job.ranks_here} ranks is more than {count} cores; set it to {share}"
        return [warning("OMP_NUM_THREADS", text)]
    return [ok("OMP_NUM_THREADS", f"{value} for each of {job.ranks_here} ranks on {count} cores")]


def torchrun(environment: Mapping[str, str]) -> list[Finding]:
    """Whether torchrun's variables go together; no process group is started."""
    there = [name for name in _TORCHRUN if name in environment]
    if not there:
        return [ok("torchrun", "not under torchrun: a command is one rank, or starts its ranks itself")]
    found = []
    numbers: dict[str, int] = {}
    for name in there:
        if environment[name].isdecimal():
            numbers[name] = int(environment[name])
        else:
            found.append(error("torchrun", f"{name}={environment[name]!r} is no number; start with torchrun"))
    for name, bound in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if name in numbers and numbers[name] >= numbers.get(bound, 1):
            said = f"{bound}={numbers[bound]}" if bound in numbers else f"{bound} unset, so 1"
            found.append(error("torchrun", f"{name}={numbers[name]} is outside {said}; start with torchrun"))
    world, here = numbers.get("WORLD_SIZE", 1), numbers.get("LOCAL_WORLD_SIZE", 1)
    if here > world:
        text = f"LOCAL_WORLD_SIZE={here} is above WORLD_SIZE={world}; start with torchrun"
        found.append(error("torchrun", text))
    if world > 1:
        missing = [name for name in ("RANK", *_RENDEZVOUS) if not environment.get(name)]
        if missing:
            text = f"WORLD_SIZE={world}, but {', '.join(missing)} not set: ranks cannot meet; start with torchrun"
            found.append(error("torchrun", text))
        port = environment.get("MASTER_PORT", "")
        if port and not (port.isdecimal() and 0 < int(port) < 65536):
            found.append(error("torchrun", f"MASTER_PORT={port!r} is no port; use 1..65535"))
    if found:
        return found
    return [ok("torchrun", f"rank {numbers.get('RANK', 0)} of {world}, {here} on this host")]
