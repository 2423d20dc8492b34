"""bs_jax: change the batch size; learning rate, weight decay, betas and the rest follow.

Everything here is imported on first use, so that ``import bs_jax`` costs nothing and the parts
that read records need no JAX.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bs_jax.scaling import (
        RULES,
        BatchRamp,
        GradientAccumulator,
        MicrobatchStats,
        ScalingRule,
        critical_batch_size,
        explain,
        hyperparams,
        invariance_check,
        invariant_adamw,
        noise_by_group,
        noise_scale_by_group,
        noise_scale_estimate,
        power,
        ranger,
        scale_by_batch,
        scale_hyperparams,
        value_grad_and_stats,
    )

__version__ = "0.1.0"
__all__ = [
    "RULES",
    "BatchRamp",
    "GradientAccumulator",
    "MicrobatchStats",
    "ScalingRule",
    "critical_batch_size",
    "explain",
    "hyperparams",
    "invariance_check",
    "invariant_adamw",
    "noise_by_group",
    "noise_scale_by_group",
    "noise_scale_estimate",
    "power",
    "ranger",
    "scale_by_batch",
    "scale_hyperparams",
    "value_grad_and_stats",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("bs_jax.scaling"), name)
    if not name.startswith("_") and importlib.util.find_spec(f"bs_jax.{name}") is not None:
        return importlib.import_module(f"bs_jax.{name}")  # bs_jax.scaling, without a line for it
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
