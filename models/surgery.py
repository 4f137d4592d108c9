"""`rewire` and `wiring_of`: change which outputs the sub-blocks of a transformers model leave out, in place."""

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from farskip.executor import Executor
from farskip.models.attach import attach, attachment_of, layers_of
from farskip.models.family import family_of_model
from farskip.wiring import Wiring

Model = TypeVar("Model", bound=nn.Module)


def rewire(model: Model, wiring: str | Wiring = "farskip", layers: str | Sequence[int] = "all") -> Model:
    """Rewire the skip connections of a model, in place. Weights and their names stay as they are.

    Args:
        model: a transformers causal language model of a known family.
        wiring: a name (see `farskip.wiring`) or a `Wiring` for the whole model.
        layers: which layers, for a name: ``"all"``, ``"last:3"``, ``"first:3"``, ``"2:5"`` or a list.

    Returns:
        The same model.

    Raises:
        ValueError: unknown family or wiring, layers out of range, a table that breaks a rule. The model is untouched.

    Source: FarSkip-Collective (arXiv 2511.11505) section 3.
    """
    family = family_of_model(model)
    all_layers = layers_of(model)
    if isinstance(wiring, Wiring):
        if layers != "all":
            raise ValueError(f"layers={layers!r} goes with the name of a wiring; a Wiring already says its layers")
        chosen = wiring
    else:
        chosen = Wiring.named(wiring, len(all_layers), layers)
    previous = attachment_of(model)
    executor = Executor(
        [family.sub_blocks(layer) for layer in all_layers],
        chosen,
        dispatcher=previous.executor.dispatcher if previous else None,
        tensor_parallel=previous.executor.tensor_parallel if previous else None,
        mode=previous.executor.mode if previous else "overlapped",
        times=previous.executor.times if previous else None,
        side_stream=previous.executor.side_stream if previous else "none",
    )
    if previous is not None:
        executor.observers = previous.executor.observers
        executor.routing_hook = previous.executor.routing_hook
        executor.wait_meter = previous.executor.wait_meter
    attach(model, executor)
    return model


def wiring_of(model: Any) -> Wiring:
    """The wiring of a model; ordinary for one that farskip was never attached to.

    Raises:
        ValueError: not a model of a known family.
    """
    family_of_model(model)
    attachment = attachment_of(model)
    if attachment is None:
        return Wiring.named("ordinary", len(layers_of(model)))
    return attachment.executor.wiring
