"""What a hyperparameter means: its role owns the formula, the bounds and the words.

``Scaled`` holds one recipe under one rule at one ``k = batch_size / base_batch_size``; each role's
formula reads from it what it needs. The formulas serve Python floats and traced scalars alike.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bs_jax.errors import UserError
from bs_jax.scaling.clock import rescaled
from bs_jax.scaling.rules import Family, Scalar, ScalingRule

# Of one update: half of int32, so that the clock may add two of them.
MAX_EXAMPLES = 1 << 30


class ScalingWarning(UserWarning):
    """Something about a scaled recipe that its user should look at."""


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a plain number: not a bool, an array or a tracer."""
    return isinstance(value, (numbers.Real, np.number)) and not isinstance(value, (bool, np.bool_))


def is_numeric(value: object) -> bool:
    """Whether a value can be a hyperparameter: a plain number, a scalar array or a tracer."""
    return is_number(value) or (hasattr(value, "dtype") and getattr(value, "shape", None) == ())


def check_batch_sizes(batch_size: object, base_batch_size: object) -> None:
    """Raise a ``UserError`` unless both are positive integers."""
    for name, value in (("batch_size", batch_size), ("base_batch_size", base_batch_size)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise UserError(
                f"{name} must be an integer (examples per update, all devices), got"
                f" {_shown(value)}; give e.g. 256, or a traced integer to update(..., batch_size=)"
            )
        if not 1 <= value <= MAX_EXAMPLES:
            raise UserError(
                f"{name} is {value}; give at least 1 example per update, and at most"
                f" {MAX_EXAMPLES:,}, which the int32 clock of examples adds up"
            )


def given_batch_size(size: Any, base_batch_size: int) -> Any:
    """Return the batch size given to an update: a number as it is, an array as int32.

    Raises:
        UserError: unless it is a positive integer, or a traced one, whose value nobody knows.
    """
    is_integer = hasattr(size, "dtype") and jnp.issubdtype(size.dtype, jnp.integer)
    if is_number(size) or not is_numeric(size) or not is_integer:
        check_batch_sizes(size, base_batch_size)
        return size
    if not isinstance(size, Tracer):
        check_batch_sizes(int(size), base_batch_size)
    # Narrower integers would overflow in the clock.
    return jnp.asarray(size, jnp.int32)


def _shown(value: object) -> str:
    if isinstance(value, (jax.Array, np.ndarray)):
        return f"an array of shape {value.shape}" if value.shape else f"an array of {value.dtype}"
    return repr(value)


def _sqrt(x: Scalar) -> Scalar:
    # math.sqrt keeps Python floats in double precision.
    return math.sqrt(x) if isinstance(x, (int, float)) else x**0.5


def larger(x: Scalar, y: Scalar) -> Scalar:
    """Return the larger: of plain numbers in double precision."""
    return max(x, y) if is_number(x) and is_number(y) else jnp.maximum(x, y)


def _ratio(new: Scalar, old: Scalar) -> Scalar:
    """Return ``new / old`` of decays; 1 where both are 0."""
    if is_number(old):
        return new / old if old else 1.0
    return jnp.where(old > 0, new / jnp.where(old > 0, old, 1.0), 1.0)


class NoiseScaleNeeded(Exception):
    """A formula asked for q while the noise scale is not known."""


@dataclasses.dataclass(frozen=True)
class Noise:
    r"""The noise of the base batch's gradient, from which q follows.

    ``q = sqrt((k + phi) / (k (1 + phi)))`` with ``phi = noise / signal``: how a raw per-step
    magnitude (Adam's v, a gradient norm) changes from batch size B0 to k B0. It is 1/sqrt(k) where
    noise dominates and 1 where signal does.

    Attributes:
        signal: |g|^2, in any unit.
        noise: tr(Sigma)/B0, in the same unit.

    Example:
        >>> round(Noise(1.0, 0.0).q(4.0), 3), round(Noise(1.0, 1e9).q(4.0), 3)
        (1.0, 0.5)
    """

    signal: Scalar
    noise: Scalar

    @classmethod
    def from_scale(cls, noise_scale: Scalar, base_batch_size: int) -> Noise:
        """Return the noise for a known noise scale in examples: a number, or a scalar array.

        Raises:
            UserError: if it is not a finite number of examples.
        """
        known = is_numeric(noise_scale)
        if known and is_number(noise_scale):
            known = noise_scale >= 0 and math.isfinite(noise_scale)
        if not known:
            raise UserError(
                f"noise_scale is {_shown(noise_scale)}; give a finite number of examples, e.g."
                " 1000.0"
            )
        return cls(1.0, noise_scale / base_batch_size)

    def q(self, k: Scalar) -> Scalar:
        """Return the change of a raw magnitude from the base batch size to k times it."""
        signal, noise = self.signal, self.noise
        if not (is_number(signal) and is_number(noise)):
            # Gradients may be so small or large that sums of their squares leave float32's range:
            # only the ratio matters, and where both have vanished all counts as noise.
            largest = jnp.maximum(signal, noise)
            known = (largest >= jnp.finfo(jnp.float32).tiny) & jnp.isfinite(largest)
            unit = jnp.where(known, largest, 1.0)
            signal = jnp.where(known, signal / unit, 0.0)
            noise = jnp.where(known, noise / unit, 1.0)
        return _sqrt((k * signal + noise) / (k * (signal + noise)))

    @property
    def phi(self) -> Scalar:
        """The noise scale over the base batch size; infinite without a signal."""
        if is_number(self.signal) and is_number(self.noise):
            return self.noise / self.signal if self.signal else math.inf
        return jnp.where(
            self.signal > 0, self.noise / jnp.where(self.signal > 0, self.signal, 1.0), jnp.inf
        )


@dataclasses.dataclass(frozen=True)
class Role:
    """What a hyperparameter means to the scaling rules.

    Attributes:
        name: as in ``ROLES``.
        kept: what stays the same when the batch size changes; a text, or a function of ``Scaled``,
            the hyperparameter's name and the base batch size.
        formula: the new value, for tables; a text, or a function of ``Scaled``.
        scale: ``scale(scaled, base value, k) -> new value``; ``None``: the value stays.
        low: smallest valid base value.
        high: base values must lie below it.
        is_decay: whether the value is the decay of a moving average.
        takes_schedule: whether optax itself accepts a schedule for it.
    """

    name: str
    kept: str | Callable[[Scaled, str, int], str]
    formula: str | Callable[[Scaled], str]
    scale: Callable[[Scaled, Scalar, Scalar], Scalar] | None = None
    low: float = 0.0
    high: float = math.inf
    is_decay: bool = False
    takes_schedule: bool = False

    def check(self, hyperparameter: str, value: object) -> None:
        """Raise a ``UserError`` for a base value that this role does not allow."""
        switched_off = value is None and self.name != "learning_rate"
        if callable(value) or switched_off:
            return
        dtype = getattr(value, "dtype", float)
        if not is_numeric(value) or np.issubdtype(dtype, np.complexfloating):
            raise UserError(
                f"{hyperparameter} is {_shown(value)}, but as {self.name} it must be a real number,"
                f" a scalar array or a schedule; change {hyperparameter}"
            )
        if not is_number(value) or (math.isfinite(value) and self.low <= value < self.high):
            return
        bounds = f"at least {self.low:g}" + (f" and below {self.high:g}" if self.high < 2 else "")
        if self.low == -math.inf:
            bounds = "finite"
        raise UserError(
            f"{hyperparameter} is {value}, but as {self.name} it must be {bounds};"
            f" change {hyperparameter}"
        )


@dataclasses.dataclass(frozen=True)
class Scaled:
    """One recipe under one rule at one k: every hyperparameter in force.

    Attributes:
        optimizer: its name, for messages.
        family: its family; ``None`` if a user's own factory did not say.
        roles: hyperparameter -> role.
        values: hyperparameter -> base value: a number or a scalar array.
        rule: the scaling rule.
        k: batch size over base batch size.
        noise: the noise of the base batch's gradient; ``None`` where it is not known.
        share: of k, by which every step may grow (``noise.step_share``); 1 inside the noise scale
            and without a guard.
        guards_moment: whether a guard acts in the invariant second moment, coordinate by
            coordinate, and not on the rate.
        known: whether the optimizer stands in the table, so that its state is known as well.
        own_clock: what gives the keywords of an optimizer that counts its own updates.
    """

    optimizer: str
    family: Family | None
    roles: Mapping[str, Role]
    values: Mapping[str, Any]
    rule: ScalingRule
    k: Scalar
    noise: Noise | None = None
    share: Scalar = 1.0
    guards_moment: bool = False
    known: bool = False
    own_clock: Callable[[Scaled], dict[str, Scalar]] | None = None

    @functools.cached_property
    def is_identity(self) -> bool:
        """Whether the rule certainly changes nothing: k is the number 1 and nothing is offset."""
        if not isinstance(self.k, (int, float)) or self.k != 1:
            return False
        return all(
            f in (None, 1.0) for f in (self.rule.offset, *dict(self.rule.overrides).values())
        )

    def k_of(self, name: str) -> Scalar | None:
        """Return the k that one hyperparameter is scaled by; ``None`` if it is switched off."""
        factor = dict(self.rule.overrides).get(name, 1.0)
        if factor is None:
            return None
        factor = factor * self.rule.offset
        k = self.k if factor == 1.0 else self.k * factor
        return k if self.rule.k_power == 1.0 else k**self.rule.k_power

    def value(self, name: str) -> Any:
        """Return the value in force of one hyperparameter."""
        base, role = self.values[name], self.roles[name]
        if self.is_identity or base is None or role.scale is None:
            return base
        k = self.k_of(name)
        if k is None or (is_number(base) and base == 0):  # switched off
            return base
        return role.scale(self, base, k)

    def with_base(self, name: str, base: Any) -> Any:
        """Return the value in force of one hyperparameter for another base value."""
        return dataclasses.replace(self, values={**self.values, name: base}).value(name)

    def schedule_or_value(self, name: str) -> Any:
        """Return the value in force; a schedule of base-size updates as one of new updates."""
        schedule = self.values[name]
        if not callable(schedule):
            return self.value(name)
        at_base = rescaled(schedule, self.k, middle=self.rule.reads_middle)
        return lambda step: self.with_base(name, at_base(step))

    def clock(self) -> dict[str, Scalar]:
        """Return the keywords by which an optimizer's own clock counts base-size updates."""
        if self.own_clock is None or not self.rule.time_constants or self.is_identity:
            return {}
        return self.own_clock(self)

    def with_role(self, role: str) -> list[str]:
        """Return the names of the hyperparameters of one role that have a value."""
        return [name for name in self.values if self.roles[name].name == role]

    def only(self, role: str) -> str:
        """Return the name of the one hyperparameter of a role.

        Raises:
            UserError: if there is none, or more than one.
        """
        names = self.with_role(role)
        if len(names) == 1:
            return names[0]
        found = f"{len(names)} ({', '.join(names)})" if names else "none"
        raise UserError(
            f"{self.optimizer}: rule {self.rule.name!r} needs one argument of role {role!r}, found"
            f" {found}; make it an argument and name it, e.g. roles={{'b2': {role!r}}}"
        )

    def gradient_norm_factor(self, k: Scalar) -> Scalar:
        """Return q: how a raw gradient's magnitude changes.

        Raises:
            NoiseScaleNeeded: if the rule measures q and the noise is not known.
        """
        if self.rule.q_power is not None:
            return k**self.rule.q_power
        if is_number(k) and k == 1:
            return 1.0
        if self.noise is None:
            raise NoiseScaleNeeded
        return self.noise.q(k)

    def denominator_factor(self, k: Scalar) -> Scalar:
        """Return how what the optimizer divides by changes: q, or as the family says."""
        if self.rule.q_power is not None:
            return k**self.rule.q_power
        if self.family is None:
            raise UserError(
                f"rule {self.rule.name!r} scales {self.optimizer} by its family, which is not"
                " known: pass family= (e.g. family='adam'), or use rule='sqrt'"
            )
        if self.family.denominator == "none" or (
            self.rule.invariant and self.family.can_be_invariant
        ):
            return 1.0
        if self.family.denominator == "centered":
            return self._centered_gain() / _sqrt(k)
        q = self.gradient_norm_factor(k)
        return q / _sqrt(k) if self.family.denominator == "sum" else q

    def _centered_gain(self) -> Scalar:
        # Of the variance of g, the error g - m of an average m that holds g shows b^2 2/(1 + b),
        # and the spread of an average of squares about it 2 b/(1 + b): both change with b as
        # well as with the batch.
        gain: Scalar = 1.0
        for name, role in self.roles.items():
            if role.name in ("centering_decay", "variance_decay") and name in self.values:
                old, new = self.values[name], self.value(name)
                # An average of decay 0 is the gradient itself: it shows nothing, before and after.
                left = _ratio(new, old)
                root = left if role.name == "centering_decay" else _sqrt(left)
                gain = gain * root * _sqrt((1 + old) / (1 + new))
        return gain

    def lr_factor(self, k: Scalar, *, divided: bool = False) -> Scalar:
        """Return F: the change of the learning rate, momentum's gain apart.

        Where the guard acts on the rate it is, beyond the noise scale, F of ``k share`` base-size
        updates, but k**a at least, with a the rule's ``guard_power`` (0 for what moves by the
        gradient's own size).

        Args:
            k: batch size over base batch size.
            divided: of the rate of a part whose second moment alone sets the length of a step.
        """
        free = self.free_lr_factor(k, k, divided=divided)
        if self.guards_moment or (is_number(self.share) and self.share == 1):
            return free
        by_size = self.family is not None and self.family.moves_by_size
        least = k ** (0.0 if by_size else self.rule.guard_power)
        held = self.free_lr_factor(k, k * self.share, divided=divided)
        if is_number(free) and is_number(held):
            return max(held, min(free, least))
        return jnp.maximum(held, jnp.minimum(free, least))

    def free_lr_factor(self, k: Scalar, steps: Scalar, *, divided: bool = False) -> Scalar:
        """Return F, without a guard, of an update that makes up for so many base-size ones."""
        if self.rule.lr_power is not None:
            return steps**self.rule.lr_power
        if self.family is not None and self.family.normalized and not divided:
            return steps
        return steps * self.denominator_factor(k)

    def held_back(self, k: Scalar) -> Scalar:
        """Return the share of the rule's own learning rate that the guard leaves."""
        return self.lr_factor(k) / self.free_lr_factor(k, k)

    def momentum_gain(self) -> Scalar:
        """Return (1 - d')/(1 - d) for momentum that sums gradients instead of averaging them."""
        gain: Scalar = 1.0
        for name in self.values:
            if self.roles[name].name == "undamped_momentum":
                old, new = self.values[name], self.value(name)
                gain = gain if new is old else gain * ((1 - new) / (1 - old))
        return gain

    def formula(self, name: str) -> str:
        """Return in symbols how one hyperparameter is scaled."""
        rule, formula = self.rule, self.roles[name].formula
        if self.k_of(name) is None:
            return "switched off"
        if not rule.time_constants and rule.lr_power == 0:
            text = "unchanged"
        else:
            text = formula if isinstance(formula, str) else formula(self)
        if rule.k_power == 1:
            return text
        scale = f"k^{rule.k_power:g}"  # where others read k
        return re.sub(r"\bk\b", f"({scale})" if "^" in text else scale, text)

    def kept(self, name: str, base_batch_size: int) -> str:
        """Return in words what stays the same of one hyperparameter."""
        rule, role = self.rule, self.roles[name]
        if self.k_of(name) is None:
            return "nothing"
        if not (rule.time_constants or rule.lr_power is None or role.is_decay):
            return "the number itself"
        return role.kept if isinstance(role.kept, str) else role.kept(self, name, base_batch_size)

    def symbols(self) -> tuple[str, str]:
        """Return the names of F and of what the optimizer's denominator changes by."""
        rule, family = self.rule, self.family
        if rule.lr_power is not None:
            q = "1" if not rule.q_power else f"k^{rule.q_power:g}"
            return {0.0: "1", 1.0: "k"}.get(rule.lr_power, f"k^{rule.lr_power:g}"), q
        if family is None:
            return "F", "q"
        if rule.invariant and family.can_be_invariant:
            return "k", "1"
        return family.lr_formula, {"centered": "c", "sum": "q k^-0.5"}.get(family.denominator, "q")


def _learning_rate_formula(scaled: Scaled) -> str:
    momentum = " (1 - d^k)/(1 - d)" if scaled.with_role("undamped_momentum") else ""
    return f"x {scaled.symbols()[0]}{momentum}"


_MOVEMENT = "movement per example"


def _learning_rate_kept(scaled: Scaled, name: str, base_batch_size: int) -> str:
    """What a fixed power of k keeps of the movement per example."""
    rule, family = scaled.rule, scaled.family
    if rule.lr_power is None or family is None:
        return _MOVEMENT
    power, (noise, signal) = rule.lr_power * rule.k_power, family.lr_powers
    if not noise <= power <= signal:
        return f"nothing: {_MOVEMENT} changes at any noise"
    if noise == signal:
        return _MOVEMENT
    ends = {noise: ", where noise dominates", signal: ", where signal dominates"}
    return _MOVEMENT + ends.get(power, ", where noise and signal are alike")


def _decay_kept(scaled: Scaled, name: str, base_batch_size: int) -> str:
    base, rule, role = scaled.values[name], scaled.rule, scaled.roles[name]
    if not is_number(base) or not 0 < base < 1:
        return _SUMMED if role.name == "undamped_momentum" else "half-life in examples"
    half_life = f"half-life {math.log(0.5) / math.log(base) * base_batch_size:,.0f} examples"
    if not rule.time_constants or rule.k_power != 1:
        return f"nothing: {half_life} before"
    return half_life


_SUMMED = "half-life in examples; learning rate x (1 - decay^k)/(1 - decay)"


def _mixing_weight(scaled: Scaled, base: Scalar, k: Scalar) -> Scalar:
    """Solve for the weight that keeps the signal to noise ratio of the mixed gradient.

    x = b1 m + (1 - b1) g, with m an average of decay b2, has the noise of g times
    V(b1, r) = (1 - b1)^2 + r b1^2, r = (1 - b2)/(1 + b2); a batch k times as large has 1/k of it.
    """
    if not scaled.rule.time_constants:
        return base
    decays = scaled.with_role("decay")
    if not decays:
        scaled.only("decay")  # raises
    # The optimizer's own comes first: others (BatchNorm's) may follow the same rule.
    old, new = scaled.values[decays[0]], scaled.value(decays[0])
    r_old, r_new = (1 - old) / (1 + old), (1 - new) / (1 + new)
    wanted = k * ((1 - base) ** 2 + r_old * base**2)
    # Roots of (1 + r) x^2 - 2 x + 1 - wanted; none is real where even the average is too noisy,
    # and none positive where the raw gradient is too clean: the nearest weight serves then.
    inside = 1 - (1 + r_new) * (1 - wanted)
    if is_number(inside):
        return max(0.0, (1 - math.sqrt(max(inside, 0.0))) / (1 + r_new))
    solved = jnp.maximum(0.0, (1 - jnp.sqrt(jnp.maximum(inside, 0.0))) / (1 + r_new))
    return jnp.where(base > 0, solved, 0.0)  # switched off, as a plain 0 is


def _eps_sum(scaled: Scaled, base: Scalar, k: Scalar) -> Scalar:
    # Added to the average at each update, it settles at eps/(1 - b).
    decay = scaled.only("second_moment_decay")
    settled = (1 - scaled.value(decay)) / (1 - scaled.values[decay])
    return base * scaled.denominator_factor(k) ** 2 * settled


def _by_q(text: str) -> Callable[[Scaled], str]:
    """A formula with q in it, as the rule and the family have q."""

    def formula(scaled: Scaled) -> str:
        q = scaled.symbols()[1]
        return "unchanged" if q == "1" else text.replace("q", f"({q})" if "^" in q else q)

    return formula


def _weight_decay(scaled: Scaled, base: Scalar, k: Scalar) -> Scalar:
    # Where the guard holds the learning rate back, the decay that it multiplies is held back too.
    if scaled.rule.weight_decay_power is not None:
        return base * k**scaled.rule.weight_decay_power
    return base * (k / scaled.free_lr_factor(k, k))


def _weight_decay_formula(scaled: Scaled) -> str:
    power, factor = scaled.rule.weight_decay_power, scaled.symbols()[0]
    if power is not None:
        return {0.0: "unchanged", 1.0: "x k"}.get(power, f"x k^{power:g}")
    return {"k": "unchanged", "k q": "x 1/q"}.get(factor, f"x k/({factor})")


def _weight_decay_kept(scaled: Scaled, name: str, base_batch_size: int) -> str:
    rule, rate, base = scaled.rule, scaled.values.get("learning_rate"), scaled.values[name]
    if rule.lr_power is not None and rule.weight_decay_power is not None:
        powers = (rule.lr_power + rule.weight_decay_power) * rule.k_power
        if powers != 1:
            return "nothing: decay per example grows with k"
    if is_number(rate) and is_number(base):
        return f"decay {rate * base / base_batch_size:.3g} per example"
    return "learning rate x weight decay, per example"


def _weight_decay_normalized(scaled: Scaled, base: Scalar, k: Scalar) -> Scalar:
    if scaled.rule.weight_decay_power is not None:
        return base * k**scaled.rule.weight_decay_power
    return base / scaled.denominator_factor(k)


def _weight_decay_independent(scaled: Scaled, base: Scalar, k: Scalar) -> Scalar:
    return 1 - (1 - base) ** (k * scaled.held_back(k)) if scaled.rule.time_constants else base


def _norm_formula(scaled: Scaled) -> str:
    q = scaled.symbols()[1]
    return f"x ({q})" if "^" in q else f"x {q}"


def _period(scaled: Scaled, base: Scalar, k: Scalar) -> Scalar:
    if not scaled.rule.time_constants:
        return base
    if is_number(base) and is_number(k):
        return max(1, round(base / k))
    if scaled.optimizer == "lookahead":
        raise UserError(
            "optax.lookahead cannot change its period while training; keep the batch size constant,"
            " or use bs_jax.scaling.ranger"
        )
    return jnp.maximum(1, jnp.round(base / k))


def _period_kept(scaled: Scaled, name: str, base_batch_size: int) -> str:
    base = scaled.values[name]
    new = scaled.value(name) if is_number(base) else None
    if is_number(base) and is_number(new) and scaled.rule.k_power == 1:
        now = new * scaled.k * base_batch_size
        return f"{base * base_batch_size:,.0f} examples (now {now:,.0f})"
    return "examples per period"


# Formulas of one line: s is the recipe at this k (``Scaled``).
_decay = functools.partial(
    Role,
    kept=_decay_kept,
    formula="decay^k",
    scale=lambda s, base, k: base**k if s.rule.time_constants else base,
    high=1.0,
    is_decay=True,
)

_ROLES = (
    Role(
        "learning_rate",
        _learning_rate_kept,
        _learning_rate_formula,
        lambda s, base, k: base * (s.lr_factor(k) * s.momentum_gain()),
        takes_schedule=True,
    ),
    # Of an optimizer inside another that normalises its own update (the Adam inside Muon).
    Role(
        "divided_learning_rate",
        _MOVEMENT,
        "x k q",
        lambda s, base, k: base * s.lr_factor(k, divided=True),
    ),
    _decay("decay"),
    _decay("second_moment_decay"),
    _decay("undamped_momentum"),
    _decay("centering_decay"),
    _decay("variance_decay"),
    Role(
        "mixing_weight",
        "signal to noise of the mixed gradient",
        "solved",
        _mixing_weight,
        high=1.0,
    ),
    Role(
        "eps",
        "size beside the root of the second moment",
        _by_q("x q"),
        lambda s, base, k: base * s.denominator_factor(k),
    ),
    Role(
        "eps_root",
        "size beside the second moment",
        _by_q("x q^2"),
        lambda s, base, k: base * s.denominator_factor(k) ** 2,
    ),
    Role(
        "eps_sum",
        "size beside the second moment it is added to at each update",
        "x q^2 (1-b^k)/(1-b)",
        _eps_sum,
    ),
    Role(
        "weight_decay",
        _weight_decay_kept,
        _weight_decay_formula,
        _weight_decay,
        takes_schedule=True,
    ),
    Role(
        "weight_decay_normalized",
        "size beside the normalised gradient",
        _by_q("x 1/q"),
        _weight_decay_normalized,
    ),
    Role(
        "weight_decay_independent",
        "decay per example",
        "1 - (1 - wd)^k",
        _weight_decay_independent,
        high=1.0,
        takes_schedule=True,
    ),
    Role("l2", "size beside the gradient", "unchanged"),
    Role(
        "gradient_norm",
        "size beside a raw gradient norm",
        _norm_formula,
        lambda s, base, k: base * s.gradient_norm_factor(k),
    ),
    Role(
        "update_norm",
        "size beside the update before the learning rate",
        "x q/d",
        lambda s, base, k: base * (s.gradient_norm_factor(k) / s.denominator_factor(k)),
    ),
    Role("period", _period_kept, "max(1, round(period/k))", _period, low=1.0),
    Role(
        "slow_step_size",
        "share of the fast weights' way that the slow ones follow",
        "unchanged",
        high=1.0 + 1e-9,
    ),
    Role("unchanged", "itself", "unchanged", low=-math.inf),
)
ROLES: dict[str, Role] = {role.name: role for role in _ROLES}


def check_decays(scaled: Scaled) -> None:
    """Raise a ``UserError`` where a decay of plain numbers is so near to 1 that float32 has 1."""
    for name, role in scaled.roles.items():
        base = scaled.values.get(name)
        if not role.is_decay or not is_number(base) or not 0 < base < 1:
            continue
        new = scaled.value(name)
        if np.float32(new) == 1:
            raise UserError(
                f"{name} {base:g} becomes 1 - {1 - new:.2g} at k = {scaled.k:.3g}, which float32"
                " rounds to 1: its average would never move; use a larger batch size, or switch"
                f" it off by rule.replace({name}=None)"
            )


def is_narrow(dtype: Any) -> bool:
    """Whether a floating type has fewer bits than float32."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits < 32


def rounded_away(roles: Mapping[str, Role], values: Mapping[str, Any], params: Any) -> list[str]:
    """Return a sentence for each value that is lost in the dtype that the moments are kept in.

    A decay may round to 1, and what is added beside a moment (eps) to 0.
    """
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(params)}
    narrow = sorted((d for d in dtypes if is_narrow(d)), key=str)
    found: list[str] = []
    for name, value in values.items():
        if name not in roles or not is_number(value):
            continue
        for dtype in narrow:
            rounded = float(np.asarray(value, dtype))
            kept = f"give {name} as a jnp.float32, or keep the parameters in float32"
            if roles[name].is_decay and value < 1 and rounded == 1:
                found.append(
                    f"{name} = {value:.6g} rounds to 1 in {dtype}, the dtype of parameters and"
                    f" moments: the average never forgets; {kept}"
                )
            elif roles[name].name.startswith("eps") and value > 0 and rounded == 0:
                found.append(
                    f"{name} = {value:.6g} rounds to 0 in {dtype}, the dtype of parameters and"
                    f" moments: nothing keeps the division from 0/0; {kept}, or use a larger {name}"
                )
    return found
