"""Where a scaled recipe leaves the range that the theory holds for, and how far it may go."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bs_jax.errors import UserError
from bs_jax.scaling.formulas import Scaler
from bs_jax.scaling.roles import Spec, factory_name
from bs_jax.scaling.values import is_number

# Updates per half-life below which a moving average is hardly one.
MIN_HALF_LIFE_UPDATES = 0.5
# Updates in a run below which no rule follows the base (first epochs of the checks in the docs).
MIN_UPDATES = 100
# 1 - decay below which float32 holds it to less than two digits.
_FLOAT32_GAP = 1e-6
# Decay of the second moment below which optax's RAdam never rectifies.
RADAM_SMALLEST_DECAY = 0.6

DECAYS = (
    "decay",
    "second_moment_decay",
    "undamped_momentum",
    "centering_decay",
    "variance_decay",
)


class ScalingWarning(UserWarning):
    """Something about a scaled recipe that its user should look at."""


def check_float32(scaler: Scaler) -> None:
    """Raise a ``UserError`` where a decay of plain numbers ends so near to 1 that float32 has 1."""
    for name, role in scaler.spec.roles.items():
        base = scaler.values.get(name, 0.0)
        if role not in DECAYS or not is_number(base) or not 0 < base < 1:
            continue
        new = scaler.value(name)
        if np.float32(new) == 1:
            raise UserError(
                f"{name} {base:g} becomes 1 - {1 - new:.2g} at k = {scaler.k:.3g}, which float32"
                " rounds to 1: its average would never move; use a larger batch size, or switch"
                f" it off by rule.replace({name}=None)"
            )


def warn_of_narrow_decays(values: Mapping[str, Any], spec: Spec) -> None:
    """Warn of decays that arrive as bfloat16 or float16, from ``inject_hyperparams`` say."""
    narrow = [
        f"{name} is {values[name].dtype}"
        for name, role in spec.roles.items()
        if role in DECAYS and _is_narrow(getattr(values.get(name), "dtype", jnp.float32))
    ]
    if narrow:
        warnings.warn(
            f"{', '.join(narrow)}, which rounds decays near 1 to 1: give float32"
            " (optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32))",
            ScalingWarning,
            stacklevel=3,
        )


def _is_narrow(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits < 32


def warn_of_dtypes(values: Mapping[str, Any], spec: Spec, params: Any) -> None:
    """Warn of decays that round to 1 in the dtype that the moments are kept in."""
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(params)}
    for name, role in spec.roles.items():
        value = values.get(name, 1.0)
        if role not in DECAYS or not is_number(value) or not value < 1:
            continue
        for dtype in dtypes:
            if _is_narrow(dtype) and np.asarray(value, dtype) == 1:
                warnings.warn(
                    f"{name} = {value:.6g} rounds to 1 in {dtype}, the dtype of parameters and"
                    f" moments: the average never forgets; give {name} as a jnp.float32, or keep"
                    " the parameters in float32",
                    ScalingWarning,
                    stacklevel=2,
                )


def find_warnings(
    scaler: Scaler,
    *,
    batch_size: int,
    base_batch_size: int,
    noise_scale: float | None = None,
    train_examples: int | None = None,
    numbers_alone: bool = True,
) -> list[str]:
    """Return what a user should know before training, each with the largest safe batch size.

    Args:
        scaler: rule, optimizer, base values and k.
        batch_size: examples per update.
        base_batch_size: examples per update that the values were tuned at.
        noise_scale: gradient noise scale in examples, where known.
        train_examples: length of training, where known.
        numbers_alone: whether the values may be used by themselves, outside ``scale_by_batch`` and
            the trainer, which also keep an optimizer's own clock.

    Returns:
        Sentences; empty if nothing is wrong.
    """
    if scaler.k == 1:
        return []
    return [
        *_short_half_lives(scaler, base_batch_size),
        *_dtypes(scaler),
        *_radam(scaler, base_batch_size, numbers_alone),
        *_noise(scaler, batch_size, base_batch_size, noise_scale),
        *_updates(batch_size, train_examples),
        *_families(scaler),
        *_powers(scaler),
    ]


def _limit(k: float, base_batch_size: int) -> str:
    return f"holds up to k = {k:.3g} (batch size {int(k * base_batch_size):,})"


def _short_half_lives(scaler: Scaler, base_batch_size: int) -> list[str]:
    found = []
    for name, role in scaler.spec.roles.items():
        base = scaler.values.get(name)
        if role not in DECAYS or base is None or not is_number(base) or not 0 < base < 1:
            continue
        if not scaler.rule.time_constants or scaler.rule.k_of(name, scaler.k) is None:
            continue
        half_life = math.log(0.5) / math.log(base)
        if half_life / scaler.k < MIN_HALF_LIFE_UPDATES:
            found.append(
                f"{name}: its half-life of {half_life * base_batch_size:,.0f} examples is"
                f" {half_life / scaler.k:.2g} updates, so it hardly averages any more;"
                f" {_limit(half_life / MIN_HALF_LIFE_UPDATES, base_batch_size)}"
            )
    return found


def _dtypes(scaler: Scaler) -> list[str]:
    found = []
    for name, role in scaler.spec.roles.items():
        base = scaler.values.get(name)
        if role not in DECAYS or base is None:
            continue
        dtype = str(getattr(base, "dtype", ""))
        if dtype in ("bfloat16", "float16"):
            found.append(f"{name} is {dtype}, which rounds decays near 1 to 1; give a float32")
        elif is_number(base) and 0 < float(base) < 1 and 1 - scaler.value(name) < _FLOAT32_GAP:
            k = math.log1p(-_FLOAT32_GAP) / math.log(float(base))
            found.append(
                f"{name}: 1 - {name} becomes {1 - scaler.value(name):.2g}, which float32 holds"
                f" poorly; keep k at or above {k:.3g}"
            )
    return found


def _radam(scaler: Scaler, base_batch_size: int, numbers_alone: bool) -> list[str]:
    name = factory_name(scaler.spec.factory)
    if name not in ("radam", "ranger"):
        return []
    base, new = scaler.values["b2"], scaler.value("b2")
    if not is_number(base) or not is_number(new) or new >= RADAM_SMALLEST_DECAY:
        return []
    kept = scaler.rule.own_clocks
    if kept and not numbers_alone:
        return []
    limit = math.log(RADAM_SMALLEST_DECAY) / math.log(base)
    saved = (
        " scale_by_batch and the trainer keep the rectification on the clock of base-size updates,"
        " but these numbers alone do not; by themselves they serve:"
    )
    return [
        f"b2 becomes {new:.3g}: below {RADAM_SMALLEST_DECAY} {name} never rectifies;"
        f"{saved if kept else ''} {_limit(limit, base_batch_size)}"
    ]


def _noise(
    scaler: Scaler, batch_size: int, base_batch_size: int, noise_scale: float | None
) -> list[str]:
    if noise_scale is None or batch_size <= max(noise_scale, base_batch_size):
        return []
    k = max(noise_scale / base_batch_size, 1.0)
    return [
        f"batch size {batch_size:,} is past the noise scale of {noise_scale:,.0f} examples: a"
        " larger batch buys little there and learning rates near k times the base run into the"
        f" stability limit; {_limit(k, base_batch_size)}"
    ]


def _updates(batch_size: int, train_examples: int | None) -> list[str]:
    if train_examples is None or train_examples >= MIN_UPDATES * batch_size:
        return []
    return [
        f"{train_examples:,} examples are {train_examples // batch_size} updates of {batch_size:,};"
        f" under {MIN_UPDATES} no rule follows the base: use a batch size of at most"
        f" {max(train_examples // MIN_UPDATES, 1):,}"
    ]


def _families(scaler: Scaler) -> list[str]:
    family = scaler.spec.family
    if family is None or family.label == "exact" or not scaler.rule.time_constants:
        return []
    return [f"{factory_name(scaler.spec.factory)} is scaled approximately: {family.note}"]


def _powers(scaler: Scaler) -> list[str]:
    """Warn of a fixed power of k that no noise makes right for this optimizer."""
    rule, family = scaler.rule, scaler.spec.family
    rate = scaler.values.get("learning_rate")
    if rule.lr_power is None or not rule.time_constants or family is None or rate is None:
        return []
    if rule.k_of("learning_rate", scaler.k) is None:
        return []
    (low, high), given = family.lr_powers, rule.lr_power * rule.k_power
    if low <= given <= high:
        return []
    right = f"k^{low:g} whatever the noise" if low == high else f"k^{low:g} to k^{high:g}"
    return [
        f"learning rate x k^{given:g}: {factory_name(scaler.spec.factory)} follows the base at"
        f" {right}; use rule 'power({high:g})', 'noise_aware' or 'invariant'"
    ]
