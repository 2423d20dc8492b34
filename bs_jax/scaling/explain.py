"""explain: every hyperparameter before and after, what is kept, where the rule stops being true."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from bs_jax.errors import UserError
from bs_jax.scaling.cautions import DECAYS, find_warnings
from bs_jax.scaling.formulas import Noise, NoiseScaleNeeded, Scaler, named_values
from bs_jax.scaling.roles import ROLES, Spec, factory_name, fill_implied, resolve, resolve_factory
from bs_jax.scaling.rules import ScalingRule, resolve_rule
from bs_jax.scaling.values import check_batch_sizes, check_value, is_number

COLUMNS = ("hyperparameter", "role", "base", "new", "kept", "formula", "source")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a rule does to one recipe.

    Attributes:
        title: one line that names the optimizer, the batch sizes and the rule.
        rows: one dict per hyperparameter with the keys in ``COLUMNS``. ``new`` is ``None`` where
            the value follows a noise scale measured while training.
        warnings: sentences; each gives the reason and the largest batch size that avoids it.
    """

    title: str
    rows: list[dict[str, Any]]
    warnings: list[str]

    def to_json(self) -> str:
        """Return title, rows and warnings as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def to_text(self) -> str:
        """Return an aligned table for a terminal."""
        cells = self._cells()
        widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.title, "", *lines, *(f"warning: {w}" for w in self.warnings)])

    def to_markdown(self) -> str:
        """Return a Markdown table."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in self._cells()]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        lines.insert(1, "|" + " --- |" * len(COLUMNS))
        warned = ["", *(f"- **Warning:** {w}" for w in self.warnings)] if self.warnings else []
        return "\n".join([self.title, "", *lines, *warned])

    def _cells(self) -> list[list[str]]:
        body = [[_text(row[column]) for column in COLUMNS] for row in self.rows]
        return [list(COLUMNS), *body]


def _text(value: Any) -> str:
    if value is None:
        return "measured"
    return f"{value:.6g}" if is_number(value) else str(value)


def explain(
    factory: Callable[..., Any] | str,
    *,
    batch_size: int,
    base_batch_size: int,
    rule: str | ScalingRule = "invariant",
    noise_scale: float | None = None,
    roles: Mapping[str, str] | None = None,
    family: str | None = None,
    train_examples: int | None = None,
    numbers_alone: bool = True,
    **hyperparams: Any,
) -> Explanation:
    """Tell what a rule makes of a recipe at another batch size: no training, no arrays.

    Args:
        factory: the optax factory, or its name.
        batch_size: examples per update to scale to.
        base_batch_size: examples per update that the values were tuned at.
        rule: a name, ``"power(a)"``, or a ``ScalingRule``.
        noise_scale: gradient noise scale in examples, where it is known.
        roles: further hyperparameters -> role.
        family: of a user's own factory.
        train_examples: length of training in examples, to warn of too few updates.
        numbers_alone: whether the values may be used by themselves, in another program say:
            warns of what only ``scale_by_batch`` and the trainer keep.
        **hyperparams: values at the base batch size; the rest are the factory's defaults.

    Returns:
        The explanation: ``rows``, ``warnings``, ``to_text()``, ``to_markdown()``, ``to_json()``.

    Raises:
        UserError: for invalid values or names.

    Example:
        >>> table = explain("adamw", batch_size=512, base_batch_size=64, rule="sqrt",
        ...     learning_rate=1e-3, b2=0.99)
        >>> [(row["hyperparameter"], round(row["new"], 6)) for row in table.rows][:3]
        [('learning_rate', 0.002828), ('b1', 0.430467), ('b2', 0.922745)]
    """
    check_batch_sizes(batch_size, base_batch_size)
    factory, rule = resolve_factory(factory), resolve_rule(rule)
    values = named_values(factory, hyperparams, roles)
    spec = resolve(factory, values, roles, family)
    values = {n: value for n, value in fill_implied(values, spec).items() if n in spec.roles}
    for name, value in values.items():
        check_value(name, spec.roles[name], value)
    values = {name: value for name, value in values.items() if value is not None}
    if train_examples is not None and not is_number(train_examples):
        raise UserError(f"train_examples is {train_examples!r}; give a number, e.g. 60000")
    noise = None if noise_scale is None else Noise.from_scale(noise_scale, base_batch_size)
    scaler = Scaler(rule, spec, values, batch_size / base_batch_size, noise)
    rows = [_row(scaler, name, base_batch_size, batch_size) for name in values]
    label = ""
    if spec.family is None:
        label = " (family unknown)"
    elif rule.lr_power is None or spec.family.label != "exact":
        # Nothing is exact at a power of k that holds in noise or in signal alone.
        label = f" ({spec.family.label})"
    title = (
        f"{factory_name(factory)}{label}, batch size {base_batch_size} -> {batch_size}"
        f" (k = {scaler.k:g}), rule {rule.name}"
    )
    warnings = find_warnings(
        scaler,
        batch_size=batch_size,
        base_batch_size=base_batch_size,
        noise_scale=noise_scale,
        train_examples=train_examples,
        numbers_alone=numbers_alone,
    )
    return Explanation(title, rows, warnings)


def _row(scaler: Scaler, name: str, base_batch_size: int, batch_size: int) -> dict[str, Any]:
    base, role = scaler.values[name], scaler.spec.roles[name]
    stand_in = scaler
    if not is_number(base):
        stand_in = dataclasses.replace(scaler, values={**scaler.values, name: 1.0})
    try:
        new = stand_in.value(name)
    except NoiseScaleNeeded:
        new = None
    switched_off = scaler.rule.k_of(name, scaler.k) is None
    formula = "switched off" if switched_off else _with_power(scaler.rule, _formula(scaler, role))
    if not is_number(base):
        base = "schedule" if callable(base) else "given"
        new = None if new is None else f"{base} x {new:.6g}"
    if isinstance(base, (int, float)) and base == 0:
        formula = "0 stays 0"
    return {
        "hyperparameter": name,
        "role": role,
        "base": base,
        "new": new,
        "kept": "nothing" if switched_off else _kept(scaler, name, base, new, base_batch_size),
        "formula": formula,
        "source": scaler.rule.origin,
    }


def _formula(scaler: Scaler, role: str) -> str:
    rule, spec = scaler.rule, scaler.spec
    formula = ROLES[role].formula
    if not rule.time_constants and rule.lr_power == 0:
        return "unchanged"
    factor, q = _factor_names(rule, spec)
    if role == "learning_rate":
        momentum = any(
            r == "undamped_momentum" and scaler.values.get(n) is not None
            for n, r in spec.roles.items()
        )
        return f"x {factor}" + (" (1 - d^k)/(1 - d)" if momentum else "")
    if role == "weight_decay":
        if rule.weight_decay_power is not None:
            return _power("x k", rule.weight_decay_power)
        return {"k": "unchanged", "k q": "x 1/q"}.get(factor, f"x k/({factor})")
    if role in ("eps", "eps_root", "weight_decay_normalized", "gradient_norm"):
        if q == "1" and role != "gradient_norm":
            return "unchanged"
        return formula.replace("q", f"({q})" if "^" in q else q)
    return formula


def _with_power(rule: ScalingRule, formula: str) -> str:
    """The formula of a rule that reads k**k_power wherever others read k."""
    if rule.k_power == 1:
        return formula
    scale = f"k^{rule.k_power:g}"
    return re.sub(r"\bk\b", f"({scale})" if "^" in formula else scale, formula)


def _power(prefix: str, exponent: float) -> str:
    if exponent == 0:
        return "unchanged"
    return prefix if exponent == 1 else f"{prefix}^{exponent:g}"


def _factor_names(rule: ScalingRule, spec: Spec) -> tuple[str, str]:
    family = spec.family
    if rule.lr_power is not None:
        q_power = 0.0 if rule.q_power is None else rule.q_power
        q = "1" if q_power == 0 else f"k^{q_power:g}"
        factor = {0.0: "1", 1.0: "k"}.get(rule.lr_power, f"k^{rule.lr_power:g}")
        return factor, q
    if family is None:
        return "F", "q"
    if rule.invariant and family.can_be_invariant:
        return "k", "1"
    return family.lr_formula, {"centered": "c", "sum": "q k^-0.5"}.get(family.denominator, "q")


def _movement(power: float, spec: Spec) -> str:
    """What a fixed power of k keeps of the movement per example."""
    kept = ROLES["learning_rate"].kept
    if spec.family is None:
        return kept
    noise, signal = spec.family.lr_powers
    if not noise <= power <= signal:
        return f"nothing: {kept} changes at any noise"
    if noise == signal:
        return kept
    ends = {noise: ", where noise dominates", signal: ", where signal dominates"}
    return kept + ends.get(power, ", where noise and signal are alike")


def _kept(scaler: Scaler, name: str, base: Any, new: Any, base_batch_size: int) -> str:
    role = scaler.spec.roles[name]
    rule = scaler.rule
    if role in DECAYS:
        if not is_number(base) or not 0 < base < 1:
            return ROLES[role].kept
        half_life = math.log(0.5) / math.log(base) * base_batch_size
        if not rule.time_constants or rule.k_power != 1:
            return f"nothing: half-life {half_life:,.0f} examples before"
        return f"half-life {half_life:,.0f} examples"
    if role == "learning_rate" and rule.time_constants and rule.lr_power is not None:
        return _movement(rule.lr_power * rule.k_power, scaler.spec)
    if rule.lr_power is not None and rule.weight_decay_power is not None:
        if not rule.time_constants:
            return "the number itself"
        if role == "weight_decay" and (rule.lr_power + rule.weight_decay_power) * rule.k_power != 1:
            return "nothing: decay per example grows with k"
    if role == "weight_decay":
        lr = scaler.values.get("learning_rate")
        if is_number(lr) and is_number(base):
            return f"decay {lr * base / base_batch_size:.3g} per example"
    if role == "period" and is_number(base) and is_number(new) and rule.k_power == 1:
        now = new * scaler.k * base_batch_size
        return f"{base * base_batch_size:,.0f} examples (now {now:,.0f})"
    return ROLES[role].kept
