"""Batch normalisation with a decay that is an argument, ghost batches and shared statistics."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bs_jax.errors import UserError


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
            return _affine(x, factor, bias - running_mean.value * factor, self.dtype)

        groups = self._group_count(x.shape[0])
        grouped = x.astype(jnp.float32).reshape(groups, -1, channels)
        mean = jnp.mean(grouped, axis=1, keepdims=True)
        mean_square = jnp.mean(jnp.square(grouped), axis=1, keepdims=True)
        if self.axis_name is not None and not self.is_initializing():
            mean, mean_square = lax.pmean((mean, mean_square), self.axis_name)
        var = jnp.maximum(mean_square - jnp.square(mean), 0.0)

        if not self.is_initializing():
            keep = jnp.asarray(self.decay if decay is None else decay, jnp.float32)
            for running, value in ((running_mean, mean), (running_var, var)):
                running.value = keep * running.value + (1 - keep) * jnp.mean(value, axis=(0, 1))

        factor = scale[None, None] * lax.rsqrt(var + self.epsilon)
        y = grouped * factor + (bias[None, None] - mean * factor)
        return y.astype(self.dtype).reshape(x.shape)

    def _group_count(self, examples: int) -> int:
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
        return examples // size


def _affine(x: jax.Array, factor: jax.Array, shift: jax.Array, dtype: Any) -> jax.Array:
    shape = (1,) * (x.ndim - 1) + factor.shape
    return (x.astype(jnp.float32) * factor.reshape(shape) + shift.reshape(shape)).astype(dtype)
