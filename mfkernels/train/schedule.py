"""What changes from step to step: learning rate and temperature.

Both are functions of the step alone: a training that goes on has nothing of them to restore.
"""

import math

from ..models import annealed_temperature
from .recipe import Recipe


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step: a linear warm-up, both ends included, then half a cosine.

    Args:
        step: steps done before, since the beginning of the training.
        steps_per_epoch: steps of an epoch.

    Source: the released scripts of DMF and iFormer.
    """
    warmup = int(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * step / max(warmup - 1, 1)
    steps = max(recipe.epochs * steps_per_epoch - warmup, 1)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) / 2 * (1 + math.cos(math.pi * (step - warmup) / steps))


def temperature(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the temperature of DMF's kernel scores in a step, see `annealed_temperature`."""
    return annealed_temperature(
        step, steps_per_epoch, epochs=recipe.temperature_epochs, start=recipe.temperature
    )
