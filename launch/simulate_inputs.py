"""What `farskip simulate` is given: words of the command line and files -> a model's shape, stage times, links."""

import argparse
import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from farskip.launch.run_folder import STAGE_TIMES
from farskip.models.model_shape import read_shape
from farskip.simulator import StageTimes
from farskip.stage_costs import LinkRate, ModelShape
from farskip.what_if import DIRECTIONS
from farskip.wiring import DENSE, MOE, MOE_SHARED

_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_GB_S = {"mbit/s": 1 / 8e3, "gbit/s": 1 / 8, "mb/s": 1e-3, "gb/s": 1.0, "tb/s": 1e3}
KNOWN_STAGES = frozenset(StageTimes().forward)


def shape_of(options: argparse.Namespace) -> tuple[str, ModelShape]:
    """What the model is called, and its shape: from a config.json, or from the flags.

    Raises:
        ValueError: neither or both, no checkpoint, or sizes that make no sense.
    """
    if (options.model is None) == (options.num_layers is None):
        raise ValueError("give either --model FOLDER or --num-layers N")
    if options.model is not None:
        own = [name for name in ("hidden", "experts", "top_k", "dense_first") if getattr(options, name) is not None]
        if own or options.shared:
            name = (own[0] if own else "shared").replace("_", "-")
            raise ValueError(f"--{name} goes with --num-layers; --model reads it from config.json")
        return read_shape(options.model)
    dense = options.dense_first or 0
    if not 0 <= dense <= options.num_layers or options.num_layers < 1:
        raise ValueError(f"--dense-first {dense} of --num-layers {options.num_layers} makes no model")
    for name in ("experts", "hidden", "top_k"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} is too small; use at least 1, or leave it out")
    if (options.top_k or 0) > (options.experts or 0):
        raise ValueError(f"--top-k {options.top_k} is more than there are: --experts {options.experts or 0}")
    moe = MOE_SHARED if options.shared else MOE
    experts = options.experts or 0
    blocks = tuple(DENSE if layer < dense or not experts else moe for layer in range(options.num_layers))
    top_k = options.top_k or 0
    return "a model of flags", ModelShape(blocks=blocks, hidden=options.hidden or 0, num_experts=experts, top_k=top_k)


def given_time(text: str) -> tuple[str, str, float]:
    """``experts=1.2ms`` or ``experts.backward=2ms``: stage, direction, milliseconds.

    Raises:
        ValueError: not of this form, no such stage, or no time.
    """
    name, equals, value = text.partition("=")
    stage, _, direction = name.partition(".")
    match = re.fullmatch(r"(.+?)(us|ms|s)", value.strip())
    if not equals or match is None or (direction or "forward") not in DIRECTIONS:
        raise ValueError(f"--time {text} is not understood; use STAGE=1.2ms, STAGE.backward=2ms, with us, ms or s")
    _known_stage(stage, f"--time {text}")
    return stage, direction or "forward", _number(match[1], f"--time {text}") * _MS[match[2]]


def link_rate(text: str, option: str = "--link") -> LinkRate:
    """``50GB/s,10us`` or ``400Gbit/s``.

    Raises:
        ValueError: not of this form, or no bandwidth.
    """
    bandwidth, _, latency = text.partition(",")
    match = re.fullmatch(r"(.+?)(us|ms|s)", latency.strip() or "0us")
    if match is None:
        raise ValueError(f"{option} {text}: the latency {latency!r} is not understood; use 50GB/s,10us")
    return LinkRate(
        gb_s=bandwidth_of(bandwidth, f"{option} {text}"),
        latency_us=1e3 * _number(match[1], f"{option} {text}") * _MS[match[2]],
    )


def bandwidth_of(text: str, where: str) -> float:
    """GB/s of ``50GB/s``, ``400Gbit/s``, ``1TB/s``, ``500Mbit/s``.

    Raises:
        ValueError: another unit, or not above 0.
    """
    match = re.fullmatch(r"([^a-zA-Z]+)([a-zA-Z/]+)", text.strip())
    if match is None or match[2].lower() not in _GB_S:
        raise ValueError(f"{where}: the bandwidth {text!r} is not understood; use 50GB/s, 400Gbit/s or 1TB/s")
    found = _number(match[1], where) * _GB_S[match[2].lower()]
    if not found > 0:
        raise ValueError(f"{where}: the bandwidth {text!r} has to be above 0")
    return found


def sweep_of(text: str) -> tuple[float, float]:
    """``5GB/s:100GB/s`` in GB/s.

    Raises:
        ValueError: not of this form, or not ascending.
    """
    low, colon, high = text.partition(":")
    if not colon:
        raise ValueError(f"--sweep {text} is not understood; use 5GB/s:100GB/s")
    found = bandwidth_of(low, f"--sweep {text}"), bandwidth_of(high, f"--sweep {text}")
    if not found[0] < found[1]:
        raise ValueError(f"--sweep {text} does not ascend; give the slower bandwidth first")
    return found


def read_times(path: Path, variant: str | None) -> StageTimes:
    """Milliseconds from a run folder, from a file of them, or of one variant of a result of `farskip bench overlap`.

    Raises:
        ValueError: no such file, not JSON, no such variant, an unknown stage, or a time that is none.
    """
    file = path / STAGE_TIMES if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"--times {file}: there is no such file; a run writes {STAGE_TIMES} if it measures its stages")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"--times {file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"--times {file}: {type(content).__name__} instead of an object")
    variants = content.get("machine", {}).get("stage_ms") if isinstance(content.get("machine"), dict) else None
    if isinstance(variants, dict):
        if variant not in variants:
            raise ValueError(f"--times {file} holds those of several; add --variant, one of {', '.join(variants)}")
        content = variants[variant]
        if not isinstance(content, dict):
            raise ValueError(f"--times {file}: {variant} is {type(content).__name__} instead of an object")
    elif variant is not None:
        raise ValueError(f"--variant {variant}: {file} is no result of farskip bench overlap; leave it out")
    if set(content) - set(DIRECTIONS) or not content.get("forward"):
        raise ValueError(f"--times {file}: keys {sorted(content)}; it has to hold forward, and may hold backward")
    return StageTimes(**{way: _checked(content[way], f"--times {file}: {way}") for way in content})


def merged(lower: StageTimes, upper: StageTimes) -> StageTimes:
    """The times of both; where both have one, the upper's. A forward time of the upper's alone replaces both of the
    lower's directions."""
    kept = {stage: ms for stage, ms in lower.backward.items() if stage not in upper.forward}
    return replace(upper, forward={**lower.forward, **upper.forward}, backward={**kept, **upper.backward})


def _checked(times: Any, where: str) -> Mapping[str, float]:
    if not isinstance(times, dict):
        raise ValueError(f"{where} is no object of stage: milliseconds")
    for stage, ms in times.items():
        _known_stage(stage, where)
        if isinstance(ms, bool) or not isinstance(ms, int | float) or not 0 <= ms < math.inf:
            raise ValueError(f"{where}.{stage}={ms!r} is no time; use milliseconds, 0 or more")
    return times


def _known_stage(stage: str, where: str) -> None:
    if stage not in KNOWN_STAGES:
        near = difflib.get_close_matches(stage, KNOWN_STAGES, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(sorted(KNOWN_STAGES))}"
        raise ValueError(f"{where}: there is no stage {stage!r}; {advice}")


def _number(text: str, where: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise ValueError(f"{where}: {text!r} is no number of 0 or more")
    return found
