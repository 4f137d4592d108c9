"""What each layer of a stored model is made of, read off the names of its tensors: no model, no transformers.

Every family of this project calls its routed experts ``experts`` and its shared expert ``shared_expert`` or
``shared_experts``, somewhere below ``layers.<number>``; the conformance suite holds each one to it.
"""

import re
from collections.abc import Iterable

from farskip.wiring import DENSE, MOE, MOE_SHARED, LayerBlocks

_OF_LAYER = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)(?P<rest>\..+)")
_SHARED = re.compile(r"\.shared_experts?\.")


def blocks_of_layers(names: Iterable[str], num_layers: int) -> list[LayerBlocks]:
    """The sub-blocks of each layer, as `Wiring.resolve` takes them.

    Args:
        names: of all tensors.
        num_layers: as the config says; what lies beyond (heads for further tokens) is not looked at.

    Raises:
        ValueError: a layer has no tensors.
    """
    seen: set[int] = set()
    routed: set[int] = set()
    shared: set[int] = set()
    for name in names:
        if match := _OF_LAYER.fullmatch(name):
            layer = int(match["layer"])
            seen.add(layer)
            if ".experts." in match["rest"]:
                routed.add(layer)
            if _SHARED.search(match["rest"]):
                shared.add(layer)
    blocks = []
    for layer in range(num_layers):
        if layer not in seen:
            raise ValueError(f"missing tensors: none of layer {layer}, though config.json says {num_layers} layers")
        blocks.append(DENSE if layer not in routed else MOE_SHARED if layer in shared else MOE)
    return blocks
