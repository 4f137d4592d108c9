"""Settings of the CUDA driver and of NCCL that decide whether a collective can run under compute at all.

One that defeats overlap gives no error and no wrong number; the step is only as slow as without it. So it is said.
"""

from collections.abc import Mapping, MutableMapping

_DEFEATS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "CUDA_DEVICE_MAX_CONNECTIONS": (
        ("1",),
        "all streams share one hardware queue, so a collective waits for the compute that was launched before it and "
        "the other way round; unset it (advice to set 1 is for another way of overlapping)",
    ),
    "CUDA_LAUNCH_BLOCKING": (("1",), "every launch waits until it is done; unset it"),
    "TORCH_NCCL_BLOCKING_WAIT": (("1",), "the host stands still at every wait instead of launching on; unset it"),
    "NCCL_BLOCKING_WAIT": (("1",), "the host stands still at every wait instead of launching on; unset it"),
    "GPU_MAX_HW_QUEUES": (("1",), "all streams of an AMD GPU share one hardware queue; unset it"),
}


def overlap_warnings(environment: Mapping[str, str]) -> list[str]:
    """One line per setting that keeps collectives from running under compute."""
    return [
        f"{name}={environment[name]} defeats overlap: {why}"
        for name, (values, why) in _DEFEATS.items()
        if environment.get(name, "").strip().upper() in values
    ]


def prefer_collectives(environment: MutableMapping[str, str]) -> None:
    """Have NCCL's streams get a free multiprocessor before compute does, unless the user has said otherwise.

    A collective needs few of them, and it should start when it is launched, not when compute lets it.
    """
    environment.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
