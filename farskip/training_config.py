"""Every setting of a training run, as plain dataclasses that Hydra can use as structured configurations.

Decides: names, defaults and bounds. Plain dataclasses (neither frozen nor slotted), because structured configurations
need class-level defaults. Values that no step could use are refused by ``check``, in one line each, before anything is
built.
Refuses: to read files or arguments; that is launch's work.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class Precision(StrEnum):
    """In what the model computes. Parameters, gradients and optimizer state are fp32 either way."""

    fp32 = "fp32"
    bf16 = "bf16"


class OptimizerImplementation(StrEnum):
    """How AdamW's update runs: one fused kernel, a few kernels over lists, or one parameter at a time."""

    auto = "auto"
    fused = "fused"
    foreach = "foreach"
    loop = "loop"


class DistilledPositions(StrEnum):
    """Over which positions the KL is summed."""

    all = "all"
    labeled = "labeled"


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and the learning rate's course."""

    learning_rate: float = 3e-4
    """Highest learning rate, reached at the end of the warm-up."""
    warmup_steps: int = 100
    """Optimizer steps over which the learning rate rises linearly."""
    floor_fraction: float = 0.1
    """Learning rate of the last step, as a fraction of the highest."""
    beta1: float = 0.9
    """Decay of the running mean of the gradients."""
    beta2: float = 0.95
    """Decay of the running mean of their squares."""
    eps: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms, biases and embeddings (with a head tied to one) get none."""
    max_grad_norm: float | None = 1.0
    """Global gradient norm above which gradients are scaled down; null: never."""
    implementation: OptimizerImplementation = OptimizerImplementation.auto
    """How the update runs: auto (fused on CUDA, foreach elsewhere), fused, foreach or loop."""


@dataclass(kw_only=True)
class HeldoutConfig:
    """Evaluation on held-out text during training, and early stopping."""

    every_steps: int = 100
    """Optimizer steps between evaluations, one more at the end; 0: never."""
    num_batches: int = 8
    """Held-out micro-batches per rank and evaluation."""
    patience: int = 0
    """Evaluations in a row without improvement after which training stops; 0: never stops early."""
    min_improvement: float = 0.0
    """How much lower the held-out value must be to count as better."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the training state is written, and what is kept."""

    every_steps: int = 500
    """Optimizer steps between checkpoints; 0: only the best and the last."""
    keep_last: int = 2
    """Newest checkpoints that are kept, besides the best one."""
    shutdown_timeout_s: float = 60.0
    """Seconds the checkpoint after SIGTERM may take before the process gives up."""


@dataclass(kw_only=True)
class TrainingConfig:
    """One training run."""

    num_steps: int = 1000
    """Optimizer steps of the whole run, counted from its start also after a resume."""
    accumulation: int = 1
    """Micro-batches per rank and optimizer step."""
    precision: Precision = Precision.fp32
    """In what the model computes: fp32, or bf16 (autocast; parameters stay fp32)."""
    seed: int = 0
    """Seed of dropout and the like; rank r uses seed + r."""
    log_every: int = 10
    """Optimizer steps between lines of metrics."""
    loss_chunk_tokens: int = 1024
    """Positions whose logits are in memory at a time."""
    distilled_positions: DistilledPositions = DistilledPositions.all
    """Distillation only: the KL counts all real tokens (all), or those with a label (labeled)."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def check(self) -> None:
        """Refuse values that no step could use.

        Raises:
            ValueError: one line with the key, its value, the bound and the remedy.
        """
        for key in ("num_steps", "accumulation", "log_every", "loss_chunk_tokens"):
            _at_least(key, getattr(self, key), 1)
        _at_least("seed", self.seed, 0)
        optimizer, heldout, checkpoint = self.optimizer, self.heldout, self.checkpoint
        _above_zero("optimizer.learning_rate", optimizer.learning_rate)
        _at_least("optimizer.warmup_steps", optimizer.warmup_steps, 0)
        _fraction("optimizer.floor_fraction", optimizer.floor_fraction)
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(optimizer, key) < 1:
                raise ValueError(f"training.optimizer.{key}={getattr(optimizer, key)} must be at least 0 and below 1")
        _above_zero("optimizer.eps", optimizer.eps)
        _at_least("optimizer.weight_decay", optimizer.weight_decay, 0)
        if optimizer.max_grad_norm is not None:
            _above_zero("optimizer.max_grad_norm", optimizer.max_grad_norm, "; null switches clipping off")
        if optimizer.warmup_steps > self.num_steps:
            raise ValueError(
                f"training.optimizer.warmup_steps={optimizer.warmup_steps} is more than "
                f"training.num_steps={self.num_steps}; lower it or train longer"
            )
        _at_least("heldout.every_steps", heldout.every_steps, 0)
        _at_least("heldout.num_batches", heldout.num_batches, 1)
        _at_least("heldout.patience", heldout.patience, 0)
        _at_least("heldout.min_improvement", heldout.min_improvement, 0)
        if heldout.patience and not heldout.every_steps:
            raise ValueError(
                f"training.heldout.patience={heldout.patience} needs evaluations; "
                "set training.heldout.every_steps above 0"
            )
        _at_least("checkpoint.every_steps", checkpoint.every_steps, 0)
        _at_least("checkpoint.keep_last", checkpoint.keep_last, 1)
        _above_zero("checkpoint.shutdown_timeout_s", checkpoint.shutdown_timeout_s)


# Each bound is written so that NaN fails it.
def _at_least(key: str, value: float, bound: float) -> None:
    if not value >= bound:
        raise ValueError(f"training.{key}={value} is too small; it must be at least {bound}")


def _above_zero(key: str, value: float, remedy: str = "") -> None:
    if not value > 0:
        raise ValueError(f"training.{key}={value} must be above 0{remedy}")


def _fraction(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"training.{key}={value} must lie between 0 and 1")
