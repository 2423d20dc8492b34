"""Scaling rules and optimizer families, as data.

A rule says how hyperparameters follow ``k = batch_size / base_batch_size``. A family says how an
optimizer's update answers to the size and the noise of the gradient.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
from collections.abc import Iterable
from typing import Any, TypeAlias

from bs_jax.errors import UserError

# A Python float, or a scalar array that may be traced: every formula of this package serves both.
Scalar: TypeAlias = Any
PyTree: TypeAlias = Any


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
        guard: whether steps grow with the batch only up to the noise scale (see
            ``noise.step_share``): the measured one for rules that measure, a given
            ``noise_scale=`` for every rule.
        guard_power: a: beyond the noise scale steps grow by k**a at least: 1/2 as under the
            square-root rule, 0 not at all. Optimizers that move by the gradient's own size (SGD)
            read it as 0.
        origin: where the rule comes from.

    Example:
        >>> rule = RULES["sqrt"].replace(b2=None, eps=2.0)
        >>> rule.name, rule.overrides
        ('sqrt[b2=off,eps=x2]', (('b2', None), ('eps', 2.0)))
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
    guard: bool = True
    guard_power: float = 0.5
    origin: str = ""

    def __post_init__(self) -> None:
        for label, value in (("offset", self.offset), *self.overrides):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value) and value > 0):
                raise UserError(
                    f"rule {self.name!r}: the factor on k for {label!r} is {value!r}; it multiplies"
                    " k, so use a positive number (1.0: as the rule says), or None to switch off"
                )

    def replace(
        self,
        *,
        offset: float | None = None,
        guard: bool | None = None,
        **overrides: float | None,
    ) -> ScalingRule:
        """Return the rule with hyperparameters switched off (``None``) or offset (a factor on k).

        Args:
            offset: factor on k for every hyperparameter.
            guard: whether steps grow with the batch only up to the noise scale.
            **overrides: by hyperparameter name.

        Returns:
            A new rule whose name tells what was changed.

        Raises:
            UserError: if a factor is not positive and finite.
        """
        merged = dict(self.overrides) | overrides
        merged = {name: value for name, value in sorted(merged.items()) if value != 1.0}
        total = self.offset if offset is None else offset
        guarded = self.guard if guard is None else bool(guard)
        marks = [f"k=x{total:g}"] if total != 1.0 else []
        base = self.name.split("[")[0]
        if guarded != (RULES[base].guard if base in RULES else True):
            marks.append(f"guard={'on' if guarded else 'off'}")
        marks += [f"{n}=off" if v is None else f"{n}=x{_short(v)}" for n, v in merged.items()]
        return dataclasses.replace(
            self,
            name=f"{base}[{','.join(marks)}]" if marks else base,
            offset=total,
            overrides=tuple(merged.items()),
            guard=guarded,
        )

    @property
    def reads_middle(self) -> bool:
        """Whether an update reads schedules at the middle of the base-size ones it stands for.

        Rules that change plain numbers alone leave schedules as a user by hand would have them.
        """
        return self.time_constants and self.own_clocks

    @property
    def measures(self) -> bool:
        """Whether the rule reads micro-batch statistics: for q, the second moment or the guard."""
        return self.lr_power is None


def _short(value: object) -> str:
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


_RULES = (
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
        guard=False,
        origin="learning rate and weight decay x k: decay per epoch grows with k",
    ),
    ScalingRule(
        "seed_sqrt",
        lr_power=1.0,
        weight_decay_power=1.0,
        q_power=0.0,
        own_clocks=False,
        k_power=0.5,
        guard=False,
        origin="as seed, with sqrt(k) in place of k everywhere",
    ),
)

RULES: dict[str, ScalingRule] = {rule.name: rule for rule in _RULES}
"""The rules by name."""


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
    raise UserError(f"unknown rule {rule!r}{nearest(str(rule), RULES)}, power(a)")


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return the end of a message about an unknown word: the nearest choice, then all of them."""
    choices = list(choices)
    near = [choice for choice in choices if choice.lower() == word.lower()]
    near = near or difflib.get_close_matches(word, choices, n=1, cutoff=0.4)
    hint = f": did you mean {near[0]!r}? " if near else ": "
    return f"{hint}choose from {', '.join(choices)}"


@dataclasses.dataclass(frozen=True)
class Family:
    """How an optimizer's update answers to the size and the noise of the gradient.

    Attributes:
        name: for tables.
        denominator: what the update is divided by: ``"none"``, ``"raw"`` (magnitude of the step's
            own gradient), ``"sum"`` (squares summed over steps), ``"centered"`` (variance).
        normalized: whether the update is normalised once more afterwards, so that F = k.
        second_moment: how the optimizer keeps it: ``"ema"``, ``"sum"``, ``"layer"`` (one number a
            leaf), ``"factored"``; about an average of the gradient as ``"centered"`` (squared
            errors) or ``"centered_raw"`` (squares, less the squared average). These can be made
            invariant; ``"max"`` or ``"none"`` cannot.
        trace_after_lr: whether momentum is taken after the learning rate.
        metric: in which the noise scale that limits its steps is measured: ``"plain"``,
            ``"coordinate"`` or ``"layer"`` (see ``noise.sample``); ``None``: it takes no steps.
        guards_moment: whether a guard can act coordinate by coordinate, in an invariant second
            moment that alone sets the length of the step; elsewhere it holds the rate back.
        label: ``"exact"`` or ``"approximate"``, as the noisy quadratic shows.
        note: what a user should know.
        can_be_invariant: whether the second moment can be made that of the base batch size.
    """

    name: str
    denominator: str = "none"
    normalized: bool = False
    second_moment: str = "none"
    trace_after_lr: bool = False
    metric: str | None = "coordinate"
    guards_moment: bool = False
    label: str = "exact"
    note: str = ""
    can_be_invariant: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "can_be_invariant", self.second_moment not in ("max", "none"))

    @property
    def moves_by_size(self) -> bool:
        """Whether a gradient twice as large moves the parameters twice as far, as in SGD."""
        return self.denominator == "none" and not self.normalized

    @property
    def lr_formula(self) -> str:
        """F, the factor on the learning rate when q is measured."""
        if self.normalized:
            return "k"
        return {"none": "k", "raw": "k q", "sum": "sqrt(k) q", "centered": "sqrt(k) c"}[
            self.denominator
        ]

    @property
    def lr_powers(self) -> tuple[float, float]:
        """F as a power of k: where noise dominates, and where signal does."""
        if self.normalized:
            return 1.0, 1.0
        return {"none": (1.0, 1.0), "raw": (0.5, 1.0), "sum": (0.0, 0.5), "centered": (0.5, 0.5)}[
            self.denominator
        ]


_FAMILIES = (
    Family("linear", metric="plain", note="linear in the gradient"),
    Family(
        "adam",
        "raw",
        second_moment="ema",
        guards_moment=True,
        note="filtered gradient / root of second moment",
    ),
    Family("rmsprop", "raw", second_moment="ema", guards_moment=True, trace_after_lr=True),
    Family(
        "centered",
        "centered",
        second_moment="centered",
        guards_moment=True,
        note="divides by the spread about its own average: the batch's noise, and that one's lag",
    ),
    Family(
        "centered_rmsprop",
        "centered",
        second_moment="centered_raw",
        guards_moment=True,
        trace_after_lr=True,
        note="the lag of its average behind a moving gradient counts as spread, beside the noise",
    ),
    Family(
        "amsgrad",
        "raw",
        second_moment="ema",
        label="approximate",
        note="the largest of many noisy second moments depends on how many there were",
    ),
    Family(
        "adamax",
        "raw",
        second_moment="max",
        label="approximate",
        note="the largest of many noisy gradients depends on how many there were",
    ),
    Family("normalized_adam", "raw", normalized=True, second_moment="ema"),
    Family(
        "sign",
        normalized=True,
        note="the mixing weight is solved to keep signal to noise, which ends at 0 for large k",
    ),
    Family(
        "muon",
        "raw",
        normalized=True,
        second_moment="ema",
        metric="layer",
        label="approximate",
        note="Nesterov's raw share of the gradient is no time constant",
    ),
    Family("lars", "raw", trace_after_lr=True, metric="layer"),
    Family("adagrad", "sum", second_moment="sum"),
    Family("adafactor", "raw", second_moment="factored", guards_moment=True, trace_after_lr=True),
    Family("novograd", "raw", second_moment="layer", guards_moment=True, metric="layer"),
    Family("wrapper", metric=None, note="has no learning rate of its own"),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}
"""The families of optimizers by name: how their update answers to the gradient's size."""
