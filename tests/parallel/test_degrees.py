"""Rules on degrees of parallelism; that meshes and dispatchers go by them is tested where they are made."""

import pytest

from farskip.parallel.degrees import check_degrees, check_experts


@pytest.mark.parametrize(("world", "ep", "tp"), [(1, 1, 1), (8, 8, 1), (8, 1, 8), (8, 4, 2), (8, 2, 2), (12, 6, 3)])
def test_degrees_that_go_together(world: int, ep: int, tp: int) -> None:
    check_degrees(world, ep, tp)


@pytest.mark.parametrize(
    ("world", "ep", "tp", "message"),
    [
        (8, 3, 1, "ep=3 does not divide 8 ranks: choose a divisor of 8"),
        (8, 0, 1, "ep=0 does not divide 8 ranks"),
        (8, 1, 3, "tp=3 does not divide 8 ranks: choose a divisor of 8"),
        (8, 2, 4, "ep=2 is not a multiple of tp=4: .* choose ep=1 or a multiple of 4"),
    ],
)
def test_degrees_that_do_not(world: int, ep: int, tp: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_degrees(world, ep, tp)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((60, 8), "expert parallelism of 8 does not divide 60 experts: choose a divisor"),
        ((64, 8, 0), "chunks=0 is too small"),
        ((64, 8, 1, 0), "capacity=0 is too small"),
    ],
)
def test_experts(arguments: tuple[int, ...], message: str) -> None:
    check_experts(64, 8, 2, 1)
    with pytest.raises(ValueError, match=message):
        check_experts(*arguments)
