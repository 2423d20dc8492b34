"""The noisy quadratic: a problem where the right answer at any batch size is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    sigmas: Sequence[float],
    microbatches: int = 1,
    base_updates: int = 4000,
    shape: tuple[int, ...] = (128,),
    seed: int = 0,
    quarters: int = 4,
    read: Callable[[Any, Any], Any] | None = None,
    batch_sizes: Sequence[int] | None = None,
) -> np.ndarray:
    r"""Train on ``g = x + noise``, noise of deviation sigma/sqrt(k), from x = 1.

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

    Returns:
        The means, float32 of shape (len(sigmas), quarters).

    Example:
        >>> import optax
        >>> (row,) = run(lambda b, b0: optax.sgd(1e-3), k=1, sigmas=[0.0])
        >>> [round(float(x), 3) for x in row]
        [0.368, 0.135, 0.05, 0.018]
    """
    base = BASE_BATCH_SIZE
    optimizer = make_optimizer(round(base * k), base)
    n = microbatches

    def quarter(carry: Any, sigma: Any, key: jax.Array, batch_size: int) -> Any:
        deviation = sigma * np.sqrt(n * base / batch_size)

        def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
            x, state = carry
            parts = x[None] + deviation * jax.random.normal(key, (n, *shape))
            grad = jnp.mean(parts, axis=0)
            extra: dict[str, Any] = {}
            if n > 1:
                extra["microbatch"] = MicrobatchStats(jnp.mean(jnp.square(parts), axis=0), n)
            if batch_sizes is not None:
                extra["batch_size"] = jnp.int32(batch_size)
            updates, state = optimizer.update(grad, state, x, **extra)
            return (x + updates, state), None

        updates = round(base_updates * base / batch_size / quarters)
        return jax.lax.scan(step, carry, jax.random.split(key, updates))[0]

    def look(carry: tuple[Any, Any]) -> jax.Array:
        return jnp.mean(carry[0] if read is None else read(*carry))

    def train_once(sigma: jax.Array, key: jax.Array) -> jax.Array:
        x = jnp.ones(shape)
        carry, keys = (x, optimizer.init(x)), jax.random.split(key, quarters)
        if batch_sizes is None:

            def body(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
                carry = quarter(carry, sigma, key, round(base * k))
                return carry, look(carry)

            return jax.lax.scan(body, carry, keys)[1]
        means = []
        for i, batch_size in enumerate(batch_sizes):
            carry = quarter(carry, sigma, keys[i], batch_size)
            means.append(look(carry))
        return jnp.stack(means)

    @jax.jit
    @jax.vmap
    def train(sigma: jax.Array, key: jax.Array) -> jax.Array:
        both = jax.vmap(train_once, in_axes=(0, None))(jnp.stack([sigma, -sigma]), key)
        return jnp.mean(both, axis=0)

    seeds = jax.random.split(jax.random.key(seed), len(sigmas))
    return np.asarray(train(jnp.asarray(sigmas, jnp.float32), seeds))
