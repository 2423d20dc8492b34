"""The optimizer of a run, built from its hyperparameters as arrays, and what it reports.

There are two ways, and both are the library's. A rule is data of the program: it decides what is
traced. So a rule that measures is compiled in, by `scale_by_batch`. A rule that knows its numbers
before training leaves nothing but numbers, computed once in double precision. They are arguments of
the program: runs under any such rule share one compiled program, are one run where their numbers
agree, and keep the state of the plain optax optimizer in their checkpoints. Sent through
`scale_by_batch`, each rule would be a program of its own.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bs_jax import scaling
from bs_jax.recipe import Optimizer, Scaling, Schedule
from bs_jax.run import FixedValues, ResolvedRun, ScaledWhileTraining
from bs_jax.scaling import optimizers as library
from bs_jax.scaling.transform import build
from bs_jax.training.state import TrainState

# Decays per update that live in the model and the trainer; the rule scales them with the others.
MODEL_ROLES = {"bn_decay": "decay", "ema_decay": "decay"}


def names() -> tuple[str, ...]:
    """The optimizers that a config may name: optax factories whose hyperparameters are known."""
    known = library.registered().items()
    return tuple(sorted(name for name, factory in known if _has_a_learning_rate(factory)))


@functools.cache  # reading two dozen signatures took 40 % of the time to resolve a run
def _has_a_learning_rate(factory: library.Factory) -> bool:
    return "learning_rate" in inspect.signature(factory).parameters


def rule_of(settings: Scaling) -> scaling.ScalingRule:
    """The scaling rule of a recipe, with its switches and offsets."""
    overrides: dict[str, Any] = {name: float(factor) for name, factor in settings.offsets}
    overrides |= dict.fromkeys(settings.off)
    overrides["guard"] = None if settings.guard else False  # None: as the rule says
    return scaling.resolve_rule(settings.rule).replace(offset=float(settings.offset), **overrides)


def call_of(optimizer: Optimizer) -> library.Recipe:
    """The library's view of an optimizer: what each of its arguments means to the rules."""
    return library.Recipe.of(optimizer.name, kwargs=optimizer.hyperparams)


def traced_values(run: ResolvedRun, batch_size: int | None = None) -> Mapping[str, float]:
    """The numbers that a compiled program takes as arguments, by name.

    Args:
        run: the run.
        batch_size: examples per update, of a run whose batch ramps; the run's by default.
    """
    values = {n: v for n, v in run.optimizer.hyperparams.items() if not isinstance(v, bool)}
    clock = {f"clock.{name}": value for name, value in _clock_of(run).items()}
    if isinstance(run.optimizer, FixedValues):
        clock["schedule_ahead"] = run.optimizer.schedule_ahead
    decays = {"bn_decay": run.bn_decay, "ema_decay": run.ema_decay}
    if run.ramps:
        decays = _decays_at(run, batch_size or run.batch_size, decays)
    return values | clock | decays


def _decays_at(run: ResolvedRun, batch_size: int, decays: Mapping[str, float]) -> dict[str, float]:
    """The model's and the trainer's decays, scaled from the base batch size."""
    optimizer = run.optimizer
    assert isinstance(optimizer, ScaledWhileTraining)
    rule, k = rule_of(optimizer.scaling), batch_size / optimizer.base_batch_size
    own = library.Recipe.of(
        optimizer.name,
        kwargs={**optimizer.hyperparams, **decays},
        roles=MODEL_ROLES,
    )
    scaled = own.at(rule, k)
    return {name: scaled.value(name) if value else value for name, value in decays.items()}


def _clock_of(run: ResolvedRun) -> Mapping[str, float]:
    return run.optimizer.clock if isinstance(run.optimizer, FixedValues) else {}


def cohort_key(run: ResolvedRun) -> str:
    """What a compiled program depends on: runs with equal keys can share one.

    Everything in the run except the seed and the values of `traced_values` (of which only
    presence counts, and of the EMA whether it is on).
    """
    content = run.config
    for name in ("seed", "name", "title", "report", "tensorboard", "trackers", "bn_decay"):
        content.pop(name, None)
    content["ema_decay"] = bool(run.ema_decay)
    content["optimizer"]["hyperparams"] = {
        name: value if isinstance(value, bool) else "traced"
        for name, value in run.optimizer.hyperparams.items()
    }
    if _clock_of(run):
        content["scaling"]["clock"] = "traced"
    content["scaling"].pop("schedule_ahead", None)
    return json.dumps(content, sort_keys=True)


def make_optimizer(
    run: ResolvedRun, hyperparams: Mapping[str, jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """Build the optimizer of a run, with its hyperparameters as (traced) arrays.

    Args:
        run: the run; its numbers are not read.
        hyperparams: name -> float32 scalar, as in `traced_values`.

    Returns:
        A transformation whose `update` takes ``microbatch=`` (and needs it where the rule works
        while training).
    """
    optimizer = run.optimizer
    shape = schedule_shape(run.schedule, run.train_examples)
    kwargs: dict[str, Any] = {
        name: value if isinstance(value, bool) else hyperparams[name]
        for name, value in optimizer.hyperparams.items()
    }
    if optimizer.decay_mask == "kernels":
        kwargs["mask"] = _kernels
    # Schedules count updates: of the batch size in use, or of the base's under scale_by_batch,
    # which itself reads them in the middle of an update.
    fixed = isinstance(optimizer, FixedValues)
    size = run.batch_size if fixed else optimizer.base_batch_size
    ahead = hyperparams["schedule_ahead"] if fixed else 0
    for name, role in call_of(optimizer).roles.items():
        if name in kwargs and role.name in ("learning_rate", "divided_learning_rate"):
            kwargs[name] = lambda count, peak=kwargs[name]: peak * shape(count * size + ahead)
    if isinstance(optimizer, FixedValues):
        clock = {name: hyperparams[f"clock.{name}"] for name in optimizer.clock}
        return build(library.Recipe.of(optimizer.name, kwargs=kwargs), {}, clock)
    return scaling.scale_by_batch(
        optimizer.name,
        batch_size=run.batch_size,
        base_batch_size=optimizer.base_batch_size,
        rule=rule_of(optimizer.scaling),
        noise_scale=optimizer.scaling.noise_scale or None,
    )(**kwargs)


def keeps_noise(run: ResolvedRun) -> bool:
    """Whether the state of a run's optimizer holds a noise scale; nothing is computed."""

    def found() -> Any:
        values = {name: jnp.float32(value) for name, value in traced_values(run).items()}
        return noise_scale(make_optimizer(run, values).init({"kernel": jnp.zeros((2, 2))}))

    return jax.eval_shape(found) is not None


def _kernels(params: Any) -> Any:
    """Mark what is weight-decayed: all but biases and BatchNorm's parameters, by their names."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), params)


def schedule_shape(schedule: Schedule, train_examples: int) -> Callable[[Any], jax.Array]:
    """The learning rate over its peak, as a function of examples seen.

    Args:
        schedule: warm-up, name and fractions.
        train_examples: length of training.

    Returns:
        examples (int or float scalar) -> float32 scalar in [0, 1]. Linear warm-up from 0; flat;
        then by name: "constant", "linear" or "flat_cosine" to the final fraction.

    >>> cosine = Schedule("flat_cosine", warmup_examples=0, flat_fraction=0.0, final_fraction=0.0)
    >>> shape = schedule_shape(cosine, train_examples=1000)
    >>> [round(float(shape(examples)), 3) for examples in (0, 500, 1000)]
    [1.0, 0.5, 0.0]
    """
    warmup, final = schedule.warmup_examples, schedule.final_fraction
    start = max(schedule.flat_fraction * train_examples, warmup)

    def shape(examples: Any) -> jax.Array:
        seen = jnp.maximum(jnp.asarray(examples, jnp.float32), 0.0)
        progress = jnp.clip((seen - start) / max(train_examples - start, 1), 0.0, 1.0)
        if schedule.name == "constant":
            left = jnp.ones(())
        elif schedule.name == "linear":
            left = 1 - progress
        else:
            left = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        value = final + (1 - final) * left
        return value * jnp.minimum(seen / warmup, 1.0) if warmup else value

    return shape


def metrics(
    run: ResolvedRun, hyperparams: Mapping[str, jax.Array], state: TrainState, opt_state: Any
) -> dict[str, jax.Array]:
    """What the optimizer shows of an update: the learning rate, or all values that it measured.

    Args:
        run: the run.
        hyperparams: its arrays.
        state: before the update.
        opt_state: after it.
    """
    if isinstance(run.optimizer, FixedValues):
        shape = schedule_shape(run.schedule, run.train_examples)
        read_at = state.examples + hyperparams["schedule_ahead"]
        return {"optim/learning_rate": hyperparams["learning_rate"] * shape(read_at)}
    in_force = scaling.hyperparams(opt_state)
    found = {f"optim/{name}": jnp.asarray(value, jnp.float32) for name, value in in_force.items()}
    noise = noise_scale(opt_state)
    if noise is not None:
        found |= {
            "noise_scale": noise.noise_scale,
            "noise_scale_low": noise.low,
            "noise_scale_high": noise.high,
        }
    return found


def noise_scale(opt_state: Any) -> scaling.NoiseScale | None:
    """The noise scale that limits the batch size; None where the optimizer keeps none.

    In the metric that the optimizer moves in, where it is kept.
    """
    found = scaling.noise_scale_estimate(opt_state)
    finer = getattr(found, "preconditioned", None)
    return found if finer is None else finer
