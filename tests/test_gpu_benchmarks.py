"""Benchmarks that need a GPU to measure anything: what can be said of them without one."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from farskip.pending import Pending
from farskip.wait_meter import WaitMeter

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


class OneRank:
    """A link of one rank, on which everything is there at once."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.meter = WaitMeter()
        self.num_sums = 0

    def all_to_all(self, output: torch.Tensor, tensor: torch.Tensor, *splits: object) -> "OneRank":
        output.copy_(tensor)
        return self

    def exchange_counts(self, counts: torch.Tensor) -> Pending:
        return Pending(counts.clone(), None)

    def all_reduce(self, tensor: torch.Tensor) -> "OneRank":
        self.num_sums += 1
        return self

    def wait(self) -> None:
        return None


@pytest.fixture
def benchmark_named(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_variants_of_the_expert_benchmark_differ_by_wiring_alone(
    benchmark_named: Callable[[str], ModuleType],
) -> None:
    overlap = benchmark_named("gpu_overlap")
    sizes = {"hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 8, "n_routed_experts": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16, "v_head_dim": 8}
    config = {**overlap.LITE, **sizes, **heads, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "num_hidden_layers": 3}

    def make(wiring: str, mode: str, side_stream: str, link: OneRank) -> object:
        return overlap.Variant(config, wiring, mode, side_stream, link, torch.arange(24).view(2, 12), torch.float32)

    variants = overlap.build_variants(make, OneRank(), OneRank())
    outputs = {name: variant.forward() for name, variant in variants.items()}
    for name, variant in variants.items():
        variant.forward_backward()
        assert all(parameter.grad is None for parameter in variant.model.parameters())
        wiring = "farskip_serial" if name.startswith("farskip") else "ordinary_blocking"
        assert torch.equal(outputs[name], outputs[wiring]), name
    assert not torch.equal(outputs["farskip_serial"], outputs["ordinary_blocking"])


def test_the_slices_of_the_tensor_benchmark_sum_what_their_wiring_says(
    benchmark_named: Callable[[str], ModuleType],
) -> None:
    tensor_overlap = benchmark_named("gpu_tensor_overlap")
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {**tensor_overlap.SLICE, **sizes, "head_dim": 8, "num_hidden_layers": 3}
    ids_BS = torch.arange(24).view(2, 12)
    link, no_link = OneRank(), OneRank()

    def make(wiring: str, mode: str, link: OneRank) -> object:
        return tensor_overlap.Variant(config, wiring, mode, link, ids_BS, torch.float32)

    variants = tensor_overlap.build_variants(make, link, no_link)
    outputs, sums = {}, {}
    for name, variant in variants.items():
        before = link.num_sums + no_link.num_sums
        outputs[name] = variant.forward()
        sums[name] = link.num_sums + no_link.num_sums - before
        variant.forward_backward()
        assert all(parameter.grad is None for parameter in variant.model.parameters())
        variant.decode()
        variant.decode()  # the cache is as it was
    per_layer = {name: found / 3 for name, found in sums.items()}
    assert per_layer == {**dict.fromkeys(variants, 2), "tp_parallel": 1}
    assert torch.equal(outputs["tp_ladder_serial"], outputs["tp_ladder_overlapped"])
    assert torch.equal(outputs["tp_ordinary_blocking"], outputs["tp_no_communication"])
    assert not torch.equal(outputs["tp_ordinary_blocking"], outputs["tp_ladder_serial"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["gpu_overlap", "gpu_tensor_overlap"])
def test_without_a_gpu_nothing_is_measured(name: str) -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / f"{name}.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{name}: torch sees no CUDA device here; nothing is measured\n"
