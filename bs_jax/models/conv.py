"""Convolution that takes the form its back end is quickest at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bs_jax.models import cpu, layer_forms


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` in the form that is quickest on the default back end.

    Where `layer_forms` says so, floating-point channels-last images with two spatial axes and no
    dilation take the forms of `bs_jax.models.cpu.convolve`; all else goes to `jax.lax`. For
    `flax.linen.Conv(conv_general_dilated=...)`: the parameters stay as they are.
    """
    forms = layer_forms.current()
    undilated = all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    plain = (
        undilated
        and _channels_last(lhs, dimension_numbers)
        and lhs.dtype == rhs.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
    )
    if isinstance(padding, str) and plain:
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    pointwise = (
        plain
        and feature_group_count == 1
        and (*rhs.shape[:2], *window_strides) == (1, 1, 1, 1)
        and not any(low or high for low, high in padding)  # pyright: ignore[reportGeneralTypeIssues]
    )
    if pointwise and forms.pointwise_products:
        return jnp.einsum("bhwi,io->bhwo", lhs, rhs[0, 0], precision=precision)
    if not plain or not forms.own_convolutions:
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
    strides, pads = tuple(window_strides), tuple((low, high) for low, high in padding)
    return cpu.convolve(lhs, rhs, strides, pads, feature_group_count)  # pyright: ignore[reportArgumentType]


def _channels_last(lhs: jax.Array, dimension_numbers: Any) -> bool:
    if lhs.ndim != 4 or dimension_numbers is None:
        return False
    if not isinstance(dimension_numbers, lax.ConvDimensionNumbers):
        return dimension_numbers == ("NHWC", "HWIO", "NHWC")
    return dimension_numbers == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


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
