"""The variants of `farskip bench overlap`: the same model under each wiring, schedule and link.

    ordinary_blocking     ordinary wiring, every exchange waited for at once; what the others are compared with
    ordinary_shared       ordinary wiring, the shared expert under the exchanges
    ordinary_chunked      ordinary wiring, tokens in chunks
    WIRING_serial         another wiring, every exchange waited for at once
    WIRING_overlapped     the same, exchanges under whatever does not wait for them
    WIRING_chunked        the same, tokens in chunks
    no_communication      ordinary_blocking, each exchange replaced by a copy of rows that stay

Each has weights of its own, all equal. Router weights are the model's; which experts are chosen is fixed.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from farskip.benchmarking import Computed, fixed_routing
from farskip.executor import Executor
from farskip.launch.bench_config import BenchOverlapConfig
from farskip.models.attach import attachment_of
from farskip.models.family import backbone_of
from farskip.models.fresh import build_model
from farskip.models.parallelize import parallelize
from farskip.models.surgery import rewire
from farskip.parallel.collectives import ProcessGroupLink
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.schedule import Segment
from farskip.timed_blocks import SleepingSubBlocks, SleepTimes
from farskip.wiring import Wiring

VOCABULARY = 512
_HEAD_WIDTH, _ROTARY_WIDTH = 32, 16


@dataclass(kw_only=True, slots=True)
class Variant:
    """One way to run the step.

    Attributes:
        name: as in the results.
        forward: hidden states [B, S, D] of this rank's tokens.
        parameters: what gets gradients, by name.
        executor: whose schedule runs it; None where it is not ours.
        reference: the variant that it has to equal; empty if it has none.
        exact: whether it has to equal it bit for bit.
        around: entered for the time of a pass.
        wiring: by which the model on one rank is wired that it is compared with where it has no reference.
        decode: one more token per sequence, with a cache; None where there is no such pass.
    """

    name: str
    forward: Callable[[], torch.Tensor]
    parameters: Mapping[str, nn.Parameter]
    executor: Executor | None = None
    reference: str = ""
    exact: bool = True
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    wiring: str = ""
    decode: Callable[[], torch.Tensor] | None = None

    def run(self, gradient_BSD: torch.Tensor | None) -> torch.Tensor:
        """One pass: forward and backward, or only forward where no gradient is given."""
        with self.around(), torch.set_grad_enabled(gradient_BSD is not None):
            output_BSD = self.forward()
            if gradient_BSD is not None:
                output_BSD.backward(gradient_BSD)
        return output_BSD

    def computed(self, gradient_BSD: torch.Tensor) -> Computed:
        """One forward and backward pass, and what came of it."""
        output_BSD = self.run(gradient_BSD)
        gradients = {name: p.grad.detach().clone() for name, p in self.parameters.items() if p.grad is not None}
        self.drop_gradients()
        return Computed(output=output_BSD.detach().clone(), gradients=gradients)

    def drop_gradients(self) -> None:
        """Forget the gradients of the last pass."""
        for parameter in self.parameters.values():
            parameter.grad = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What makes one of our variants."""

    name: str
    wiring: str
    schedule: str
    chunks: int = 1
    sequence_parallel: bool = False
    reference: str = ""

    @property
    def exact(self) -> bool:
        """Whether it computes its reference in the same chunks, and so in the same bits."""
        return self.chunks == 1 or self.sequence_parallel


def kinds(config: BenchOverlapConfig) -> list[Kind]:
    """Our variants, in the order of the table, without no_communication."""
    found = []
    for wiring in dict.fromkeys(["ordinary", *config.wirings]):
        serial, overlapped = ("blocking", "shared") if wiring == "ordinary" else ("serial", "overlapped")
        base = Kind(name=f"{wiring}_{serial}", wiring=wiring, schedule="serial")
        found += [base, Kind(name=f"{wiring}_{overlapped}", wiring=wiring, schedule="overlapped", reference=base.name)]
        if config.chunks > 1:
            chunked = f"{wiring}_chunked"
            found.append(
                Kind(name=chunked, wiring=wiring, schedule="overlapped", chunks=config.chunks, reference=base.name)
            )
    return found


class RealModels:
    """Variants of a transformers model.

    Args:
        config: of the benchmark.
        mesh: experts are spread over its ``ep`` axis.
        rank: this rank; its tokens are its own.
    """

    def __init__(self, config: BenchOverlapConfig, mesh: DeviceMesh, rank: int) -> None:
        size = config.size
        self._config = config
        self._mesh = mesh
        self._hook = fixed_routing(config.routing, size.experts, config.hosts)
        generator = torch.Generator().manual_seed(rank)
        self.ids_BS = torch.randint(VOCABULARY, (size.batch, size.sequence), generator=generator)

    def build(self, kind: Kind, link: ProcessGroupLink) -> Variant:
        """One variant. A collective."""
        model = self.model(kind.wiring)
        parallelize(model, self._mesh, kind.schedule, link=link, chunks=kind.chunks)
        return self._variant(kind, model)

    def whole(self, wiring: str) -> torch.Tensor:
        """Output of the model with all experts on this rank."""
        return self._variant(Kind(name="whole", wiring=wiring, schedule="serial"), self.model(wiring)).run(None)

    def model(self, wiring: str) -> Any:
        """The model with all its experts under a wiring; equal on all ranks."""
        return rewire(self.plain_model(), wiring)

    def plain_model(self) -> Any:
        """The model as transformers built it, with the same weights every time."""
        size = self._config.size
        settings = {
            "hidden_size": size.hidden,
            "intermediate_size": size.shared_experts * size.expert_width,
            "moe_intermediate_size": size.expert_width,
            "n_shared_experts": size.shared_experts,
            "num_hidden_layers": size.layers,
            "first_k_dense_replace": 0,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads,
            "n_routed_experts": size.experts,
            "num_experts_per_tok": size.top_k,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 4 * _HEAD_WIDTH,
            "qk_nope_head_dim": _HEAD_WIDTH,
            "qk_rope_head_dim": _ROTARY_WIDTH,
            "v_head_dim": _HEAD_WIDTH,
            "max_position_embeddings": max(size.sequence, 1),
        }
        model = build_model("deepseek_v3", settings, vocab_size=VOCABULARY, end_of_document_id=0, seed=0)
        return model.train()

    def _variant(self, kind: Kind, model: Any) -> Variant:
        attachment = attachment_of(model)
        assert attachment is not None
        attachment.executor.routing_hook = self._hook
        backbone = backbone_of(model)

        def forward() -> torch.Tensor:
            return backbone(input_ids=self.ids_BS, use_cache=False).last_hidden_state

        return Variant(
            name=kind.name,
            forward=forward,
            parameters=dict(backbone.named_parameters()),
            executor=attachment.executor,
            reference=kind.reference,
            exact=kind.exact,
            wiring=kind.wiring,
        )


def stage_variant(kind: Kind, executor: Executor, blocks: nn.ModuleList, x_BSD: torch.Tensor) -> Variant:
    """A variant of sub-blocks without a model around them.

    Args:
        kind: what it is.
        executor: runs the blocks.
        blocks: whose parameters get gradients.
        x_BSD: what goes into the first layer.
    """
    segment = Segment(0, len(blocks))
    arguments: list[dict[str, Any]] = [{}] * len(blocks)

    def forward() -> torch.Tensor:
        entering_BSD = x_BSD.detach().requires_grad_(torch.is_grad_enabled())
        shards = executor.shard_tokens(entering_BSD.shape)
        if shards is not None:
            entering_BSD = shards.enter(entering_BSD)
        schedule = executor.schedule()
        left_BSD = executor.run_segment(schedule, segment, entering_BSD, entering_BSD, arguments, shards=shards)[0]
        return left_BSD if shards is None else shards.leave(left_BSD)

    return Variant(
        name=kind.name,
        forward=forward,
        parameters=dict(blocks.named_parameters()),
        executor=executor,
        reference=kind.reference,
        exact=kind.exact,
        wiring=kind.wiring,
    )


class TimedModels:
    """Variants of sleeps, run by the executor without a model around it.

    Args:
        config: of the benchmark.
        rank: this rank; its tokens are its own.
    """

    def __init__(self, config: BenchOverlapConfig, rank: int) -> None:
        size, timed = config.size, config.timed
        self._config = config
        self._rank = rank
        self._hook = fixed_routing(config.routing, size.experts, config.hosts)
        self._times = SleepTimes(
            attention=timed.attention_ms,
            shared=timed.shared_ms,
            experts=timed.experts_ms,
            rows=size.batch * size.sequence * size.top_k,
        )
        generator = torch.Generator().manual_seed(rank)
        self._x_BSD = torch.randn(size.batch, size.sequence, size.hidden, generator=generator)

    def build(self, kind: Kind, link: ProcessGroupLink) -> Variant:
        """One variant."""
        dispatcher = AllToAllDispatcher(link, self._config.size.experts, kind.chunks)
        return self._variant(kind, self._blocks(link.rank, link.size), dispatcher)

    def whole(self, wiring: str) -> torch.Tensor:
        """Output with all experts on this rank."""
        return self._variant(Kind(name="whole", wiring=wiring, schedule="serial"), self._blocks(0, 1)).run(None)

    def _blocks(self, rank: int, size: int) -> nn.ModuleList:
        shape = self._config.size
        return nn.ModuleList(
            SleepingSubBlocks(shape.hidden, shape.experts, shape.top_k, self._times, rank=rank, size=size, seed=layer)
            for layer in range(shape.layers)
        )

    def _variant(self, kind: Kind, blocks: nn.ModuleList, dispatcher: AllToAllDispatcher | None = None) -> Variant:
        wiring = Wiring.named(kind.wiring, len(blocks))
        executor = Executor(list(blocks), wiring, dispatcher=dispatcher, mode=kind.schedule)  # type: ignore[arg-type]
        executor.routing_hook = self._hook
        return stage_variant(kind, executor, blocks, self._x_BSD)
