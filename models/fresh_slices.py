"""A model with random weights of which a rank only ever holds its slices, and for a moment one module whole.

transformers builds the model without memory. Then, in the order in which it draws initial values, each module gets
memory for its whole parameters, is given its values by transformers' own code, and is cut to this rank's slice before
the next one has its turn. What is drawn depends on the seed alone and not on the slice, so the slices of all ranks are
in bits those of the model that one rank builds.

Values are those of ``initialize_weights`` alone: constructors draw as well when transformers builds a model with
memory, and throw it away. So a seed gives other weights here than there.

Refuses: a parameter or buffer that transformers leaves without a value.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from farskip.models.attach import layers_of
from farskip.models.family import Family
from farskip.models.rank_slices import RankSlices, Share
from farskip.models.tensor_parallel import check_tensor_parallel, cut_dimensions
from farskip.parallel.degrees import check_experts
from farskip.parallel.tensor_parallel import slice_of


def fresh_model(family: Family, config: Any, seed: int, here: RankSlices) -> Any:
    """The transformers model of a config, with random weights. What modules say of themselves, as ``num_experts`` or
    ``out_features``, still is of the whole.

    Args:
        family: of the model.
        config: transformers' config.
        seed: of the weights; the caller's generators are left as they are.
        here: which slices.

    Raises:
        ValueError: experts that cannot be shared out equally, what `check_tensor_parallel` refuses, or a tensor that
            this version of transformers gives no value.

    Note: memory of the process is at most that of the slices and of the largest module, a layer's experts.
    """
    with torch.device("meta"):
        model = family.model_class()(config)
    filling = _Filling(model, _cuts(model, family, here))
    # Parts of a model that are models themselves, as its backbone, give their own modules their values.
    parts = [part for part in model.modules() if hasattr(part, "initialize_weights")]
    # Values are drawn on CPU; to fork or seed the others' generators would initialize every GPU of the host.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            for part in parts:
                part._init_weights = filling.around(part._init_weights)
            model.initialize_weights()
        finally:
            for part in parts:
                part.__dict__.pop("_init_weights", None)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta or tensor.isnan().any():
            raise ValueError(
                f"{family.name}: transformers {transformers.__version__} leaves {name} without an initial value; "
                "use a newer one, or another model.family"
            )
    return model


def _cuts(model: Any, family: Family, here: RankSlices) -> dict[str, tuple[int, Share]]:
    """Dimension and share of every parameter that is cut, by name."""
    blocks = [family.sub_blocks(layer) for layer in layers_of(model)]
    experts = {
        id(parameter)
        for block in blocks
        if block.experts is not None
        for parameter in block.experts.parameters(recurse=False)
    }
    cuts: dict[str, tuple[int, Share]] = {}
    if here.experts.size > 1:
        cuts = {name: (0, here.experts) for name, parameter in model.named_parameters() if id(parameter) in experts}
        for name in cuts:
            check_experts(model.get_parameter(name).shape[0], here.experts.size)
    if here.tensors.size > 1:
        check_tensor_parallel(model, family, blocks, here.tensors.size)
        cuts |= {name: (dim, here.tensors) for name, dim in cut_dimensions(model, family).items()}
    return cuts


class _Filling:
    """Gives the modules of a model without memory memory and values, one after the other."""

    def __init__(self, model: nn.Module, cuts: dict[str, tuple[int, Share]]) -> None:
        # Held until the end: an address that is free is given to another tensor.
        self._empty = {id(tensor): (name, tensor) for name, tensor in model.named_parameters()}
        self._made: dict[int, nn.Parameter] = {}
        self._cuts = cuts

    def around(self, initialize: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        """transformers' method that gives one module its values, with memory before it and the cut behind it."""

        def fill(module: nn.Module) -> None:
            own = dict(module.named_parameters(recurse=False))
            keys = {name: id(parameter) for name, parameter in own.items() if parameter.is_meta}
            is_shared = bool(keys) and all(key in self._made for key in keys.values())
            for name, key in keys.items():
                if key not in self._made:
                    self._made[key] = nn.Parameter(_nobody_wrote(own[name]), requires_grad=own[name].requires_grad)
                setattr(module, name, self._made[key])
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_meta:
                    setattr(module, name, _nobody_wrote(buffer))
            if is_shared:  # a head tied to the embedding, which has its values
                return
            initialize(module)
            for name, key in keys.items():
                dim, share = self._cuts.get(self._empty[key][0], (0, Share(rank=0, size=1)))
                if share.size > 1:
                    mine = slice_of(self._made[key].detach(), dim, share.rank, share.size)
                    self._made[key] = nn.Parameter(mine, requires_grad=self._made[key].requires_grad)
                    setattr(module, name, self._made[key])

        return fill


def _nobody_wrote(empty: torch.Tensor) -> torch.Tensor:
    """Memory in which a value that is missing shows."""
    assert empty.is_floating_point(), f"a tensor of {empty.dtype} has no NaN to show that nobody wrote it"
    return torch.full(empty.shape, float("nan"), dtype=empty.dtype, device="cpu")
