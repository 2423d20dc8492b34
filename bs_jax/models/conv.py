"""Convolution that takes the form its back end is quickest at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def patches_and_product(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Sequence[tuple[int, int]],
    groups: int = 1,
) -> jax.Array:
    """Gather every output's receptive field as a row, then one matrix product ("im2col").

    Args:
        images: [examples, height, width, channels].
        kernel: [kernel height, kernel width, channels / groups, features].
        strides: of the two spatial axes.
        padding: (before, after) zeros of the two spatial axes.
        groups: of channels, each feeding its own share of the features.

    Returns:
        [examples, output height, output width, features].

    Example:
        >>> images, kernel = jnp.ones((1, 3, 3, 2)), jnp.ones((3, 3, 2, 1))
        >>> patches_and_product(images, kernel, (2, 2), ((1, 1), (1, 1)))[0, :, :, 0]
        Array([[8., 8.],
               [8., 8.]], dtype=float32)
    """
    kernel_height, kernel_width, group_channels, features = kernel.shape
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    examples, padded_height, padded_width, _ = images.shape
    height = (padded_height - kernel_height) // strides[0] + 1
    width = (padded_width - kernel_width) // strides[1] + 1
    shifted = [
        images[
            :,
            row : row + (height - 1) * strides[0] + 1 : strides[0],
            column : column + (width - 1) * strides[1] + 1 : strides[1],
        ]
        for row in range(kernel_height)
        for column in range(kernel_width)
    ]
    positions = examples * height * width
    if groups == 1:
        rows = jnp.concatenate(shifted, axis=-1).reshape(positions, -1)
        outputs = rows @ kernel.reshape(-1, features)
    else:
        stacked = [part.reshape(positions, groups, group_channels) for part in shifted]
        rows = jnp.concatenate(stacked, axis=-1)
        kernels = kernel.reshape(-1, groups, features // groups)
        outputs = jnp.einsum("pgk,kgf->pgf", rows, kernels)
    return outputs.reshape(examples, height, width, features)


def xla_convolution(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Sequence[tuple[int, int]],
    groups: int = 1,
) -> jax.Array:
    """The back end's own convolution; arguments and result as in `patches_and_product`."""
    return lax.conv_general_dilated(
        images,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


FORMS: dict[str, Callable[..., jax.Array]] = {
    "xla": xla_convolution,
    "patches": patches_and_product,
}


def choose_form(backend: str) -> str:
    """The quickest form's name, as `benchmarks/conv_forms.py` measured it.

    On CPU it is "patches" for every shape: inside `lax.scan`, where training runs, XLA's own
    convolution falls back to a plain loop nest and takes 2 to 25 times as long. (Alone, with two
    threads, XLA's takes between a third and four times as long as "patches": it wins on maps of
    16x16 and more with many channels.)

    Args:
        backend: "cpu", "gpu" or "tpu".

    Returns:
        A key of `FORMS`.
    """
    return "patches" if backend == "cpu" else "xla"


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

    Channels-last images with two spatial axes and no dilation take the chosen form; all else goes
    to `jax.lax`. For `flax.linen.Conv(conv_general_dilated=...)`: the parameters stay as they are.
    """
    form = choose_form(jax.default_backend())
    undilated = all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    if form == "xla" or not undilated or not _channels_last(lhs, dimension_numbers):
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
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    return FORMS[form](lhs, rhs, tuple(window_strides), padding, feature_group_count)


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
