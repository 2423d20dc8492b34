"""Activations whose backward pass is written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Activation(NamedTuple):
    """An elementwise function that a layer may fuse with its own.

    Attributes:
        function: array -> array of its dtype, differentiable.
        value: the same, float32 -> float32.
        slope: its derivative, float32 -> float32.
    """

    function: Callable[[jax.Array], jax.Array]
    value: Callable[[jax.Array], jax.Array]
    slope: Callable[[jax.Array], jax.Array]

    def __call__(self, x: jax.Array) -> jax.Array:
        """`function(x)`."""
        return self.function(x)


@jax.custom_vjp
def mish(x: jax.Array) -> jax.Array:
    r"""Mish: ``x tanh(log(1 + e^x))``.

    With w = e^x and n = w (w + 2), tanh(log(1 + w)) = n / (n + 2). The backward pass keeps x alone
    and has one exponential and one division too, so that each is one pass over memory:

        d mish/dx = w (4 (x + 1) + w (4 x + 6 + w (4 + w))) / (n + 2)^2

    Args:
        x: float array of any shape; computed in float32.

    Returns:
        An array like `x`.

    Example:
        >>> [f"{y:.4f}" for y in mish(jnp.array([-100.0, 0.0, 1.0, 100.0]))]
        ['-0.0000', '0.0000', '0.8651', '100.0000']

    Reference:
        Misra, Mish: A Self Regularized Non-Monotonic Activation Function, 2019.
    """
    return _mish_value(x.astype(jnp.float32)).astype(x.dtype)


def _mish_value(x: jax.Array) -> jax.Array:
    return x * _tanh_softplus(_exp(x))


def _mish_slope(x: jax.Array) -> jax.Array:
    w = _exp(x)
    numerator = w * (4.0 * (x + 1.0) + w * (4.0 * x + 6.0 + w * (4.0 + w)))
    denominator = w * (w + 2.0) + 2.0
    return numerator / (denominator * denominator)


def _exp(x: jax.Array) -> jax.Array:
    # Beyond 20 the factor is 1 to float32 precision; w^2 must not overflow.
    return jnp.exp(jnp.minimum(x, 20.0))


def _tanh_softplus(w: jax.Array) -> jax.Array:
    n = w * (w + 2.0)
    return n / (n + 2.0)


def _mish_forward(x):
    return mish(x), x


def _mish_backward(x, dy):
    # The barrier keeps XLA from holding the forward pass's exponential until here: computing it
    # again is quicker than fetching it.
    slope = _mish_slope(lax.optimization_barrier(x).astype(jnp.float32))
    return ((dy.astype(jnp.float32) * slope).astype(x.dtype),)


mish.defvjp(_mish_forward, _mish_backward)

MISH = Activation(mish, _mish_value, _mish_slope)
RELU = Activation(jax.nn.relu, jax.nn.relu, lambda x: (x > 0.0).astype(x.dtype))
