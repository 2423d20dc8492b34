"""explain: every hyperparameter before and after, what is kept, where the rule stops being true."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from bs_jax.errors import UserError
from bs_jax.scaling.hyperparameters import (
    Noise,
    NoiseScaleNeeded,
    Scaled,
    check_batch_sizes,
    is_number,
)
from bs_jax.scaling.noise import step_share
from bs_jax.scaling.optimizers import Recipe
from bs_jax.scaling.rules import ScalingRule, resolve_rule

COLUMNS = ("hyperparameter", "role", "base", "new", "kept", "formula", "source")

# Updates per half-life below which a moving average is hardly one.
MIN_HALF_LIFE_UPDATES = 0.5
# Updates in a run below which no rule follows the base (first epochs of the checks in the docs).
MIN_UPDATES = 100
# 1 - decay below which float32 holds it to less than two digits.
_FLOAT32_GAP = 1e-6
# Decay of the second moment below which optax's RAdam never rectifies.
RADAM_SMALLEST_DECAY = 0.6


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a rule does to one recipe.

    Attributes:
        title: one line that names the optimizer, the batch sizes and the rule.
        rows: one dict per hyperparameter with the keys in ``COLUMNS``. ``new`` is ``None`` where
            the value follows a noise scale measured while training.
        warnings: sentences; each gives the reason and the largest batch size that avoids it.
        notes: sentences on what is known before training, and what is not.
    """

    title: str
    rows: list[dict[str, Any]]
    warnings: list[str]
    notes: list[str] = dataclasses.field(default_factory=list[str])

    def to_json(self) -> str:
        """Return title, rows, warnings and notes as JSON."""
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
        below = [f"{label}: {x}" for label, found in self._sentences() for x in found]
        return "\n".join([self.title, "", *lines, *below])

    def to_markdown(self) -> str:
        """Return a Markdown table."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in self._cells()]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        lines.insert(1, "|" + " --- |" * len(COLUMNS))
        warned, noted = (
            [f"- **{label.capitalize()}:** {x}" for x in found]
            for label, found in self._sentences()
        )
        below = [*warned, *noted]
        return "\n".join([self.title, "", *lines, *(["", *below] if below else [])])

    def _sentences(self) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
        return ("warning", self.warnings), ("note", self.notes)

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
    guard: bool | None = None,
    noise_scale: float | None = None,
    roles: Mapping[str, str] | None = None,
    family: str | None = None,
    train_examples: int | None = None,
    numbers_alone: bool = True,
    **hyperparams: Any,
) -> Explanation:
    """Show what a rule does to a recipe at another batch size, without training.

    Args:
        factory: the optax factory, or its name.
        batch_size: examples per update to scale to.
        base_batch_size: examples per update that the values were tuned at.
        rule: a name, ``"power(a)"``, or a ``ScalingRule``.
        guard: whether steps grow with the batch only up to the noise scale; ``None``: as the rule
            says.
        noise_scale: gradient noise scale in examples, where it is known.
        roles: further hyperparameters -> role.
        family: of a user's own factory.
        train_examples: length of training in examples, to warn of too few updates.
        numbers_alone: whether the values may be used by themselves, in another program say:
            warns of what only ``scale_by_batch`` and the trainer do beside them.
        **hyperparams: values at the base batch size; the rest are the factory's defaults.

    Returns:
        The explanation: ``rows``, ``warnings``, ``notes``, and ``to_text()``, ``to_markdown()``,
        ``to_json()``. With a ``noise_scale`` the values are guarded, as ``scale_by_batch`` would.

    Raises:
        UserError: for invalid values or names.

    Example:
        >>> table = explain("adamw", batch_size=512, base_batch_size=64, rule="sqrt",
        ...     learning_rate=1e-3, b2=0.99)
        >>> [(row["hyperparameter"], round(row["new"], 6)) for row in table.rows][:3]
        [('learning_rate', 0.002828), ('b1', 0.430467), ('b2', 0.922745)]
    """
    check_batch_sizes(batch_size, base_batch_size)
    rule = resolve_rule(rule).replace(guard=guard)
    recipe = Recipe.of(factory, kwargs=hyperparams, roles=roles, family=family)
    recipe.invariant_moment(rule)  # raises where the rule promises what it cannot do
    if train_examples is not None and not is_number(train_examples):
        raise UserError(f"train_examples is {train_examples!r}; give a number, e.g. 60000")
    noise = None if noise_scale is None else Noise.from_scale(noise_scale, base_batch_size)
    phi = None if noise is None else noise.phi
    scaled = recipe.at(rule, batch_size / base_batch_size, noise, phi=phi)
    rows = [_row(scaled, name, base_batch_size) for name in recipe.values]
    label = ""
    if recipe.family is None:
        label = " (family unknown)"
    elif rule.lr_power is None or recipe.family.label != "exact":
        # Nothing is exact at a power of k that holds in noise or in signal alone.
        label = f" ({recipe.family.label} on the noisy quadratic)"
    title = (
        f"{recipe.optimizer.name}{label}, batch size {base_batch_size} -> {batch_size}"
        f" (k = {scaled.k:g}), rule {rule.name}"
    )
    warnings = _find_warnings(
        recipe,
        scaled,
        batch_size=batch_size,
        base_batch_size=base_batch_size,
        noise_scale=noise_scale,
        train_examples=train_examples,
        numbers_alone=numbers_alone,
    )
    return Explanation(title, rows, warnings, _notes(recipe, scaled, noise_scale, base_batch_size))


def _row(scaled: Scaled, name: str, base_batch_size: int) -> dict[str, Any]:
    base, stand_in = scaled.values[name], scaled
    if not is_number(base):
        stand_in = dataclasses.replace(scaled, values={**scaled.values, name: 1.0})
    try:
        new = stand_in.value(name)
    except NoiseScaleNeeded:
        new = None
    formula = scaled.formula(name)
    if not is_number(base):
        base = "schedule" if callable(base) else "given"
        new = None if new is None else f"{base} x {new:.6g}"
    elif base == 0:
        formula = "0 stays 0"
    return {
        "hyperparameter": name,
        "role": scaled.roles[name].name,
        "base": base,
        "new": new,
        "kept": scaled.kept(name, base_batch_size),
        "formula": formula,
        "source": scaled.rule.origin,
    }


def _find_warnings(
    recipe: Recipe,
    scaled: Scaled,
    *,
    batch_size: int,
    base_batch_size: int,
    noise_scale: float | None = None,
    train_examples: float | None = None,
    numbers_alone: bool = True,
) -> list[str]:
    """Return what to look at before training, each with the largest batch size that is safe.

    Args:
        recipe: optimizer and base values.
        scaled: the recipe under the rule at k.
        batch_size: examples per update.
        base_batch_size: examples per update that the values were tuned at.
        noise_scale: gradient noise scale in examples, where known.
        train_examples: length of training, where known.
        numbers_alone: whether the values may be used by themselves, outside ``scale_by_batch`` and
            the trainer, which do more than set them.

    Returns:
        Sentences; empty if nothing is wrong.
    """
    if scaled.k == 1:
        return []
    return [
        *_short_half_lives(scaled, base_batch_size),
        *_dtypes(scaled),
        *_radam(scaled, base_batch_size, numbers_alone),
        *_noise(scaled, batch_size, base_batch_size, noise_scale),
        *_updates(batch_size, train_examples),
        *_families(scaled),
        *_powers(scaled),
        *(_numbers_alone(recipe, scaled) if numbers_alone else []),
    ]


def _numbers_alone(recipe: Recipe, scaled: Scaled) -> list[str]:
    """Warn of what a rule promises and its numbers alone, in a plain optimizer, do not do."""
    rule, name = scaled.rule, scaled.optimizer
    rate = "learning_rate" in scaled.values and scaled.k_of("learning_rate") is not None
    found: list[str] = []
    if rate and recipe.invariant_moment(rule) is not None:
        found.append(
            f"these numbers alone do not do what rule {rule.name!r} promises: it needs the second"
            " moment as the base batch size would have shown it, which scale_by_batch and the"
            f" trainer estimate from micro-batches; for a plain {name} use rule 'sqrt'"
        )
    elif rate and scaled.noise is not None and recipe.needs_noise(rule):
        found.append(
            "these numbers hold at this noise scale alone, which grows while a model trains;"
            " scale_by_batch and the trainer measure it"
        )
    if rate and rule.measures and recipe.metric(rule) and scaled.noise is None and scaled.k > 1:
        found.append(
            "these numbers alone have no guard: beyond the noise scale their steps are too long;"
            " give noise_scale= where it is known"
        )
    if name not in ("radam", "ranger") and scaled.clock():
        found.append(
            f"{name} counts or sums over updates by itself, which these numbers do not reach:"
            " scale_by_batch and the trainer keep it on the clock of base-size updates"
        )
    if any(callable(value) for value in scaled.values.values()) and rule.time_constants:
        found.append(
            "a schedule is in updates of the base batch size: by hand divide its lengths by"
            f" k = {scaled.k:g}"
        )
    return found


def _notes(
    recipe: Recipe, scaled: Scaled, noise_scale: float | None, base_batch_size: int
) -> list[str]:
    """Say how far steps may grow: with a known noise scale, or what is not known before."""
    k, rule = scaled.k, scaled.rule
    if k <= 1 or recipe.metric(rule) is None or not (rule.measures or noise_scale is not None):
        return []
    if noise_scale is not None:
        if scaled.share == 1:
            return [f"guard: a noise scale of {noise_scale:,.0f} examples leaves k = {k:g} free"]
        return [
            f"guard: a noise scale of {noise_scale:,.0f} examples lets every step grow to"
            f" x{k * scaled.share:.3g} of the base's instead of x{k:g}; {_beyond(scaled)}"
        ]
    example = round(base_batch_size * k / 2)
    share = step_share(k, example / base_batch_size)
    return [
        "not known before training: the noise scale. It is measured while training, and the guard"
        f" lets every step grow only up to it: with noise_scale={example} to x{k * share:.3g}; the"
        f" values above are those within, x{k:g}"
    ]


def _beyond(scaled: Scaled) -> str:
    """Say what the guard does beyond the noise scale."""
    if scaled.guards_moment:
        return (
            "beyond it the second moment holds back the coordinates whose signal dominates, to"
            f" x{scaled.k**scaled.rule.guard_power:.3g} at least"
        )
    return f"the values above hold it, at x{scaled.lr_factor(scaled.k):.3g} for the learning rate"


def _limit(k: float, base_batch_size: int) -> str:
    return f"holds up to k = {k:.3g} (batch size {int(k * base_batch_size):,})"


def _short_half_lives(scaled: Scaled, base_batch_size: int) -> list[str]:
    found: list[str] = []
    for name, role in scaled.roles.items():
        base = scaled.values.get(name)
        if not role.is_decay or base is None or not is_number(base) or not 0 < base < 1:
            continue
        if not scaled.rule.time_constants or scaled.k_of(name) is None:
            continue
        half_life = math.log(0.5) / math.log(base)
        if half_life / scaled.k < MIN_HALF_LIFE_UPDATES:
            found.append(
                f"{name}: its half-life of {half_life * base_batch_size:,.0f} examples is"
                f" {half_life / scaled.k:.2g} updates, so it hardly averages any more (it becomes"
                f" {float(scaled.value(name)):.2g}; no floor holds it up);"
                f" {_limit(half_life / MIN_HALF_LIFE_UPDATES, base_batch_size)}"
            )
    return found


def _dtypes(scaled: Scaled) -> list[str]:
    found: list[str] = []
    for name, role in scaled.roles.items():
        base = scaled.values.get(name)
        if not role.is_decay or base is None:
            continue
        dtype = str(getattr(base, "dtype", ""))
        if dtype in ("bfloat16", "float16"):
            found.append(f"{name} is {dtype}, which rounds decays near 1 to 1; give a float32")
        elif is_number(base) and 0 < float(base) < 1 and 1 - scaled.value(name) < _FLOAT32_GAP:
            k = math.log1p(-_FLOAT32_GAP) / math.log(float(base))
            found.append(
                f"{name}: 1 - {name} becomes {1 - scaled.value(name):.2g}, which float32 holds"
                f" poorly; keep k at or above {k:.3g}"
            )
    return found


def _radam(scaled: Scaled, base_batch_size: int, numbers_alone: bool) -> list[str]:
    name = scaled.optimizer
    if name not in ("radam", "ranger"):
        return []
    base, new = scaled.values["b2"], scaled.value("b2")
    if not is_number(base) or not is_number(new) or new >= RADAM_SMALLEST_DECAY:
        return []
    kept = scaled.rule.own_clocks
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
    scaled: Scaled, batch_size: int, base_batch_size: int, noise_scale: float | None
) -> list[str]:
    if noise_scale is None or batch_size <= max(noise_scale, base_batch_size):
        return []
    k = max(noise_scale / base_batch_size, 1.0)
    return [
        f"batch size {batch_size:,} is past the noise scale of {noise_scale:,.0f} examples: a"
        " larger batch buys little there and learning rates near k times the base run into the"
        f" stability limit; {_limit(k, base_batch_size)}"
    ]


def _updates(batch_size: int, train_examples: float | None) -> list[str]:
    if train_examples is None or train_examples >= MIN_UPDATES * batch_size:
        return []
    return [
        f"{train_examples:,} examples are {train_examples // batch_size} updates of {batch_size:,};"
        f" under {MIN_UPDATES} no rule follows the base: use a batch size of at most"
        f" {max(train_examples // MIN_UPDATES, 1):,}"
    ]


def _families(scaled: Scaled) -> list[str]:
    family = scaled.family
    if family is None or family.label == "exact" or not scaled.rule.time_constants:
        return []
    return [f"{scaled.optimizer} is scaled approximately: {family.note}"]


def _powers(scaled: Scaled) -> list[str]:
    """Warn of a fixed power of k that no noise makes right for this optimizer."""
    rule, family = scaled.rule, scaled.family
    rate = scaled.values.get("learning_rate")
    if rule.lr_power is None or not rule.time_constants or family is None or rate is None:
        return []
    if scaled.k_of("learning_rate") is None:
        return []
    (low, high), given = family.lr_powers, rule.lr_power * rule.k_power
    if low <= given <= high:
        return []
    right = f"k^{low:g} whatever the noise" if low == high else f"k^{low:g} to k^{high:g}"
    return [
        f"learning rate x k^{given:g}: {scaled.optimizer} follows the base at"
        f" {right}; use rule 'power({high:g})', 'noise_aware' or 'invariant'"
    ]
