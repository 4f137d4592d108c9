"""How much of emulated all-reduces one GPU hides: one rank's slice of Llama-3-70B layers at tp=8, in bf16.

One GPU cannot hold two ranks of NCCL, so an all-reduce is a paced copy on a side stream, of a bandwidth that makes
communication a given share of the blocking step (`farskip.parallel.paced_copy_link`): each term stands for the sum, and
what is computed is not the function of the whole model. Passes: prefill (`forward`), a training step
(`forward_backward`), and one more token with the others in a cache (`decode`). All variants run in turn in one process;
times are of the device, by events. Prints a table and writes JSON. Needs a CUDA device.

    python benchmarks/gpu_tensor_overlap.py [--layers 4] [--tokens 4096] [--share 0.4] [--rounds 12] [--out FILE]
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import elapsed_ms, interleaved, parse_options, print_table, summaries, write

from farskip.executor import Executor
from farskip.models.attach import attach, layers_of
from farskip.models.family import backbone_of, family_of_model
from farskip.models.fresh import build_model
from farskip.models.kernels import kernels_line, use_kernels
from farskip.models.surgery import rewire, wiring_of
from farskip.parallel.collectives import Link
from farskip.parallel.paced_copy_link import PacedCopyLink
from farskip.parallel.tensor_parallel import TensorParallelRanks

TP = 8
SLICE: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672 // TP,
    "num_attention_heads": 64 // TP,
    "num_key_value_heads": 8 // TP,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}
"""Of each projection what one of 8 ranks holds; the stream is whole."""
NO_LINK_GBYTE_S = 1e6
"""So fast that no exchange is seen: what the same launches and copies cost without a wire."""
KINDS = {
    "tp_ordinary_blocking": ("ordinary", "serial"),
    "tp_parallel": ("parallel", "overlapped"),
    "tp_ladder_serial": ("ladder", "serial"),
    "tp_ladder_overlapped": ("ladder", "overlapped"),
}
FREE = "tp_no_communication"
PASSES = ("forward", "forward_backward", "decode")


class Variant:
    """One slice under a wiring and a schedule, over a link of one rank.

    Args:
        config: of the slice.
        wiring: a wiring's name.
        mode: ``serial`` or ``overlapped``.
        link: carries the all-reduces.
        ids_BS: the tokens.
        dtype: of the parameters.
    """

    def __init__(
        self, config: dict[str, Any], wiring: str, mode: str, link: Link, ids_BS: torch.Tensor, dtype: torch.dtype
    ) -> None:
        model = build_model("llama", config, vocab_size=1024, end_of_document_id=0, seed=0)
        self.model = rewire(model.to(ids_BS.device, dtype).train(), wiring)
        blocks = [family_of_model(self.model).sub_blocks(layer) for layer in layers_of(self.model)]
        ranks = TensorParallelRanks(link)
        attach(self.model, Executor(blocks, wiring_of(self.model), tensor_parallel=ranks, mode=mode))
        use_kernels(self.model, "auto")
        self._ids_BS = ids_BS
        self._cache: Any = None

    def forward(self) -> torch.Tensor:
        """A prefill; the hidden states."""
        with torch.no_grad():
            return backbone_of(self.model)(input_ids=self._ids_BS, use_cache=False).last_hidden_state

    def forward_backward(self) -> None:
        """A training step without head and optimizer."""
        hidden_BSD = backbone_of(self.model)(input_ids=self._ids_BS, use_cache=False).last_hidden_state
        hidden_BSD.backward(torch.ones_like(hidden_BSD))
        self.model.zero_grad(set_to_none=True)

    def decode(self) -> None:
        """One more token for each sequence."""
        backbone = backbone_of(self.model)
        with torch.no_grad():
            if self._cache is None:
                self._cache = backbone(input_ids=self._ids_BS, use_cache=True).past_key_values
            backbone(input_ids=self._ids_BS[:, :1], past_key_values=self._cache, use_cache=True)
            self._cache.crop(-1)


def build_variants(make: Callable[..., Variant], link: Link, no_link: Link) -> dict[str, Variant]:
    """All variants by name; `make` is called with (wiring, mode, link)."""
    variants = {name: make(wiring, mode, link) for name, (wiring, mode) in KINDS.items()}
    return {**variants, FREE: make("ordinary", "serial", no_link)}


def main() -> None:
    options = parse_options(__doc__, layers=4, tokens=4096, share=0.4, rounds=12)
    device, config = torch.device("cuda"), {**SLICE, "num_hidden_layers": options.layers}
    sequence = min(options.tokens, 4096)
    ids_BS = torch.randint(1024, (options.tokens // sequence, sequence), device=device)

    def make(wiring: str, mode: str, link: Link) -> Variant:
        return Variant(config, wiring, mode, link, ids_BS, torch.bfloat16)

    no_link = PacedCopyLink(device, bandwidth_gbyte_s=NO_LINK_GBYTE_S)
    free = make("ordinary", "serial", no_link)
    print(kernels_line(free.model, "auto"))
    free.forward_backward()
    compute_ms = statistics.median(elapsed_ms(free.forward_backward) for _ in range(5))
    del free
    # each layer sums the stream twice in forward and its gradient twice in backward
    summed = 4 * options.layers * ids_BS.numel() * SLICE["hidden_size"] * 2
    bandwidth = summed / (compute_ms * options.share / (1 - options.share)) / 1e6
    variants = build_variants(make, PacedCopyLink(device, bandwidth_gbyte_s=bandwidth), no_link)
    passes = {}
    for name in PASSES:
        times = interleaved({key: getattr(variant, name) for key, variant in variants.items()}, options.rounds)
        passes[name] = summaries(times, "tp_ordinary_blocking", FREE)
        print_table(f"{name}, emulated link that sums {bandwidth:.1f} GB/s", passes[name])
    write(options.out, passes, bandwidth_gbyte_s=bandwidth, layers=options.layers, tokens=options.tokens)


if __name__ == "__main__":
    main()
