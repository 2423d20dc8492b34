"""Noisy quadratics: problems where the right answer at any batch size is known."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from bs_jax.scaling.clocked import ranger
from bs_jax.scaling.noise import MicrobatchStats
from bs_jax.scaling.rules import RULES, ScalingRule
from bs_jax.scaling.transform import scale_by_batch

BASE_BATCH_SIZE = 64
SIGMAS = (10.0, 1.0, 0.3)  # noise over signal of the base batch: about 100, 1 and growing, 0.1
# Largest deviation from the base, of a mean that starts at 1, within which a family is exact.
EXACT_WITHIN = 0.012


class Check(NamedTuple):
    """An optimizer as it is held against the noisy quadratic.

    Attributes:
        factory: the optax factory.
        recipe: its hyperparameters at the base batch size.
        shape: of the parameters.
        evaluate: ``(x, state) -> parameters`` to look at, where not x itself.
    """

    factory: Callable[..., Any]
    recipe: dict[str, Any]
    shape: tuple[int, ...] = (128,)
    evaluate: Callable[[Any, Any], Any] | None = None


def checks() -> dict[str, Check]:
    """Return every optimizer of the table with a recipe that moves x about as Adam's does."""
    adam = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.99}
    rms = {"learning_rate": 1e-3, "decay": 0.99}
    matrix = (16, 16)

    def averaged(x: Any, state: Any) -> Any:
        return contrib.schedule_free_eval_params(state.inner_state, x)

    return {
        "sgd": Check(optax.sgd, {"learning_rate": 3e-4}),
        "sgd, momentum": Check(optax.sgd, {"learning_rate": 3e-5, "momentum": 0.9}),
        "sgd, Nesterov": Check(
            optax.sgd, {"learning_rate": 3e-5, "momentum": 0.9, "nesterov": True}
        ),
        "adam": Check(optax.adam, adam),
        "adamw": Check(optax.adamw, {**adam, "weight_decay": 0.3}),
        "nadam": Check(optax.nadam, adam),
        "nadamw": Check(optax.nadamw, {**adam, "weight_decay": 0.3}),
        "radam": Check(optax.radam, adam),
        "ranger": Check(ranger, {**adam, "learning_rate": 2e-3}),
        "amsgrad": Check(optax.amsgrad, adam),
        "adamax": Check(optax.adamax, adam),
        "adamaxw": Check(optax.adamaxw, {**adam, "weight_decay": 0.3}),
        "adabelief": Check(optax.adabelief, adam),
        "lion": Check(optax.lion, {"learning_rate": 1e-3, "weight_decay": 0.1}),
        "lamb": Check(optax.lamb, {**adam, "weight_decay": 0.3}),
        "lars": Check(
            optax.lars, {"learning_rate": 1.0, "momentum": 0.9, "trust_coefficient": 1e-3}
        ),
        "rmsprop": Check(optax.rmsprop, rms),
        "rmsprop, momentum": Check(optax.rmsprop, {**rms, "learning_rate": 1e-4, "momentum": 0.9}),
        "rmsprop, centered": Check(optax.rmsprop, {**rms, "centered": True}),
        "adagrad": Check(optax.adagrad, {"learning_rate": 0.05}),
        "adafactor": Check(
            optax.adafactor, {"learning_rate": 1e-3, "min_dim_size_to_factor": 8}, matrix
        ),
        "adafactor, unfactored": Check(optax.adafactor, {"learning_rate": 1e-3}, matrix),
        "novograd": Check(optax.novograd, adam),
        "muon": Check(contrib.muon, {"learning_rate": 1e-2}, matrix),
        "muon, no Nesterov": Check(
            contrib.muon, {"learning_rate": 1e-2, "nesterov": False}, matrix
        ),
        "muon's adam": Check(contrib.muon, {"learning_rate": 1e-3, "adam_b2": 0.99}),
        "schedule_free_sgd": Check(
            contrib.schedule_free_sgd, {"learning_rate": 1e-3}, evaluate=averaged
        ),
        "schedule_free_adamw": Check(
            contrib.schedule_free_adamw, {"learning_rate": 1e-3, "b2": 0.99}, evaluate=averaged
        ),
    }


# Curvatures of a problem whose steepest direction limits the step: SGD with momentum m diverges
# above a learning rate of 2 (1 + m).
SPREAD = np.logspace(-2, 0, 256)


def spread_quadratic(
    rule: ScalingRule | str,
    k: float,
    *,
    sigma: float = 0.1,
    base_updates: int = 1000,
    quarters: int = 4,
    read: Callable[[Any, Any], Any] | None = None,
    **kwargs: Any,
) -> np.ndarray:
    r"""Train SGD with momentum on curvatures spread over ``SPREAD``: a problem with a limit.

    At ``sigma`` 0.1 the signal dominates at first. Unguarded at k = 8 the learning rate becomes
    4.6 and momentum 0.43, beyond the limit of 2.9: it diverges.

    Args:
        rule: the scaling rule.
        k: batch size over base batch size.
        sigma: deviation of the base batch's noise, over the root of the curvature.
        base_updates: length, in updates of the base batch size; cosine decay to 0.
        quarters: number of equal stretches after which to look.
        read: ``(x, state) -> what to take the mean of``; ``None``: h x^2 / 2, the loss.
        **kwargs: further arguments of ``scale_by_batch``.

    Returns:
        The mean after each stretch, shape (quarters,).
    """
    schedule = optax.cosine_decay_schedule(0.1, base_updates)

    def make(batch_size: int, base_batch_size: int) -> Any:
        scaled = scale_by_batch(
            optax.sgd, batch_size=batch_size, base_batch_size=base_batch_size, rule=rule, **kwargs
        )
        return scaled(schedule, momentum=0.9)

    (losses,) = run(
        make,
        k=k,
        sigmas=[sigma],
        microbatches=max(2, round(k)),
        base_updates=base_updates,
        shape=SPREAD.shape,
        quarters=quarters,
        read=read or (lambda x, _: jnp.asarray(SPREAD / 2, jnp.float32) * jnp.square(x)),
        curvature=SPREAD,
    )
    return losses


def deviations(
    check: Check, rule: str, *, ks: Sequence[float] = (8, 0.25), base_updates: int = 4000
) -> np.ndarray:
    """Return how far each batch size strays from the base.

    Args:
        check: the optimizer.
        rule: a rule's name; two micro-batches serve those that measure.
        ks: batch sizes over the base batch size.
        base_updates: length, in updates of the base batch size.

    Returns:
        Largest deviation of the mean of x, shape (len(ks), len(SIGMAS)).
    """

    def train(rule: str, k: float, microbatches: int) -> np.ndarray:
        def make(batch_size: int, base_batch_size: int) -> Any:
            scaled = scale_by_batch(
                check.factory,
                batch_size=batch_size,
                base_batch_size=base_batch_size,
                rule=rule,
                guard=False,  # a quadratic without a limit: the unguarded rule is exact at any k
            )
            return scaled(**check.recipe)

        return run(
            make,
            k=k,
            sigmas=SIGMAS,
            microbatches=microbatches,
            base_updates=base_updates,
            shape=check.shape,
            read=check.evaluate,
        )

    base = train("none", 1, 1)
    measured = 2 if RULES[rule].measures else 1
    return np.stack([np.abs(train(rule, k, measured) - base).max(axis=1) for k in ks])


def run(
    make_optimizer: Callable[[int, int], Any],
    *,
    k: float,
    sigmas: Sequence[float],
    microbatches: int = 1,
    base_updates: int = 4000,
    shape: tuple[int, ...] = (128,),
    seed: int = 0,
    quarters: int = 4,
    read: Callable[[Any, Any], Any] | None = None,
    batch_sizes: Sequence[int] | None = None,
    curvature: np.ndarray | None = None,
) -> np.ndarray:
    r"""Train on ``g = x + noise``, noise of deviation sigma/sqrt(k), from x = 1.

    With a ``curvature`` h, ``g = h x + sqrt(h) noise``: then steps have a limit, 2/h for plain SGD.

    A correct rule gives the rows of k = 1 at every k: the mean of x after each quarter of the same
    number of examples. Each run is made twice, with opposite noise, and averaged, which takes most
    of the sampling noise out of the mean.

    Args:
        make_optimizer: ``(batch_size, base_batch_size) -> transformation``.
        k: batch size over base batch size.
        sigmas: deviations of the base batch's gradient noise, per coordinate; one run each.
        microbatches: parts of each batch, whose statistics the optimizer is given if above 1.
        base_updates: length, in updates of the base batch size.
        shape: of x.
        seed: of the noise.
        quarters: number of equal stretches after which the mean of x is taken.
        read: ``(x, state) -> parameters`` to look at in place of x (averaged weights).
        batch_sizes: batch size in each quarter, where it changes; passed to every update.
        curvature: of each coordinate, shape ``shape``; ``None``: 1.

    Returns:
        The means, float32 of shape (len(sigmas), quarters).

    Example:
        >>> import optax
        >>> (row,) = run(lambda b, b0: optax.sgd(1e-3), k=1, sigmas=[0.0])
        >>> [round(float(x), 3) for x in row]
        [0.368, 0.135, 0.05, 0.018]
    """
    optimizer = make_optimizer(round(BASE_BATCH_SIZE * k), BASE_BATCH_SIZE)
    n = microbatches
    steep = jnp.asarray(1.0 if curvature is None else curvature, jnp.float32)
    sizes = batch_sizes or [round(BASE_BATCH_SIZE * k)] * quarters
    shares = [BASE_BATCH_SIZE / size for size in sizes]
    lengths = [round(base_updates * share / quarters) for share in shares]

    def update(x: Any, state: Any, noise: jax.Array, batch_size: jax.Array) -> tuple[Any, Any, Any]:
        parts = x[None] + noise
        if curvature is not None:
            parts = (steep * x)[None] + jnp.sqrt(steep)[None] * noise
        extra: dict[str, Any] = {}
        if n > 1:
            extra["microbatch"] = MicrobatchStats(jnp.mean(jnp.square(parts), axis=0), n)
        if batch_sizes is not None:
            extra["batch_size"] = batch_size
        step, state = optimizer.update(jnp.mean(parts, axis=0), state, x, **extra)
        x = x + step
        return x, state, jnp.mean(x if read is None else read(x, state))

    # All runs side by side in one scan: JAX would trace a scan inside vmap again and again.
    @jax.jit
    def train(noise: jax.Array, batch_size: jax.Array) -> jax.Array:
        def step(carry: tuple[Any, Any], now: Any) -> tuple[tuple[Any, Any], jax.Array]:
            noise, batch_size = now
            both = jnp.concatenate([noise, -noise])
            x, state, mean = jax.vmap(update, in_axes=(0, 0, 0, None))(*carry, both, batch_size)
            return (x, state), mean

        x = jnp.ones((2 * len(sigmas), *shape))
        return jax.lax.scan(step, (x, jax.vmap(optimizer.init)(x)), (noise, batch_size))[1]

    deviations = np.outer(np.sqrt(np.multiply(n, shares)), sigmas).astype(np.float32)
    noise = _noise(seed, deviations, lengths=tuple(lengths), shape=(n, *shape))
    means = np.asarray(train(noise, np.repeat(np.asarray(sizes, np.int32), lengths)))
    return means[np.cumsum(lengths) - 1].reshape(len(sizes), 2, -1).mean(axis=1).T


@functools.partial(jax.jit, static_argnames=("lengths", "shape"))
def _noise(
    seed: int, deviations: jax.Array, *, lengths: tuple[int, ...], shape: tuple[int, ...]
) -> jax.Array:
    """Draw the noise of every update; a program of its own, which many optimizers share.

    Args:
        seed: of the draws.
        deviations: of a coordinate, in each stretch of each run, shape (stretches, runs).
        lengths: number of updates of each stretch.
        shape: of a draw.

    Returns:
        The draws, shape (updates, runs, *shape).
    """

    def draw(key: jax.Array, deviations: jax.Array) -> jax.Array:
        stretches = zip(jax.random.split(key, len(lengths)), lengths, strict=True)
        keys = jnp.concatenate([jax.random.split(key, length) for key, length in stretches])
        each = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        scale = jnp.repeat(deviations, np.array(lengths), total_repeat_length=sum(lengths))
        return scale.reshape(-1, *[1] * len(shape)) * each

    keys = jax.random.split(jax.random.key(seed), deviations.shape[1])
    return jax.vmap(draw, in_axes=(0, 1), out_axes=1)(keys, deviations)
