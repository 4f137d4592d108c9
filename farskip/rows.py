"""Rows of tokens on their way: how they are cut into parts, and in which dtype they are multiplied on arrival."""

import torch


def even_sizes(total: int, parts: int) -> list[int]:
    """Sizes of `parts` neighboring stretches of `total` rows that differ by at most one."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which torch would multiply a tensor here. Under autocast not its own; of fp64 always its own.

    What is rounded to it before it is sent, instead of where it arrives, has the same bits and fewer bytes. Autocast
    casts no op of ours.
    """
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)
