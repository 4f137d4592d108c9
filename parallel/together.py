"""Where all ranks wait: at a barrier, or for something that rank 0 does alone and that may take long.

A barrier is a collective and ends the job when a rank is later than the group's timeout. Packing a text or writing a
model takes as long as it takes, so what rank 0 has to say about it stands in the store of the process group, and the
others look for it there.
"""

import time

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_FAILED = "farskip/failed"
_LONGEST_PAUSE_S = 1.0


def barrier(device: torch.device | str) -> None:
    """Wait for all ranks. A collective of the default group.

    Args:
        device: on which this rank computes. Where it is one of CUDA, NCCL is told which: by itself it would take the
            rank's number modulo that of this host's GPUs, and hang where that is not the rank's own.
    """
    device = torch.device(device)
    if device.type != "cuda":
        dist.barrier()
        return
    dist.barrier(device_ids=[torch.cuda.current_device() if device.index is None else device.index])


def first_rank_says(words: str = "") -> str:
    """What rank 0 says, on every rank. All ranks call it; the others wait for rank 0 without a limit, rank 0 for none.

    Args:
        words: of rank 0; those of the others are not asked for.

    Raises:
        RuntimeError: a rank has said that it failed (`say_that_this_rank_failed`), or the store went with its host.

    Note: of a rank that was killed only its launcher knows, which ends the others.
    """
    store, rank = _get_default_store(), dist.get_rank()
    # Every rank counts its own calls, in the store since a process may live through several groups.
    key = f"farskip/first rank said {store.add(f'farskip/calls of {rank}', 1)}"
    if rank == 0:
        store.set(key, words.encode("utf-8", "backslashreplace").decode())
        return words
    pause_s = 0.001
    while not store.check([key]):
        if store.check([_FAILED]):
            failed = store.get(_FAILED).decode()
            raise RuntimeError(f"rank {rank}: no answer from rank {failed}: it failed while others waited for rank 0")
        time.sleep(pause_s)
        pause_s = min(1.25 * pause_s, _LONGEST_PAUSE_S)
    return str(store.get(key).decode())


def say_that_this_rank_failed() -> None:
    """Lets those go who wait in `first_rank_says`, now or later."""
    _get_default_store().set(_FAILED, str(dist.get_rank()))
