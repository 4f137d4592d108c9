"""The variants of `farskip bench overlap parallel=tensor`: a dense model whose sub-blocks are cut over the hosts.

    tp_ordinary_blocking               ordinary wiring, every all-reduce waited for at once; the others' measure
    tp_parallel                        attention and MLP share one all-reduce, which nothing hides
    tp_ladder_serial                   ladder, every all-reduce waited for at once
    tp_ladder_overlapped               the same, each all-reduce under the next sub-block
    tp_sequence_parallel_serial        ladder, the stream in shares of tokens, the MLP in two chunks; waiting at once
    tp_sequence_parallel_overlapped    the same, gathers and scatters under other sub-blocks
    tp_no_communication                tp_ordinary_blocking without its all-reduces

All hosts see the same tokens. Besides the passes of every benchmark there is `decode` with real compute: one more token
for each sequence, with the keys and values of the others in a cache.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from farskip.executor import Executor
from farskip.launch.bench_config import BenchOverlapConfig
from farskip.launch.bench_variants import VOCABULARY, Kind, Variant, stage_variant
from farskip.models.attach import attachment_of
from farskip.models.family import backbone_of
from farskip.models.fresh import build_model
from farskip.models.parallelize import parallelize
from farskip.models.surgery import rewire
from farskip.parallel.collectives import ProcessGroupLink
from farskip.parallel.tensor_parallel import TensorParallelRanks
from farskip.timed_dense_blocks import DenseSleepTimes, SleepingDenseBlocks
from farskip.wiring import Wiring


def tensor_kinds() -> list[Kind]:
    """The variants in the order of the table, without tp_no_communication."""
    shares = Kind(
        name="tp_sequence_parallel_serial", wiring="ladder", schedule="serial", chunks=2, sequence_parallel=True
    )
    return [
        Kind(name="tp_ordinary_blocking", wiring="ordinary", schedule="serial"),
        Kind(name="tp_parallel", wiring="parallel", schedule="overlapped"),
        Kind(name="tp_ladder_serial", wiring="ladder", schedule="serial"),
        Kind(name="tp_ladder_overlapped", wiring="ladder", schedule="overlapped", reference="tp_ladder_serial"),
        shares,
        replace(shares, name="tp_sequence_parallel_overlapped", schedule="overlapped", reference=shares.name),
    ]


class RealTensorModels:
    """Variants of a transformers Llama.

    Args:
        config: of the benchmark.
        mesh: sub-blocks are cut over its ``tp`` axis.
    """

    def __init__(self, config: BenchOverlapConfig, mesh: DeviceMesh) -> None:
        self._config = config
        self._mesh = mesh
        size, generator = config.size, torch.Generator().manual_seed(0)
        self._ids_BS = torch.randint(VOCABULARY, (size.batch, size.sequence), generator=generator)

    def build(self, kind: Kind, link: ProcessGroupLink) -> Variant:
        """One variant. A collective."""
        model = self._model(kind.wiring)
        shares: dict[str, Any] = {"sequence_parallel": kind.sequence_parallel, "chunks": kind.chunks}
        parallelize(model, self._mesh, kind.schedule, tensor_link=link, **shares)
        return self._variant(kind, model)

    def whole(self, wiring: str) -> torch.Tensor:
        """Output of the model on one rank."""
        return self._variant(Kind(name="whole", wiring=wiring, schedule="serial"), self._model(wiring)).run(None)

    def _model(self, wiring: str) -> Any:
        size = self._config.size
        settings = {
            "hidden_size": size.hidden,
            "intermediate_size": size.mlp_width,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads,
            "head_dim": size.hidden // size.heads,
            "max_position_embeddings": size.sequence + 1,
        }
        model = build_model("llama", settings, vocab_size=VOCABULARY, end_of_document_id=0, seed=0)
        return rewire(model.train(), wiring)

    def _variant(self, kind: Kind, model: Any) -> Variant:
        attachment = attachment_of(model)
        assert attachment is not None
        backbone: Any = backbone_of(model)
        cached: list[Any] = []

        def forward() -> torch.Tensor:
            return backbone(input_ids=self._ids_BS, use_cache=False).last_hidden_state

        def decode() -> torch.Tensor:
            if not cached:
                cached.append(backbone(input_ids=self._ids_BS, use_cache=True).past_key_values)
            found = backbone(input_ids=self._ids_BS[:, :1], past_key_values=cached[0], use_cache=True)
            cached[0].crop(-1)
            return found.last_hidden_state

        return Variant(
            name=kind.name,
            forward=forward,
            decode=decode,
            parameters=dict(backbone.named_parameters()),
            executor=attachment.executor,
            reference=kind.reference,
            wiring=kind.wiring,
        )


class TimedTensorModels:
    """Variants of sleeps, run by the executor without a model around it.

    Args:
        config: of the benchmark.
    """

    def __init__(self, config: BenchOverlapConfig) -> None:
        size = config.size
        self._config = config
        tokens = size.batch * size.sequence
        self._times = DenseSleepTimes(attention=config.timed.attention_ms, mlp=config.timed.mlp_ms, tokens=tokens)
        generator = torch.Generator().manual_seed(0)
        self._x_BSD = torch.randn(size.batch, size.sequence, size.hidden, generator=generator)

    def build(self, kind: Kind, link: ProcessGroupLink) -> Variant:
        """One variant."""
        ranks = TensorParallelRanks(link, sequence_parallel=kind.sequence_parallel, chunks=kind.chunks)
        return self._variant(kind, self._blocks(link.rank, link.size), ranks)

    def whole(self, wiring: str) -> torch.Tensor:
        """Output on one rank."""
        return self._variant(Kind(name="whole", wiring=wiring, schedule="serial"), self._blocks(0, 1)).run(None)

    def _blocks(self, rank: int, size: int) -> nn.ModuleList:
        shape = self._config.size
        return nn.ModuleList(
            SleepingDenseBlocks(shape.hidden, self._times, rank=rank, size=size, seed=layer)
            for layer in range(shape.layers)
        )

    def _variant(self, kind: Kind, blocks: nn.ModuleList, ranks: TensorParallelRanks | None = None) -> Variant:
        wiring = Wiring.named(kind.wiring, len(blocks))
        executor = Executor(list(blocks), wiring, tensor_parallel=ranks, mode=kind.schedule)  # type: ignore[arg-type]
        return stage_variant(kind, executor, blocks, self._x_BSD)
