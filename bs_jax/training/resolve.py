"""From a recipe to a run: its hyperparameters scaled to the batch size, or the rule to apply."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from bs_jax import models, scaling
from bs_jax.recipe import (
    FixedValues,
    MeasuredWhileTraining,
    Recipe,
    ResolvedRun,
    Scaled,
    choose,
)
from bs_jax.scaling.hyperparameters import Noise
from bs_jax.training import optimizers

# Decays per update that live in the model and the trainer; the rule scales them with the others.
_MODEL_ROLES = {"bn_decay": "decay", "ema_decay": "decay"}


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
    optimizer = _optimizer(recipe, values, found)
    micro_batch_size = recipe.micro_batch_size or (
        recipe.batch_size
        if isinstance(optimizer, FixedValues)
        else default_micro_batch_size(recipe.batch_size, recipe.base_batch_size)
    )
    scaled = Scaled(
        rule=recipe.scaling.rule,
        batch_size=recipe.batch_size,
        base_batch_size=recipe.base_batch_size,
        base=base,
        values=values,
        rows=tuple(explanation.rows),
        warnings=tuple(explanation.warnings),
    )
    changed = {
        "run_id": "",
        "optimizer": optimizer,
        "micro_batch_size": micro_batch_size,
        "bn_decay": values["bn_decay"],
        "ema_decay": values["ema_decay"] if recipe.ema_decay else 0.0,
        "measures_noise": False,
        "scaled": scaled,
    }
    same = {
        field.name: getattr(recipe, field.name)
        for field in dataclasses.fields(ResolvedRun)
        if field.name not in changed
    }
    run = ResolvedRun(**same, **changed)
    return dataclasses.replace(run, run_id=run.content_id)


def explain_recipe(recipe: Recipe) -> scaling.Explanation:
    """The table of a recipe's hyperparameters before and after."""
    return scaling.explain(
        recipe.optimizer.name,
        batch_size=recipe.batch_size,
        base_batch_size=recipe.base_batch_size,
        rule=optimizers.rule_of(recipe.scaling),
        noise_scale=recipe.scaling.noise_scale or None,
        roles=_MODEL_ROLES,
        train_examples=recipe.train_examples,
        numbers_alone=False,
        **cast(Any, recipe.base_values),
    )


def default_micro_batch_size(batch_size: int, base_batch_size: int) -> int:
    """Examples per gradient sample: the base batch where the batch holds two of them, else half.

    With micro-batches of exactly the base batch the invariant second moment needs no
    extrapolation (Wang & Aitchison 2024). The largest divisor of the batch at or below the target
    is taken, so that the batch is split evenly.

    >>> default_micro_batch_size(256, 64), default_micro_batch_size(96, 64)
    (64, 48)
    """
    target = min(base_batch_size, batch_size // 2)
    return next(b for b in range(max(target, 1), 0, -1) if batch_size % b == 0)


def _optimizer(
    recipe: Recipe, values: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]
) -> FixedValues | MeasuredWhileTraining:
    """The optimizer with its numbers, where the rule knows them all before training."""
    own = recipe.optimizer
    if _measures(recipe, rows):
        return MeasuredWhileTraining(
            own.name, own.decay_mask, own.hyperparams, recipe.base_batch_size, recipe.scaling
        )
    # Defaults of the factory that the recipe does not name follow the rule as well.
    unnamed = {
        name: row["new"]
        for name, row in rows.items()
        if name not in recipe.base_values and row["new"] != row["base"]
    }
    hyperparams = {name: values[name] for name in own.hyperparams} | unnamed
    return FixedValues(own.name, own.decay_mask, hyperparams, _clock(recipe))


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
    return dict(call.clock(call.at(optimizers.rule_of(recipe.scaling), recipe.k, noise)))
