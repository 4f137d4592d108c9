"""Decides which device rows are communication, and what each of them does. Four layers, asked in this order:

    1  the arguments that the profiler wrote next to the kernel ("Collective name")
    2  the operator that launched it (nccl:..., c10d::..., record_param_comms), found by correlation
    3  its name: NCCL, RCCL, DeepEP, NVSHMEM, symmetric memory, custom all-reduces, peer copies
    4  patterns that the user gave

Layer 3 says whether a kernel belongs to a communication library at all; layers 1 and 2 then say better what it does,
because a kernel called SendRecv or Generic does not say. Local helpers that run beside a collective (casts, layout of
a dispatch) stay compute even when an argument or a parent names a collective. This file gives no phase and no layer:
a kernel called dispatch also carries the gradient of a combine, so that is answered by the range open at its launch
(``trace_attribute``).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from farskip.trace_model import Category, CollectiveDetails

KINDS = (
    "all_to_all",
    "dispatch",
    "combine",
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "broadcast",
    "send_recv",
    "notify",
    "unknown",
)
"""What a collective can be called in a report, by what the kernel does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a name (or an argument) says: the kind of collective, and which layer said so."""

    kind: str
    said_by: str


@dataclass(frozen=True, kw_only=True, slots=True)
class UserPattern:
    """A pattern given by ``--communication``: ``REGEX`` or ``KIND=REGEX``."""

    kind: str
    regex: re.Pattern[str]


def parse_user_pattern(text: str) -> UserPattern:
    """Reads one ``--communication`` argument.

    Args:
        text: a regular expression searched for in kernel names; ``all_reduce=my_kernel`` also says what it does.

    Returns:
        The pattern; without a kind in front, the kind is "unknown".

    Raises:
        ValueError: the regular expression does not compile.
    """
    kind, equals, rest = text.partition("=")
    named = bool(equals) and kind in KINDS
    try:
        return UserPattern(kind=kind if named else "unknown", regex=re.compile(rest if named else text))
    except re.error as error:
        raise ValueError(
            f"--communication {text!r}: no regular expression ({error}); escape special characters"
        ) from None


# What an operation is called, in kernel names (AllReduce), operators (allreduce_, _allgather_base_) and arguments.
# Order matters: reduce_scatter before reduce, all_gather before gather.
_OPERATIONS: tuple[tuple[str, str], ...] = (
    (r"all_?to_?all|alltoall|a2a", "all_to_all"),
    (r"reduce_?scatter", "reduce_scatter"),
    (r"all_?reduce", "all_reduce"),
    (r"all_?gather|fcollect", "all_gather"),
    (r"broadcast", "broadcast"),
    (r"send_?recv|^_?i?(send|recv)(_|$)|recv_?any", "send_recv"),
    (r"barrier|notify|sync_?all|quiet", "notify"),
)
_OPERATION_PATTERNS = tuple((re.compile(pattern, re.IGNORECASE), kind) for pattern, kind in _OPERATIONS)

_EXPERT_PARALLEL = re.compile(
    r"deep_?ep|dpsk\W*\d*ep|hybrid_ep|uccl\W*\d*ep|mori\W*\d*moe|pplx|moe_?(comm|a2a|alltoall)|mnnvl_?moe",
    re.IGNORECASE,
)
_LIBRARY = re.compile(
    r"^(nccl|rccl|msccl)\w*kernel|^msccl(pp)?\b|^nccl\w*(AllReduce|AllGather|ReduceScatter|SendRecv)", re.I
)
_SHARED_MEMORY = re.compile(
    r"multimem_|(one|two)_?shot_|cross_device_reduce|quick_?reduce|symm_mem|symmetric_memory|nvshmem|rocshmem|"
    r"lamport\w*all_?reduce|all_?reduce\w*lamport|custom_?all_?reduce",
    re.IGNORECASE,
)
_OPERATION_IN_IDENTIFIER = re.compile(r"all_?reduce|all_?gather|reduce_?scatter|all_?to_?all", re.IGNORECASE)
_LOCAL_HELPER = re.compile(
    r"^at::|^at_cuda|^cub::|^thrust::|^void cub|elementwise|get_dispatch_layout|CatArray|^triton_(poi|red|per)_",
    re.IGNORECASE,
)
_PEER_COPY = re.compile(r"PtoP|Peer", re.IGNORECASE)
_COLLECTIVE_PARENT = re.compile(r"^(nccl:|c10d::|gloo:|symm_mem::|_c10d_functional::|deep_ep::)|^record_param_comms$")


def operation_kind(text: str) -> str:
    """The kind of collective that an operation's name stands for, "unknown" if none."""
    for pattern, kind in _OPERATION_PATTERNS:
        if pattern.search(text):
            return kind
    return "unknown"


def function_name(kernel: str) -> str:
    """A demangled kernel's qualified name without return type, template arguments and parameters."""
    text = kernel.replace("(anonymous namespace)::", "").removeprefix("void ").strip()
    return re.split(r"[<(]", text, maxsplit=1)[0]


def is_local_helper(kernel: str) -> bool:
    """Whether a kernel is known to be local work, whoever launched it."""
    return _LOCAL_HELPER.search(kernel.replace("(anonymous namespace)::", "").removeprefix("void ")) is not None


def verdict_by_name(kernel: str, category: Category, patterns: Sequence[UserPattern] = ()) -> Verdict | None:
    """What a device row's name says.

    Args:
        kernel: the name as in the file, demangled or not.
        category: KERNEL or COPY.
        patterns: the user's, asked last.

    Returns:
        The verdict, or None where the name does not stand for communication.
    """
    verdict = _peer_copy(kernel) if category == Category.COPY else _kernel_by_name(kernel)
    if verdict is None:
        for pattern in patterns:
            if pattern.regex.search(kernel):
                return Verdict(kind=pattern.kind, said_by="pattern")
    return verdict


def _peer_copy(name: str) -> Verdict | None:
    return Verdict(kind="send_recv", said_by="name") if _PEER_COPY.search(name) else None


def _kernel_by_name(kernel: str) -> Verdict | None:
    if is_local_helper(kernel):
        return None
    function = function_name(kernel)
    last = function.rsplit("::", 1)[-1]
    if _EXPERT_PARALLEL.search(function):
        kind = _expert_parallel_kind(last)
        return None if kind is None else Verdict(kind=kind, said_by="name")
    if _LIBRARY.search(last) or _SHARED_MEMORY.search(function):
        kind = (
            "all_reduce" if "cross_device_reduce" in last or re.search("quick_?reduce", last) else operation_kind(last)
        )
        return Verdict(kind=kind, said_by="name")
    if _OPERATION_IN_IDENTIFIER.search(last):
        return Verdict(kind=operation_kind(last), said_by="name")
    return None


def _expert_parallel_kind(function: str) -> str | None:
    """Kernels of expert-parallel libraries: notify first, because notify_dispatch waits and moves nothing."""
    lowered = function.lower()
    if "layout" in lowered:
        return None
    if "notify" in lowered or "barrier" in lowered or "clean_low_latency" in lowered:
        return "notify"
    if "dispatch" in lowered:
        return "dispatch"
    if "combine" in lowered:
        return "combine"
    return operation_kind(function) if _OPERATION_IN_IDENTIFIER.search(function) else None


def verdict_by_details(details: CollectiveDetails) -> Verdict:
    """What the profiler's own arguments say."""
    return Verdict(kind=operation_kind(details.collective), said_by="arguments")


def verdict_by_parent(parent: str) -> Verdict | None:
    """What the operator that launched a kernel says; None if it is no collective."""
    if not _COLLECTIVE_PARENT.search(parent):
        return None
    name = re.split(r"::|:", parent)[-1]
    return Verdict(kind=operation_kind(name), said_by="operator")


def combine_verdicts(
    name: str, by_name: Verdict | None, details: CollectiveDetails | None, parents: Sequence[str]
) -> Verdict | None:
    """The verdict on one device row out of all layers.

    Args:
        name: the row's name; not that of a local helper, which is compute whatever the other layers say.
        by_name: what the name (or a user's pattern) says.
        details: the profiler's arguments, if any.
        parents: the operators open when it was launched, innermost first.

    Returns:
        The verdict, or None for a row that is not communication.
    """
    if by_name is not None and by_name.said_by == "pattern":
        return by_name
    if by_name is None and details is None and not any(parent.startswith("nccl:") for parent in parents):
        return None
    if by_name is None and (name.startswith(("Memcpy", "Memset")) and not _PEER_COPY.search(name)):
        return None
    if by_name is not None and by_name.kind in ("dispatch", "combine", "notify"):
        return by_name
    candidates = [verdict_by_details(details)] if details is not None else []
    candidates += [verdict for parent in parents if (verdict := verdict_by_parent(parent)) is not None]
    if by_name is not None and by_name.kind not in ("unknown", "send_recv"):
        candidates.insert(1 if details is not None else 0, by_name)
    for candidate in candidates:
        if candidate.kind != "unknown":
            return candidate
    # A SendRecv that nothing else explains is an all-to-all or a pipeline's transfer: the name cannot tell.
    if by_name is None:
        return candidates[0] if candidates else None
    if by_name.kind == "send_recv" and by_name.said_by == "name" and not _PEER_COPY.search(name):
        return Verdict(kind="unknown", said_by="name")
    return by_name
