"""Training settings: usable by Hydra, documented, checked; and what follows from them (learning rate, weight decay)."""

import ast
import inspect
import itertools
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from farskip import training_config
from farskip.learning_rate import learning_rate
from farskip.optimizer import build_optimizer, split_for_weight_decay
from farskip.testing_training import TinyModule
from farskip.training_config import (
    CheckpointConfig,
    HeldoutConfig,
    OptimizerConfig,
    OptimizerImplementation,
    Precision,
    TrainingConfig,
)


def test_defaults_pass_and_survive_a_structured_configuration() -> None:
    TrainingConfig().check()
    structured = OmegaConf.structured(TrainingConfig)
    overrides = OmegaConf.from_dotlist(
        ["precision=bf16", "optimizer.learning_rate=1e-4", "optimizer.max_grad_norm=null"]
    )
    config = OmegaConf.to_object(OmegaConf.merge(structured, overrides))
    assert config == TrainingConfig(
        precision=Precision.bf16, optimizer=OptimizerConfig(learning_rate=1e-4, max_grad_norm=None)
    )


@pytest.mark.parametrize("override", ["num_stpes=3", "precision=fp8", "optimizer.lr=1"])
def test_a_typo_is_an_error(override: str) -> None:
    with pytest.raises(OmegaConfBaseException):
        OmegaConf.merge(OmegaConf.structured(TrainingConfig), OmegaConf.from_dotlist([override]))


def test_every_setting_is_documented() -> None:
    tree = ast.parse(inspect.getsource(training_config))
    for node in tree.body:
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
            continue
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and not ast.unparse(statement.annotation).endswith("Config"):
                is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert is_text, f"{node.name}.{ast.unparse(statement.target)} has no line of documentation"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainingConfig(num_steps=0), "training.num_steps=0 is too small; it must be at least 1"),
        (TrainingConfig(loss_chunk_tokens=0), "training.loss_chunk_tokens=0"),
        (TrainingConfig(seed=-1), "training.seed=-1"),
        (TrainingConfig(optimizer=OptimizerConfig(learning_rate=math.nan)), "learning_rate=nan must be above 0"),
        (TrainingConfig(optimizer=OptimizerConfig(beta2=1.0)), "beta2=1.0 must be at least 0 and below 1"),
        (TrainingConfig(optimizer=OptimizerConfig(floor_fraction=2)), "floor_fraction=2 must lie between 0 and 1"),
        (TrainingConfig(optimizer=OptimizerConfig(max_grad_norm=0)), "max_grad_norm=0 must be above 0; null switches"),
        (TrainingConfig(num_steps=50), "warmup_steps=100 is more than training.num_steps=50; lower it"),
        (TrainingConfig(heldout=HeldoutConfig(every_steps=0, patience=3)), "patience=3 needs evaluations; set"),
        (TrainingConfig(checkpoint=CheckpointConfig(keep_last=0)), "keep_last=0 is too small; it must be at least 1"),
        (TrainingConfig(checkpoint=CheckpointConfig(shutdown_timeout_s=0)), "shutdown_timeout_s=0 must be above 0"),
    ],
)
def test_unusable_values_are_refused_in_one_line(config: TrainingConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        config.check()
    assert "\n" not in str(caught.value)


def test_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, floor_fraction=0.2)
    rates = [learning_rate(step, 12, config) for step in range(14)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    # A quarter and half of the eight remaining steps.
    assert rates[5] == pytest.approx(0.2 + 0.8 * math.cos(math.pi / 8) ** 2)
    assert rates[7] == pytest.approx(0.6)
    assert rates[11] == pytest.approx(0.2)
    assert rates[13] == rates[11]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[3:12]))


@pytest.mark.parametrize(("warmup_steps", "num_steps"), [(0, 1), (1, 1), (5, 5), (0, 3)])
def test_learning_rate_of_short_runs_is_never_zero_or_above_the_highest(warmup_steps: int, num_steps: int) -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=warmup_steps, floor_fraction=0.1)
    rates = [learning_rate(step, num_steps, config) for step in range(num_steps)]
    assert all(0.1 - 1e-12 <= rate <= 1.0 for rate in rates)


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    decayed, spared = split_for_weight_decay(TinyModule())
    assert set(decayed) == {"mix.weight", "head.weight"}
    assert set(spared) == {"embedding.weight", "mix.bias", "norm.weight", "norm.bias"}
    decayed, _ = split_for_weight_decay(TinyModule(tied=True))
    assert set(decayed) == {"mix.weight"}


def test_frozen_parameters_are_left_out() -> None:
    module = TinyModule()
    module.embedding.requires_grad_(False)
    decayed, spared = split_for_weight_decay(module)
    assert "embedding.weight" not in decayed | spared
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(module.requires_grad_(False), OptimizerConfig())


def test_parameters_below_fp32_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parameter mix\.weight is bfloat16: training keeps parameters in fp32"):
        build_optimizer(TinyModule().bfloat16(), OptimizerConfig())


@pytest.mark.parametrize("implementation", list(OptimizerImplementation), ids=str)
def test_one_update_equals_adamw_written_out(implementation: OptimizerImplementation) -> None:
    config = OptimizerConfig(
        learning_rate=0.1, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5, implementation=implementation
    )
    module = TinyModule().double()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    build_optimizer(module, config).step()
    decayed, _ = split_for_weight_decay(module)
    for name, parameter in module.named_parameters():
        gradient = _gradient(parameter)
        # After one step the corrected moments are the gradient and its square.
        decay = 0.1 * 0.5 if name in decayed else 0.0
        expected = before[name] * (1 - decay) - 0.1 * gradient / (gradient.abs() + 1e-3)
        assert torch.allclose(parameter, expected, rtol=0, atol=1e-12), name


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_configurations_have_defaults_for_every_field() -> None:
    for config in (TrainingConfig, OptimizerConfig, HeldoutConfig, CheckpointConfig):
        kinds: list[Any] = [config() for _ in range(2)]
        assert kinds[0] == kinds[1]
        assert fields(config)
