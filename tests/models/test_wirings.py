"""Rewired models against an independent two-stream reference: logits, gradients, states, generation, recomputation."""

import copy
import gc
import importlib.util
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from farskip.models.attach import attachment_of, layers_of
from farskip.models.surgery import rewire, wiring_of
from farskip.models.testing_models import gradients, next_token_loss, run_backward, tiny_model, token_ids
from farskip.stage import Routing
from farskip.testing import assert_close, assert_equal_bits
from farskip.wiring import LayerWiring, Wiring


def load_reference() -> ModuleType:
    path = Path(__file__).with_name("two_stream_reference.py")
    spec = importlib.util.spec_from_file_location("two_stream_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["two_stream_reference"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


reference = load_reference()

# Tolerances of DESIGN.md 4: fp32 sums formed in another order.
LOGITS = {"max_error": 5e-5}
GRADIENTS = {"rel_norm": 1e-4}

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"family": "qwen3_moe"},
    "qwen3_moe-dense": {"family": "qwen3_moe", "mlp_only_layers": [0, 1, 2, 3]},
    "qwen3_moe-mixed": {"family": "qwen3_moe", "mlp_only_layers": [1]},
    "deepseek_v3": {"family": "deepseek_v3"},
    "deepseek_v3-no-dense": {"family": "deepseek_v3", "first_k_dense_replace": 0, "q_lora_rank": None},
}
NAMES = ("ordinary", "farskip", "attn_only", "mlp_only", "parallel", "ladder")
LAYERS: dict[str, tuple[Any, list[int]]] = {
    "all": ("all", [0, 1, 2, 3]),
    "last": ("last:2", [2, 3]),
    "first": ("first:2", [0, 1]),
    "middle": ("1:3", [1, 2]),
    "list": ([0, 2], [0, 2]),
}
families = pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
models = pytest.mark.parametrize("model", MODELS)


def topologies(name: str, layers: str = "all") -> list[str]:
    name = {"mlp_only": "parallel"}.get(name, name)
    return [name if layer in LAYERS[layers][1] else "ordinary" for layer in range(4)]


def pair(model: str, name: str, layers: str = "all", **changes: Any) -> tuple[Any, Any]:
    """The untouched model for the reference, and its rewired copy."""
    untouched = tiny_model(**MODELS[model], **changes)
    return untouched, rewire(copy.deepcopy(untouched), name, LAYERS[layers][0])


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", NAMES)
@models
def test_logits_and_every_gradient(model: str, name: str, layers: str) -> None:
    untouched, ours = pair(model, name, layers)
    ids = token_ids(2, 9)
    expected = reference.logits(untouched, ids, topologies(name, layers))
    next_token_loss(expected, ids).backward()
    logits, ours_gradients = run_backward(ours, ids)
    assert_close(logits, expected, **LOGITS)
    assert_close(ours_gradients, gradients(untouched), **GRADIENTS)


@families
def test_a_custom_table(family: str) -> None:
    """ScMoE Pos-1: only the routed experts leave out attention."""
    untouched = tiny_model(family)
    ours = rewire(copy.deepcopy(untouched), Wiring((LayerWiring(routed=("attention",)),) * 4))
    ids = token_ids(2, 9)
    expected = reference.logits(untouched, ids, ["scmoe"] * 4)
    next_token_loss(expected, ids).backward()
    logits, ours_gradients = run_backward(ours, ids)
    assert_close(logits, expected, **LOGITS)
    assert_close(ours_gradients, gradients(untouched), **GRADIENTS)


@pytest.mark.parametrize("confused", ["attention", "mlp"])
@pytest.mark.parametrize("name", NAMES)
@models
def test_a_swapped_stream_is_seen(model: str, name: str, confused: str) -> None:
    """The comparison above has teeth: a reference that reads the other stream is far off wherever the two differ."""
    untouched, ours = pair(model, name)
    ids = token_ids(2, 9)
    swapped = reference.logits(untouched, ids, topologies(name), confused=confused)
    no_other_stream = confused == "attention" and model == "qwen3_moe-dense" and name != "ladder"
    if no_other_stream:
        assert_close(ours(ids).logits, swapped, **LOGITS)
        return
    with pytest.raises(AssertionError, match="max_error"):
        assert_close(ours(ids).logits, swapped, max_error=100 * LOGITS["max_error"])


@pytest.mark.parametrize("name", NAMES)
@families
def test_hidden_states_are_the_full_stream(family: str, name: str) -> None:
    untouched, ours = pair(family, name)
    ids = token_ids(2, 9)
    expected = reference.hidden_states(untouched, ids, topologies(name))
    captured = ours(ids, output_hidden_states=True)
    assert len(captured.hidden_states) == len(expected)
    for state, theirs in zip(captured.hidden_states, expected, strict=True):
        assert_close(state, theirs, **LOGITS)
    assert_close(captured.logits, ours(ids).logits, **LOGITS)


@pytest.mark.parametrize("name", NAMES)
@families
def test_sixteen_greedy_tokens_with_left_padding(family: str, name: str) -> None:
    untouched, ours = (model.eval() for model in pair(family, name))
    ids = token_ids(3, 6)
    ids[0, :3] = ids[1, :1] = untouched.config.pad_token_id
    mask = (ids != untouched.config.pad_token_id).long()
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    cached, recomputed = (ours.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False))
    assert cached.shape == (3, 22) and torch.equal(cached, recomputed)
    with torch.no_grad():
        # Row 2 has no padding: rotary positions of the reference start at the first token.
        assert torch.equal(cached[2:], reference.greedy(untouched, ids[2:], topologies(name), 16, mask[2:]))


@pytest.mark.parametrize("kind", ["static", "beams", "sampling", "logits"])
@families
def test_other_ways_to_generate(family: str, kind: str) -> None:
    _, ours = (model.eval() for model in pair(family, "farskip"))
    options = {
        "static": {"do_sample": False, "cache_implementation": "static"},
        "beams": {"do_sample": False, "num_beams": 3},
        "sampling": {"do_sample": True},
        "logits": {"do_sample": False, "output_logits": True, "return_dict_in_generate": True},
    }[kind]
    ids, results = token_ids(2, 5), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        if kind == "static" and not use_cache:
            options = {"do_sample": False}
        generated = ours.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            use_cache=use_cache,
            eos_token_id=None,
            **options,
        )
        results.append(generated if isinstance(generated, torch.Tensor) else generated.sequences)
    assert torch.equal(*results)


# -- gradient checkpointing -----------------------------------------------------------------------------------------


def enable_checkpointing(model: Any, layers: int) -> None:
    model.train()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            assert not module.gradient_checkpointing
    model._set_gradient_checkpointing(
        enable=True,
        gradient_checkpointing_func=lambda function, *args: pytest.fail("transformers checkpointed a layer by itself"),
    )
    attachment = attachment_of(model)
    assert attachment is not None
    attachment.checkpoint_layers = layers


@pytest.mark.parametrize("checkpoint_layers", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("name", ["ordinary", "farskip", "ladder"])
@families
def test_recomputation_changes_nothing(family: str, name: str, checkpoint_layers: int) -> None:
    _, ours = pair(family, name)
    ids = token_ids(2, 9)
    expected_logits, expected = run_backward(ours, ids, use_cache=False)
    enable_checkpointing(ours, checkpoint_layers)
    logits, recomputed = run_backward(ours, ids, use_cache=False)
    assert_equal_bits(logits, expected_logits)
    # Gradients of a value with many uses are summed in another order where a segment begins.
    assert_close(recomputed, expected, **GRADIENTS)


@families
def test_recomputation_really_happens_and_saves_memory(family: str) -> None:
    _, ours = pair(family, "farskip")
    attachment = attachment_of(ours)
    assert attachment is not None
    saved: list[int] = []
    for layers in (None, 1):
        if layers:
            enable_checkpointing(ours, layers)
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ours(token_ids(2, 9), use_cache=False)
        saved.append(total)
    assert saved[1] < saved[0] / 3


@pytest.mark.parametrize("checkpoint_layers", [None, 1, 2, 4])
def test_the_routing_hook_hears_of_every_layer_once_and_of_every_recomputation(checkpoint_layers: int | None) -> None:
    _, ours = pair("deepseek_v3", "farskip")
    attachment = attachment_of(ours)
    assert attachment is not None
    calls: list[tuple[int, bool]] = []

    def hook(layer: int, routing: Routing, recomputing: bool) -> Routing:
        calls.append((layer, recomputing))
        return routing

    attachment.executor.routing_hook = hook
    if checkpoint_layers:
        enable_checkpointing(ours, checkpoint_layers)
    for _ in range(2):
        run_backward(ours, token_ids(2, 9), use_cache=False)
    assert sorted(call for call in calls if not call[1]) == sorted([(1, False), (2, False), (3, False)] * 2)
    again = [(1, True), (2, True), (3, True)] * 2 if checkpoint_layers else []
    assert sorted(call for call in calls if call[1]) == sorted(again)


def test_checkpointing_rests_in_evaluation_and_without_gradients() -> None:
    _, ours = pair("qwen3_moe", "farskip")
    enable_checkpointing(ours, 1)
    ids = token_ids(2, 6)
    with torch.no_grad():
        expected = ours(ids).logits
    assert_equal_bits(ours.eval()(ids).logits, expected)
    generated = ours.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert generated.shape[1] <= 10


def enable_by_transformers(model: Any, **keywords: Any) -> None:
    """Under its present name, or the one of earlier versions."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable(gradient_checkpointing_kwargs=keywords)
    except TypeError:
        enable(keywords)


def test_transformers_own_switch_works() -> None:
    _, ours = pair("deepseek_v3", "farskip")
    expected = run_backward(ours, token_ids(2, 9))
    enable_by_transformers(ours, use_reentrant=False)
    logits, recomputed = run_backward(ours, token_ids(2, 9), use_cache=False)
    assert_equal_bits(logits, expected[0])
    assert_close(recomputed, expected[1], **GRADIENTS)


def test_reentrant_checkpointing_is_refused() -> None:
    _, ours = pair("qwen3_moe", "farskip")
    enable_by_transformers(ours, use_reentrant=True)
    with pytest.raises(ValueError, match=r"use_reentrant=True loses gradients"):
        ours(token_ids(2, 9), use_cache=False)


@pytest.mark.parametrize("checkpoint_layers", [1, 2])
def test_attention_dropout_is_drawn_once_per_step(checkpoint_layers: int) -> None:
    """The recomputation draws the numbers of the forward pass again."""
    _, ours = pair("deepseek_v3", "farskip", attention="eager", attention_dropout=0.3)
    results = []
    for layers in (None, checkpoint_layers):
        if layers:
            enable_checkpointing(ours, layers)
        torch.manual_seed(5)
        results.append(run_backward(ours, token_ids(2, 9), use_cache=False))
    assert_equal_bits(results[1][0], results[0][0])
    assert_close(results[1][1], results[0][1], **GRADIENTS)


# -- what would silently compute something else ----------------------------------------------------------------------


def test_a_hook_that_replaces_hidden_states_between_layers_is_refused() -> None:
    _, ours = pair("qwen3_moe", "farskip")
    layers_of(ours)[1].register_forward_hook(lambda module, args, output: output + 1.0)
    with pytest.raises(RuntimeError, match="layer 2: its input is not what the layer before returned"):
        ours(token_ids(1, 5))


def test_a_hook_that_replaces_a_layers_input_is_refused() -> None:
    _, ours = pair("qwen3_moe", "farskip")
    layers_of(ours)[2].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    with pytest.raises(RuntimeError, match="layer 2: its input is not what the layer before returned"):
        ours(token_ids(1, 5))


def test_a_model_that_stops_early_is_refused() -> None:
    """transformers runs only the first config.num_hidden_layers layers; ours would return the embeddings."""
    _, ours = pair("qwen3_moe", "farskip")
    ours.config.num_hidden_layers = 2
    with pytest.raises(RuntimeError, match=r"calls 2 of .* 4 layers"):
        ours(token_ids(1, 5))


def test_a_model_whose_layers_were_cut_is_refused() -> None:
    _, ours = pair("qwen3_moe", "farskip")
    ours.model.layers = nn.ModuleList(list(ours.model.layers)[:3])
    with pytest.raises(RuntimeError, match=r"calls 3 of .* 4 layers"):
        ours(token_ids(1, 5))


def test_a_model_whose_layers_were_exchanged_is_refused() -> None:
    _, ours = pair("qwen3_moe", "farskip")
    layers = ours.model.layers
    layers[1], layers[2] = layers[2], layers[1]
    with pytest.raises(RuntimeError, match="layer 2 was called where layer 1 stands"):
        ours(token_ids(1, 5))


def test_a_layer_called_by_itself_is_refused() -> None:
    """It would return its input."""
    _, ours = pair("qwen3_moe", "farskip")
    with pytest.raises(RuntimeError, match="layer 0 was called outside the model"):
        layers_of(ours)[0](torch.randn(1, 5, 32))
    ours(token_ids(1, 5))
    with pytest.raises(RuntimeError, match="layer 0 was called outside the model"):
        layers_of(ours)[0](torch.randn(1, 5, 32))


def test_another_attention_implementation_afterwards_is_refused() -> None:
    _, ours = pair("qwen3_moe", "farskip")
    ours.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="set it before rewire or parallelize"):
        ours(token_ids(1, 5))


def test_a_forward_hook_on_a_layer_sees_its_full_stream() -> None:
    untouched, ours = pair("deepseek_v3", "farskip")
    ids, seen = token_ids(2, 9), []
    layers_of(ours)[1].register_forward_hook(lambda module, args, output: seen.append(output))
    ours(ids)
    assert_close(seen[0], reference.hidden_states(untouched, ids, topologies("farskip"))[2], **LOGITS)


def test_an_exception_in_the_middle_leaves_the_model_usable() -> None:
    _, ours = pair("deepseek_v3", "farskip")
    ids = token_ids(2, 9)
    expected = ours(ids).logits
    handle = layers_of(ours)[2].mlp.gate.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ours(ids)
    handle.remove()
    assert_equal_bits(ours(ids).logits, expected)


# -- in place, copies, refusals ---------------------------------------------------------------------------------------


@families
def test_a_deep_copy_works_and_is_independent(family: str) -> None:
    _, ours = pair(family, "farskip")
    ids = token_ids(2, 9)
    twin = copy.deepcopy(ours)
    expected, expected_gradients = run_backward(ours, ids)
    logits, twin_gradients = run_backward(twin, ids)
    assert_equal_bits(logits, expected)
    assert_equal_bits(twin_gradients, expected_gradients)
    rewire(twin, "ladder")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert wiring_of(ours).name == "farskip"
    assert_equal_bits(ours(ids).logits, expected)


def test_rewiring_works_in_place_and_any_number_of_times() -> None:
    untouched, ours = pair("deepseek_v3", "farskip")
    ids = token_ids(2, 9)
    for name in ("ladder", "ordinary", "attn_only"):
        assert rewire(ours, name) is ours and wiring_of(ours).name == name
        assert_close(ours(ids).logits, reference.logits(untouched, ids, topologies(name)), **LOGITS)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("farskp",), "did you mean 'farskip'"),
        (("farskip", [4]), r"layer 4 is outside 0\.\.3"),
        ((Wiring.named("farskip", 3),), "wiring has 3 layers, the model 4"),
        ((Wiring.named("farskip", 4), "last:1"), "a Wiring already says its layers"),
    ],
)
def test_a_refused_rewire_leaves_the_model_untouched(arguments: tuple[Any, ...], reason: str) -> None:
    model = tiny_model("qwen3_moe")
    before = [type(layer) for layer in layers_of(model)]
    with pytest.raises(ValueError, match=reason):
        rewire(model, *arguments)
    assert [type(layer) for layer in layers_of(model)] == before and attachment_of(model) is None
    assert model.config._attn_implementation == "sdpa"
    model(token_ids(1, 4))


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="model architecture 'Linear' is not supported"):
        rewire(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'Qwen3MoeModel' is not supported; closest: Qwen3MoeForCausalLM"):
        rewire(tiny_model("qwen3_moe").model)


def test_frozen_parameters_get_no_gradient_and_change_no_other() -> None:
    _, ours = pair("deepseek_v3", "farskip")
    ids = token_ids(2, 9)
    _, expected = run_backward(ours, ids)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_("layers.1." not in name and "embed" not in name)
    _, partly = run_backward(ours, ids)
    assert partly.keys() == {name for name in expected if "layers.1." not in name and "embed" not in name}
    assert_equal_bits(partly, {name: expected[name] for name in partly})


def test_transformers_own_hooks_cost_no_overlap_afterwards() -> None:
    """Its capturing hooks stay on the layers for good; they must not cut later passes into single layers."""
    _, ours = pair("deepseek_v3", "farskip")
    attachment = attachment_of(ours)
    assert attachment is not None
    ours(token_ids(1, 4), output_hidden_states=True)
    assert len(attachment.segments(recompute=False)) == 4
    ours(token_ids(1, 4))
    assert len(attachment.segments(recompute=False)) == 1


def test_the_cache_goes_with_its_last_reference() -> None:
    """Not with the garbage collector, which may come gigabytes later."""
    model = rewire(tiny_model("qwen3_moe"), "farskip").eval()
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            output = model(token_ids(1, 5), use_cache=True)
        alive = weakref.ref(output.past_key_values.layers[0].keys)
        del output
        assert alive() is None
    finally:
        gc.enable()
