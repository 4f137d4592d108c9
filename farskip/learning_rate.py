"""The learning rate of each step: linear warm-up, then a cosine down to a floor.

Decides: the curve, as a pure function of the step, so that a resumed run needs no scheduler state.
"""

import math

from farskip.training_config import OptimizerConfig


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of one optimizer step.

    Args:
        step: steps already taken, 0 for the first.
        num_steps: steps of the whole run.
        config: highest rate, warm-up and floor.

    Returns:
        Step ``warmup_steps - 1`` has the highest rate, step ``num_steps - 1`` (and any later) the floor.

    Source: FarSkip-Collective, section 5 (cosine, 1000 steps of warm-up).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_steps = num_steps - max(config.warmup_steps, 1)
    progress = 1.0 if decay_steps <= 0 else min((step + 1 - max(config.warmup_steps, 1)) / decay_steps, 1.0)
    floor = config.learning_rate * config.floor_fraction
    return floor + (config.learning_rate - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
