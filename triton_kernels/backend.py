"""Which implementation of an op runs: its plain-torch twin or its Triton kernel.

Decides: `None` means Triton on CUDA (and ROCm, which torch also calls "cuda") and the twin on CPU; fp64 always means
the twin, because the kernels compute in fp32. Refuses: a backend that cannot run on the tensor it is given. There is
no fallback at run time: a kernel that fails, fails.

Under Triton's interpreter (TRITON_INTERPRET=1 set before triton is imported) `backend="triton"` also takes CPU
tensors.
"""

import importlib.util

import torch

BACKENDS = ("reference", "triton")

# Once, at import: torch.compile of torch 2.11 cannot trace the question.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def choose_backend(backend: str | None, tensor: torch.Tensor) -> str:
    """Name the implementation that will run on a tensor.

    Args:
        backend: "reference", "triton", or None for the choice by device and dtype.
        tensor: The main input of the op; only its device and dtype are looked at.

    Returns:
        "reference" or "triton"; a plain string, to be printed once by whoever owns the run.

    Raises:
        ValueError: The name is unknown, or Triton is asked for a dtype or device it cannot serve.
        RuntimeError: Triton is needed and not installed.
    """
    if backend is None:
        backend = "triton" if tensor.device.type == "cuda" and tensor.dtype != torch.float64 else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)} or None")
    if backend == "triton":
        _check_triton(tensor)
    return backend


def _check_triton(tensor: torch.Tensor) -> None:
    """Raise unless a Triton kernel can run on this tensor."""
    if tensor.dtype == torch.float64:
        raise ValueError("backend 'triton' computes in fp32 and got a float64 tensor; use backend='reference'")
    if not triton_installed():
        raise RuntimeError(
            f"backend 'triton' was chosen for a {tensor.device.type} tensor, but triton is not installed; "
            "install triton >= 3.6 or pass backend='reference'"
        )
    if tensor.device.type != "cuda" and not _interpreting():
        raise ValueError(
            f"backend 'triton' cannot run on a {tensor.device.type} tensor; move it to a GPU, use backend='reference', "
            "or set TRITON_INTERPRET=1 before triton is imported"
        )


def triton_installed() -> bool:
    """Whether triton can be imported; does not import it."""
    return _TRITON_INSTALLED


def _interpreting() -> bool:
    """Whether this process runs kernels in Triton's interpreter."""
    from farskip.triton_kernels.common_triton import INTERPRETING

    return INTERPRETING


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward pass can follow, so that a forward op has to keep what it needs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
