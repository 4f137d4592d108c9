"""Kinds of layers from names of tensors: what the families' own sub-blocks say of every configuration in the suite."""

from pathlib import Path

import pytest

from farskip.models.attach import layers_of
from farskip.models.checkpoint_files import read_checkpoint
from farskip.models.layer_kinds import blocks_of_layers
from farskip.models.testing_families import CASES, build, family_of
from farskip.wiring import DENSE, MOE, MOE_SHARED


@pytest.mark.parametrize("case", CASES)
def test_names_say_what_the_adapter_says(case: str, tmp_path: Path) -> None:
    model = build(CASES[case])
    family = family_of(CASES[case])
    expected = [family.sub_blocks(layer).blocks for layer in layers_of(model)]
    assert blocks_of_layers(model.state_dict(), len(expected)) == expected, "experts stacked, as in memory"
    model.save_pretrained(tmp_path)
    assert blocks_of_layers(read_checkpoint(tmp_path).tensors, len(expected)) == expected, "as the family stores them"


def test_names_in_general() -> None:
    names = [
        "model.layers.0.mlp.up_proj.weight",
        "layers.1.mlp.experts.up_blocks",
        "language_model.model.layers.2.feed_forward.experts.3.w1",
        "model.layers.2.feed_forward.shared_expert.up_proj.weight",
        "model.layers.3.mlp.shared_expert_gate.weight",
        "model.layers.10.mlp.experts.0.up_proj.weight",
        "model.norm.weight",
    ]
    assert blocks_of_layers(names, 4) == [DENSE, MOE, MOE_SHARED, DENSE]
    with pytest.raises(ValueError, match=r"none of layer 4, though config\.json says 11 layers"):
        blocks_of_layers(names, 11)
