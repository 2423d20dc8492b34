"""From a recipe to its optimizer: scaled hyperparameters, the optax factory, what it reports."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bs_jax import scaling
from bs_jax.scaling.hyperparameters import Noise
from bs_jax.scaling.optimizers import Recipe, registered
from bs_jax.training.state import TrainState

# Decays per update that live in the model and the trainer; the rule scales them with the others.
_MODEL_ROLES = {"bn_decay": "decay", "ema_decay": "decay"}


@dataclasses.dataclass(frozen=True)
class ScaledRecipe:
    """Every hyperparameter of a recipe before and after.

    Attributes:
        base: as the recipe has them.
        values: for the batch size in use; None where the value is found while training.
        defaults: new values of the factory's defaults that the rule changes and the recipe does
            not name.
        clock: keywords by which the optimizer's own clock counts base-size updates, or None.
        rule_while_training: whether the optimizer applies the rule itself, step by step.
        rows: the explanation, a dict a hyperparameter.
        warnings: where the rule stops being true.
    """

    base: dict[str, Any]
    values: dict[str, Any]
    defaults: dict[str, Any]
    clock: dict[str, Any] | None
    rule_while_training: bool
    rows: list[dict[str, Any]]
    warnings: list[str]


def names() -> tuple[str, ...]:
    """The optimizers that a config may name: optax factories whose hyperparameters are known."""
    return tuple(
        sorted(
            name
            for name, factory in registered().items()
            if "learning_rate" in inspect.signature(factory).parameters
        )
    )


def scalable_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The hyperparameters of a recipe that a rule may scale."""
    return (*config["optimizer"]["hyperparams"], *_MODEL_ROLES)


def rule_of(config: Mapping[str, Any]) -> scaling.ScalingRule:
    """The scaling rule of a config, with its switches and offsets."""
    settings = config["scaling"]
    overrides: dict[str, float | None] = {
        name: float(factor) for name, factor in settings["offsets"]
    }
    overrides |= dict.fromkeys(settings["off"])
    return scaling.resolve_rule(settings["rule"]).replace(
        offset=float(settings["offset"]), **overrides
    )


def scale_recipe(config: Mapping[str, Any]) -> ScaledRecipe:
    """Scale a recipe's hyperparameters from its base batch size to its batch size.

    Args:
        config: a recipe (nested mapping).

    Returns:
        The values before and after, with the reasons.

    Raises:
        UserError: a value, a rule or a batch size that cannot be.
    """
    explanation = explain_recipe(config)
    base = _base_values(config)
    rule_while_training = _found_while_training(config, explanation.rows)
    values = {row["hyperparameter"]: row["new"] for row in explanation.rows}
    unnamed = (row for row in explanation.rows if row["hyperparameter"] not in base)
    return ScaledRecipe(
        base=base,
        values={name: values.get(name, value) for name, value in base.items()},
        defaults={
            row["hyperparameter"]: row["new"] for row in unnamed if row["new"] != row["base"]
        },
        clock=None if rule_while_training else _clock(config),
        rule_while_training=rule_while_training,
        rows=explanation.rows,
        warnings=list(explanation.warnings),
    )


def explain_recipe(config: Mapping[str, Any]) -> scaling.Explanation:
    """The table of a recipe's hyperparameters before and after."""
    return scaling.explain(
        config["optimizer"]["name"],
        batch_size=config["batch_size"],
        base_batch_size=config["base_batch_size"],
        rule=rule_of(config),
        noise_scale=config["scaling"]["noise_scale"] or None,
        roles=_MODEL_ROLES,
        train_examples=config["train_examples"],
        numbers_alone=False,
        **_base_values(config),
    )


def _base_values(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {**config["optimizer"]["hyperparams"], "bn_decay": config["bn_decay"]}
    if config["ema_decay"]:
        values["ema_decay"] = config["ema_decay"]
    return values


def _found_while_training(config: Mapping[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether some factor, or the second moment itself, comes from the gradients of each step."""
    rule, recipe = rule_of(config), recipe_of(config)
    if recipe.at(rule, config["batch_size"] / config["base_batch_size"]).is_identity:
        return False
    return recipe.invariant_moment(rule) is not None or any(row["new"] is None for row in rows)


def _clock(config: Mapping[str, Any]) -> dict[str, Any] | None:
    base, noise_scale = config["base_batch_size"], config["scaling"]["noise_scale"]
    recipe = recipe_of(config)
    scaled = recipe.at(
        rule_of(config),
        config["batch_size"] / base,
        Noise.from_scale(noise_scale, base) if noise_scale else None,
    )
    return recipe.clock(scaled) or None


def recipe_of(config: Mapping[str, Any]) -> Recipe:
    """What a config's optimizer and its hyperparameters mean to the rules."""
    return Recipe.of(config["optimizer"]["name"], kwargs=config["optimizer"]["hyperparams"])


def traced_values(config: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that a compiled program takes as arguments, by name."""
    values = {
        name: value
        for name, value in config["optimizer"]["hyperparams"].items()
        if not isinstance(value, bool)
    }
    clock = {f"clock.{name}": value for name, value in _clock_in(config).items()}
    return values | clock | {"bn_decay": config["bn_decay"], "ema_decay": config["ema_decay"]}


def _clock_in(config: Mapping[str, Any]) -> Mapping[str, float]:
    return config["scaling"].get("clock", {})


def cohort_key(config: Mapping[str, Any]) -> str:
    """What a compiled program depends on: runs with equal keys can share one.

    Everything in the config except the seed and the values of `traced_values` (of which only
    presence counts, and of the EMA whether it is on).
    """
    static = json.loads(json.dumps(dict(config)))
    for name in ("seed", "name", "title", "report", "tensorboard", "bn_decay"):
        static.pop(name)
    static["ema_decay"] = bool(config["ema_decay"])
    static["optimizer"]["hyperparams"] = {
        name: value if isinstance(value, bool) else "traced"
        for name, value in config["optimizer"]["hyperparams"].items()
    }
    if _clock_in(config):
        static["scaling"]["clock"] = "traced"
    return json.dumps(static, sort_keys=True)


def make_optimizer(
    config: Mapping[str, Any], hyperparams: Mapping[str, jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """Build the optimizer of a resolved run, with its hyperparameters as (traced) arrays.

    Args:
        config: a resolved run's config.
        hyperparams: name -> float32 scalar, as in `traced_values`.

    Returns:
        A transformation whose `update` takes ``microbatch=`` (and needs it where the rule works
        while training).
    """
    shape = schedule_shape(config)
    kwargs: dict[str, Any] = {
        name: value if isinstance(value, bool) else hyperparams[name]
        for name, value in config["optimizer"]["hyperparams"].items()
    }
    if config["optimizer"]["decay_mask"] == "kernels":
        kwargs["mask"] = _kernels
    # Schedules count updates: of the batch size in use, or of the base's under scale_by_batch.
    fixed = config["scaling"]["rule"] == "fixed"
    size = config["batch_size"] if fixed else config["base_batch_size"]
    for name, role in recipe_of(config).roles.items():
        if name in kwargs and role.name in ("learning_rate", "divided_learning_rate"):
            kwargs[name] = lambda count, peak=kwargs[name]: peak * shape(count * size)
    if fixed:
        clock = {name: hyperparams[f"clock.{name}"] for name in _clock_in(config)}
        return Recipe.of(config["optimizer"]["name"], kwargs=kwargs).build({}, clock)
    return scaling.scale_by_batch(
        config["optimizer"]["name"],
        batch_size=config["batch_size"],
        base_batch_size=config["base_batch_size"],
        rule=rule_of(config),
        noise_scale=config["scaling"]["noise_scale"] or None,
    )(**kwargs)


def _kernels(params: Any) -> Any:
    """Mark what is weight-decayed: all but biases and BatchNorm's parameters, by their names."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), params)


def schedule_shape(config: Mapping[str, Any]) -> Callable[[Any], jax.Array]:
    """The learning rate over its peak, as a function of examples seen.

    Args:
        config: with ``schedule`` and ``train_examples``.

    Returns:
        examples (int or float scalar) -> float32 scalar in [0, 1]. Linear warm-up from 0; flat;
        then by name: "constant", "linear" or "flat_cosine" to the final fraction.

    >>> schedule = {"name": "flat_cosine", "warmup_examples": 0, "flat_fraction": 0.0,
    ...             "final_fraction": 0.0}
    >>> shape = schedule_shape({"schedule": schedule, "train_examples": 1000})
    >>> [round(float(shape(examples)), 3) for examples in (0, 500, 1000)]
    [1.0, 0.5, 0.0]
    """
    schedule, total = config["schedule"], config["train_examples"]
    warmup, final = schedule["warmup_examples"], schedule["final_fraction"]
    start = max(schedule["flat_fraction"] * total, warmup)

    def shape(examples: Any) -> jax.Array:
        seen = jnp.asarray(examples, jnp.float32)
        progress = jnp.clip((seen - start) / max(total - start, 1), 0.0, 1.0)
        if schedule["name"] == "constant":
            left = jnp.ones(())
        elif schedule["name"] == "linear":
            left = 1 - progress
        else:
            left = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        value = final + (1 - final) * left
        return value * jnp.minimum(seen / warmup, 1.0) if warmup else value

    return shape


def metrics(
    config: Mapping[str, Any],
    hyperparams: Mapping[str, jax.Array],
    state: TrainState,
    opt_state: Any,
) -> dict[str, jax.Array]:
    """What the optimizer shows of an update: the learning rate, and the noise scale if measured.

    Args:
        config: a resolved run's config.
        hyperparams: its arrays.
        state: before the update.
        opt_state: after it.
    """
    if config["scaling"]["rule"] == "fixed":
        rate = hyperparams["learning_rate"] * schedule_shape(config)(state.examples)
        return {"optim/learning_rate": rate}
    in_force = scaling.hyperparams(opt_state)
    return {f"optim/{name}": jnp.asarray(value, jnp.float32) for name, value in in_force.items()}
