"""Norms and stream of whole models on the fused ops: the same function, and serial equals overlapped in bits."""

import copy
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import farskip.executor as executor_module
from farskip.chain import MLP_NORM
from farskip.executor import Executor
from farskip.fusion import plan_fusions
from farskip.models import norm_rule as rules
from farskip.models import stream_kernels
from farskip.models.attach import attach, attachment_of, layers_of
from farskip.models.family import family_of_model
from farskip.models.hf_layer import HFSubBlocks
from farskip.models.kernels import kernels_line, use_kernels
from farskip.models.surgery import rewire, wiring_of
from farskip.models.testing_families import CASES, build
from farskip.models.testing_models import gradients, next_token_loss, run_backward, tiny_model, token_ids
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.testing_links import FakeLink
from farskip.rows_gradient import RowsGradient
from farskip.stage import RoutedRows
from farskip.testing import assert_close, assert_equal_bits, load_beside
from farskip.triton_kernels.add_rms_norm import rms_norm
from farskip.wiring import ATTENTION, LayerWiring, Wiring

reference = load_beside(__file__, "two_stream_reference")

LOGITS = {"max_error": 5e-5}
"""DESIGN.md 4: fp32, sums in another order."""
GRADIENTS = {"rel_norm": 1e-4}
"""DESIGN.md 4."""
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"family": "qwen3_moe"},
    "qwen3_moe-dense": {"family": "qwen3_moe", "mlp_only_layers": [0, 1, 2, 3]},
    "deepseek_v3": {"family": "deepseek_v3"},
    "deepseek_v3-no-dense": {"family": "deepseek_v3", "first_k_dense_replace": 0, "q_lora_rank": None},
}
NAMES = ("ordinary", "farskip", "attn_only", "parallel", "ladder")
SC_MOE = Wiring((LayerWiring(routed=("attention",)),) * 4)
OPS = ("add_rms_norm", "release_attention", "release_router", "release_router_by_use", "release_both")


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each op ran under an executor."""
    found: Counter[str] = Counter()
    for name in OPS:
        real = getattr(stream_kernels, name)
        monkeypatch.setattr(stream_kernels, name, lambda *a, n=name, f=real, **k: (found.update({n: 1}), f(*a, **k))[1])
    return found


def norm_classes() -> dict[str, Any]:
    """The classes of `norm_rule`, where transformers has them."""
    found = {}
    for case in CASES.values():
        model = build(case)
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                found[type(module).__name__] = type(module)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_known_norm_rounds_where_the_kernel_rounds(dtype: torch.dtype) -> None:
    """Values in bits; gradients are in closed form, bf16 ones to the unit of its 8 bits."""
    classes = norm_classes()
    assert classes.keys() == rules.KNOWN.keys()
    generator = torch.Generator().manual_seed(3)
    for kind in classes.values():
        norm = kind(64, eps=1e-5).to(dtype)
        with torch.no_grad():
            norm.weight.add_(torch.randn(64, generator=generator).to(dtype))
        x = torch.randn(33, 64, generator=generator).mul_(3).to(dtype).requires_grad_()
        out = {}
        for which in ("theirs", "ours"):
            rule = rules.norm_rule(norm)
            y = norm(x) if which == "theirs" else rms_norm(x, rule.weight, rule.eps, unit_offset=rule.unit_offset)
            y.backward(torch.randn(33, 64, generator=torch.Generator().manual_seed(4)).to(dtype))
            out[which] = {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad}
            x.grad = norm.weight.grad = None
        assert_equal_bits(out["ours"]["y"], out["theirs"]["y"])
        assert_close(out["ours"], out["theirs"], rel_norm=1e-5 if dtype == torch.float32 else 8e-3)


def test_roundings_can_be_told_apart() -> None:
    """The norm of GPT-OSS under Llama's rule has other bits."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

    norm = GptOssRMSNorm(64).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.add_(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(33, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert not torch.equal(norm(x), rms_norm(x, norm.weight, 1e-6))


@pytest.mark.parametrize("layers", ["all", [0, 2]], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_against_the_independent_reference(model: str, name: str, layers: Any, ops: Counter[str]) -> None:
    untouched = tiny_model(**MODELS[model])
    ours = rewire(copy.deepcopy(untouched), name, layers)
    use_kernels(ours, "reference")
    ids = token_ids(2, 9)
    topologies = [name if layers == "all" or layer in layers else "ordinary" for layer in range(4)]
    expected = reference.logits(untouched, ids, topologies)
    next_token_loss(expected, ids).backward()
    logits, ours_gradients = run_backward(ours, ids)
    assert ops, "nothing was fused"
    assert_close(logits, expected, **LOGITS)
    assert_close(ours_gradients, gradients(untouched), **GRADIENTS)


@pytest.mark.parametrize("case", CASES)
def test_every_family_computes_what_it_computes_without(case: str, ops: Counter[str]) -> None:
    plain = rewire(build(CASES[case]), "farskip")
    fused = copy.deepcopy(plain)
    use_kernels(fused, "reference")
    ids = token_ids(2, 9)
    expected, expected_gradients = run_backward(plain, ids, use_cache=False)
    assert not ops
    logits, found = run_backward(fused, ids, use_cache=False)
    assert ops
    assert_close(logits, expected, **LOGITS)
    assert_close(found, expected_gradients, **GRADIENTS)


def over_fake_link(
    model: Any, mode: str, *, recompute: int = 0, setting: str = "reference", chunks: int = 2, **of_dispatch: Any
) -> Any:
    family = family_of_model(model)
    blocks = [family.sub_blocks(layer) for layer in layers_of(model)]
    dispatcher = AllToAllDispatcher(FakeLink(), 8, chunks, **of_dispatch)
    executor = Executor(blocks, wiring_of(model), dispatcher=dispatcher, mode=mode)
    attachment = attach(model, executor)
    if recompute:
        attachment.checkpoint_layers = recompute
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=lambda *_: pytest.fail("called"))
    use_kernels(model, setting)
    return model


def serial_and_overlapped(make: Any, ids: torch.Tensor, **keywords: Any) -> list[dict[str, torch.Tensor]]:
    found = []
    for mode in ("serial", "overlapped"):
        logits, grads = run_backward(over_fake_link(make(), mode, **keywords), ids, use_cache=False)
        found.append({"logits": logits, **grads})
    return found


@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("name", [*NAMES, "hybrid", "scmoe"])
@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek_v3", "deepseek_v3-no-dense"])
def test_serial_and_overlapped_are_equal_in_bits(model: str, name: str, recompute: int, ops: Counter[str]) -> None:
    def make() -> Any:
        untouched = tiny_model(**MODELS[model])
        if name == "hybrid":
            return rewire(untouched, "farskip", [1, 3])
        return rewire(untouched, SC_MOE if name == "scmoe" else name)

    serial, overlapped = serial_and_overlapped(make, token_ids(2, 6), recompute=recompute)
    assert ops
    assert_equal_bits(overlapped, serial)


def test_in_bf16_too(ops: Counter[str]) -> None:
    """Where every rounding point shows: serial updates both streams at once, overlapped one after the other."""
    serial, overlapped = serial_and_overlapped(
        lambda: rewire(tiny_model(**MODELS["deepseek_v3-no-dense"]).to(torch.bfloat16), "farskip"), token_ids(2, 6)
    )
    assert ops == {"release_both": 3, "release_attention": 3, "release_router": 3}
    assert_equal_bits(overlapped, serial)


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """See `count_forms`."""
    return count_forms(monkeypatch)


def count_forms(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a routed output came as rows, and how often the gradient of rows came unsummed."""
    found: Counter[str] = Counter()
    real_routed, real_take = stream_kernels._routed, RowsGradient.take

    def routed(r: Any) -> Any:
        found["rows"] += isinstance(r, RoutedRows)
        return real_routed(r)

    def take(self: RowsGradient, arrived: torch.Tensor) -> Any:
        taken = real_take(self, arrived)
        found["unsummed"] += taken is not None
        return taken

    monkeypatch.setattr(stream_kernels, "_routed", routed)
    monkeypatch.setattr(RowsGradient, "take", take)
    return found


def merged_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no op takes rows."""
    monkeypatch.setattr(executor_module, "plan_fusions", lambda *a, as_rows, **k: plan_fusions(*a, **k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("recompute", "capacity"), [(0, None), (2, 2)])
@pytest.mark.parametrize("name", ["farskip", "ladder", "ordinary"])
@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek_v3-no-dense"])
def test_rows_have_the_bits_of_merged_tokens(
    model: str,
    name: str,
    recompute: int,
    capacity: int | None,
    dtype: torch.dtype,
    forms: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Serial, overlapped, and both again with routed outputs that are merged before an op takes them."""

    def found() -> list[dict[str, torch.Tensor]]:
        make = lambda: rewire(tiny_model(**MODELS[model]).to(dtype), name)  # noqa: E731
        ids = token_ids(2, 6)
        return serial_and_overlapped(make, ids, recompute=recompute, chunks=1, capacity=capacity)

    serial, overlapped = found()
    assert forms["rows"] and (bool(forms["unsummed"]) == (name != "ordinary"))
    assert_equal_bits(overlapped, serial)
    forms.clear()
    merged_first(monkeypatch)
    for dense in found():
        assert_equal_bits(overlapped, dense)
    assert not forms["rows"] + forms["unsummed"]


def test_frozen_norms_and_routers_with_rows(forms: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of norms, routers and experts wants no gradient."""
    for frozen in ("layernorm", ".gate.", ".experts.", "embed_tokens"):
        found = []
        for mode, dense in (("serial", False), ("overlapped", False), ("overlapped", True)):
            model = over_fake_link(rewire(tiny_model(**MODELS["deepseek_v3"]), "farskip"), mode, chunks=1)
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_(frozen not in parameter_name)
            with monkeypatch.context() as patch:
                if dense:
                    merged_first(patch)
                logits, grads = run_backward(model, token_ids(2, 6), use_cache=False)
            assert grads and not any(frozen in parameter_name for parameter_name in grads)
            found.append({"logits": logits, **grads})
        assert_equal_bits(found[1], found[0])
        assert_equal_bits(found[2], found[0])
    assert forms["rows"] and forms["unsummed"]


def test_gradients_of_some_parameters_only(forms: Counter[str]) -> None:
    """Backward stops early, at one layer's router or experts, and may be repeated."""
    model = over_fake_link(rewire(tiny_model(**MODELS["deepseek_v3"]), "farskip"), "overlapped", chunks=1)
    ids = token_ids(2, 6)
    _, expected = run_backward(model, ids, use_cache=False)
    parameters = dict(model.named_parameters())
    loss = next_token_loss(model(ids, use_cache=False).logits, ids)
    for part in ("layers.2.mlp.gate", "layers.2.mlp.experts", "layers.2.input_layernorm", "embed_tokens"):
        names = [each for each in expected if part in each]
        assert names
        grads = torch.autograd.grad(loss, [parameters[each] for each in names], retain_graph=True)
        assert_equal_bits(dict(zip(names, grads, strict=True)), {each: expected[each] for each in names})
    assert forms["unsummed"]


@pytest.mark.parametrize("name", ["farskip", "ladder"])
def test_under_autocast_rows_have_the_bits_of_merged_tokens(name: str) -> None:
    """They are bf16 and the stream is fp32: a sum of rows is rounded to bf16 once, then widened, in both directions."""
    ids, found = token_ids(2, 6), []
    for mode, dense in (("serial", False), ("overlapped", False), ("overlapped", True)):
        model = over_fake_link(rewire(tiny_model(**MODELS["deepseek_v3-no-dense"]), name), mode, chunks=1)
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
            counted = count_forms(patch)
            if dense:
                merged_first(patch)
            logits = model(ids, use_cache=False).logits
            next_token_loss(logits.float(), ids).backward()
        assert bool(counted["rows"]) == (not dense)
        assert bool(counted["unsummed"]) == (not dense and (mode, name) != ("serial", "farskip"))
        found.append({"logits": logits.detach(), **gradients(model)})
    assert_equal_bits(found[1], found[0])
    assert_equal_bits(found[2], found[0])


def test_a_family_that_weighs_inputs_with_rows(forms: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-4: rows are weighted behind the copy and come back without weights."""
    found = []
    for dense in (False, True):
        if dense:
            merged_first(monkeypatch)
        for mode in ("serial", "overlapped"):
            model = rewire(build(CASES["llama4_text-all-moe-two-experts-tied"]), "farskip")
            family = family_of_model(model)
            blocks = [family.sub_blocks(layer) for layer in layers_of(model)]
            (num_experts,) = {int(block.experts.num_experts) for block in blocks if block.experts is not None}
            dispatcher = AllToAllDispatcher(FakeLink(), num_experts)
            attach(model, Executor(blocks, wiring_of(model), dispatcher=dispatcher, mode=mode))
            use_kernels(model, "reference")
            logits, grads = run_backward(model, token_ids(2, 6), use_cache=False)
            found.append({"logits": logits, **grads})
        assert bool(forms["rows"]) == bool(forms["unsummed"]) == (not dense)
        forms.clear()
    for other in found[1:]:
        assert_equal_bits(other, found[0])


@pytest.mark.gpu
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_serial_and_overlapped_are_equal_in_bits_on_a_gpu(
    name: str, chunks: int, ops: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `auto` runs it, compiled; with one chunk rows against merged tokens too."""
    make = lambda: rewire(tiny_model(**MODELS["deepseek_v3-no-dense"]).to("cuda", torch.bfloat16), name)  # noqa: E731
    serial, overlapped = serial_and_overlapped(make, token_ids(2, 6).cuda(), setting="auto", chunks=chunks)
    assert ops
    assert_equal_bits(overlapped, serial)
    merged_first(monkeypatch)
    for dense in serial_and_overlapped(make, token_ids(2, 6).cuda(), setting="auto", chunks=chunks):
        assert_equal_bits(dense, serial)


def test_under_autocast(ops: Counter[str]) -> None:
    """The stream is fp32 and outputs of sub-blocks are bf16: near what torch's own promotion computes."""
    plain = rewire(tiny_model("deepseek_v3"), "farskip")
    fused = copy.deepcopy(plain)
    use_kernels(fused, "reference")
    ids = token_ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = plain(ids).logits, fused(ids).logits
        next_token_loss(found.float(), ids).backward()
    assert ops and found.dtype == expected.dtype
    assert (found - expected).float().norm() < 3e-2 * expected.float().norm()
    assert all(gradient.isfinite().all() for gradient in gradients(fused).values())


@pytest.mark.parametrize("wiring", ["farskip", "ordinary", "attn_only", "ladder", "parallel"])
def test_under_autocast_neither_schedule_nor_segments_change_a_bit(wiring: str) -> None:
    """Outputs are bf16 and the stream is fp32: whichever op or plain add reads them, they are widened once."""
    ids, found = token_ids(2, 6), []
    for mode, segment in (("serial", 0), ("overlapped", 0), ("serial", 2), ("overlapped", 2)):
        model = rewire(tiny_model("deepseek_v3", first_k_dense_replace=0, q_lora_rank=None), wiring)
        blocks = [family_of_model(model).sub_blocks(layer) for layer in layers_of(model)]
        executor = Executor(blocks, wiring_of(model), dispatcher=AllToAllDispatcher(FakeLink(), 8), mode=mode)
        attachment = attach(model, executor)
        if segment:
            attachment.checkpoint_layers = segment
            model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=lambda *_: pytest.fail("called"))
        use_kernels(model.train(), "reference")
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, use_cache=False).logits
            next_token_loss(logits.float(), ids).backward()
        found.append((logits.detach(), gradients(model)))
    for logits, _ in found[1:]:
        assert_equal_bits(logits, found[0][0])
    for serial, overlapped in (found[:2], found[2:]):  # gradients may be bracketed otherwise by other segments
        assert_equal_bits(overlapped[1], serial[1])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at embeddings
def test_a_compiled_model_keeps_its_bits() -> None:
    """What is decided per forward pass stands outside the graphs."""
    ids, found = token_ids(2, 6), []
    for compiled in (False, True):
        model = rewire(tiny_model("deepseek_v3"), "farskip")
        use_kernels(model, "reference")
        if compiled:
            model.compile(backend="eager")
        found.append(run_backward(model, ids, use_cache=False))
    assert_equal_bits(found[1][0], found[0][0])
    assert_equal_bits(found[1][1], found[0][1])


def test_a_hook_on_all_modules_is_called() -> None:
    model = rewire(tiny_model("deepseek_v3"), "farskip")
    use_kernels(model, "reference")
    seen: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda each, *_: seen.append(type(each).__name__))
    try:
        model(token_ids(1, 5))
        line = kernels_line(model, "reference")
    finally:
        handle.remove()
    assert seen.count("DeepseekV3RMSNorm") > 2 * len(layers_of(model))
    assert "(layer 0: all modules have hooks)" in line


def test_a_hook_on_a_norm_is_called() -> None:
    """Whenever it was added; what is normed stays."""
    model = rewire(tiny_model("deepseek_v3"), "farskip")
    use_kernels(model, "reference")
    ids, seen = token_ids(1, 5), []
    expected = model(ids).logits
    handle = layers_of(model)[2].input_layernorm.register_forward_hook(lambda *_: seen.append(1))
    assert_equal_bits(model(ids).logits, expected)
    assert len(seen) == 1
    line = kernels_line(model, "reference")
    assert line.endswith("streams and norms reference but 1 of 8 norms (layer 2: it has hooks) (kernels=reference)")
    handle.remove()
    assert kernels_line(model, "reference").endswith("streams and norms reference (kernels=reference)")


class Doubled(torch.nn.Module):
    """Some other norm."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm
        self.weight = norm.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.norm(x)


def test_a_norm_of_another_kind_is_called() -> None:
    """A module that somebody put in its place after the kernels were switched on, a subclass, a replaced forward."""
    plain = rewire(tiny_model("deepseek_v3"), "farskip")
    fused = copy.deepcopy(plain)
    use_kernels(fused, "reference")
    for model in (plain, fused):
        layers = layers_of(model)
        layers[1].input_layernorm = Doubled(layers[1].input_layernorm)
        kind: Any = type(layers[2].input_layernorm)
        forward = kind.forward
        subclass = type("Halved", (kind,), {"forward": lambda self, x, forward=forward: forward(self, x) / 2})
        layers[2].input_layernorm.__class__ = subclass
        norm = layers[3].post_attention_layernorm
        norm.forward = lambda x, norm=norm: 3 * type(norm).forward(norm, x)
    ids = token_ids(2, 9)
    expected, expected_gradients = run_backward(plain, ids)
    logits, found = run_backward(fused, ids)
    assert_close(logits, expected, **LOGITS)
    assert_close(found, expected_gradients, **GRADIENTS)
    assert "but 3 of 8 norms (layer 1: Doubled is not known)" in kernels_line(fused, "reference")


def test_what_a_family_does_behind_a_norm_is_done() -> None:
    """Mixtral's noise; and whatever an override to come does."""
    plain = rewire(build(CASES["mixtral"], router_jitter_noise=0.3), "farskip")
    fused = copy.deepcopy(plain)
    use_kernels(fused, "reference")
    assert "streams and norms reference but 4 of 8 norms (layer 0: its family does" in kernels_line(fused, "reference")
    ids, found = token_ids(2, 9), []
    for model in (plain, fused):
        torch.manual_seed(5)
        found.append(model(ids, use_cache=False).logits)
    assert_close(found[1], found[0], **LOGITS)
    assert kernels_line(fused.eval(), "reference").endswith("streams and norms reference (kernels=reference)")
    block: Any = family_of_model(fused).sub_blocks(layers_of(fused)[0])
    other = type("Other", (HFSubBlocks,), {"attention_norm": lambda self, stream: stream})(block.layer)
    assert HFSubBlocks(block.layer).bare_norms == {ATTENTION, MLP_NORM} and other.bare_norms == {MLP_NORM}


def test_the_setting_survives_another_wiring_and_a_copy_and_goes_with_off(ops: Counter[str]) -> None:
    model = rewire(tiny_model("qwen3_moe"), "farskip")
    use_kernels(model, "reference")
    rewire(model, "ladder")
    twin = copy.deepcopy(model)
    twin(token_ids(1, 5))
    assert ops
    use_kernels(model, "off")
    ops.clear()
    assert_equal_bits(model(token_ids(1, 5)).logits, rewire(tiny_model("qwen3_moe"), "ladder")(token_ids(1, 5)).logits)
    assert not ops and "streams and norms transformers" in kernels_line(model, "off")


def test_a_copy_norms_with_its_own_weights() -> None:
    model = rewire(tiny_model("deepseek_v3"), "farskip")
    use_kernels(model, "reference")
    twin, ids = copy.deepcopy(model), token_ids(1, 5)
    expected = model(ids).logits
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_equal_bits(model(ids).logits, expected)
    assert not twin(ids).logits.any()


def test_generation_with_a_cache() -> None:
    plain = rewire(tiny_model("deepseek_v3"), "farskip").eval()
    fused = copy.deepcopy(plain)
    use_kernels(fused, "reference")
    ids = token_ids(2, 5)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(fused.generate(ids, **asked), plain.generate(ids, **asked))


def test_frozen_norms_and_embeddings() -> None:
    model = rewire(tiny_model("deepseek_v3"), "farskip")
    use_kernels(model, "reference")
    ids = token_ids(2, 9)
    _, expected = run_backward(model, ids)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layernorm" not in name and "embed" not in name)
    _, partly = run_backward(model, ids)
    assert partly.keys() == {name for name in expected if "layernorm" not in name and "embed" not in name}
    assert_equal_bits(partly, {name: expected[name] for name in partly})


def test_norms_with_another_eps_each() -> None:
    """The op for both streams takes one."""
    plain = rewire(tiny_model("deepseek_v3"), "farskip")
    for layer in layers_of(plain):
        layer.input_layernorm.variance_epsilon = 0.5
    fused = copy.deepcopy(plain)
    use_kernels(fused, "reference")
    ids = token_ids(2, 9)
    expected, expected_gradients = run_backward(plain, ids)
    logits, found = run_backward(fused, ids)
    assert_close(logits, expected, **LOGITS)
    assert_close(found, expected_gradients, **GRADIENTS)


def test_weights_of_another_dtype_keep_transformers_code(ops: Counter[str]) -> None:
    """It promotes; the ops do not."""
    plain = rewire(tiny_model("qwen3_moe"), "farskip")
    for layer in layers_of(plain):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.double()
    fused = copy.deepcopy(plain)
    use_kernels(fused, "reference")
    attachment = attachment_of(fused)
    assert attachment is not None and attachment.executor.stream_kernels is not None
    stream = torch.zeros(1, 3, 32)
    assert attachment.executor.stream_kernels.fusible(0, 4, stream) == frozenset()
    line = kernels_line(fused, "reference")
    assert "norms transformers (layer 0: its weight is torch.float64, the stream torch.float32)" in line
    norm, theirs = layers_of(fused)[1].input_layernorm, layers_of(plain)[1].input_layernorm
    assert_equal_bits(norm(stream + 1), theirs(stream + 1))
    assert not ops


@pytest.mark.parametrize(
    ("device", "dtype", "setting", "backend"),
    [
        ("cpu", torch.float32, "auto", None),
        ("cpu", torch.float32, "off", None),
        ("cpu", torch.float32, "reference", "reference"),
        ("cuda", torch.float32, "off", None),
        ("cuda", torch.float64, "auto", None),
        ("cuda", torch.float32, "auto", "triton"),
        ("cuda", torch.bfloat16, "auto", "triton"),
        ("cuda", torch.bfloat16, "reference", "reference"),
    ],
)
def test_what_runs_where(device: str, dtype: torch.dtype, setting: str, backend: str | None) -> None:
    """Only device and dtype of a tensor are looked at, so that this can be asked without a GPU."""
    if backend == "triton":
        pytest.importorskip("triton")
    stream: Any = SimpleNamespace(device=torch.device(device), is_cuda=device == "cuda", dtype=dtype)
    assert stream_kernels.stream_backend(setting, stream) == backend
