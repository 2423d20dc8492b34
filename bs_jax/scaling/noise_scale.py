"""The gradient noise scale, estimated from micro-batch statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bs_jax.scaling.microbatch import (
    MicrobatchStats,
    PyTree,
    abs_square,
    check_microbatch,
    tree_map,
    tree_sum,
)
from bs_jax.scaling.rules import Scalar

DECAY = 0.99  # of the running noise scale, per base-size update
ERRORS = 2.0  # standard errors to either side that the range of a noise scale spans
SAMPLE = ("signal", "noise", "signal_square", "noise_square", "product")  # what `sample` returns


class NoiseScaleState(NamedTuple):
    """Running estimate of the gradient noise scale.

    Attributes:
        signal: moving average of |g|^2, not yet divided by ``weight``.
        noise: moving average of tr(Sigma), per example.
        signal_square: of the squared per-update values of |g|^2; for the spread.
        noise_square: of the squared per-update values of tr(Sigma).
        product: of both.
        weight: 1 - the product of the decays used.
        weight_square: sum of squared weights of the average: 1 / effective number of updates.
    """

    signal: jax.Array
    noise: jax.Array
    signal_square: jax.Array
    noise_square: jax.Array
    product: jax.Array
    weight: jax.Array
    weight_square: jax.Array


class NoiseScale(NamedTuple):
    """The gradient noise scale, as estimated.

    Attributes:
        noise_scale: tr(Sigma)/|g|^2 in examples: the batch size at which noise and signal of the
            gradient are alike. Infinite where no signal can be told from zero.
        standard_error: of ``noise_scale``, by the delta method from the spread over updates;
            infinite before the second update.
        low: lower end of the range in which it lies: |g|^2/tr(Sigma) with ``ERRORS`` standard
            errors added, inverted. The signal is what is known worst, and may be zero, so this
            range has no symmetric form.
        high: its upper end; infinite where the signal may be zero.
        signal: |g|^2.
        noise: tr(Sigma), per example.
    """

    noise_scale: jax.Array
    standard_error: jax.Array
    low: jax.Array
    high: jax.Array
    signal: jax.Array
    noise: jax.Array


def init_noise_scale() -> NoiseScaleState:
    """Return the estimate before any update."""
    return NoiseScaleState(*(jnp.zeros((), jnp.float32) for _ in NoiseScaleState._fields))


def sample(grads: PyTree, stats: MicrobatchStats, *, batch_size: Scalar) -> dict[str, jax.Array]:
    r"""Return one update's estimates of |g|^2 and tr(Sigma), and what their spread is made of.

    ``|g|^2 ~ sum c``, ``tr(Sigma) ~ b sum w`` with b examples a micro-batch. Each is unbiased, so
    means of them over updates are, too; their ratio is not, so it is taken last.

    Args:
        grads: mean gradient; of the statistics only the leaves that it has are used.
        stats: of this update; its own ``mean`` comes before ``grads``, which may be clipped.
        batch_size: examples in this update, over all micro-batches.

    Returns:
        ``signal`` and ``noise`` (per example), their squares and their product; float32 scalars.

    Raises:
        UserError: if the statistics come from a single micro-batch.

    Reference:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018.
    """
    check_microbatch(stats, grads)
    mean = grads if stats.mean is None else stats.mean
    # Mapped over the gradients first: under optax.masked they have fewer leaves than statistics.
    square = tree_sum(tree_map(lambda _, m: _squared_norm(m), grads, mean))
    mean_square = tree_sum(tree_map(lambda _, s: s.astype(jnp.float32), grads, stats.mean_square))
    signal, noise = signal_and_noise_of_sums(square, mean_square, stats.count)
    noise = noise * (batch_size / stats.count)
    return {
        "signal": signal,
        "noise": noise,
        "signal_square": signal * signal,
        "noise_square": noise * noise,
        "product": signal * noise,
    }


def _squared_norm(x: jax.Array) -> jax.Array:
    # Without the barrier XLA takes these squares and the optimizer's for one array, as large as
    # the parameters, and writes it to memory.
    return jnp.sum(abs_square(jax.lax.optimization_barrier(x)))


def average(
    state: NoiseScaleState, means: Mapping[str, Any], *, updates: int = 1, decay: Scalar
) -> NoiseScaleState:
    """Take the mean of the samples of some updates into the running estimate.

    Args:
        state: the estimate so far.
        means: of ``sample`` over the updates, by name.
        updates: how many.
        decay: of the average, per update.

    Returns:
        The new estimate.
    """
    keep = decay if updates == 1 else decay**updates
    new = {name: means[name] for name in SAMPLE} | {"weight": 1.0}
    averaged = {name: keep * getattr(state, name) + (1 - keep) * x for name, x in new.items()}
    weight_square = keep**2 * state.weight_square + (1 - keep) ** 2 / updates
    return NoiseScaleState(**averaged, weight_square=weight_square)


def update_noise_scale(
    state: NoiseScaleState,
    grads: PyTree,
    stats: MicrobatchStats,
    *,
    batch_size: Scalar,
    decay: Scalar = DECAY,
) -> NoiseScaleState:
    """Take one update's micro-batch statistics into the running estimate.

    Args:
        state: the estimate so far.
        grads: mean gradient (used where ``stats.mean`` is ``None``).
        stats: of this update.
        batch_size: examples in this update, over all micro-batches.
        decay: of the average, per update.

    Returns:
        The new estimate.

    Raises:
        UserError: if the statistics come from a single micro-batch.
    """
    return average(state, sample(grads, stats, batch_size=batch_size), decay=decay)


def signal_and_noise_of_sums(square: Any, mean_square: Any, count: Any) -> tuple[Any, Any]:
    """Return sum c and sum w from the sums of the squared mean and of the mean square."""
    variance = jnp.maximum(mean_square - square, 0.0)
    return square - variance / (count - 1), variance * (count / (count - 1))


def estimate(state: NoiseScaleState) -> NoiseScale:
    """Read the noise scale and its spread out of the running estimate."""
    weight = jnp.where(state.weight > 0, state.weight, 1.0)
    signal, noise = state.signal / weight, state.noise / weight
    var_signal = jnp.maximum(state.signal_square / weight - signal**2, 0.0)
    var_noise = jnp.maximum(state.noise_square / weight - noise**2, 0.0)
    covariance = state.product / weight - signal * noise
    # With x = signal/noise, dx = (d signal - x d noise)/noise; the sample variance of an average
    # over few updates is too small by 1 - share.
    share = state.weight_square / weight**2
    x = _ratio(signal, noise)
    spread = jnp.maximum(var_signal - 2 * x * covariance + x**2 * var_noise, 0.0)
    few = (share > 1 - 1e-5) | (state.weight == 0)
    error = jnp.sqrt(spread * share / jnp.where(few, 1.0, 1 - share))
    error = jnp.where(few, jnp.inf, _ratio(error, noise))
    scale = _ratio(noise, jnp.maximum(signal, 0.0))
    return NoiseScale(
        noise_scale=scale,
        standard_error=jnp.where(jnp.isinf(scale), jnp.inf, error * scale**2),
        low=_ratio(jnp.ones(()), jnp.maximum(x + ERRORS * error, 0.0)),
        high=_ratio(jnp.ones(()), jnp.maximum(x - ERRORS * error, 0.0)),
        signal=signal,
        noise=noise,
    )


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """A quotient that is infinite, never undefined, where its denominator is zero."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), jnp.inf)


def noise_scale_estimate(state: Any) -> NoiseScale | None:
    """Return the noise scale held anywhere in an optimizer state; ``None`` if it keeps none.

    Args:
        state: the state of a ``scale_by_batch`` transformation or of a chain that holds one, or a
            ``NoiseScaleState``.

    Returns:
        The estimate with its standard error.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, NoiseScaleState))
    found = [x for x in leaves if isinstance(x, NoiseScaleState)]
    return estimate(found[0]) if found else None
