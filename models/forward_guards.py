"""What a parallel model looks at in front of a forward pass: mistakes that would silently compute something else.

    in front of each         torch's DDP or FSDP1 around a model whose parameters are this rank's slices: they take a
                             parameter for the same tensor on all ranks, overwrite slices and average their gradients
    in front of the first    other tokens on ranks of one ``tp`` group: each would add its terms to another sum

The one costs a look at an attribute, the other a small collective, once. FSDP2 (``fully_shard``) is another thing: it
keeps to the mesh that it is given.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class ForwardGuards:
    """Called by the backbone's forward pre-hook.

    Args:
        model: a parallel model.
        sliced: names of the parameters that are this rank's slices.
        tensor_group: the ranks that share their tokens; None where every rank has its own.
    """

    def __init__(self, model: nn.Module, sliced: Collection[str], tensor_group: dist.ProcessGroup | None) -> None:
        places = (name.rpartition(".") for name in sliced)
        self._slices = [(model.get_submodule(path), attribute) for path, _, attribute in places]
        self._tensor_group = tensor_group

    def __call__(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look. The first call is a collective under tensor parallelism.

        Raises:
            ValueError: one of the mistakes.
        """
        wrapper = self._wrapper(backbone) if self._slices else None
        if wrapper is not None:
            raise ValueError(
                f"{wrapper} around a parallel model takes the slices of ranks for copies of one tensor; load the model "
                "afresh and sum gradients with farskip.parallel.data_parallel.DataParallel (docs/tensor_parallel.md)"
            )
        if self._tensor_group is not None:
            refuse_other_tokens((*args, *kwargs.values()), self._tensor_group)
            self._tensor_group = None

    def _wrapper(self, backbone: nn.Module) -> str | None:
        ddp = nn.parallel.DistributedDataParallel._active_ddp_module
        if ddp is not None and any(module is backbone for module in ddp.modules()):
            return "DistributedDataParallel"
        holder, attribute = self._slices[0]
        managed = getattr(holder, "_is_fsdp_managed_module", False)
        # FSDP1 gives a module views of its flat parameter, FSDP2 parameters.
        return (
            "FullyShardedDataParallel" if managed and not isinstance(getattr(holder, attribute), nn.Parameter) else None
        )


def refuse_other_tokens(inputs: Iterable[Any], group: dist.ProcessGroup) -> None:
    """Compare the whole numbers (tokens, positions, masks) among the inputs of the ranks of a group. A collective.

    Args:
        inputs: what the backbone is called with; of embeddings only the shape counts, for they may differ in bits.
        group: the ranks that share them.

    Raises:
        ValueError: on every rank of the group, if any two differ.

    Note: synchronizes the host with the device.
    """
    mine = _checksum([each for each in inputs if isinstance(each, torch.Tensor)])
    everybodys = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybodys, mine, group=group)
    ranks, sums = dist.get_process_group_ranks(group), [each.tolist() for each in everybodys]
    other = next((rank for rank, each in zip(ranks, sums, strict=True) if each != sums[0]), None)
    if other is not None:
        raise ValueError(
            f"tensor parallelism: rank {other} was given other tokens than rank {ranks[0]}, but ranks "
            f"{', '.join(map(str, ranks))} cut one model: give them the same batches, shared out by rank // "
            f"{len(ranks)} instead of rank"
        )


def _checksum(tensors: Collection[torch.Tensor]) -> torch.Tensor:
    """int64 [2]: of shapes, and of whole numbers and their places."""
    device = next((each.device for each in tensors), torch.device("cpu"))
    shapes, numbers = 0, torch.zeros((), dtype=torch.int64, device=device)
    for number, tensor in enumerate(tensors, start=1):
        for length in (number, *tensor.shape):
            shapes = (shapes * 1_000_003 + length) % (1 << 61)
        if not tensor.is_floating_point():
            values = tensor.detach().to(device, torch.int64).flatten()
            # Odd factors: sums wrap around, and no value is multiplied away.
            factors = 2 * torch.arange(values.numel(), device=device) + 2 * number + 1
            numbers = numbers + (values * factors).sum()
    return torch.stack([torch.tensor(shapes, device=device), numbers])
