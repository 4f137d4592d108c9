"""Dispatch copy: each token written to its expert rows, its weights beside them.

Decides: the checks; the ops stand in `unpermute.py`, since each of the two is the other's gradient.

Legend: T tokens, K experts per token, R rows, H hidden size.
"""

from torch import Tensor

from farskip.triton_kernels.backend import choose_backend
from farskip.triton_kernels.dispatch_map import DispatchMap
from farskip.triton_kernels.unpermute import apply_permute, check_weights


def permute(x: Tensor, dispatch: DispatchMap, *, backend: str | None = None) -> Tensor:
    """Copy each token to the rows of its slots: rows[dst_tk] = x_t.

    Args:
        x: Tokens, [T, H].
        dispatch: The map.
        backend: "reference", "triton", or None to choose by device.

    Returns:
        [R, H]; rows without a slot are zero. The gradient of a token is the sum over its rows, in fp32 from k = 0 on,
        rounded once.

    Raises:
        ValueError: The tokens are not the map's.

    Note:
        No host synchronization. Deterministic. Keeps nothing but the map for the backward.
    """
    if x.ndim != 2 or len(x) != len(dispatch.dst):
        raise ValueError(f"x must be [{len(dispatch.dst)}, hidden], the map's tokens, got {list(x.shape)}")
    return apply_permute(x.contiguous(), dispatch.dst, dispatch.src, None, choose_backend(backend, x))


def permute_weights(weights: Tensor, dispatch: DispatchMap, *, backend: str | None = None) -> Tensor:
    """Bring each slot's weight to its row, for weights that act on the expert's side.

    Args:
        weights: [T, K].
        dispatch: The map.
        backend: As for `permute`.

    Returns:
        [R] in the dtype of `weights`; rows without a slot have weight zero.

    Raises:
        ValueError: The weights are not the map's.
    """
    check_weights(weights, dispatch)
    slots_S1 = weights.reshape(-1, 1)  # to the copy kernel each slot is a token of one column
    backend = choose_backend(backend, weights)
    return apply_permute(slots_S1, dispatch.dst.reshape(-1, 1), dispatch.src, None, backend).squeeze(1)
