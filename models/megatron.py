"""megatron-core models under a wiring: `rewire_spec`, which changes the spec that a GPTModel is built from.

    spec = rewire_spec(get_gpt_decoder_block_spec(config, use_transformer_engine=True), "farskip")
    model = GPTModel(config, transformer_layer_spec=spec, ...)

Megatron stays stock: the spec names a subclass of its layer and of its core attention, and nothing else changes.
Modules, parameters, their names and the keys of sharded checkpoints are those of the untouched spec.

megatron-core is an optional extra; nothing of it is imported before `rewire_spec` is called. docs/megatron.md has a
whole example and what is refused.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from farskip.executor import Executor
from farskip.parallel.collectives import Link, ProcessGroupLink
from farskip.schedule import Schedule, check_mode
from farskip.wiring import Wiring

_VERSION = (0, 16)


def rewire_spec(
    spec: Any,
    wiring: str | Wiring = "farskip",
    layers: str | Sequence[int] = "all",
    *,
    schedule: str = "overlapped",
    chunks: int = 1,
    link: Callable[[Any], Link] = ProcessGroupLink,
) -> Any:
    """The same spec with its layers rewired.

    Args:
        spec: the spec of a layer (`get_gpt_layer_local_spec` and kin) or of a block (`get_gpt_decoder_block_spec`). Is
            left as it is; a block for multi-token prediction has to be made from it, not from what is returned.
        wiring: a name (see `farskip.wiring`) or a `Wiring` for the whole model, all its pipeline stages together.
        layers: which of its layers, for a name: ``"all"``, ``"last:3"``, ``"first:3"``, ``"2:5"`` or a list.
        schedule: ``overlapped`` or ``serial``; both compute the same function, bit for bit.
        chunks: parts into which the tokens of each layer are cut, so that exchanges also hide under routed experts.
        link: makes the link that carries rows between ranks, from Megatron's expert-parallel group.

    Returns:
        A spec of the same kind. What it says is checked when a model is built from it.

    Raises:
        ImportError: megatron-core is not installed, or in a version that this file was not written for.
        ValueError: a spec whose layers are not Megatron's own, `layers` beside a whole `Wiring`, or a setting that
            cannot be.
    """
    _require_megatron()
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from farskip.models.megatron_layer import Rewiring, rewire_layer_spec

    if isinstance(wiring, Wiring) and layers != "all":
        raise ValueError(f"layers={layers!r} goes with the name of a wiring; a Wiring already says its layers")
    check_mode(schedule)
    rewiring = Rewiring(wiring, layers, schedule=schedule, chunks=chunks, make_link=link)
    if isinstance(spec, TransformerBlockSubmodules):
        return replace(spec, layer_specs=[rewire_layer_spec(one, rewiring) for one in spec.layer_specs or ()])
    if not isinstance(spec, ModuleSpec):
        raise ValueError(
            f"rewire_spec: {type(spec).__name__} is no spec; give it what get_gpt_layer_local_spec, "
            "get_gpt_layer_with_transformer_engine_spec or get_gpt_decoder_block_spec return"
        )
    return rewire_layer_spec(spec, rewiring, alike=True)


def executor_of(model: Any) -> Executor:
    """The executor that runs the layers of a model, or of one chunk of it under virtual pipeline stages.

    It takes observers (`farskip.recorder`, `farskip.profiling`) and knows the wiring.

    Args:
        model: a GPTModel that was built from a rewired spec; wrappers around it do not matter.

    Raises:
        ValueError: not built from a rewired spec.
    """
    executor: Executor = _stage_of(model).executor
    return executor


def schedule_of(model: Any) -> Schedule:
    """The schedule of a training pass: of the whole model, drained where this stage begins, recomputes and ends.

    Args:
        model: as of `executor_of`.

    Raises:
        ValueError: not built from a rewired spec.
    """
    stage = _stage_of(model)
    schedule: Schedule = stage.schedule(recompute=stage.recomputes)
    return schedule


def _stage_of(model: Any) -> Any:
    for module in model.modules():
        stage = module.__dict__.get("farskip_stage")
        if stage is not None:
            return stage
    raise ValueError(f"{type(model).__name__} has no rewired layers; build it from what rewire_spec returns")


def _require_megatron() -> None:
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        raise ImportError("rewire_spec needs megatron-core, which is not installed: pip install 'farskip[megatron]'")
    installed = importlib.import_module("megatron.core.package_info")
    if (installed.MAJOR, installed.MINOR) != _VERSION:
        raise ImportError(
            f"rewire_spec knows the layers of megatron-core 0.16, and {installed.__version__} is installed: "
            "pip install 'megatron-core>=0.16.1,<0.17'"
        )
