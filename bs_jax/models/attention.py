"""Squeeze-excite and simple self-attention: how XResNet's blocks weigh channels and positions."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bs_jax.models.activations import mish
from bs_jax.models.initializers import he_normal


class SqueezeExcite(nn.Module):
    """Weigh every channel by what the whole map shows.

    ``x sigmoid(V mish(U average(x) + a) + b)``, with ceil(channels // reduction / 8) 8 features
    between U and V.

    Attributes:
        reduction: of the channels.
        dtype: of the computation.

    Reference:
        Hu et al., Squeeze-and-Excitation Networks, 2017.
    """

    reduction: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Weigh the channels of [examples, height, width, channels]."""
        channels = x.shape[-1]
        hidden = math.ceil(channels // self.reduction / 8) * 8
        average = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=he_normal("fan_in"), name=name)

        weight = nn.sigmoid(dense(channels, "excite")(mish(dense(hidden, "squeeze")(average))))
        return x * weight[:, None, None, :]


class SimpleSelfAttention(nn.Module):
    r"""Every position gathers what resembles it: ``gamma (x x^T) (W x) + x``.

    x is channels by positions, W square with its largest singular value brought to 1 (spectral
    norm), gamma a scalar that starts at 0.

    The singular value is found by power iteration, one round a training pass: from the last u,
    ``v = W^T u / |W^T u|``, ``u = W v / |W v|``, ``sigma = u^T W v``. u and v are held fixed in
    the backward pass and kept in "batch_stats" for evaluation, which does not move them. They
    follow from the weights and the last u alone, never from the examples. So all devices and
    micro-batches of an update find the same ones, and averaging them, as is done with BatchNorm's
    statistics, leaves them as they are. An update is one round into however many micro-batches it
    is cut.

    Attributes:
        dtype: of the products; the power iteration is in float32.

    Reference:
        Zhang et al., Self-Attention Generative Adversarial Networks, 2018, in the form without
        softmax of Doria & Goldsborough, 2019; Miyato et al., Spectral Normalization, 2018.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Attend over the positions of [examples, height, width, channels]."""
        channels = x.shape[-1]
        gamma = self.param("gamma", nn.initializers.zeros, (), jnp.float32)
        kernel = self.param("kernel", he_normal("fan_in"), (channels, channels), jnp.float32)
        positions = x.astype(self.dtype).reshape(x.shape[0], -1, channels)
        kernel = (kernel / self._largest_singular_value(kernel, train)).astype(self.dtype)
        projected = positions @ kernel
        gram = jnp.einsum("bnc,bnd->bcd", positions, positions)
        gathered = jnp.einsum("bcd,bnd->bnc", gram, projected)
        return (gamma.astype(self.dtype) * gathered + positions).reshape(x.shape)

    def _largest_singular_value(self, kernel: jax.Array, train: bool) -> jax.Array:
        def random_unit() -> jax.Array:
            return _unit(jax.random.normal(self.make_rng("params"), kernel.shape[:1]))

        # The kernel is [inputs, features], the transpose of W.
        left = self.variable("batch_stats", "u", random_unit)
        right = self.variable("batch_stats", "v", random_unit)
        u, v = left.value, right.value
        if train:
            fixed = lax.stop_gradient(kernel)
            v = _unit(_exact_product(fixed, u))
            u = _unit(_exact_product(v, fixed))
            if not self.is_initializing():
                left.value, right.value = u, v
        return _exact_product(_exact_product(v, kernel), u)


# By default accelerators round the factors of a float32 product: to 8 bits on a TPU.
_exact_product = functools.partial(jnp.matmul, precision="highest")


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)
