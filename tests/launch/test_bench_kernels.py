"""The kernel benchmark without a GPU: it refuses, its cases agree with plain torch, its floors are the arithmetic."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from farskip.launch import bench_kernels
from farskip.launch.kernel_cases import MODELS, KernelCase, ModelShape, build_cases

SMALL = {"hidden": 32, "intermediate": 16}


def small(shape: ModelShape) -> ModelShape:
    experts = 16 if shape.rule.get("num_groups") else max(4, shape.top_k)
    rule = shape.rule | ({"num_groups": 4, "top_groups": 3} if shape.rule.get("num_groups") else {})
    return ModelShape(name=shape.name, experts=experts, top_k=shape.top_k, rule=rule, has_bias=shape.has_bias, **SMALL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "this machine has no CUDA device, so there is nothing to time"),
        (["--models", "gpt"], "--models gpt is unknown; choose from "),
        (["--tokens", "0"], "--tokens 0 is too small; use at least 1"),
    ],
    ids=str,
)
def test_what_cannot_be_timed(
    words: list[str], says: str, farskip_command: Callable[[list[str]], tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, error = farskip_command(["bench", "kernels", "--out", str(tmp_path / "results"), *words])
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"farskip bench kernels: {says}")
    assert not (tmp_path / "results").exists()


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_kernels.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--models NAME [NAME ...] whose sizes: deepseek_v3,", "--tokens N [N ...] of one call", "--ops OP"):
        assert words in text
    assert "Decides" not in text  # words for who reads the source


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
def test_our_side_agrees_with_the_other_side(shape: ModelShape) -> None:
    for case in build_cases(small(shape), 24, "cpu", with_liger=False):
        assert bench_kernels.compare(case, case.variants["farskip"]) is None, case.op


def test_a_wrong_result_is_found() -> None:
    cases = {case.op: case for case in build_cases(small(MODELS[0]), 24, "cpu", with_liger=False)}
    wrong = {
        "permute": lambda x: (1.02 * cases["permute"].variants["eager"](x)[0],),
        "dispatch_map": lambda ids: tuple(t + 1 for t in cases["dispatch_map"].variants["eager"](ids)),
    }
    for op, run in wrong.items():
        assert bench_kernels.compare(cases[op], run) is not None

    def right_value_wrong_gradient(h: torch.Tensor) -> tuple[torch.Tensor]:
        out = cases["swiglu"].variants["eager"](h)[0]
        return (out + 0.1 * (out - out.detach()),)

    found = bench_kernels.compare(cases["swiglu"], right_value_wrong_gradient)
    assert found is not None and found.startswith("gradient 0")


@pytest.mark.slow
@pytest.mark.timeout(600)
# torch's own compiler imports a module of torch that warns of another one.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_backward_can_be_run_many_times() -> None:
    cases = {case.op: case for case in build_cases(small(MODELS[0]), 24, "cpu", with_liger=False)}
    for run in (cases["swiglu"].variants["farskip"], bench_kernels.compiled(cases["swiglu"].variants["eager"])):
        work = bench_kernels.prepare(run, cases["swiglu"].inputs, backward=True)
        assert torch.equal(work()[0], work()[0])
    assert not bench_kernels.prepare(run, cases["swiglu"].inputs, backward=False)()[0].requires_grad


def test_floors() -> None:
    """DeepSeek-V3, 8192 tokens, at 4.3 TB/s: T x H bf16 is one unit of 27.3 us."""
    T, H, K, rate = 8192, 7168, 8, 4.3e12
    tiny = {case.op: case for case in build_cases(small(MODELS[0]), 24, "cpu", with_liger=False)}
    unit = 2 * 24 * SMALL["hidden"]
    units = {"permute": 1 + K, "unpermute": 1 + K, "release_attention": 5, "release_router": 4 + K}
    units["release_router_backward"] = 5 + K
    for op, count in units.items():
        assert tiny[op].forward_bytes == pytest.approx(count * unit, abs=2 * SMALL["hidden"])
    case = KernelCase(op="x", inputs=list, variants={}, forward_bytes=2 * T * H * (K + 1), backward_bytes=0)
    assert case.floor_us(rate, 1.0, backward=False) == pytest.approx(246, abs=1)
    product = KernelCase(
        op="x", inputs=list, variants={}, forward_bytes=0, backward_bytes=0, forward_flops=2 * T * K * H * 4096
    )
    assert product.floor_us(rate, 790e12, backward=False) == pytest.approx(4871, abs=1)
    assert product.floor_us(rate, 790e12, backward=True) == pytest.approx(2 * 4871, abs=2)


def test_report_is_written_whole(tmp_path: Path) -> None:
    row = {"model": "m", "tokens": 8, "op": "route", "variant": "farskip", "us": 2.0, "floor_us": 1.0}
    report: dict[str, Any] = {
        "machine": {"gpu": "Some GPU", "date": "2026-01-01"},
        "results": [row | {"share_of_floor": 0.5}],
    }
    bench_kernels.write_report(report, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "kernels-some-gpu-2026-01-01.json",
        "kernels-some-gpu-2026-01-01.png",
    ]
