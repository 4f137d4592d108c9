"""What `farskip doctor` finds about the machine: versions, devices, shared memory, open files, disk.

A finding is ok, a warning (a run works, but not as well as it could) or an error (a run would fail). Its text is one
line that names the value, the bound and the remedy.
"""

import importlib.util
import os
import platform
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from farskip.models.folder_copy import size_text

_SHM_BYTES = 1 << 30
"""NCCL keeps buffers of every pair of ranks of a host there; containers often get 64 MB."""
_SOCKETS_PER_PEER, _OTHER_FILES = 16, 256
"""Open files of a rank: process groups times connections to each other rank, and everything else."""
_DISK_BYTES = 10 * 10**9
"""Free disk below which a run is likely to end with its first checkpoints."""

DEVICE, HOST = "a device", "this machine"
"""Where the memory of `device_memory` is."""

_WITHOUT = {
    "megatron.core": (
        "megatron-core",
        "no GPTModel can be rewired, and farskip bench overlap leaves out megatron-core's variants",
    ),
    "accelerate": ("accelerate", "checkpoints quantized otherwise than in fp8 blocks cannot be loaded"),
    "liger_kernel": ("liger-kernel", "farskip bench kernels compares without Liger's"),
}
"""Optional: module -> package, and what there is not without it."""


class Level(StrEnum):
    """How bad it is."""

    ok = "ok"
    warning = "warning"
    error = "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: how bad it is.
        name: of the thing.
        text: value, bound and remedy, in one line.
    """

    level: Level
    name: str
    text: str


def ok(name: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(level=Level.ok, name=name, text=text)


def warning(name: str, text: str) -> Finding:
    """A run works, but not as well as it could."""
    return Finding(level=Level.warning, name=name, text=text)


def error(name: str, text: str) -> Finding:
    """A run would fail."""
    return Finding(level=Level.error, name=name, text=" ".join(text.split()))


def packages() -> list[Finding]:
    """Python and what pyproject.toml asks for, as the installed package records it."""
    try:
        needed, python = requires("farskip") or [], metadata("farskip")["Requires-Python"]
    except PackageNotFoundError:
        return [warning("versions", "farskip runs from a source tree and is not installed: no version is compared")]
    return compare_versions(needed, python)


def compare_versions(needed: Sequence[str], python: str | None) -> list[Finding]:
    """Installed versions against requirements.

    Args:
        needed: as in pyproject.toml; those of extras are not looked at.
        python: the versions of Python that will do.
    """
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return [warning("versions", "the package packaging is not installed: no version is compared; pip install it")]
    found: list[Finding] = []
    fine = [f"python {platform.python_version()}"]
    if python and not SpecifierSet(python).contains(platform.python_version(), prereleases=True):
        fine = []
        found.append(error("python", f"version {platform.python_version()}, farskip needs {python}: use another one"))
    for text in needed:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        here = installed(requirement.name)
        advice = f"pip install '{requirement.name}{requirement.specifier}'"
        if here is None:
            found.append(error(requirement.name, f"not installed, farskip needs {requirement.specifier}; {advice}"))
        elif not requirement.specifier.contains(here, prereleases=True):
            found.append(error(requirement.name, f"version {here}, farskip needs {requirement.specifier}; {advice}"))
        else:
            fine.append(f"{requirement.name} {here}")
    return [*found, ok("versions", ", ".join(fine))] if fine else found


def installed(package: str) -> str | None:
    """The version of an installed package; None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def extras() -> list[Finding]:
    """What is optional, and what there is not without it."""
    found = []
    for module, (package, without) in _WITHOUT.items():
        try:
            there = importlib.util.find_spec(module) is not None
        except ImportError:  # the package around it is not there
            there = False
        text = f"installed, {installed(package)}" if there else f"not installed: {without}; pip install {package}"
        found.append(ok(package, text))
    return found


def devices(ranks_here: int | None) -> list[Finding]:
    """What torch sees, and whether its ranks reach each other.

    Args:
        ranks_here: ranks of this host; None if nobody said.
    """
    try:
        import torch
    except (ImportError, OSError) as problem:
        return [error("torch", f"cannot be imported ({problem}); install it again for this machine")]
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return [ok("devices", f"this torch ({torch.__version__}) is built for CPUs: ranks run over gloo")]
        text = f"this torch is built for {built} and sees no device: check driver and CUDA_VISIBLE_DEVICES, else CPU"
        return [warning("devices", text)]
    count = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    found = [ok("devices", f"{count} of {names}; {built}; {_nccl(torch)}")]
    if ranks_here is not None and ranks_here > count:
        text = f"{ranks_here} ranks on this host and {count} devices: each rank needs one of its own; start fewer"
        found.append(error("devices", text))
    pairs = [(i, j) for i in range(count) for j in range(count) if i < j]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        text = f"{len(apart)} of {len(pairs)} pairs, as {apart[0]}, cannot read each other's memory: they exchange"
        found.append(warning("peer access", f"{text} through the host; keep ep and tp groups on devices that can"))
    elif pairs:
        found.append(ok("peer access", f"all {len(pairs)} pairs of devices read each other's memory"))
    return found


def _nccl(torch: Any) -> str:
    if not torch.distributed.is_nccl_available():
        return "no NCCL in this torch"
    return f"NCCL {'.'.join(str(part) for part in torch.cuda.nccl.version())}"


def has_devices() -> bool:
    """Whether torch sees one, so that ranks run over NCCL."""
    try:
        import torch
    except (ImportError, OSError):
        return False
    return torch.cuda.is_available()


def device_memory() -> tuple[int, str] | None:
    """Bytes of the smallest device, or of the machine; None where the system does not say."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    if torch.cuda.is_available():
        sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
        return min(sizes), DEVICE
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), HOST
    except (ValueError, OSError):
        return None


def room(ranks: int, runs: Path, shm: Path = Path("/dev/shm")) -> list[Finding]:
    """Shared memory, open files, and disk for runs.

    Args:
        ranks: of the job.
        runs: where run folders go; it need not exist.
        shm: where shared memory is.
    """
    found: list[Finding] = []
    if shm.is_dir():
        size = shutil.disk_usage(shm).total
        text = f"{size_text(size)}; NCCL needs up to {size_text(_SHM_BYTES)}"
        advice = "; in a container start it with --shm-size=8g or --ipc=host"
        found.append(ok("shared memory", text) if size >= _SHM_BYTES else warning("shared memory", text + advice))
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = _OTHER_FILES + _SOCKETS_PER_PEER * (ranks - 1)
    if limit == resource.RLIM_INFINITY or limit >= need:
        text = "no limit" if limit == resource.RLIM_INFINITY else f"limit {limit}"
        found.append(ok("open files", f"{text}, {need} are enough for {ranks} rank{'s' if ranks > 1 else ''}"))
    else:
        text = f"limit {limit}, a rank of {ranks} may need {need}; ulimit -n {need} first (the system allows {most})"
        found.append(warning("open files", text))
    nearest = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        found.append(error("disk", f"{runs}: cannot write in {nearest}; set run.folder to a place of yours"))
        return found
    free = shutil.disk_usage(nearest).free
    text = f"{size_text(free)} free where {runs} goes"
    advice = f", less than {size_text(_DISK_BYTES)}: checkpoints may not fit; make room or set run.folder elsewhere"
    found.append(ok("disk", text) if free >= _DISK_BYTES else warning("disk", text + advice))
    return found
