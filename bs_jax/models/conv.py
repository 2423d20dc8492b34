"""Convolution that takes the form its back end is quickest at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Padding = str | Sequence[tuple[int, int]]


def patches_and_product(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> jax.Array:
    """Gather every output's receptive field as a row, then one matrix product ("im2col").

    Args:
        images: [examples, height, width, channels].
        kernel: [kernel height, kernel width, channels, features].
        strides: of the two spatial axes.
        padding: (before, after) zeros of the two spatial axes.

    Returns:
        [examples, output height, output width, features].
    """
    kernel_height, kernel_width, channels, features = kernel.shape
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    examples, padded_height, padded_width, _ = images.shape
    height = (padded_height - kernel_height) // strides[0] + 1
    width = (padded_width - kernel_width) // strides[1] + 1
    shifted = [
        lax.slice(
            images,
            (0, row, column, 0),
            (
                examples,
                row + (height - 1) * strides[0] + 1,
                column + (width - 1) * strides[1] + 1,
                channels,
            ),
            (1, *strides, 1),
        )
        for row in range(kernel_height)
        for column in range(kernel_width)
    ]
    rows = jnp.concatenate(shifted, axis=-1).reshape(examples * height * width, -1)
    return (rows @ kernel.reshape(-1, features)).reshape(examples, height, width, features)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for channels-last images, in the quickest form."""
    plain = (
        lhs.ndim == 4
        and feature_group_count == 1
        and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    )
    if jax.default_backend() == "cpu" and plain:
        pads = (
            lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
            if isinstance(padding, str)
            else padding
        )
        return patches_and_product(lhs, rhs, tuple(window_strides), pads)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
    )


def conv(
    features: int,
    kernel_size: int = 3,
    *,
    strides: int = 1,
    padding: int | None = None,
    groups: int = 1,
    use_bias: bool = False,
    dtype: Any = jnp.float32,
    kernel_init: nn.initializers.Initializer,
    name: str | None = None,
) -> nn.Conv:
    """A square convolution with the symmetric padding (kernel_size - 1) / 2 unless given."""
    pad = (kernel_size - 1) // 2 if padding is None else padding
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=(strides, strides),
        padding=((pad, pad), (pad, pad)),
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )
