"""The arithmetic of scaling: one hyperparameter at k, for Python floats and tracers alike."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from bs_jax.errors import UserError
from bs_jax.scaling.roles import (
    UNSCALED,
    Spec,
    factory_name,
    fill_implied,
    resolve,
    resolve_factory,
)
from bs_jax.scaling.rules import Scalar, ScalingRule, resolve_rule, sqrt
from bs_jax.scaling.values import check_batch_sizes, check_value, is_number, is_numeric, shown


class NoiseScaleNeeded(Exception):
    """A formula asked for q while the noise scale is not known."""


@dataclasses.dataclass(frozen=True)
class Noise:
    """What q is made of: |g|^2 and tr(Sigma)/B0, of which only the ratio matters."""

    signal: Scalar
    noise: Scalar

    @classmethod
    def from_scale(cls, noise_scale: Scalar, base_batch_size: int) -> Noise:
        """From a noise scale in examples that is known: a number, or a scalar array."""
        known = is_numeric(noise_scale)
        if known and is_number(noise_scale):
            known = noise_scale >= 0 and math.isfinite(noise_scale)
        if not known:
            raise UserError(
                f"noise_scale is {shown(noise_scale)}; give a finite number of examples, e.g."
                " 1000.0"
            )
        return cls(1.0, noise_scale / base_batch_size)

    def q(self, k: Scalar) -> Scalar:
        """Change of a raw magnitude from the base batch size to k times it."""
        return sqrt((k * self.signal + self.noise) / (k * (self.signal + self.noise)))


@dataclasses.dataclass(frozen=True)
class Scaler:
    """All formulas for one rule, optimizer, k and noise.

    Attributes:
        rule: the scaling rule.
        spec: the optimizer's roles and family.
        values: the base values, numbers or scalars, by hyperparameter.
        k: batch size over base batch size.
        noise: the noise, ``None`` where it is not known.
    """

    rule: ScalingRule
    spec: Spec
    values: Mapping[str, Any]
    k: Scalar
    noise: Noise | None = None

    def gradient_norm_factor(self, k: Scalar) -> Scalar:
        """q: how a raw gradient's magnitude changes."""
        if self.rule.q_power is not None:
            return k**self.rule.q_power
        if is_number(k) and k == 1:
            return 1.0
        if self.noise is None:
            raise NoiseScaleNeeded
        return self.noise.q(k)

    def denominator_factor(self, k: Scalar) -> Scalar:
        """How what the optimizer divides by changes: q, or as the family says."""
        family = self.spec.family
        if self.rule.q_power is not None:
            return k**self.rule.q_power
        if family is None:
            raise UserError(
                f"rule {self.rule.name!r} scales {factory_name(self.spec.factory)} by its family,"
                " which is not known: pass family= (e.g. family='adam'), or use rule='sqrt'"
            )
        if family.denominator == "none" or (self.rule.invariant and family.can_be_invariant):
            return 1.0
        if family.denominator == "centered":
            return self._centered_gain() / sqrt(k)
        q = self.gradient_norm_factor(k)
        return q / sqrt(k) if family.denominator == "sum" else q

    def _centered_gain(self) -> Scalar:
        # Of the variance of g, the error g - m of an average m that holds g shows b^2 2/(1 + b),
        # and the spread of an average of squares about it 2 b/(1 + b): both change with b as
        # well as with the batch.
        gain: Scalar = 1.0
        for name, role in self.spec.roles.items():
            if role in ("centering_decay", "variance_decay") and name in self.values:
                old, new = self.values[name], self.value(name)
                share = new / old
                root = share if role == "centering_decay" else sqrt(share)
                gain = gain * root * sqrt((1 + old) / (1 + new))
        return gain

    def lr_factor(self, k: Scalar) -> Scalar:
        """F: change of the learning rate, momentum's gain aside."""
        if self.rule.lr_power is not None:
            return k**self.rule.lr_power
        family = self.spec.family
        if family is not None and family.normalized:
            return k
        return k * self.denominator_factor(k)

    def momentum_gain(self) -> Scalar:
        """(1 - d')/(1 - d) for momentum that sums gradients instead of averaging them."""
        gain: Scalar = 1.0
        for name, role in self.spec.roles.items():
            if role == "undamped_momentum" and self.values.get(name) is not None:
                old, new = self.values[name], self.value(name)
                if new is not old:
                    gain = gain * ((1 - new) / (1 - old))
        return gain

    def value(self, name: str) -> Any:
        """Return the value in force of one hyperparameter."""
        base, role = self.values[name], self.spec.roles.get(name, "unchanged")
        k = self.rule.k_of(name, self.k)
        if k is None or base is None or role in UNSCALED:
            return base
        if self.rule.is_identity(self.k):
            return base
        if is_number(base) and base == 0 and role != "period":
            return base
        return _FORMULAS[role](self, base, k)

    def all(self) -> dict[str, Any]:
        """Return the values in force of every hyperparameter that has a role."""
        return {name: self.value(name) for name in self.values if name in self.spec.roles}


def _learning_rate(scaler: Scaler, base: Scalar, k: Scalar) -> Scalar:
    return base * (scaler.lr_factor(k) * scaler.momentum_gain())


def _decay(scaler: Scaler, base: Scalar, k: Scalar) -> Scalar:
    return base**k if scaler.rule.time_constants else base


def _eps(scaler: Scaler, base: Scalar, k: Scalar) -> Scalar:
    return base * scaler.denominator_factor(k)


def _eps_root(scaler: Scaler, base: Scalar, k: Scalar) -> Scalar:
    return base * scaler.denominator_factor(k) ** 2


def _eps_sum(scaler: Scaler, base: Scalar, k: Scalar) -> Scalar:
    # Added to the average at each update, it settles at eps/(1 - b).
    (decay,) = (n for n, role in scaler.spec.roles.items() if role == "second_moment_decay")
    settled = (1 - scaler.value(decay)) / (1 - scaler.values[decay])
    return base * scaler.denominator_factor(k) ** 2 * settled


def _weight_decay(scaler: Scaler, base: Scalar, k: Scalar) -> Scalar:
    if scaler.rule.weight_decay_power is not None:
        return base * k**scaler.rule.weight_decay_power
    return base * (k / scaler.lr_factor(k))


def _weight_decay_normalized(scaler: Scaler, base: Scalar, k: Scalar) -> Scalar:
    if scaler.rule.weight_decay_power is not None:
        return base * k**scaler.rule.weight_decay_power
    return base / scaler.denominator_factor(k)


def _weight_decay_independent(scaler: Scaler, base: Scalar, k: Scalar) -> Scalar:
    return 1 - (1 - base) ** k if scaler.rule.time_constants else base


def _gradient_norm(scaler: Scaler, base: Scalar, k: Scalar) -> Scalar:
    return base * scaler.gradient_norm_factor(k)


def _divided_learning_rate(scaler: Scaler, base: Scalar, k: Scalar) -> Scalar:
    if scaler.rule.lr_power is not None:
        return base * k**scaler.rule.lr_power
    return base * (k * scaler.denominator_factor(k))


def _update_norm(scaler: Scaler, base: Scalar, k: Scalar) -> Scalar:
    return base * (scaler.gradient_norm_factor(k) / scaler.denominator_factor(k))


def _period(scaler: Scaler, base: Scalar, k: Scalar) -> Scalar:
    if not scaler.rule.time_constants:
        return base
    if is_number(base) and is_number(k):
        return max(1, round(base / k))
    if factory_name(scaler.spec.factory) == "lookahead":
        raise UserError(
            "optax.lookahead cannot change its period while training; keep the batch size constant,"
            " or use bs_jax.scaling.ranger"
        )
    return jnp.maximum(1, jnp.round(base / k))


def _mixing_weight(scaler: Scaler, base: Scalar, k: Scalar) -> Scalar:
    """Solve for the weight that keeps the signal to noise ratio of the mixed gradient.

    x = b1 m + (1 - b1) g, with m an average of decay b2, has the noise of g times
    V(b1, r) = (1 - b1)^2 + r b1^2, r = (1 - b2)/(1 + b2); a batch k times as large has 1/k of it.
    """
    if not scaler.rule.time_constants:
        return base
    # The optimizer's own comes first: others (BatchNorm's) may follow the same rule.
    decay = next(n for n, role in scaler.spec.roles.items() if role == "decay")
    old, new = scaler.values[decay], scaler.value(decay)
    r_old, r_new = (1 - old) / (1 + old), (1 - new) / (1 + new)
    wanted = k * ((1 - base) ** 2 + r_old * base**2)
    # Roots of (1 + r) x^2 - 2 x + 1 - wanted; none is real where even the average is too noisy,
    # and none positive where the raw gradient is too clean: the nearest weight serves then.
    inside = 1 - (1 + r_new) * (1 - wanted)
    if is_number(inside):
        return max(0.0, (1 - math.sqrt(max(inside, 0.0))) / (1 + r_new))
    return jnp.maximum(0.0, (1 - jnp.sqrt(jnp.maximum(inside, 0.0))) / (1 + r_new))


_FORMULAS: dict[str, Callable[[Scaler, Scalar, Scalar], Scalar]] = {
    "learning_rate": _learning_rate,
    "decay": _decay,
    "second_moment_decay": _decay,
    "undamped_momentum": _decay,
    "centering_decay": _decay,
    "variance_decay": _decay,
    "mixing_weight": _mixing_weight,
    "eps": _eps,
    "eps_root": _eps_root,
    "eps_sum": _eps_sum,
    "weight_decay": _weight_decay,
    "weight_decay_normalized": _weight_decay_normalized,
    "weight_decay_independent": _weight_decay_independent,
    "divided_learning_rate": _divided_learning_rate,
    "gradient_norm": _gradient_norm,
    "update_norm": _update_norm,
    "period": _period,
}


def missing_noise(rule: ScalingRule, spec: Spec, *, by_coordinate: bool = False) -> UserError:
    """Return the error for a rule that needs the noise and has none, or only its scale."""
    scale = "" if by_coordinate else "noise_scale= (examples), or "
    return UserError(
        f"rule {rule.name!r} with {factory_name(spec.factory)} needs the gradient noise: give"
        f" {scale}update(..., microbatch=) from bs_jax.value_grad_and_stats with 2 or more"
        " micro-batches. What lies in between must hand it on: flax's TrainState.apply_gradients"
        " and optax's MultiSteps(...).gradient_transformation() do not"
    )


def scale_hyperparams(
    factory: Callable[..., Any] | str,
    hyperparams: Mapping[str, Any],
    *,
    batch_size: int,
    base_batch_size: int,
    rule: str | ScalingRule = "sqrt",
    noise_scale: float | None = None,
    roles: Mapping[str, str] | None = None,
    family: str | None = None,
) -> dict[str, Any]:
    r"""Return hyperparameters for another batch size: pure arithmetic, floats in, floats out.

    For Adam under ``"sqrt"``: ``lr k^(1/2), b^k, wd k^(1/2), eps k^(-1/2)`` with
    ``k = batch_size / base_batch_size``.

    Args:
        factory: the optax factory (or its name) that the hyperparameters belong to.
        hyperparams: name -> value at the base batch size. A callable learning rate (a schedule in
            base-size updates) comes back as a schedule in updates of ``batch_size``.
        batch_size: examples per update to scale to.
        base_batch_size: examples per update that the values were tuned at.
        rule: a name, ``"power(a)"``, or a ``ScalingRule``.
        noise_scale: gradient noise scale in examples, for ``"noise_aware"``.
        roles: further names -> role, e.g. ``{"bn_decay": "decay"}``: BatchNorm's decay or a weight
            average then follow the same rule.
        family: of a user's own factory.

    Returns:
        name -> new value, for the given names and no others.

    Raises:
        UserError: for invalid values, unknown names of rules or roles, or a missing noise scale.

    Example:
        >>> new = scale_hyperparams("adamw", {"learning_rate": 1e-3, "b1": 0.9, "bn_decay": 0.9},
        ...     batch_size=256, base_batch_size=64, rule="sqrt", roles={"bn_decay": "decay"})
        >>> {name: round(value, 6) for name, value in new.items()}
        {'learning_rate': 0.002, 'b1': 0.6561, 'bn_decay': 0.6561}

    Reference:
        Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, 2022.
    """
    check_batch_sizes(batch_size, base_batch_size)
    factory, rule = resolve_factory(factory), resolve_rule(rule)
    values = named_values(factory, hyperparams, roles)
    spec = resolve(factory, values, roles, family)
    values = {n: v for n, v in fill_implied(values, spec).items() if n in spec.roles}
    for name, value in values.items():
        check_value(name, spec.roles[name], value)
    noise = None if noise_scale is None else Noise.from_scale(noise_scale, base_batch_size)
    k = batch_size / base_batch_size
    try:
        return {
            name: scale_one(Scaler(rule, spec, values, k, noise), name) if name in values else value
            for name, value in hyperparams.items()
        }
    except NoiseScaleNeeded:
        raise missing_noise(rule, spec) from None


def scale_one(scaler: Scaler, name: str) -> Any:
    """Return one value in force; a schedule of base-size updates becomes one of the new updates."""
    schedule = scaler.values[name]
    if not callable(schedule):
        return scaler.value(name)
    # The schedule's value is scaled, so a stand-in of 1 yields the factor and traps bad uses early.
    k = int(scaler.k) if is_number(scaler.k) and float(scaler.k).is_integer() else scaler.k

    def scaled_schedule(step: Any) -> Any:
        values = {**scaler.values, name: schedule(step * k)}
        return dataclasses.replace(scaler, values=values).value(name)

    return scaled_schedule


def named_values(
    factory: Callable[..., Any], given: Mapping[str, Any], roles: Mapping[str, str] | None
) -> dict[str, Any]:
    """Return the factory's defaults and the given values by name.

    Raises:
        UserError: for a name that neither the factory nor ``roles`` knows.
    """
    signature = inspect.signature(factory)
    try:
        signature.bind_partial(**{n: v for n, v in given.items() if n not in (roles or {})})
    except TypeError as error:
        raise UserError(
            f"{factory_name(factory)}: {error}; it takes {', '.join(signature.parameters)}"
        ) from error
    parameters = signature.parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    values = {**defaults, **given}
    in_order = [p.name for p in parameters if p.name in values]
    return {name: values[name] for name in dict.fromkeys([*in_order, *values])}
