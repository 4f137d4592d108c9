"""farskip: train mixture-of-experts and dense transformers whose communication hides behind compute.

The facade. Names are loaded when they are first used, so that ``import farskip`` costs nothing and needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farskip.models.parallelize import parallelize
    from farskip.models.pretrained import load, save
    from farskip.models.surgery import rewire, wiring_of
    from farskip.wiring import Wiring

__version__ = "0.1.0"

__all__ = ["Wiring", "load", "parallelize", "rewire", "save", "wiring_of"]

_HOME = {
    "Wiring": "farskip.wiring",
    "load": "farskip.models.pretrained",
    "parallelize": "farskip.models.parallelize",
    "rewire": "farskip.models.surgery",
    "save": "farskip.models.pretrained",
    "wiring_of": "farskip.models.surgery",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'farskip' has no attribute {name!r}; public names: {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
