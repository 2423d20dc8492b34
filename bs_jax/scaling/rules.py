"""Scaling rules as data: what each named rule does to a learning rate, a decay, an eps."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
from typing import Any

from bs_jax.errors import UserError

# A Python float or a JAX scalar: every formula of this package serves both.
Scalar = Any


def sqrt(x: Scalar) -> Scalar:
    """Square root that keeps Python floats in double precision."""
    return math.sqrt(x) if isinstance(x, (int, float)) else x**0.5


def noise_factor(k: Scalar, phi: Scalar) -> Scalar:
    r"""How a raw per-step magnitude (Adam's v, a gradient norm) changes from batch B0 to k B0.

    ``q = sqrt((k + phi) / (k (1 + phi)))``: 1/sqrt(k) where noise dominates, 1 where signal does.

    Args:
        k: batch size over base batch size.
        phi: noise scale over base batch size, ``tr(Sigma) / (B0 |g|^2)``.

    Returns:
        q, of the type of the arguments.

    Example:
        >>> round(noise_factor(4.0, 0.0), 3), round(noise_factor(4.0, 1e9), 3)
        (1.0, 0.5)
    """
    return sqrt((k + phi) / (k * (1 + phi)))


@dataclasses.dataclass(frozen=True)
class ScalingRule:
    r"""One scaling rule, as data.

    With ``k = batch_size / base_batch_size`` and q the change of a raw magnitude::

        learning rate      x F,  F = k**lr_power, or by the optimizer's family (see ``FAMILIES``)
        decay              decay**k, so that its half-life in examples stays
        weight decay       x k**weight_decay_power, or x k/F: decay per example stays
        eps, clipping      x q

    Attributes:
        name: what the rule is called in tables.
        lr_power: exponent of k in F; ``None``: the family's own power of k and q.
        weight_decay_power: exponent of k for weight decay that is multiplied by the learning
            rate; ``None``: k/F.
        q_power: q is assumed to be ``k**q_power``; ``None``: q follows the measured noise scale.
        time_constants: whether decays, periods and other time constants keep their examples.
        own_clocks: whether what counts updates inside an optimizer (RAdam's rectification,
            Adafactor's growing decay) counts base-size ones; without, plain numbers alone change.
        invariant: whether the second moment is made what the base batch size would have shown,
            which needs no q.
        k_power: every k above is read as ``(offset k)**k_power``: one scale for all that is
            scaled, decays included.
        offset: multiplies k for every hyperparameter.
        overrides: pairs (hyperparameter, factor on its k), or (hyperparameter, None): left alone.
        origin: where the rule comes from.

    Example:
        >>> rule = RULES["sqrt"].replace(b2=None, eps=2.0)
        >>> rule.name, rule.k_of("b2", 8.0), rule.k_of("eps", 8.0), rule.k_of("b1", 8.0)
        ('sqrt[b2=off,eps=x2]', None, 16.0, 8.0)
    """

    name: str
    lr_power: float | None
    weight_decay_power: float | None = None
    q_power: float | None = None
    time_constants: bool = True
    own_clocks: bool = True
    invariant: bool = False
    k_power: float = 1.0
    offset: float = 1.0
    overrides: tuple[tuple[str, float | None], ...] = ()
    origin: str = ""

    def __post_init__(self) -> None:
        for label, value in (("offset", self.offset), *self.overrides):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value) and value > 0):
                raise UserError(
                    f"rule {self.name!r}: the factor on k for {label!r} is {value!r}; it multiplies"
                    " k, so use a positive number (1.0: as the rule says), or None to switch off"
                )

    def k_of(self, hyperparameter: str, k: Scalar) -> Scalar | None:
        """Return the k that this hyperparameter is scaled by; ``None`` if it is switched off."""
        factor = dict(self.overrides).get(hyperparameter, 1.0)
        if factor is None:
            return None
        factor = factor * self.offset
        k = k if factor == 1.0 else k * factor
        return k if self.k_power == 1.0 else k**self.k_power

    def replace(self, *, offset: float | None = None, **overrides: float | None) -> ScalingRule:
        """Return the rule with hyperparameters switched off (``None``) or offset (a factor on k).

        Args:
            offset: factor on k for every hyperparameter.
            **overrides: by hyperparameter name.

        Returns:
            A new rule whose name tells what was changed.

        Raises:
            UserError: if a factor is not positive and finite.
        """
        merged = dict(self.overrides) | overrides
        merged = {name: value for name, value in sorted(merged.items()) if value != 1.0}
        total = self.offset if offset is None else offset
        marks = [f"k=x{total:g}"] if total != 1.0 else []
        marks += [f"{n}=off" if v is None else f"{n}=x{_short(v)}" for n, v in merged.items()]
        base = self.name.split("[")[0]
        return dataclasses.replace(
            self,
            name=f"{base}[{','.join(marks)}]" if marks else base,
            offset=total,
            overrides=tuple(merged.items()),
        )

    @property
    def measures_noise(self) -> bool:
        """Whether q follows the measured noise scale."""
        return self.q_power is None

    def is_identity(self, k: Scalar) -> bool:
        """Whether the rule certainly changes nothing: k is the number 1 and nothing is offset."""
        factors = [self.offset, *(v for _, v in self.overrides if v is not None)]
        return isinstance(k, (int, float)) and k == 1 and all(f == 1.0 for f in factors)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else repr(value)


def power(exponent: float) -> ScalingRule:
    r"""Learning rate x k**exponent, with what follows from it for weight decay and eps.

    ``lr k**a, decay**k, weight decay k**(1-a), eps k**(a-1)``: 1 is the linear rule, 0.5 the
    square-root rule.

    Args:
        exponent: a.

    Returns:
        The rule.

    Raises:
        UserError: if the exponent is not finite.

    Example:
        >>> power(0.9).name
        'power(0.9)'
    """
    if not isinstance(exponent, numbers.Real) or not math.isfinite(exponent):
        raise UserError(f"power({exponent!r}): the exponent must be finite, e.g. power(0.9)")
    exponent = float(exponent)
    return ScalingRule(
        f"power({exponent:g})",
        lr_power=exponent,
        weight_decay_power=1.0 - exponent,
        q_power=exponent - 1.0,
        origin="power of k",
    )


_SHIPPED = (
    ScalingRule(
        "none",
        lr_power=0.0,
        weight_decay_power=0.0,
        q_power=0.0,
        time_constants=False,
        origin="control: hyperparameters as they are",
    ),
    dataclasses.replace(power(1.0), name="linear", origin="Goyal et al. 2017, with decays"),
    dataclasses.replace(
        power(0.5), name="sqrt", origin="Malladi et al. 2022; weight decay Compagnoni et al. 2024"
    ),
    ScalingRule("noise_aware", lr_power=None, origin="this project: k q by family, q measured"),
    ScalingRule(
        "invariant",
        lr_power=None,
        invariant=True,
        origin="this project, after Wang & Aitchison 2024: invariant second moment",
    ),
    ScalingRule(
        "seed",
        lr_power=1.0,
        weight_decay_power=1.0,
        q_power=0.0,
        own_clocks=False,
        origin="learning rate and weight decay x k: decay per epoch grows with k",
    ),
    ScalingRule(
        "seed_sqrt",
        lr_power=1.0,
        weight_decay_power=1.0,
        q_power=0.0,
        own_clocks=False,
        k_power=0.5,
        origin="as seed, with sqrt(k) in place of k everywhere",
    ),
)

RULES: dict[str, ScalingRule] = {rule.name: rule for rule in _SHIPPED}


def resolve_rule(rule: str | ScalingRule) -> ScalingRule:
    """Return the rule that a name stands for.

    Args:
        rule: a name in ``RULES``, ``"power(0.9)"``, or a rule.

    Returns:
        The rule.

    Raises:
        UserError: if there is no such rule; names the nearest.

    Example:
        >>> resolve_rule("power(0.75)").lr_power
        0.75
    """
    if isinstance(rule, ScalingRule):
        return rule
    if rule in RULES:
        return RULES[rule]
    match = re.fullmatch(r"power\(\s*([-+.\deE]+)\s*\)", str(rule))
    if match:
        try:
            return power(float(match[1]))
        except ValueError as error:
            raise UserError(f"rule {rule!r}: write a number, e.g. 'power(0.9)'") from error
    near = difflib.get_close_matches(str(rule), RULES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown rule {rule!r}: {hint}choose from {', '.join(RULES)}, power(a)")
