"""Convolution for CPUs: matrix products and plain convolutions, its derivative written out.

XLA on CPU has a quick convolution and a plain loop nest, up to a hundred times slower. What takes
the loop nest: autodiff's gradients inside a `lax.scan`, which permute the axes in a way that only
the outermost computation is cleared of; maps of 2x2; strided gradients; groups and vmapped kernels.
So every one of forward pass, gradient of the images and gradient of the kernel is written here as
what is quick: a convolution with channels last and no dilation, or matrix products.

`benchmarks/conv_forms.py` measures the forms and whether the choice between them is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bs_jax.models.cpu.forms import (
    FORMS,
    Padding,
    Pair,
    Settings,
    accumulator,
    each_tap,
    is_pointwise,
    map_size,
    output_size,
    window_size,
)

_BLOCK = 32  # channels that small groups are joined to: narrower products run at a tenth of speed
_NARROW = 16  # channels below which XLA's convolution is slower a product
_NEAR_FLOATS, _NARROW_FLOATS = 2**17, 2**20  # of patches, up to which they are the quickest
_TINY_MAP = 4  # positions of the outputs up to which XLA's convolution takes its loop nest


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    strides: Pair = (1, 1),
    padding: Padding = ((0, 0), (0, 0)),
    groups: int = 1,
) -> jax.Array:
    """Convolve in the forms that are quickest on a CPU.

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
        >>> convolve(images, kernel, (2, 2), ((1, 1), (1, 1)))[0, :, :, 0]
        Array([[8., 8.],
               [8., 8.]], dtype=float32)
    """
    settings = Settings(tuple(strides), tuple((low, high) for low, high in padding))  # pyright: ignore[reportArgumentType]
    if groups == 1:
        return _convolve(settings, images, kernel)
    return _grouped(settings, images, kernel, groups)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(settings: Settings, images: jax.Array, kernel: jax.Array) -> jax.Array:
    return _forward(settings, images, kernel)


def _convolve_forward(settings, images, kernel):
    return _forward(settings, images, kernel), (images, kernel)


def _convolve_backward(settings, kept, slopes):
    images, kernel = kept
    return (
        image_gradient(settings, map_size(images), kernel, slopes),
        kernel_gradient(settings, images, window_size(kernel), slopes),
    )


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _forward(settings: Settings, images: jax.Array, kernel: jax.Array) -> jax.Array:
    name = choose_forward(images.shape, kernel.shape, settings)
    return FORMS[name].forward(settings, images, kernel)


def kernel_gradient(
    settings: Settings, images: jax.Array, kernel_size: Pair, slopes: jax.Array
) -> jax.Array:
    """Slopes of the kernel, from those of the outputs."""
    name = choose_kernel_gradient(
        images.shape, (*kernel_size, images.shape[-1], slopes.shape[-1]), settings
    )
    return FORMS[name].kernel_gradient(settings, images, kernel_size, slopes)


def image_gradient(
    settings: Settings, size: Pair, kernel: jax.Array, slopes: jax.Array
) -> jax.Array:
    """Slopes of the images, from those of the outputs."""
    name = choose_image_gradient(slopes.shape, kernel.shape)
    return IMAGE_GRADIENTS[name](settings, size, kernel, slopes)


def columns_image_gradient(
    settings: Settings, size: Pair, kernel: jax.Array, slopes: jax.Array
) -> jax.Array:
    """Add every tap's share, of slopes @ kernel^T, where the tap was ("col2im")."""
    height, width, channels, features = kernel.shape
    wide = accumulator(slopes.dtype)
    if (height, width) == (1, 1):
        rows = slopes.reshape(-1, features)
        shares = lax.dot_general(
            rows, kernel[0, 0], (((1,), (1,)), ((), ())), preferred_element_type=wide
        )
        shares = shares.reshape(1, 1, *slopes.shape[:3], channels)
    else:
        # As kernel @ slopes^T: the kernel is the large one, and is read as it lies in memory.
        turned = lax.optimization_barrier(slopes.reshape(-1, features).T)
        shares = jnp.matmul(kernel.reshape(-1, features), turned, preferred_element_type=wide)
        shares = shares.reshape(height, width, channels, *slopes.shape[:3])
        shares = jnp.moveaxis(shares, 2, -1)
    total: Any = None
    for tap in each_tap(size, map_size(slopes), (height, width), settings):
        part = shares[*tap.place, :, *tap.outputs]
        around = [
            (taken.start, count - taken.stop, stride - 1)
            for taken, count, stride in zip(tap.inputs, size, settings.strides, strict=True)
        ]
        zero = jnp.zeros((), part.dtype)
        part = lax.pad(part, zero, [(0, 0, 0), *around, (0, 0, 0)])
        total = part if total is None else total + part
    if total is None:
        return jnp.zeros((slopes.shape[0], *size, channels), slopes.dtype)
    return total.astype(slopes.dtype)


def residues_image_gradient(
    settings: Settings, size: Pair, kernel: jax.Array, slopes: jax.Array
) -> jax.Array:
    """Convolutions of the slopes, one for every residue of the position by the stride.

    Every position u of an axis is reached by the taps i with u + pad - i divisible by the stride:
    positions of one residue are a convolution of the slopes with every stride-th tap, reversed.

    Args:
        settings: of the convolution.
        size: height and width of the images.
        kernel: of the convolution.
        slopes: of its outputs.

    Returns:
        [examples, *size, channels].
    """
    kernel = jnp.swapaxes(kernel, 2, 3)
    axes = [
        _residues(size[axis], kernel.shape[axis], slopes.shape[1 + axis], settings, axis)
        for axis in (0, 1)
    ]
    rows = []
    for row in axes[0]:
        parts = []
        for column in axes[1]:
            shape = (slopes.shape[0], row.length, column.length, kernel.shape[-1])
            taps = kernel[row.taps, column.taps][::-1, ::-1]
            if 0 in (*shape, *taps.shape):
                parts.append(jnp.zeros(shape, slopes.dtype))
                continue
            plain = Settings((1, 1), (row.padding, column.padding))
            parts.append(_forward(plain, slopes, taps))
        rows.append(_interleave(parts, 2, size[1]))
    return _interleave(rows, 1, size[0])


class _Residue(NamedTuple):
    taps: slice
    padding: Pair
    length: int


def _residues(size: int, taps: int, outputs: int, settings: Settings, axis: int) -> list[_Residue]:
    """For each residue of the position: the taps that reach it and the slopes' padding."""
    stride, before = settings.strides[axis], settings.padding[axis][0]
    found = []
    for start in range(stride):
        first = (start + before) % stride  # the first tap that reaches these positions
        shift = (start + before - first) // stride  # of the slope that it takes
        count = max(0, -(-(taps - first) // stride))
        length = max(0, -(-(size - start) // stride))
        padding = (count - 1 - shift, shift + length - outputs)
        found.append(_Residue(slice(first, None, stride), padding, length))
    return found


def _interleave(parts: list[jax.Array], axis: int, size: int) -> jax.Array:
    """Put parts[r][q] at position q * len(parts) + r of the axis."""
    if len(parts) == 1:
        return parts[0]
    longest = parts[0].shape[axis]
    widths = [[(0, 0)] * part.ndim for part in parts]
    for part, width in zip(parts, widths, strict=True):
        width[axis] = (0, longest - part.shape[axis])
    together = jnp.stack([jnp.pad(p, w) for p, w in zip(parts, widths, strict=True)], axis + 1)
    shape = list(parts[0].shape)
    shape[axis] = longest * len(parts)
    return lax.slice_in_dim(together.reshape(shape), 0, size, axis=axis)


def choose_forward(images: tuple[int, ...], kernel: tuple[int, ...], settings: Settings) -> str:
    """The quickest form of the forward pass, as measured; a key of `FORMS`."""
    if is_pointwise(kernel, settings):
        return "taps"  # one matrix product
    height, width = output_size(images, kernel, settings)
    outputs = (images[0], height, width)
    return "patches" if _is_tiny(outputs) or _patches_fit(outputs, kernel) else "xla"


def choose_image_gradient(slopes: tuple[int, ...], kernel: tuple[int, ...]) -> str:
    """The quickest form of the images' gradient, as measured; a key of `IMAGE_GRADIENTS`."""
    few = kernel[:2] == (1, 1) or kernel[2] < _NARROW
    return "columns" if few or _is_tiny(slopes) or _patches_fit(slopes, kernel) else "residues"


def choose_kernel_gradient(
    images: tuple[int, ...], kernel: tuple[int, ...], settings: Settings
) -> str:
    """The quickest form of the kernel's gradient, as measured; a key of `FORMS`."""
    if is_pointwise(kernel, settings):
        return "taps"
    height, width = output_size(images, kernel, settings)
    outputs = (images[0], height, width)
    if _is_tiny(outputs):
        return "taps"
    return "patches" if _patches_fit(outputs, kernel) else "xla"


def _is_tiny(outputs: tuple[int, ...]) -> bool:
    return outputs[1] * outputs[2] <= _TINY_MAP


def _patches_fit(outputs: tuple[int, ...], kernel: tuple[int, ...]) -> bool:
    """Whether the patches, as many as outputs and as large as a window, stay in a near cache."""
    floats = math.prod(outputs[:3]) * math.prod(kernel[:3])
    return floats <= (_NARROW_FLOATS if kernel[2] < _NARROW else _NEAR_FLOATS)


IMAGE_GRADIENTS: dict[str, Callable[..., jax.Array]] = {
    "columns": columns_image_gradient,
    "residues": residues_image_gradient,
}


# Groups: blocks of them side by side, each a dense convolution. --------------------------------


def _grouped(settings: Settings, images: jax.Array, kernel: jax.Array, groups: int) -> jax.Array:
    """Join groups to blocks of about 32 channels, zeros between them, and vmap over the blocks.

    A block of m groups costs m times the products; those of four channels run so slowly that this
    is far quicker.
    """
    height, width, group_channels, features = kernel.shape
    joined = next(m for m in range(max(1, _BLOCK // group_channels), 0, -1) if groups % m == 0)
    blocks, group_features = groups // joined, features // groups
    apart = kernel.reshape(height, width, group_channels, blocks, joined, group_features)
    own = jnp.eye(joined, dtype=kernel.dtype)
    # [blocks, height, width, (group, its channels), (group, its features)], zero across groups.
    block_kernels = jnp.einsum("hwcbgf,gk->bhwkcgf", apart, own).reshape(
        blocks, height, width, joined * group_channels, joined * group_features
    )
    block_images = images.reshape(*images.shape[:3], blocks, -1)
    convolve_block = partial(_convolve, settings)
    outputs = jax.vmap(convolve_block, in_axes=(3, 0), out_axes=3)(block_images, block_kernels)
    return outputs.reshape(*outputs.shape[:3], features)
