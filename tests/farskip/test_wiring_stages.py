"""Which wiring a step has on the way to the whole one."""

import pytest

from farskip.wiring import Wiring
from farskip.wiring_stages import WiringStages

ORDINARY = {num_layers: Wiring.named("ordinary", num_layers) for num_layers in (3, 4, 5, 8)}


def rewired(stages: WiringStages, steps: range) -> list[tuple[int, ...]]:
    return [stages.at(step).rewired_layers for step in steps]


def test_layers_come_from_the_last_one_on() -> None:
    stages = WiringStages(start=ORDINARY[5], wiring=Wiring.named("farskip", 5), layers=2, steps=3)
    assert (stages.num_stages, stages.last_begins) == (3, 7)
    two, four, five = (3, 4), (1, 2, 3, 4), (0, 1, 2, 3, 4)
    assert rewired(stages, range(1, 10)) == [two] * 3 + [four] * 3 + [five] * 3
    assert stages.at(1) == Wiring.named("farskip", 5, "last:2")
    assert stages.at(7) == stages.at(1000) == stages.wiring


def test_only_layers_that_are_to_be_rewired_count() -> None:
    wiring = Wiring.named("ladder", 8, [0, 2, 3, 7])
    stages = WiringStages(start=ORDINARY[8], wiring=wiring, layers=3, steps=1)
    assert rewired(stages, range(1, 4)) == [(2, 3, 7), (0, 2, 3, 7), (0, 2, 3, 7)]
    assert stages.at(2) == wiring


@pytest.mark.parametrize("layers", [4, 9])
def test_all_at_once_is_one_stage(layers: int) -> None:
    stages = WiringStages(start=ORDINARY[4], wiring=Wiring.named("farskip", 4), layers=layers, steps=10)
    assert (stages.num_stages, stages.last_begins) == (1, 1)
    assert stages.at(1) == stages.wiring


def test_every_stage_keeps_the_table_of_its_layers() -> None:
    table = Wiring((*Wiring.named("farskip", 2).layers, *Wiring.named("ladder", 2).layers))
    at_first = WiringStages(start=ORDINARY[4], wiring=table, layers=3, steps=1).at(1)
    assert at_first.layers == (Wiring.named("ordinary", 1).layers[0], *table.layers[1:])


def test_layers_that_are_wired_already_stay_so_and_take_no_turn() -> None:
    start, wiring = Wiring.named("farskip", 5, "last:2"), Wiring.named("farskip", 5)
    stages = WiringStages(start=start, wiring=wiring, layers=2, steps=1)
    assert rewired(stages, range(1, 4)) == [(1, 2, 3, 4), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)]
    back = WiringStages(start=wiring, wiring=ORDINARY[5], layers=3, steps=1)
    assert rewired(back, range(1, 3)) == [(0, 1), ()]


def test_a_start_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="start has 3 layers and wiring 4; give two wirings of one model"):
        WiringStages(start=ORDINARY[3], wiring=ORDINARY[4], layers=1, steps=1)


def test_nothing_to_rewire_is_one_stage() -> None:
    stages = WiringStages(start=ORDINARY[3], wiring=ORDINARY[3], layers=1, steps=5)
    assert (stages.num_stages, stages.last_begins, stages.at(1)) == (1, 1, stages.wiring)


@pytest.mark.parametrize(("layers", "steps", "name"), [(0, 1, "layers"), (1, 0, "steps")])
def test_no_layer_or_no_step_is_refused(layers: int, steps: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 is too small; use at least 1"):
        WiringStages(start=ORDINARY[3], wiring=Wiring.named("farskip", 3), layers=layers, steps=steps)
