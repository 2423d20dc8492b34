"""Scaling an optimizer's hyperparameters with the batch size: needs JAX and optax, nothing else."""

from bs_jax.scaling.cautions import ScalingWarning
from bs_jax.scaling.check import InvarianceCheck, invariance_check
from bs_jax.scaling.explain import Explanation, explain
from bs_jax.scaling.formulas import scale_hyperparams
from bs_jax.scaling.microbatch import MicrobatchStats, value_grad_and_stats
from bs_jax.scaling.noise_scale import NoiseScale, noise_scale_estimate
from bs_jax.scaling.noise_scale import sample as noise_sample
from bs_jax.scaling.optimizer import ScaleByBatchState
from bs_jax.scaling.ranger import ranger
from bs_jax.scaling.registry import FAMILIES
from bs_jax.scaling.rules import RULES, ScalingRule, power, resolve_rule
from bs_jax.scaling.transform import (
    hyperparams,
    invariant_adamw,
    scale_by_batch,
)

__all__ = [
    "FAMILIES",
    "RULES",
    "Explanation",
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
