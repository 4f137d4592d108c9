"""What `farskip doctor` finds about a planned run: whether a model goes over these ranks, and into their memory.

The rules are those that the run itself goes by, asked before it starts; the model is built without memory. What one of
them refuses is an error, and what does not depend on it is asked all the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from farskip.launch.config import ParallelConfig
from farskip.launch.doctor_environment import Job
from farskip.launch.doctor_machine import DEVICE, HOST, Finding, device_memory, error, ok, warning
from farskip.models.checkpoint_files import has_safetensors, read_checkpoint
from farskip.models.folder_copy import size_text
from farskip.models.layer_kinds import blocks_of_layers
from farskip.parallel.degrees import check_degrees, check_experts
from farskip.simulator import StageTimes, choose_schedule, simulate
from farskip.stage_graph import build_stage_graph
from farskip.wiring import LayerBlocks, Wiring

_PLAIN_NUMBERS = ("F64", "F32", "BF16", "F16")
"""Numbers that are stored one by one; quantized ones may be packed."""
_ORIGINAL_BYTES = 4
"""Per parameter: distill holds the frozen original, too, in fp32 by default."""


def degrees(parallel: ParallelConfig, job: Job) -> list[Finding]:
    """Whether degrees of parallelism go together with the number of ranks."""
    try:
        parallel.check()
        check_degrees(job.ranks, parallel.ep or job.ranks, parallel.tp)
    except ValueError as problem:
        return [error("parallel", str(problem))]
    return [ok("parallel", f"ep {parallel.ep or job.ranks} and tp {parallel.tp} over {job.ranks} ranks")]


def checkpoint(
    folder: Path, wiring: str | None, layers: str | Sequence[int] | None, parallel: ParallelConfig | None, job: Job
) -> list[Finding]:
    """Whether a checkpoint can be loaded, rewired and spread over the ranks, and what a rank then holds.

    Args:
        folder: of the checkpoint.
        wiring: that it gets; None: what it says.
        layers: which of them; all if None.
        parallel: ep, tp, sequence_parallel, chunks and capacity of the run; None if they are no such settings: then
            nothing is said of the model over ranks.
        job: the ranks.
    """
    try:
        from farskip.models.attach import layers_of
        from farskip.models.checkpoint_config import ordinary_config, transformers_config
        from farskip.models.pretrained import undo_quantization
        from farskip.models.rank_slices import why_whole
        from farskip.models.tensor_parallel import check_tensor_parallel
    except (ImportError, OSError) as problem:
        return [error("model", f"not looked at, because it takes torch and transformers ({problem})")]
    try:
        family, recorded, settings = ordinary_config(folder)
        undo_quantization(folder, settings, None)
        config = transformers_config(family, settings)
    except (ValueError, RuntimeError) as problem:
        text = str(problem).removeprefix("load ")
        return [error("model", text if str(folder) in text else f"{folder}: {text}")]
    try:
        model = _without_memory(family, config)
    except Exception as problem:  # of transformers' own code, which a run would end with, too
        text = f"transformers cannot build it ({type(problem).__name__}: {problem})"
        return [error("model", f"{folder}: {text}; correct config.json")]
    found = [ok("model", f"{folder}: {family.name}, {recorded or 'ordinary'}")]
    sub_blocks = [family.sub_blocks(layer) for layer in layers_of(model)]
    blocks = [each.blocks for each in sub_blocks]
    found += _files(folder, blocks, model)
    reason = why_whole(folder, settings)
    if reason is not None and job.ranks > 1:
        found.append(warning("loading", f"every rank reads the whole checkpoint, because {reason}"))
    chosen: Wiring | None = None
    try:
        chosen = _chosen(recorded, wiring, layers, len(blocks))
        inputs = chosen.resolve(blocks)
    except ValueError as problem:
        found.append(error("wiring", str(problem)))
    if parallel is None:
        return found
    ep, refused = parallel.ep or job.ranks, len(found)
    experts: list[Any] = [each.experts for each in sub_blocks if each.experts is not None]
    try:
        if experts:
            most = max(int(each.num_experts) for each in experts)
            check_experts(most, ep, parallel.chunks, parallel.capacity or None)
    except ValueError as problem:
        found.append(error("experts", str(problem)))
    try:
        if parallel.tp > 1:
            check_tensor_parallel(model, family, sub_blocks, parallel.tp)
    except ValueError as problem:
        found.append(error("tensor parallelism", str(problem)))
    if len(found) > refused:
        return found
    if chosen is not None:
        found += _windows(chosen, inputs, parallel, ep > 1 and bool(experts))
    return found + _memory(model, family, experts, ep, parallel, job)


def _without_memory(family: Any, config: Any) -> Any:
    import torch

    from farskip.launch.quiet import quiet_libraries

    with quiet_libraries(), torch.device("meta"):
        return family.model_class()(config)


def _files(folder: Path, blocks: list[LayerBlocks], model: Any) -> list[Finding]:
    if not has_safetensors(folder):
        return [warning("files", f"{folder} has no safetensors: only config.json was looked at")]
    try:
        stored = read_checkpoint(folder)
        kinds = blocks_of_layers(stored.tensors, len(blocks))
    except ValueError as problem:
        return [error("files", str(problem))]
    for layer, (here, there) in enumerate(zip(kinds, blocks, strict=True)):
        if here != there:
            text = f"layer {layer} has tensors of {' + '.join(here)}, config.json says {' + '.join(there)}; correct it"
            return [error("files", text)]
    in_files = stored.tensors
    for name, tensor in model.state_dict().items():
        known = in_files.get(name)  # experts, and what transformers renames as it loads, have other names
        if known is not None and known.dtype in _PLAIN_NUMBERS and known.shape != tuple(tensor.shape):
            text = f"{name} is {list(known.shape)}, config.json makes it {list(tensor.shape)}; correct it"
            return [error("files", text)]
    return [ok("files", f"{len(stored.files)} of {size_text(stored.num_bytes)}, whole; {len(stored.tensors)} tensors")]


def _chosen(recorded: Wiring | None, name: str | None, layers: str | Sequence[int] | None, num_layers: int) -> Wiring:
    if name is not None:
        return Wiring.named(name, num_layers, "all" if layers is None else layers)
    if layers is not None:
        raise ValueError(f"--layers {layers} goes with --wiring NAME; add it")
    return recorded or Wiring.named("ordinary", num_layers)


def _windows(wiring: Wiring, inputs: Any, parallel: ParallelConfig, expert_parallel: bool) -> list[Finding]:
    """Whether any collective has compute to hide under."""
    graph = build_stage_graph(
        inputs,
        expert_parallel=expert_parallel,
        chunks=parallel.chunks,
        tensor_parallel=parallel.tp > 1,
        sequence_chunks=parallel.chunks if parallel.sequence_parallel else 0,
    )
    if not graph.has_collectives:
        return [ok("overlap", "no collective inside the layers: there is nothing to hide")]
    schedule, times = choose_schedule(graph, "overlapped"), StageTimes()
    hidden = sum(simulate(getattr(schedule, way), times, way).hidden_total for way in ("forward", "backward"))
    if not hidden:
        text = f"{wiring} leaves no compute to hide a collective under; try --wiring farskip or ladder, or --chunks 2"
        return [warning("overlap", text)]
    return [ok("overlap", f"{wiring}: there is compute to hide collectives under; farskip simulate says how much")]


def _memory(model: Any, family: Any, experts: list[Any], ep: int, parallel: ParallelConfig, job: Job) -> list[Finding]:
    """What a rank holds of parameters, gradients and optimizer, against what there is."""
    from farskip.models.tensor_parallel import cut_parameters

    whole = sum(parameter.numel() for parameter in model.parameters())
    if parallel.tp > 1:
        cut_parameters(model, family, 0, parallel.tp)
    of_experts = sum(parameter.numel() for each in experts for parameter in each.parameters(recurse=False))
    count = sum(parameter.numel() for parameter in model.parameters()) - of_experts + of_experts // ep
    # Ranks that hold the same divide its update, so each has an equal part of the whole; a few tensors are not divided.
    updated = whole // job.ranks if parallel.shard_optimizer else count
    # training keeps parameters in fp32, and AdamW two moments of each
    held = {"parameters": 4 * count, "gradients": 4 * count, "AdamW": 8 * updated}
    parts = ", ".join(f"{what} {size_text(size)}" for what, size in held.items())
    pretrain = sum(held.values())
    distill = pretrain + _ORIGINAL_BYTES * count
    text = (
        f"a rank holds {count:,} parameters: {parts}, together {size_text(pretrain)}; with the original, in distill, "
    )
    text += f"{size_text(distill)}; activations not counted"
    there = device_memory()
    if there is None:
        return [ok("memory", text)]
    size, where = there
    if where == HOST and job.ranks_here is not None:
        size, where = size // job.ranks_here, f"{where} for each of {job.ranks_here} ranks"
    text += f"; there is {size_text(size)} on {where}"
    if max(pretrain, distill) <= size:
        return [ok("memory", text)]
    text += f": too little{'' if pretrain > size else ' for distill'}; use more ranks, a larger ep or tp"
    text += "" if parallel.shard_optimizer or job.ranks == 1 else ", or divide the optimizer (--shard-optimizer)"
    # A machine without devices may only be where a run is planned.
    return [error("memory", text) if pretrain > size and where == DEVICE else warning("memory", text)]
