"""Scaling an optimizer's hyperparameters with the batch size; imports JAX, optax and NumPy alone.

The rooms, each importing from those above it only:

    rules            a rule is data, and so is a family of optimizers
    clock            examples seen, exact at any length, and schedules read by them
    hyperparameters  what a hyperparameter means: its role's formula, bounds and words
    noise            what the parts of a batch say: the noise scale, and how far steps may grow
    microbatch       the gradient of a batch in parts, and statistics of the parts
    clocked          ranger, and optimizers that count their own updates: that clock as a keyword
    optimizers       the table of optimizers, and a recipe: one call of a factory; scale_hyperparams
    moments          what an optimizer's state holds; a second moment made the base's
    state            what a transformation keeps, and how to read it
    transform        scale_by_batch
    upgrade          optimizer states that an earlier version saved
    schedules        batch sizes over training: planned, or following the noise
    explain          every hyperparameter before and after, and where a rule stops being true
    check            invariance_check
    critical_batch   up to which batch size the loss follows, by branches of a run
    problems         the noisy quadratic, where the right answer is known
"""

from bs_jax.scaling import schedules as schedules  # its functions are used as schedules.NAME
from bs_jax.scaling.check import InvarianceCheck, invariance_check
from bs_jax.scaling.clocked import ranger
from bs_jax.scaling.critical_batch import CriticalBatch, critical_batch_size
from bs_jax.scaling.explain import Explanation, explain
from bs_jax.scaling.hyperparameters import ScalingWarning
from bs_jax.scaling.microbatch import GradientAccumulator, value_grad_and_stats
from bs_jax.scaling.noise import MicrobatchStats, NoiseScale, noise_by_group
from bs_jax.scaling.noise import sample as noise_sample
from bs_jax.scaling.optimizers import scale_hyperparams
from bs_jax.scaling.rules import FAMILIES, RULES, ScalingRule, power, resolve_rule
from bs_jax.scaling.schedules import BatchRamp
from bs_jax.scaling.state import (
    ScaleByBatchState,
    hyperparams,
    noise_scale_by_group,
    noise_scale_estimate,
)
from bs_jax.scaling.transform import invariant_adamw, scale_by_batch
from bs_jax.scaling.upgrade import upgrade_state

__all__ = [
    "FAMILIES",
    "RULES",
    "BatchRamp",
    "CriticalBatch",
    "Explanation",
    "GradientAccumulator",
    "InvarianceCheck",
    "MicrobatchStats",
    "NoiseScale",
    "ScaleByBatchState",
    "ScalingRule",
    "ScalingWarning",
    "critical_batch_size",
    "explain",
    "hyperparams",
    "invariance_check",
    "invariant_adamw",
    "noise_by_group",
    "noise_sample",
    "noise_scale_by_group",
    "noise_scale_estimate",
    "power",
    "ranger",
    "resolve_rule",
    "scale_by_batch",
    "scale_hyperparams",
    "upgrade_state",
    "value_grad_and_stats",
]
