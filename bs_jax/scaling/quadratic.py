"""The noisy quadratic: a problem where the right answer at any batch size is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bs_jax.scaling.noise_scale import MicrobatchStats

BASE_BATCH_SIZE = 64


def run(
    make_optimizer: Callable[[int, int], Any],
    *,
    k: float,
    sigma: float,
    microbatches: int = 1,
    base_updates: int = 4000,
    shape: tuple[int, ...] = (1000,),
    seed: int = 0,
    quarters: int = 4,
    read: Callable[[Any, Any], Any] | None = None,
) -> np.ndarray:
    r"""Train on ``g = x + noise``, noise of deviation sigma/sqrt(k), from x = 1.

    A correct rule gives the row of k = 1 at every k: the mean of x after each quarter of the same
    number of examples.

    Args:
        make_optimizer: ``(batch_size, base_batch_size) -> transformation``.
        k: batch size over base batch size.
        sigma: deviation of the base batch's gradient noise, per coordinate.
        microbatches: parts of each batch, whose statistics the optimizer is given if above 1.
        base_updates: length, in updates of the base batch size.
        shape: of x.
        seed: of the noise.
        quarters: number of equal stretches after which the mean of x is taken.
        read: ``(x, state) -> parameters`` to look at in place of x (averaged weights).

    Returns:
        The means, float32 of shape (quarters,).

    Example:
        >>> import optax
        >>> row = run(lambda b, b0: optax.sgd(1e-3), k=1, sigma=0.0)
        >>> [round(float(x), 3) for x in row]
        [0.368, 0.135, 0.05, 0.018]
    """
    optimizer = make_optimizer(round(BASE_BATCH_SIZE * k), BASE_BATCH_SIZE)
    updates_per_quarter = round(base_updates / k / quarters)
    deviation = sigma / np.sqrt(k)
    n = microbatches

    def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
        x, state = carry
        parts = x + deviation * np.sqrt(n) * jax.random.normal(key, (n, *shape))
        grad = jnp.mean(parts, axis=0)
        extra = {}
        if n > 1:
            extra["microbatch"] = MicrobatchStats(jnp.mean(jnp.square(parts), axis=0), n)
        updates, state = optimizer.update(grad, state, x, **extra)
        return (x + updates, state), None

    def quarter(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        carry, _ = jax.lax.scan(step, carry, jax.random.split(key, updates_per_quarter))
        return carry, jnp.mean(carry[0] if read is None else read(*carry))

    @jax.jit
    def train(key: jax.Array) -> jax.Array:
        x = jnp.ones(shape)
        start = (x, optimizer.init(x))
        return jax.lax.scan(quarter, start, jax.random.split(key, quarters))[1]

    return np.asarray(train(jax.random.key(seed)))
