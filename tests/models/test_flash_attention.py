"""Every attention implementation that transformers knows under the seam: flash attention and the hub's kernels too.

The flash functions are stand-ins that compute plain attention: what is tested is which function is reached, by which
name, with which masks and documents. The real kernels need a GPU.

Legend: B batch, S sequence, T = B*S tokens, H heads, G key and value heads, C width of a head, N documents.
"""

import importlib.machinery
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from farskip.batch import Batch
from farskip.executor import Executor
from farskip.models.attach import attach, attachment_of, layers_of
from farskip.models.family import family_of_model
from farskip.models.language_model import HFLanguageModel
from farskip.models.recompute import recompute_stages
from farskip.models.surgery import rewire, wiring_of
from farskip.models.testing_families import CASES, FAMILIES, build
from farskip.models.testing_models import run_backward, tiny_model, token_ids
from farskip.parallel.dispatcher import AllToAllDispatcher
from farskip.parallel.testing_links import FakeLink
from farskip.testing import assert_close, assert_equal_bits

LOGITS, GRADIENTS = {"max_error": 5e-5}, {"rel_norm": 1e-4}
"""DESIGN.md 4: fp32, sums in another order."""
FLASH = "flash_attention_2"
KERNEL = "kernels-community/flash-attn2"
SINK_KERNEL = "kernels-community/vllm-flash-attn3"


class Flash:
    """Stand-ins of flash attention's functions.

    Attributes:
        calls: which function was called, with which further arguments.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def dense(
        self,
        q_BSHC: torch.Tensor,
        k_BSGC: torch.Tensor,
        v_BSGC: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        **sinks: torch.Tensor,
    ) -> torch.Tensor:
        """As `flash_attn_func`; a sink per head where `sinks` has one."""
        self.calls.append(("dense", {}))
        rows = zip(q_BSHC, k_BSGC, v_BSGC, strict=True)
        return torch.stack([self._attend(*row, softmax_scale, causal, window_size, **sinks) for row in rows])

    def packed(
        self,
        q_THC: torch.Tensor,
        k_TGC: torch.Tensor,
        v_TGC: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        """As `flash_attn_varlen_func`."""
        return self._packed(locals())

    def packed_with_sinks(
        self,
        q_THC: torch.Tensor,
        k_TGC: torch.Tensor,
        v_TGC: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        s_aux: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As that of a kernel that knows sinks. transformers reads from the signature that it does."""
        return self._packed(locals())

    def _packed(self, given: dict[str, Any]) -> torch.Tensor:
        bounds = {name: given[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")}
        self.calls.append(("packed", bounds))
        parts = []
        for which, tensor in (("q", given["q_THC"]), ("k", given["k_TGC"]), ("k", given["v_TGC"])):
            lengths_N = bounds[f"cu_seqlens_{which}"].diff()
            assert int(lengths_N.max()) <= bounds[f"max_seqlen_{which}"]
            parts.append(tensor.split(lengths_N.tolist()))
        sinks = {"s_aux": given["s_aux"]} if given.get("s_aux") is not None else {}
        rest = (given["softmax_scale"], given["causal"], given["window_size"])
        return torch.cat([self._attend(*document, *rest, **sinks) for document in zip(*parts, strict=True)])

    @staticmethod
    def _attend(
        q_SHC: torch.Tensor,
        k_SGC: torch.Tensor,
        v_SGC: torch.Tensor,
        scale: float | None,
        causal: bool,
        window: tuple[int, int],
        s_aux: torch.Tensor | None = None,
    ) -> torch.Tensor:
        groups = q_SHC.shape[1] // k_SGC.shape[1]
        k_SHC, v_SHC = (tensor.repeat_interleave(groups, dim=1) for tensor in (k_SGC, v_SGC))
        scores_HQK = torch.einsum("qhc,khc->hqk", q_SHC, k_SHC) * (q_SHC.shape[-1] ** -0.5 if scale is None else scale)
        num_q, num_k = scores_HQK.shape[1:]
        ahead_QK = torch.arange(num_k) - (torch.arange(num_q)[:, None] + num_k - num_q)
        hidden_QK = ahead_QK > 0 if causal else torch.zeros_like(ahead_QK, dtype=torch.bool)
        if window[0] >= 0:
            hidden_QK = hidden_QK | (ahead_QK < -window[0])
        scores_HQK = scores_HQK.masked_fill(hidden_QK, float("-inf"))
        if s_aux is not None:
            scores_HQK = torch.cat([scores_HQK, s_aux[:, None, None].expand(-1, num_q, 1)], dim=-1)
        return torch.einsum("hqk,khc->qhc", scores_HQK.softmax(-1)[..., :num_k], v_SHC)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Flash:
    """The stand-ins, as the package flash_attn and as kernels of the hub, where transformers' own code finds them."""
    import transformers.integrations.hub_kernels as hub
    import transformers.modeling_flash_attention_utils as utils
    from transformers import PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    stand_in = Flash()
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    functions = {"flash_attn_func": stand_in.dense, "flash_attn_with_kvcache": None}
    package.__dict__.update(functions, flash_attn_varlen_func=stand_in.packed)
    padding.__dict__.update(pad_input=utils._pad_input, unpad_input=utils._unpad_input)
    for module in (package, padding):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    kernels = {
        KERNEL: SimpleNamespace(**functions, flash_attn_varlen_func=stand_in.packed),
        SINK_KERNEL: SimpleNamespace(**functions, flash_attn_varlen_func=stand_in.packed_with_sinks),
    }
    monkeypatch.setattr(hub, "get_kernel", lambda name, **arguments: kernels[name])
    monkeypatch.setattr(hub, "is_kernels_available", lambda: True)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setitem(utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2], "general_availability_check", lambda: True)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda self, **arguments: True)  # asks for a GPU
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
    loaded = [f"_flash_{name}" for name in ("fn", "varlen_fn", "with_kvcache_fn")]
    for name in ("_loaded_implementation", "_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn", *loaded):
        monkeypatch.setattr(utils, name, None)
    monkeypatch.setattr(utils, "_process_with_kvcache_kwargs_fn", None, raising=False)  # transformers 5.15 has none
    return stand_in


def packed_positions() -> torch.Tensor:
    return torch.cat([torch.arange(5), torch.arange(7)])[None]


def equals(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    assert_close(found[0], expected[0], **LOGITS)
    assert_close(found[1], expected[1], **GRADIENTS)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gpt_oss", "llama4_text")])
def test_flash_attention_computes_what_sdpa_computes(family: str, packed: bool, flash: Flash) -> None:
    ids, arguments = token_ids(1, 12), {"use_cache": False}
    if packed:
        arguments["position_ids"] = packed_positions()
    expected = run_backward(rewire(build(CASES[family]), "farskip"), ids, **arguments)
    assert not flash.calls
    model = rewire(build(replace(CASES[family], attention=FLASH)), "farskip")
    equals(run_backward(model, ids, **arguments), expected)
    assert [kind for kind, _ in flash.calls] == ["packed" if packed else "dense"] * 4


def test_a_kernel_of_the_hub_computes_what_sdpa_computes(flash: Flash) -> None:
    ids = token_ids(2, 9)
    expected = run_backward(rewire(tiny_model("qwen3_moe"), "farskip"), ids, use_cache=False)
    model = rewire(tiny_model("qwen3_moe", attention=KERNEL), "farskip")
    equals(run_backward(model, ids, use_cache=False), expected)
    assert len(flash.calls) == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
@torch.no_grad()
def test_flex_attention_computes_what_sdpa_computes() -> None:
    """Forward, of two packed sequences: torch has no backward of it on CPU."""
    positions = packed_positions().expand(2, -1)
    models = [rewire(tiny_model("deepseek_v3", attention=name), "farskip") for name in ("flex_attention", "sdpa")]
    with torch.compiler.set_stance("force_eager"):
        flex, sdpa = (model(token_ids(2, 12), position_ids=positions, use_cache=False).logits for model in models)
    assert_close(flex, sdpa, **LOGITS)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_flash_attention_leaves_padding_out(family: str, flash: Flash) -> None:
    ids, mask = token_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    logits = []
    for name in ("sdpa", FLASH):
        model = rewire(tiny_model(family, attention=name).eval(), "farskip")
        with torch.no_grad():
            logits.append(model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()])
    assert_close(logits[1], logits[0], **LOGITS)
    assert [kind for kind, _ in flash.calls] == ["packed"] * 4
    assert flash.calls[0][1]["cu_seqlens_k"].tolist() == [0, 9, 14]


def test_generation_is_that_of_sdpa(flash: Flash) -> None:
    ids, mask = token_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    ours, theirs = (rewire(tiny_model("qwen3_moe", attention=name).eval(), "farskip") for name in (FLASH, "sdpa"))
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    assert len(flash.calls) == 4 * 5


def over_fake_link(mode: str) -> Any:
    model = rewire(tiny_model("deepseek_v3", attention=FLASH), "farskip")
    blocks = [family_of_model(model).sub_blocks(layer) for layer in layers_of(model)]
    attach(model, Executor(blocks, wiring_of(model), dispatcher=AllToAllDispatcher(FakeLink(), 8, 2), mode=mode))
    return model


def test_serial_overlapped_and_recomputed_have_the_same_bits(flash: Flash) -> None:
    ids, found = token_ids(1, 12), []
    for mode, recomputes in (("serial", False), ("overlapped", False), ("overlapped", True)):
        model, before = over_fake_link(mode), len(flash.calls)
        if recomputes:
            recompute_stages(model)
        logits, grads = run_backward(model, ids, use_cache=False, position_ids=packed_positions())
        assert len(flash.calls) - before == (8 if recomputes else 4)
        found.append({"logits": logits, **grads})
    assert_equal_bits(found[1], found[0])
    assert_equal_bits(found[2], found[0])


@pytest.mark.parametrize("case", ["gpt_oss", "gpt_oss-full-tied"])
def test_a_kernel_that_knows_sinks_computes_gpt_oss(case: str, flash: Flash) -> None:
    """Window and sinks reach it, and the sinks get their gradient where the kernel has one."""
    ids = token_ids(2, 9)
    expected = run_backward(rewire(build(CASES[case]), "farskip"), ids, use_cache=False)
    untouched = build(CASES[case])
    untouched.set_attn_implementation(SINK_KERNEL)
    found = run_backward(rewire(untouched, "farskip"), ids, use_cache=False)
    equals(found, expected)
    assert len(flash.calls) == 4 and found[1]["model.layers.0.self_attn.sinks"].abs().max() > 0


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama4_text"])
@torch.no_grad()
def test_documents_of_a_batch_are_told_apart_once_for_all_layers(family: str, flash: Flash) -> None:
    """Also in a batch of several sequences, which transformers leaves to its caller."""
    case, found = CASES[family], []
    positions = torch.stack([packed_positions()[0], torch.arange(3, 15)])
    ids = token_ids(2, 12)
    batch = Batch(input_ids_BS=ids, labels_BS=ids, position_ids_BS=positions)
    for name in (case.attention, SINK_KERNEL if family == "gpt_oss" else FLASH):
        model = build(case)
        model.set_attn_implementation(name)
        found.append(HFLanguageModel(rewire(model.eval(), "farskip")).hidden(batch))
    assert_close(found[1], found[0], **LOGITS)
    (_, first), *others = flash.calls
    assert first["cu_seqlens_q"].tolist() == [0, 5, 12, 24] and first["max_seqlen_q"] == first["max_seqlen_k"] == 12
    assert first["cu_seqlens_k"] is first["cu_seqlens_q"] and len(others) == 3
    assert all(each["cu_seqlens_q"] is first["cu_seqlens_q"] for _, each in others), "one tensor, made once"


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt_oss", r"does not compute the attention of GptOssForCausalLM; load it with one of eager, .*flash-attn3"),
        ("llama4_text", r"does not compute the attention of Llama4ForCausalLM; load it with one of eager, sdpa$"),
    ],
    ids=["sinks", "chunks"],
)
def test_flash_attention_that_computes_another_attention_is_refused(family: str, reason: str, flash: Flash) -> None:
    model = build(CASES[family])
    model.config._attn_implementation = FLASH  # past transformers' own check, which refuses it or takes another one
    with pytest.raises(ValueError, match=rf"'{FLASH}' {reason}"):
        rewire(model, "farskip")
    assert attachment_of(model) is None and model.config._attn_implementation == FLASH


@pytest.mark.parametrize("lost", ["query", "sinks"])
def test_a_kernel_that_loses_a_gradient_is_refused_in_training(
    lost: str, flash: Flash, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kernels for inference do; where no gradient is wanted, they run."""
    attend = Flash._attend

    def losing(q: torch.Tensor, *rest: Any, s_aux: torch.Tensor) -> torch.Tensor:
        return attend(q, *rest, s_aux=s_aux.detach()) if lost == "sinks" else attend(q, *rest, s_aux=s_aux).detach()

    monkeypatch.setattr(Flash, "_attend", staticmethod(losing))
    model = build(CASES["gpt_oss"])
    model.set_attn_implementation(SINK_KERNEL)
    rewire(model, "farskip")
    with pytest.raises(RuntimeError, match=rf"'{SINK_KERNEL}' computes no gradient of its {lost}: train with"):
        model(token_ids(1, 5), use_cache=False)
    with torch.no_grad():
        model(token_ids(1, 5), use_cache=False)
    if lost == "sinks":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("sinks" not in name)
        model(token_ids(1, 5), use_cache=False)


@pytest.mark.parametrize("name", ["paged|eager", "paged|sdpa", "nobody/knows", "mine"])
def test_what_has_no_mask_is_refused(name: str) -> None:
    model = tiny_model("qwen3_moe")
    model.config._attn_implementation = name
    with pytest.raises(ValueError, match="has no place for the seam; use sdpa or eager"):
        rewire(model, "farskip")
    assert attachment_of(model) is None


def test_the_model_says_flash_where_transformers_asks(flash: Flash) -> None:
    from transformers.utils.generic import is_flash_attention_requested

    for name, is_flash in ((FLASH, True), (KERNEL, True), ("sdpa", False), ("eager", False)):
        model = rewire(tiny_model("qwen3_moe", attention=name), "farskip")
        assert is_flash_attention_requested(model.config) is is_flash
