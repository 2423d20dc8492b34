"""Batch normalisation with a decay that is an argument, ghost batches and shared statistics."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bs_jax.errors import UserError
from bs_jax.models import layer_forms
from bs_jax.models.activations import Activation

# A card has about a hundred multiprocessors for as many rows; few rows are not worth a second sum.
_MOST_ROWS, _FEWEST_ROWS = 128, 8


class BatchNorm(nn.Module):
    """Normalise every channel by the statistics of a group of examples.

    y = scale (x - mean) / sqrt(var + epsilon) + bias, with mean and var over the examples of a
    group and all positions. The running statistics, used when `train` is false, follow

        running = decay running + (1 - decay) (average of the groups' mean or var).

    They are linear in the groups' statistics: the average of the `batch_stats` that several
    micro-batches or devices computed from the same old ones is what one call on all of their
    examples gives. The variance is the biased one (divided by n), in the running statistics too;
    PyTorch's running variance is larger by n / (n - 1).

    Attributes:
        decay: of the running statistics, where the call gives none.
        epsilon: added to the variance.
        ghost_batch_size: examples normalised together: consecutive groups of this many. None or 0:
            the whole batch that the call sees (of one device and micro-batch).
        axis_name: mapped axis (of pmap, vmap or shard_map) over which the statistics are shared,
            so that a group is the batch of all devices; None: each device by itself.
        dtype: of the output; statistics and parameters are float32 whatever it is.
        scale_init: initialiser of the scale; zeros for the last one of a residual block.
        activation: applied to the normalised values.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> norm = BatchNorm(ghost_batch_size=2)
        >>> x = jnp.arange(8.0).reshape(4, 2)
        >>> variables = norm.init(jax.random.key(0), x, train=False)
        >>> y, updated = norm.apply(variables, x, train=True, decay=0.5, mutable=["batch_stats"])
        >>> updated["batch_stats"]["mean"].tolist()
        [1.5, 2.0]

    Reference:
        Ioffe & Szegedy, Batch Normalization, 2015; ghost batches: Hoffer et al., Train longer,
        generalize better, 2017.
    """

    decay: float = 0.9
    epsilon: float = 1e-5
    ghost_batch_size: int | None = None
    axis_name: str | None = None
    dtype: Any = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    activation: Activation | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, decay: float | jax.Array | None = None
    ) -> jax.Array:
        """Normalise a batch.

        Args:
            x: [examples, ..., channels].
            train: use the batch's statistics and update the running ones (the caller must make
                "batch_stats" mutable); else use the running ones.
            decay: overrides the attribute; a traced float32 scalar changes without a recompile.

        Returns:
            An array of the shape of `x` and the module's dtype.

        Raises:
            UserError: `ghost_batch_size` does not divide the batch, or is given beside `axis_name`.
        """
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale = self.param("scale", self.scale_init, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)

        if not train:
            factor = scale * lax.rsqrt(running_var.value + self.epsilon)
            y = _affine(x, factor, bias - running_mean.value * factor, self.dtype)
            return y if self.activation is None else self.activation(y)

        size = self._group_size(x.shape[0])
        axis_name = None if self.is_initializing() else self.axis_name
        grouped = x.reshape(x.shape[0] // size, -1, channels)
        fused = self.activation if layer_forms.current().fused_activation else None
        y, mean, var = normalise(
            grouped,
            scale,
            bias,
            epsilon=self.epsilon,
            axis_name=axis_name,
            dtype=self.dtype,
            activation=fused,
        )
        if not self.is_initializing():
            keep = jnp.asarray(self.decay if decay is None else decay, jnp.float32)
            for running, value in ((running_mean, mean), (running_var, var)):
                running.value = keep * running.value + (1 - keep) * jnp.mean(value, axis=0)
        y = y.reshape(x.shape)
        return y if self.activation is None or fused else self.activation(y)

    def _group_size(self, examples: int) -> int:
        size = self.ghost_batch_size or examples
        if self.ghost_batch_size and self.axis_name is not None:
            raise UserError(
                f"ghost_batch_size {size} and statistics shared over {self.axis_name!r} exclude "
                "each other: set ghost_batch_size to 0, or axis_name to None"
            )
        if examples % size:
            smaller = [n for n in range(1, size) if examples % n == 0]
            raise UserError(
                f"ghost_batch_size {size} does not divide a batch of {examples} examples; use "
                f"{smaller[-1] if smaller else examples} or {examples}"
            )
        return size


def normalise(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float,
    axis_name: str | None = None,
    dtype: Any = jnp.float32,
    activation: Activation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise every group and channel by its own mean and biased variance.

    The backward pass is written out, with z = (x - mean) / sqrt(var + epsilon):

        dx = scale / sqrt(var + epsilon) (dy - average(dy) - z average(dy z))

    Behind an activation, dy stands for its slope at the normalised value times the slope that
    comes in, rounded to the dtype of `x`; the normalised value is computed again, in float32.

    It keeps `x` alone from the forward pass and reads it once; autodiff's form takes two to ten
    times as long on CPU. Mean and variance are for the running statistics: no gradient flows
    through them.

    Args:
        x: [groups, positions, channels].
        scale: float32 [channels].
        bias: float32 [channels].
        epsilon: added to the variance.
        axis_name: mapped axis whose members' groups are one; None: each its own.
        dtype: of the output.
        activation: applied to the normalised values before they are rounded to `dtype`; None: none.

    Returns:
        (y of the shape of x, mean [groups, channels], variance [groups, channels]).

    Example:
        >>> y, mean, var = normalise(
        ...     jnp.array([[[1.0], [3.0]]]), jnp.ones(1), jnp.zeros(1), epsilon=0.0)
        >>> y.tolist(), mean.tolist(), var.tolist()
        ([[[-1.0], [1.0]]], [[2.0]], [[1.0]])
    """
    return _normalise(epsilon, axis_name, jnp.dtype(dtype), activation, x, scale, bias)


def _formula(
    epsilon: float,
    axis_name: str | None,
    dtype: Any,
    activation: Activation | None,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    mean, var = _statistics(x, axis_name)
    factor = scale[None] * lax.rsqrt(var + epsilon)
    y = wide * factor[:, None] + (bias[None] - mean * factor)[:, None]
    if activation is not None:
        y = activation.value(y)
    return y.astype(dtype), mean, var


_normalise: Any = jax.custom_vjp(_formula, nondiff_argnums=(0, 1, 2, 3))


def _normalise_forward(epsilon, axis_name, dtype, activation, x, scale, bias):
    # Not by _normalise: a second derivative goes through the mean and variance that are kept.
    y, mean, var = _formula(epsilon, axis_name, dtype, activation, x, scale, bias)
    return (y, mean, var), (x, mean, var, scale, bias)


def _normalise_backward(epsilon, axis_name, dtype, activation, kept, cotangents):
    del dtype
    x, mean, var, scale, bias = kept
    # The barrier keeps XLA from holding x - mean, as large as x, from the forward pass until here.
    x = lax.optimization_barrier(x)
    wide, dy = x.astype(jnp.float32), cotangents[0].astype(jnp.float32)
    inverse = lax.rsqrt(var + epsilon)
    centred = (wide - mean[:, None]) * inverse[:, None]
    if activation is not None:
        dy = dy * activation.slope(centred * scale[None, None] + bias[None, None])
        # Two passes over memory need it. Without the barrier a GPU's compiler keeps it in float32.
        dy = lax.optimization_barrier(dy.astype(x.dtype)).astype(jnp.float32)
    dbias, dscale = _sums(dy, dy * centred)
    average_dy, average_dyz = dbias / x.shape[1], dscale / x.shape[1]
    if axis_name is not None:
        average_dy, average_dyz = lax.pmean((average_dy, average_dyz), axis_name)
    dx = (scale[None] * inverse)[:, None] * (
        dy - average_dy[:, None] - centred * average_dyz[:, None]
    )
    return dx.astype(x.dtype), jnp.sum(dscale, axis=0), jnp.sum(dbias, axis=0)


_normalise.defvjp(_normalise_forward, _normalise_backward)


def _statistics(x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of every group and channel, over all members of the axis."""
    wide = x.astype(jnp.float32)
    if not layer_forms.current().one_pass_statistics:
        mean = _average(wide, axis_name)
        # Two passes: E[x^2] - E[x]^2 loses its digits where the mean is large beside the deviation.
        return mean, _average(jnp.square(wide - mean[:, None]), axis_name)
    # About a value of the group itself the mean is no larger than a few deviations: one pass then
    # loses no digits either (Chan, Golub & LeVeque 1983). A bfloat16 value has 8 bits: only where
    # most of a channel rounds to one number do the sums lose its deviation beside the mean.
    short = jnp.finfo(x.dtype).nmant <= 7
    pivot = jnp.zeros_like(wide[:, :1]) if short else wide[:, :1]
    away = wide - pivot
    shift, square = (total / x.shape[1] for total in _sums(away, jnp.square(away)))
    own_mean, own_var = pivot[:, 0] + shift, jnp.maximum(square - jnp.square(shift), 0.0)
    if axis_name is None:
        return own_mean, own_var
    mean = lax.pmean(own_mean, axis_name)
    return mean, lax.pmean(own_var + jnp.square(own_mean - mean), axis_name)


def _sums(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sums over positions of two arrays [groups, positions, channels]."""
    groups, positions, channels = first.shape
    rows = max(n for n in range(1, _MOST_ROWS + 1) if positions % n == 0)
    if groups == 1 or rows < _FEWEST_ROWS or not layer_forms.current().sums_by_rows:
        return jnp.sum(first, axis=1), jnp.sum(second, axis=1)
    split = (groups, rows, positions // rows, channels)
    partial_sums = [jnp.sum(array.reshape(split), axis=2) for array in (first, second)]
    # The barrier keeps XLA from making one sum of the two stages again.
    total = jnp.sum(jnp.stack(lax.optimization_barrier(partial_sums)), axis=2)
    return total[0], total[1]


def _average(x: jax.Array, axis_name: str | None) -> jax.Array:
    average = jnp.mean(x, axis=1)
    return average if axis_name is None else lax.pmean(average, axis_name)


def _affine(x: jax.Array, factor: jax.Array, shift: jax.Array, dtype: Any) -> jax.Array:
    shape = (1,) * (x.ndim - 1) + factor.shape
    return (x.astype(jnp.float32) * factor.reshape(shape) + shift.reshape(shape)).astype(dtype)
