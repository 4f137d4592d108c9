"""Toy sub-blocks, their fused ops, and one pass over them through an executor: what the executor's tests share."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from farskip.executor import Executor
from farskip.residual import MLP_NORM
from farskip.schedule import Schedule
from farskip.stage import Norm, RoutedRows, Routing, Seam
from farskip.triton_kernels.add_rms_norm import add_rms_norm
from farskip.triton_kernels.release_attention import release_attention
from farskip.triton_kernels.release_both import release_both
from farskip.triton_kernels.release_router import release_router
from farskip.triton_kernels.release_router_by_use import release_router_by_use
from farskip.wiring import ATTENTION, DENSE, MOE, MOE_SHARED, LayerBlocks, LayerWiring, Wiring

NAMES = ("ordinary", "farskip", "attn_only", "parallel", "ladder")
MIX = (DENSE, MOE_SHARED, MOE, MOE_SHARED)
SC_MOE = Wiring((LayerWiring(routed=("attention",)),) * 4)
SHARED_READS_ALL = Wiring((LayerWiring(attention=("previous.routed",), routed=("attention",)),) * 4)
"""Farskip whose shared expert waits for attention: y has three uses whose order a placement can change."""
WIRINGS = [Wiring.named(name, 4) for name in NAMES]
WIRINGS += [Wiring.named("farskip", 4, [1, 3]), SC_MOE, SHARED_READS_ALL]
EXPERTS, TOP_K, WIDTH = 4, 2, 8
EPS = 1e-6


class ToyBlocks:
    """Sub-blocks of one matrix each; norms and projections use their input as often as real ones do."""

    def __init__(self, blocks: LayerBlocks, seed: int) -> None:
        self.blocks = blocks
        generator = torch.Generator().manual_seed(seed)

        def matrix(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, WIDTH, generator=generator).div_(3).requires_grad_()

        self.parameters = {
            name: matrix(*shape)
            for name, shape in {
                **dict.fromkeys(("query", "key", "value", "output", "mlp", "up", "shared"), (WIDTH,)),
                "gate": (EXPERTS,),
                "experts": (EXPERTS, WIDTH),
                **dict.fromkeys((ATTENTION, MLP_NORM), ()),
            }.items()
        }

    def attention_norm(self, stream_BSD: torch.Tensor) -> torch.Tensor:
        return self.norm(ATTENTION, stream_BSD)

    def mlp_norm(self, stream_BSD: torch.Tensor) -> torch.Tensor:
        return self.norm(MLP_NORM, stream_BSD)

    def norm(self, name: str, stream_BSD: torch.Tensor) -> torch.Tensor:
        return stream_BSD * (stream_BSD.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.parameters[name]

    def attention(self, normed_BSD: torch.Tensor, seam: Seam, arguments: Mapping[str, Any]) -> torch.Tensor:
        weights = self.parameters
        query, key, value = seam(*(normed_BSD @ weights[name] for name in ("query", "key", "value")))
        return torch.softmax(query @ key.transpose(-1, -2), -1) @ value @ weights["output"]

    def mlp(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(normed_BSD @ self.parameters["mlp"]) * (normed_BSD @ self.parameters["up"])

    def shared(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(normed_BSD @ self.parameters["shared"]) * (normed_BSD @ self.parameters["up"])

    def route(self, normed_BSD: torch.Tensor) -> Routing:
        logits_TE = normed_BSD.reshape(-1, WIDTH) @ self.parameters["gate"].T
        weights_TK, experts_TK = logits_TE.softmax(-1).topk(TOP_K)
        return Routing(logits_TE=logits_TE, weights_TK=weights_TK, experts_TK=experts_TK)

    def routed(self, normed_BSD: torch.Tensor, routing: Routing) -> torch.Tensor:
        tokens = normed_BSD.reshape(-1, WIDTH)
        every_TED = torch.einsum("td,edf->tef", tokens, self.parameters["experts"]).tanh()
        chosen = every_TED.gather(1, routing.experts_TK.unsqueeze(-1).expand(-1, -1, WIDTH))
        return (chosen * routing.weights_TK.unsqueeze(-1)).sum(1).view(normed_BSD.shape)

    def expert_rows(self, rows_RD: torch.Tensor, expert_R: torch.Tensor) -> torch.Tensor:
        return torch.einsum("rd,rdf->rf", rows_RD, self.parameters["experts"][expert_R]).tanh()


class ToyKernels:
    """The plain twins of the fused ops over the norms of toy sub-blocks."""

    def __init__(self, layers: Sequence[ToyBlocks], called: Collection[Norm] = ()) -> None:
        self.layers, self.called, self.ops = layers, called, Counter[str]()

    def run_on(self, stream_BSD: torch.Tensor) -> bool:
        return True

    def fusible(self, start: int, stop: int, stream_BSD: torch.Tensor) -> frozenset[Norm]:
        norms = {Norm(layer, name) for layer in range(start, stop) for name in (ATTENTION, MLP_NORM)}
        return frozenset(norms.difference(self.called))

    def weights(self, op: str, norms: tuple[Norm, ...]) -> list[torch.Tensor]:
        self.ops[op] += 1
        return [self.layers[norm.layer].parameters[norm.name] for norm in norms]

    def add_norm(self, norms: Any, *terms: Any) -> Any:
        return add_rms_norm(*terms, *self.weights("add_norm", norms), EPS)

    def release_attention(self, norms: Any, *terms: Any) -> Any:
        return release_attention(*terms, *self.weights("release_attention", norms), EPS)

    def release_router(self, norms: Any, y: Any, r: Any, s: Any = None) -> Any:
        routed, how = self.routed(r)
        return release_router(y, s, routed, *self.weights("release_router", norms), EPS, **how)

    def release_router_by_use(self, norms: Any, num_uses: int, gradient: Any, y: Any, r: Any, s: Any = None) -> Any:
        (routed, how), (weight,) = self.routed(r), self.weights("release_router", norms)
        self.ops["by_use"] += 1

        def take(arrived: torch.Tensor) -> Any:
            taken = gradient.take(arrived)
            self.ops["unsummed"] += taken is not None
            return taken

        return release_router_by_use(y, s, routed, weight, EPS, num_uses, take, **how)

    def release_both(self, norms: Any, x: Any, a: Any, r: Any, s: Any) -> Any:
        routed, how = self.routed(r)
        return release_both(x, a, s, routed, *self.weights("release_both", norms), EPS, **how)

    def routed(self, r: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        if not isinstance(r, RoutedRows):
            return r, {}
        self.ops["rows"] += 1
        return r.rows_RD, {"dispatch": r.dispatch, "combine_weights": r.weights_TK}


def passed_through(
    executor: Executor, schedule: Schedule, layers: Sequence[ToyBlocks], *, tokens: int = 3, recompute: bool = False
) -> dict[str, torch.Tensor]:
    """One forward and backward pass over two sequences: the output, the input's gradient, those of all parameters."""
    x_BSD = torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(9), requires_grad=True)
    shards = executor.shard_tokens(x_BSD.shape)
    if shards is None:
        stream, partial = x_BSD * 1.0, x_BSD * 1.0
    else:
        stream = partial = shards.enter(x_BSD * 1.0)
    for segment in schedule.segments:
        stream, partial = executor.run_segment(
            schedule, segment, stream, partial, [{}] * len(layers), recompute=recompute, shards=shards
        )
    stream = shards.leave(stream) if shards else stream
    (stream * torch.arange(WIDTH)).sum().backward()
    assert x_BSD.grad is not None
    return {"output": stream.detach(), "x": x_BSD.grad} | {
        f"{name}.{index}": parameter.grad
        for index, layer in enumerate(layers)
        for name, parameter in layer.parameters.items()
        if parameter.grad is not None
    }


def assert_equal_bits(tensors: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> None:
    """Of two passes, neither of which read anything too early."""
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.isfinite().all(), f"{name} is not finite: something was read too early"
        assert torch.equal(tensor, others[name]), f"{name} differs in bits"
