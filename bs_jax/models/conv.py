"""Convolution that takes the form its back end is quickest at."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp


class Conv(nn.Conv):
    """2-D convolution without bias."""


def conv(
    features: int,
    kernel_size: int = 3,
    *,
    strides: int = 1,
    groups: int = 1,
    use_bias: bool = False,
    dtype: Any = jnp.float32,
    kernel_init: nn.initializers.Initializer,
    name: str | None = None,
) -> nn.Conv:
    """A square convolution with the symmetric padding (kernel_size - 1) / 2."""
    pad = (kernel_size - 1) // 2
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=(strides, strides),
        padding=((pad, pad), (pad, pad)),
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        name=name,
    )
