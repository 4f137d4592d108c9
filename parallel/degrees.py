"""Which degrees of parallelism go together: rules that hold before there is a process group. No torch here."""


def check_degrees(world: int, ep: int, tp: int) -> None:
    """Refuse degrees that no mesh of the ranks can have.

    Args:
        world: number of ranks.
        ep: over how many of them the experts of a layer are spread.
        tp: over how many attention, dense MLPs and shared experts are cut.

    Raises:
        ValueError: `ep` or `tp` does not divide the number of ranks, or `ep` would cut a tensor-parallel group.
    """
    for name, size in (("ep", ep), ("tp", tp)):
        if size < 1 or world % size:
            raise ValueError(f"{name}={size} does not divide {world} ranks: choose a divisor of {world}")
    if ep > 1 and ep % tp:
        raise ValueError(
            f"ep={ep} is not a multiple of tp={tp}: experts are spread over whole tensor-parallel groups; choose ep=1 "
            f"or a multiple of {tp}"
        )


def check_experts(num_experts: int, ep: int, chunks: int = 1, capacity: int | None = None) -> None:
    """Refuse what no dispatcher can do.

    Args:
        num_experts: of a layer, of all ranks together.
        ep: over how many ranks they are spread.
        chunks: into how many parts the tokens of a layer are cut.
        capacity: rows of one chunk that an expert takes from one rank; None for all there are.

    Raises:
        ValueError: experts that `ep` does not divide, no chunk, or no capacity.
    """
    if num_experts % ep:
        raise ValueError(f"expert parallelism of {ep} does not divide {num_experts} experts: choose a divisor")
    if chunks < 1:
        raise ValueError(f"chunks={chunks} is too small; use 1 for no chunks, or more")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity={capacity} is too small; use 1 row per expert or more, or None for no limit")
