"""How much of an emulated exchange one GPU hides: DeepSeek-V2-Lite layer shapes in bf16, forward and backward.

One GPU cannot hold two ranks of NCCL, so the exchange is a paced copy on a side stream, of a bandwidth that makes
communication a given share of the blocking step (`farskip.parallel.paced_copy_link`). All variants run in turn in one
process; times are of the device, by events. Prints a table and writes JSON. Needs a CUDA device. The variants called
side have merges, or merges and routers, on a stream beside compute (`farskip.lanes`).

    python benchmarks/gpu_overlap.py [--layers 4] [--tokens 8192] [--share 0.25] [--rounds 12] [--out FILE]
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
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.paced_copy_link import PacedCopyLink

LITE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 0,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 8192,
}
NO_LINK_GBYTE_S = 1e6
"""So fast that no exchange is seen: what the same launches and copies cost without a wire."""
KINDS = {
    "ordinary_blocking": ("ordinary", "serial", "none"),
    "ordinary_shared": ("ordinary", "overlapped", "none"),
    "farskip_serial": ("farskip", "serial", "none"),
    "farskip_overlapped": ("farskip", "overlapped", "none"),
    "farskip_overlapped_side_merge": ("farskip", "overlapped", "merge"),
    "farskip_overlapped_side_merge_and_route": ("farskip", "overlapped", "merge_and_route"),
}
FREE = {
    "no_communication": ("ordinary", "serial", "none"),
    "farskip_no_communication": ("farskip", "overlapped", "none"),
}
PASSES = ("forward", "forward_backward")


class Variant:
    """One model under a wiring and a schedule, over a link of one rank.

    Args:
        config: of the model; equal weights for all variants.
        wiring: a wiring's name.
        mode: ``serial`` or ``overlapped``.
        side_stream: what the overlapped schedule has beside compute.
        link: carries the rows.
        ids_BS: the tokens.
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: dict[str, Any],
        wiring: str,
        mode: str,
        side_stream: str,
        link: Link,
        ids_BS: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        model = build_model("deepseek_v2", config, vocab_size=1024, end_of_document_id=0, seed=0)
        self.model = rewire(model.to(ids_BS.device, dtype).train(), wiring)
        blocks = [family_of_model(self.model).sub_blocks(layer) for layer in layers_of(self.model)]
        dispatcher = AllToAllDispatcher(link, config["n_routed_experts"])
        wired = wiring_of(self.model)
        attach(self.model, Executor(blocks, wired, dispatcher=dispatcher, mode=mode, side_stream=side_stream))
        use_kernels(self.model, "auto")
        self._ids_BS = ids_BS

    def forward(self) -> torch.Tensor:
        """The hidden states."""
        with torch.no_grad():
            return backbone_of(self.model)(input_ids=self._ids_BS, use_cache=False).last_hidden_state

    def forward_backward(self) -> None:
        """A training step without head and optimizer."""
        hidden_BSD = backbone_of(self.model)(input_ids=self._ids_BS, use_cache=False).last_hidden_state
        hidden_BSD.backward(torch.ones_like(hidden_BSD))
        self.model.zero_grad(set_to_none=True)


def build_variants(make: Callable[..., Variant], link: Link, no_link: Link) -> dict[str, Variant]:
    """All variants by name; `make` is called with (wiring, mode, side_stream, link)."""
    over_link = {name: make(*kind, link) for name, kind in KINDS.items()}
    return over_link | {name: make(*kind, no_link) for name, kind in FREE.items()}


def main() -> None:
    options = parse_options(__doc__, layers=4, tokens=8192, share=0.25, rounds=12)
    device, config = torch.device("cuda"), {**LITE, "num_hidden_layers": options.layers}
    sequence = min(options.tokens, 4096)
    ids_BS = torch.randint(1024, (options.tokens // sequence, sequence), device=device)

    def make(wiring: str, mode: str, side_stream: str, link: Link) -> Variant:
        return Variant(config, wiring, mode, side_stream, link, ids_BS, torch.bfloat16)

    no_link = PacedCopyLink(device, bandwidth_gbyte_s=NO_LINK_GBYTE_S)
    free = make(*FREE["no_communication"], no_link)
    print(kernels_line(free.model, "auto"))
    free.forward_backward()
    compute_ms = statistics.median(elapsed_ms(free.forward_backward) for _ in range(5))
    del free
    # each layer sends its rows four times: dispatch and combine, forward and backward
    exchanged = 4 * options.layers * ids_BS.numel() * LITE["num_experts_per_tok"] * LITE["hidden_size"] * 2
    bandwidth = exchanged / (compute_ms * options.share / (1 - options.share)) / 1e6
    variants = build_variants(make, PacedCopyLink(device, bandwidth_gbyte_s=bandwidth), no_link)
    passes = {}
    for name in PASSES:
        times = interleaved({key: getattr(variant, name) for key, variant in variants.items()}, options.rounds)
        passes[name] = summaries(times, "ordinary_blocking", "no_communication")
        print_table(f"{name}, emulated link of {bandwidth:.1f} GB/s", passes[name])
    write(options.out, passes, bandwidth_gbyte_s=bandwidth, layers=options.layers, tokens=options.tokens)


if __name__ == "__main__":
    main()
