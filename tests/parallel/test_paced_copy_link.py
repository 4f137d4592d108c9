"""The one-GPU test bed: it takes the time it was told, compute runs meanwhile, and a model over it keeps its bits."""

import pytest
import torch

from farskip.executor import Executor
from farskip.models.attach import attach, layers_of
from farskip.models.family import family_of_model
from farskip.models.surgery import rewire, wiring_of
from farskip.models.testing_models import run_backward, tiny_model, token_ids
from farskip.parallel.collectives import AllToAll
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.paced_copy_link import PacedCopyLink
from farskip.testing import assert_equal_bits


def test_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu; on CPU use the emulated link"):
        PacedCopyLink(torch.device("cpu"), bandwidth_gbyte_s=1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"bandwidth_gbyte_s": 0.0},
        {"bandwidth_gbyte_s": 1.0, "latency_us": -1.0},
        {"bandwidth_gbyte_s": 1.0, "away_share": 1.5},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        PacedCopyLink(torch.device("cuda"), **settings)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_it_takes_as_long_as_the_wire_and_compute_runs_meanwhile() -> None:
    device = torch.device("cuda")
    link = PacedCopyLink(device, bandwidth_gbyte_s=1.0, latency_us=500.0)
    rows = torch.randn(5000, 1000, device=device)  # 20 MB: 20 ms
    exchange = AllToAll(link=link, input_splits=(5000,), output_splits=(5000,))
    matrix = torch.randn(2048, 2048, device=device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda.synchronize()
    events[0].record()
    pending = exchange.launch(rows)
    for _ in range(3):
        matrix @ matrix
    events[1].record()
    result = pending.wait()
    events[2].record()
    torch.cuda.synchronize()
    assert torch.equal(result, rows)
    assert 18 < events[0].elapsed_time(events[2]) < 27
    assert events[0].elapsed_time(events[1]) < 10, "compute did not wait for the transfer"
    assert link.meter.seconds() > 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("wiring", ["ordinary", "farskip", "ladder"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("side_stream", ["none", "merge", "merge_and_route"])
def test_serial_and_overlapped_are_equal_in_bits(side_stream: str, family: str, wiring: str) -> None:
    found = []
    for mode in ("serial", "overlapped"):
        model = rewire(tiny_model(family), wiring).cuda()
        link = PacedCopyLink(torch.device("cuda"), bandwidth_gbyte_s=0.05, latency_us=200.0)
        blocks = [family_of_model(model).sub_blocks(layer) for layer in layers_of(model)]
        dispatcher = AllToAllDispatcher(link, 8)
        executor = Executor(blocks, wiring_of(model), dispatcher=dispatcher, mode=mode, side_stream=side_stream)
        executor.wait_meter = link.meter
        attach(model, executor)
        logits, gradients = run_backward(model, token_ids(2, 9).cuda(), use_cache=False)
        found.append({"logits": logits, **gradients})
    assert_equal_bits(found[1], found[0])
