"""What a configuration says of stages."""

import pytest

from farskip.launch.config import WiringConfig
from farskip.launch.staged_rewiring import stages_of
from farskip.wiring import Wiring


def test_stages_without_a_layer_to_rewire_are_refused() -> None:
    """`farskip pretrain` has the ordinary wiring unless told otherwise."""
    ordinary = Wiring.named("ordinary", 3)
    config = WiringConfig(name="ordinary", stage_layers=2, stage_steps=5)
    with pytest.raises(ValueError, match=r"stage_layers=2 with wiring\.name=ordinary: no layer is to be rewired"):
        stages_of(config, ordinary, ordinary, 10)
    config = WiringConfig(name="ordinary")
    assert stages_of(config, ordinary, ordinary, 10) is None
