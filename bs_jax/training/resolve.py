"""From a recipe to a run: its hyperparameters scaled to the batch size, or the rule to apply."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

from bs_jax import models, scaling
from bs_jax.errors import UserError
from bs_jax.recipe import BatchRamp, Recipe
from bs_jax.run import FixedValues, ResolvedRun, Scaled, ScaledWhileTraining
from bs_jax.scaling.hyperparameters import Noise
from bs_jax.schema import choose
from bs_jax.training import optimizers


def resolve_recipe(recipe: Recipe) -> ResolvedRun:
    """Scale a recipe from its base batch size to its batch size and freeze the outcome as a run.

    A rule whose factors are known before training leaves plain numbers. So two recipes that come
    to the same numbers (under every rule at k = 1, say) are one run with one id.

    Args:
        recipe: the recipe.

    Returns:
        The run. Nothing in it depends on the machine that will train it.

    Raises:
        UserError: an unknown model, optimizer or rule, or numbers that cannot be.
    """
    choose("config.model.name", recipe.model.name, models.names())
    choose("config.optimizer.name", recipe.optimizer.name, optimizers.names())
    explanation = explain_recipe(recipe)
    base = recipe.base_values
    found = {row["hyperparameter"]: row for row in explanation.rows}
    values = {name: found[name]["new"] if name in found else old for name, old in base.items()}
    measures, ramp = _measures(recipe, found), _resolved_ramp(recipe)
    optimizer = _optimizer(
        recipe, values, found, scaled_while_training=measures or ramp.kind != "off"
    )
    compares = measures or ramp.kind == "noise"  # gradients within a batch
    # A micro-batch stays as it is while the batch grows, and BatchNorm's groups with it.
    sizes = [size for _, size in ramp.stages]
    common = ramp.start or math.gcd(*sizes) or recipe.batch_size
    micro_batch_size = recipe.micro_batch_size or (
        default_micro_batch_size(common, recipe.base_batch_size, recipe.ghost_batch_size)
        if compares
        else common
    )
    decays = base if ramp.kind != "off" else values  # a ramp scales them with the size in force
    scaled = Scaled(
        rule=recipe.scaling.rule,
        batch_size=recipe.batch_size,
        base_batch_size=recipe.base_batch_size,
        base=base,
        values=values,
        rows=tuple(explanation.rows),
        warnings=tuple(explanation.warnings),
    )
    changed: dict[str, Any] = {
        "run_id": "",
        "optimizer": optimizer,
        "micro_batch_size": micro_batch_size,
        "bn_decay": decays["bn_decay"],
        "ema_decay": decays.get("ema_decay", 0.0),
        "measures_noise": False,
        "batch_ramp": ramp,
        "scaled": scaled,
    }
    same = {
        field.name: getattr(recipe, field.name)
        for field in dataclasses.fields(ResolvedRun)
        if field.name not in changed
    }
    run = ResolvedRun(**same, **changed)
    if ramp.kind == "noise" and not optimizers.keeps_noise(run):
        raise UserError(
            f"config.batch_ramp.kind is 'noise', but rule {recipe.scaling.rule!r} with "
            f"{recipe.optimizer.name} keeps no noise scale to follow; use rule 'noise_aware', or "
            "kind 'stages' with sizes of your own"
        )
    if compares and ramp.kind != "off":
        run.check_two_micro_batches(f"batch_ramp {ramp.kind!r} with rule {recipe.scaling.rule!r}")
    return dataclasses.replace(run, run_id=run.content_id)


def explain_recipe(recipe: Recipe) -> scaling.Explanation:
    """The table of a recipe's hyperparameters before and after."""
    return scaling.explain(
        recipe.optimizer.name,
        batch_size=recipe.batch_size,
        base_batch_size=recipe.base_batch_size,
        rule=optimizers.rule_of(recipe.scaling),
        noise_scale=recipe.scaling.noise_scale or None,
        roles=optimizers.MODEL_ROLES,
        train_examples=recipe.train_examples,
        numbers_alone=False,
        **cast(Any, recipe.base_values),
    )


def default_micro_batch_size(
    batch_size: int, base_batch_size: int, ghost_batch_size: int = 0
) -> int:
    """Examples per gradient sample: the base batch where the batch holds two of them, else half.

    With micro-batches of exactly the base batch the invariant second moment needs no
    extrapolation (Wang & Aitchison 2024). The largest divisor of the batch at or below the target
    is taken, so that the batch is split evenly; of those that hold whole ghost batches, if any.

    Args:
        batch_size: examples per update.
        base_batch_size: examples per update that the recipe was tuned at.
        ghost_batch_size: examples that BatchNorm normalises together; 0: a whole micro-batch.

    >>> default_micro_batch_size(256, 64), default_micro_batch_size(96, 64)
    (64, 48)
    >>> default_micro_batch_size(96, 64, ghost_batch_size=32)
    32
    """
    target = max(min(base_batch_size, batch_size // 2), 1)
    divisors = [size for size in range(target, 0, -1) if batch_size % size == 0]
    whole = [size for size in divisors if ghost_batch_size and size % ghost_batch_size == 0]
    return (whole or divisors)[0]


def _resolved_ramp(recipe: Recipe) -> BatchRamp:
    """The ramp with its defaults filled in; without the fields that its kind does not read."""
    given = recipe.batch_ramp
    if given.kind == "stages":
        return BatchRamp("stages", given.stages)
    if given.kind == "off":
        return BatchRamp()
    return dataclasses.replace(
        given,
        stages=(),
        start=given.start or recipe.base_batch_size,
        every_examples=given.every_examples or recipe.log_every_examples,
    )


def _optimizer(
    recipe: Recipe,
    values: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, Any]],
    *,
    scaled_while_training: bool,
) -> FixedValues | ScaledWhileTraining:
    """The optimizer with its numbers, where the rule knows them all before training."""
    own = recipe.optimizer
    if scaled_while_training:
        return ScaledWhileTraining(
            own.name, own.decay_mask, own.hyperparams, recipe.base_batch_size, recipe.scaling
        )
    # Defaults of the factory that the recipe does not name follow the rule as well.
    unnamed = {
        name: row["new"]
        for name, row in rows.items()
        if name not in recipe.base_values and row["new"] != row["base"]
    }
    hyperparams = {name: values[name] for name in own.hyperparams} | unnamed
    middle = optimizers.rule_of(recipe.scaling).reads_middle
    ahead = (recipe.batch_size - recipe.base_batch_size) / 2 if middle else 0.0
    return FixedValues(own.name, own.decay_mask, hyperparams, _clock(recipe), ahead)


def _measures(recipe: Recipe, rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether some factor, or the second moment itself, comes from the gradients of each step."""
    rule, call = optimizers.rule_of(recipe.scaling), optimizers.call_of(recipe.optimizer)
    if call.at(rule, recipe.k).is_identity:
        return False
    return call.invariant_moment(rule) is not None or any(
        row["new"] is None for row in rows.values()
    )


def _clock(recipe: Recipe) -> dict[str, Any]:
    """Further arguments of optimizers that count updates internally; none where k is 1."""
    noise_scale, base = recipe.scaling.noise_scale, recipe.base_batch_size
    noise = Noise.from_scale(noise_scale, base) if noise_scale else None
    call = optimizers.call_of(recipe.optimizer)
    phi = noise.phi if noise else None  # the guard shortens what the clock multiplies, too
    return call.at(optimizers.rule_of(recipe.scaling), recipe.k, noise, phi=phi).clock()
