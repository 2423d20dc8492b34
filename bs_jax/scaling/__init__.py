"""Scaling an optimizer's hyperparameters with the batch size: needs JAX and optax, nothing else."""

from bs_jax.scaling.check import InvarianceCheck, invariance_check
from bs_jax.scaling.clocked import ranger
from bs_jax.scaling.explain import Explanation, explain
from bs_jax.scaling.hyperparameters import ScalingWarning
from bs_jax.scaling.limit import BatchRamp
from bs_jax.scaling.microbatch import (
    GradientAccumulator,
    MicrobatchStats,
    value_grad_and_stats,
)
from bs_jax.scaling.noise import NoiseScale
from bs_jax.scaling.noise import sample as noise_sample
from bs_jax.scaling.optimizers import scale_hyperparams
from bs_jax.scaling.rules import FAMILIES, RULES, ScalingRule, power, resolve_rule
from bs_jax.scaling.transform import (
    ScaleByBatchState,
    hyperparams,
    invariant_adamw,
    noise_scale_estimate,
    scale_by_batch,
)

__all__ = [
    "FAMILIES",
    "RULES",
    "BatchRamp",
    "Explanation",
    "GradientAccumulator",
    "InvarianceCheck",
    "MicrobatchStats",
    "NoiseScale",
    "ScaleByBatchState",
    "ScalingRule",
    "ScalingWarning",
    "explain",
    "hyperparams",
    "invariance_check",
    "invariant_adamw",
    "noise_sample",
    "noise_scale_estimate",
    "power",
    "ranger",
    "resolve_rule",
    "scale_by_batch",
    "scale_hyperparams",
    "value_grad_and_stats",
]
