"""What `farskip bench kernels` measures: models' shapes, ops, what stands against them, and the bytes each must move.

Decides nothing about timing or machines. A floor counts every input read once and every output written once; where an
op's forward keeps something for its backward, that is not counted: the forward is timed without gradients.

Legend: T tokens, H hidden size, I expert's intermediate size, E experts, K experts per token, R = T * K rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farskip.triton_kernels.add_rms_norm import add_rms_norm
from farskip.triton_kernels.dispatch_map import DispatchMap, dispatch_map
from farskip.triton_kernels.grouped_mm import grouped_mm
from farskip.triton_kernels.permute import permute
from farskip.triton_kernels.release_attention import release_attention
from farskip.triton_kernels.release_both import release_both
from farskip.triton_kernels.release_router import release_router, release_router_backward
from farskip.triton_kernels.route import route
from farskip.triton_kernels.swiglu import swiglu
from farskip.triton_kernels.unpermute import unpermute

EPS = 1e-6
Run = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes and routing rule of one model; rule holds keyword arguments of `route`."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    rule: dict[str, Any]
    has_bias: bool = False


MODELS = (
    ModelShape(
        name="deepseek_v3",
        hidden=7168,
        intermediate=2048,
        experts=256,
        top_k=8,
        rule={"score": "sigmoid", "num_groups": 8, "top_groups": 4, "scale": 2.5},
        has_bias=True,
    ),
    ModelShape(
        name="kimi_k2",
        hidden=7168,
        intermediate=2048,
        experts=384,
        top_k=8,
        rule={"score": "sigmoid", "scale": 2.827},
        has_bias=True,
    ),
    ModelShape(name="qwen3_30b", hidden=2048, intermediate=768, experts=128, top_k=8, rule={}),
    ModelShape(
        name="moonlight_16b",
        hidden=2048,
        intermediate=1408,
        experts=64,
        top_k=6,
        rule={"score": "sigmoid", "scale": 2.446},
        has_bias=True,
    ),
    ModelShape(
        name="deepseek_v2_lite", hidden=2048, intermediate=1408, experts=64, top_k=6, rule={"renormalize": False}
    ),
    ModelShape(name="olmoe", hidden=2048, intermediate=1024, experts=64, top_k=8, rule={"renormalize": False}),
    ModelShape(name="gpt_oss_120b", hidden=2880, intermediate=2880, experts=128, top_k=4, rule={}),
    ModelShape(name="mixtral_8x7b", hidden=4096, intermediate=14336, experts=8, top_k=2, rule={}),
    ModelShape(
        name="llama4_scout",
        hidden=5120,
        intermediate=8192,
        experts=16,
        top_k=1,
        rule={"score": "sigmoid", "renormalize": False},
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelCase:
    """One op at one shape.

    Attributes:
        op: Name of the op.
        inputs: Makes fresh random inputs; those that require a gradient get one in the backward.
        variants: Implementations by name, "farskip" and "eager" among them; all take the inputs.
        forward_bytes: Least traffic of the forward.
        backward_bytes: Least traffic of the backward; 0 if there is none.
        forward_flops: Matmul work of the forward; the backward has twice as much.
        synchronizing: Variants that wait for the device, so that no CUDA graph can hold them.
    """

    op: str
    inputs: Callable[[], list[Any]]
    variants: dict[str, Run]
    forward_bytes: int
    backward_bytes: int
    forward_flops: int = 0
    synchronizing: frozenset[str] = frozenset()

    def floor_us(self, copy_bytes_per_s: float, flops_per_s: float, *, backward: bool) -> float:
        """Microseconds below which this machine cannot do it."""
        moved = self.backward_bytes if backward else self.forward_bytes
        work = self.forward_flops * (2 if backward else 1)
        return 1e6 * max(moved / copy_bytes_per_s, work / flops_per_s)


def build_cases(shape: ModelShape, num_tokens: int, device: str, with_liger: bool) -> list[KernelCase]:
    """All ops at one model's shape, bf16 streams and fp32 routing."""
    random = partial(_random, device=device)
    T, H, I, E, K = num_tokens, shape.hidden, shape.intermediate, shape.experts, shape.top_k  # noqa: E741
    row, stream, rows = 2 * H, 2 * T * H, 2 * T * K * H
    scores = 4 * T * E
    bias = torch.randn(E, device=device) / 10 if shape.has_bias else None
    experts = torch.rand(T, E, device=device).topk(K).indices
    dispatch = dispatch_map(experts, E)
    weights = torch.rand(T, K, device=device)
    gain = partial(random, H, grad=True)
    liger_swiglu, liger_norm = _liger() if with_liger else (None, None)

    def streams(count: int) -> list[Tensor]:
        return [random(T, H, grad=True) for _ in range(count)]

    def expert_rows() -> Tensor:
        return random(T * K, H, grad=True)

    settings = {"top_k": K, "bias": bias, **shape.rule}
    cases = [
        KernelCase(
            op="route",
            inputs=lambda: [random(T, E, grad=True, dtype=torch.float32)],
            variants={
                "farskip": lambda logits: _routed(route(logits, **settings)),
                "eager": partial(eager_route, settings=settings),
            },
            forward_bytes=scores + 12 * T * K,
            backward_bytes=2 * scores + 12 * T * K,
        ),
        KernelCase(
            op="dispatch_map",
            inputs=lambda: [experts],
            variants={
                "farskip": lambda ids: _mapped(dispatch_map(ids, E)),
                "eager": partial(eager_map, num_experts=E),
            },
            forward_bytes=16 * T * K,
            backward_bytes=0,
        ),
        KernelCase(
            op="permute",
            inputs=lambda: streams(1),
            variants={
                "farskip": lambda x: (permute(x, dispatch),),
                "eager": lambda x: (x[dispatch.src.long() // K],),
            },
            forward_bytes=stream + rows,
            backward_bytes=stream + rows,
        ),
        KernelCase(
            op="unpermute",
            inputs=lambda: [expert_rows(), weights.clone().requires_grad_()],
            variants={
                "farskip": lambda y, w: (unpermute(y, dispatch, w),),
                "eager": lambda y, w: (eager_combine(y, w, dispatch),),
            },
            forward_bytes=stream + rows,
            backward_bytes=stream + 2 * rows,
        ),
        KernelCase(
            op="swiglu",
            inputs=lambda: [random(T * K, 2 * I, grad=True)],
            variants={"farskip": lambda h: (swiglu(h),), "eager": lambda h: (eager_swiglu(h),)}
            | ({"liger": lambda h: (liger_swiglu(*h.chunk(2, 1)),)} if liger_swiglu else {}),
            forward_bytes=2 * 3 * T * K * I,
            backward_bytes=2 * 5 * T * K * I,
        ),
        KernelCase(
            op="add_rms_norm",
            inputs=lambda: [*streams(2), gain()],
            variants={"farskip": lambda x, a, g: add_rms_norm(x, a, g, EPS), "eager": eager_add_norm}
            | ({"liger": liger_norm} if liger_norm else {}),
            forward_bytes=4 * stream + row,
            backward_bytes=4 * stream + row,
        ),
        KernelCase(
            op="release_attention",
            inputs=lambda: [*streams(3), gain()],
            variants={
                "farskip": lambda x, a, s, g: release_attention(x, a, s, g, EPS),
                "eager": lambda x, a, s, g: (x + a, F.rms_norm(x + a + s, g.shape, g, EPS)),
            },
            forward_bytes=5 * stream + row,
            backward_bytes=5 * stream + row,
        ),
        KernelCase(
            op="release_router",
            inputs=lambda: [*streams(2), expert_rows(), gain()],
            variants={
                "farskip": lambda y, s, r, g: release_router(
                    y, s, r, g, EPS, dispatch=dispatch, combine_weights=weights
                ),
                "eager": lambda y, s, r, g: _normed(y + (eager_combine(r, weights, dispatch) + s), g),
            },
            forward_bytes=4 * stream + rows + row,
            backward_bytes=4 * stream + rows + row,
        ),
        KernelCase(
            op="release_router_backward",
            inputs=lambda: [
                *(random(T, H), random(T, H), random(T * K, H), random(T, H)),
                *(*normed_once(random(T, H)), random(H)),
            ],
            variants={
                "farskip": partial(release_router_backward, dispatch=dispatch),
                "eager": partial(eager_release_backward, dispatch=dispatch),
            },
            forward_bytes=5 * stream + rows + row,
            backward_bytes=0,
        ),
        KernelCase(
            op="release_both",
            inputs=lambda: [*streams(3), expert_rows(), gain(), gain()],
            variants={
                "farskip": lambda x, a, s, r, gn, gx: release_both(
                    x, a, s, r, gn, gx, EPS, dispatch=dispatch, combine_weights=weights
                ),
                "eager": lambda x, a, s, r, gn, gx: eager_both(x, a, s, eager_combine(r, weights, dispatch), gn, gx),
            },
            forward_bytes=6 * stream + rows + 2 * row,
            backward_bytes=6 * stream + rows + 2 * row,
        ),
    ]
    up = random(E, H, 2 * I, grad=True)
    cases.append(
        KernelCase(
            op="grouped_mm",
            inputs=lambda: [expert_rows(), up],
            variants={
                "farskip": lambda x, b: (grouped_mm(x, b, dispatch.offsets),),
                "eager": lambda x, b: (grouped_mm(x, b, dispatch.offsets, backend="reference"),),
            },
            forward_bytes=rows + 4 * T * K * I + 4 * E * H * I,
            backward_bytes=2 * rows + 8 * T * K * I + 8 * E * H * I,
            forward_flops=2 * T * K * H * 2 * I,
            synchronizing=frozenset({"eager"}),
        )
    )
    return cases


def _random(*size: int, device: str, grad: bool = False, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*size, device=device, dtype=dtype).requires_grad_(grad)


def _routed(routing: Any) -> tuple[Tensor, ...]:
    return routing.weights, routing.experts, routing.counts


def _mapped(dispatch: DispatchMap) -> tuple[Tensor, ...]:
    return dispatch.offsets, dispatch.dst, dispatch.src


def _normed(x: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
    return x, F.rms_norm(x, gain.shape, gain, EPS)


def eager_route(logits: Tensor, settings: dict[str, Any]) -> tuple[Tensor, ...]:
    """Routing as models write it: topk, and a histogram of the chosen experts."""
    num_experts = logits.shape[1]
    scores = logits.sigmoid() if settings.get("score") == "sigmoid" else logits.softmax(1)
    keys = scores if settings["bias"] is None else scores + settings["bias"]
    if settings.get("num_groups", 1) > 1:
        grouped = keys.unflatten(1, (settings["num_groups"], -1))
        kept = grouped.topk(2, dim=2).values.sum(2).topk(settings["top_groups"], dim=1).indices
        mask = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=logits.device).scatter(1, kept, True)
        keys = grouped.masked_fill(~mask[..., None], float("-inf")).flatten(1)
    experts = keys.topk(settings["top_k"], dim=1).indices
    weights = scores.gather(1, experts)
    if settings.get("renormalize", True):
        weights = weights / weights.sum(1, keepdim=True)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=logits.device)
    counts = counts.index_add(0, experts.flatten(), torch.ones_like(experts.flatten(), dtype=torch.int32))
    return weights * settings.get("scale", 1.0), experts, counts


def eager_map(experts: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    """Dispatch map by a stable sort."""
    sorted_ids, src = experts.flatten().sort(stable=True)
    dst = torch.empty_like(src).scatter_(0, src, torch.arange(len(src), device=src.device))
    ends = torch.searchsorted(sorted_ids, torch.arange(num_experts, device=src.device), right=True)
    return ends.int(), dst.view_as(experts).int(), src.int()


def eager_combine(rows: Tensor, weights: Tensor, dispatch: DispatchMap) -> Tensor:
    """Combine by gathering and a weighted sum in fp32."""
    return (rows[dispatch.dst.long()].float() * weights[..., None]).sum(1).to(rows.dtype)


def eager_swiglu(h: Tensor) -> Tensor:
    """SwiGLU by halves."""
    gate, up = h.chunk(2, 1)
    return F.silu(gate) * up


def eager_add_norm(x: Tensor, a: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
    """Add, then torch's norm."""
    return _normed(x + a, gain)


def normed_once(x: Tensor) -> tuple[Tensor, Tensor]:
    """A stream that a norm has read, and 1/rms of its rows."""
    return x, (x.float().square().mean(1) + EPS).rsqrt()


def eager_release_backward(
    grad: Tensor,
    gate: Tensor,
    rows: Tensor,
    shared: Tensor,
    x: Tensor,
    rstd: Tensor,
    gain: Tensor,
    *,
    dispatch: DispatchMap,
) -> tuple[Tensor, ...]:
    """What follows the update, backwards: rows summed per token, the readers' gradients added, norm, residual."""
    total = (gate + rows[dispatch.dst.long()].float().sum(1).to(x.dtype) + shared).float()
    unit = x.float() * rstd[:, None]
    scaled = total * gain.float()
    through = rstd[:, None] * (scaled - unit * (scaled * unit).mean(1, keepdim=True))
    return grad + through.to(x.dtype), (total * unit.to(x.dtype).float()).sum(0).to(gain.dtype)


def eager_both(x: Tensor, a: Tensor, s: Tensor, r: Tensor, gain_n: Tensor, gain_x: Tensor) -> tuple[Tensor, ...]:
    """Both updates by single operations."""
    y = x + a
    full = y + (r + s)
    return full, F.rms_norm(y + s, gain_n.shape, gain_n, EPS), F.rms_norm(full, gain_x.shape, gain_x, EPS)


def _liger() -> tuple[Any, Any]:
    """Liger's SwiGLU and fused add with norm, which returns the norm first."""
    from liger_kernel.ops.fused_add_rms_norm import (  # type: ignore[import-not-found]
        LigerFusedAddRMSNormFunction,
    )
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]

    def add_norm(x: Tensor, a: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
        normed, total = LigerFusedAddRMSNormFunction.apply(x, a, gain, EPS, 0.0, "llama", False)
        return total, normed

    return LigerSiLUMulFunction.apply, add_norm
