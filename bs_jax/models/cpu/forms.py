"""Forms of a convolution on a CPU and of its kernel's gradient: products, patches, XLA's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]
_TALL = range(512, 8193)  # rows of a matrix that is better transposed in memory before a product


class Settings(NamedTuple):
    """What a convolution does beside its operands.

    Attributes:
        strides: of the two spatial axes.
        padding: (before, after) zeros of the two spatial axes; negative crops.
    """

    strides: Pair
    padding: Padding


class Form(NamedTuple):
    """One way to compute a convolution and its kernel's gradient.

    Attributes:
        forward: (images, kernel, settings) -> outputs.
        kernel_gradient: (images, slopes of the outputs, kernel's spatial shape, settings) ->
            slopes of the kernel.
    """

    forward: Callable[..., jax.Array]
    kernel_gradient: Callable[..., jax.Array]


def map_size(images: jax.Array) -> Pair:
    """Height and width of images [examples, height, width, channels]."""
    return images.shape[1], images.shape[2]


def window_size(kernel: jax.Array) -> Pair:
    """Height and width of a kernel [height, width, channels, features]."""
    return kernel.shape[0], kernel.shape[1]


def is_pointwise(kernel: tuple[int, ...], settings: Settings) -> bool:
    """Whether every output sees one position: the convolution is a matrix product."""
    return kernel[:2] == (1, 1) and settings.padding == ((0, 0), (0, 0))


def output_size(images: tuple[int, ...], kernel: tuple[int, ...], settings: Settings) -> Pair:
    """Height and width of the outputs."""
    height, width = (
        (images[1 + axis] + sum(settings.padding[axis]) - kernel[axis]) // settings.strides[axis]
        + 1
        for axis in (0, 1)
    )
    return height, width


# One matrix product a tap, over the positions where the tap meets no padding. ------------------


class Tap(NamedTuple):
    """One tap of a kernel: where it is, and the positions that it joins."""

    place: Pair  # in the kernel
    inputs: tuple[slice, slice]  # positions of the images
    outputs: tuple[slice, slice]  # positions of the outputs, as many


def each_tap(size: Pair, outputs: Pair, kernel_size: Pair, settings: Settings) -> Iterator[Tap]:
    """The taps of a kernel that meet the images, with the positions where they do."""
    for place in itertools.product(range(kernel_size[0]), range(kernel_size[1])):
        found: list[tuple[slice, slice]] = []
        for axis in (0, 1):
            stride, shift = settings.strides[axis], place[axis] - settings.padding[axis][0]
            first = max(0, -(shift // stride))
            last = min(outputs[axis] - 1, (size[axis] - 1 - shift) // stride)
            start = first * stride + shift
            found.append(
                (
                    slice(start, start + (last - first) * stride + 1, stride),
                    slice(first, last + 1),
                )
            )
            if last < first:
                break
        else:
            yield Tap(place, (found[0][0], found[1][0]), (found[0][1], found[1][1]))


def taps_forward(settings: Settings, images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Sum over the taps of (images at the tap) @ (kernel at the tap)."""
    outputs = output_size(images.shape, kernel.shape, settings)
    total: Any = None
    for tap in each_tap(map_size(images), outputs, window_size(kernel), settings):
        part = jnp.einsum(
            "nhwc,cf->nhwf",
            images[:, *tap.inputs],
            kernel[tap.place],
            preferred_element_type=accumulator(images.dtype),
        )
        around = [
            (taken.start, count - taken.stop)
            for taken, count in zip(tap.outputs, outputs, strict=True)
        ]
        part = jnp.pad(part, ((0, 0), *around, (0, 0)))
        total = part if total is None else total + part
    if total is None:
        return jnp.zeros((images.shape[0], *outputs, kernel.shape[-1]), images.dtype)
    return total.astype(images.dtype)


def taps_kernel_gradient(
    settings: Settings, images: jax.Array, kernel_size: Pair, slopes: jax.Array
) -> jax.Array:
    """At each tap, (images at the tap)^T @ slopes."""
    channels, features = images.shape[-1], slopes.shape[-1]
    found = {
        tap.place: _transposed_product(
            images[:, *tap.inputs].reshape(-1, channels),
            slopes[:, *tap.outputs].reshape(-1, features),
        )
        for tap in each_tap(map_size(images), map_size(slopes), kernel_size, settings)
    }
    zeros = jnp.zeros((channels, features), images.dtype)
    places = itertools.product(range(kernel_size[0]), range(kernel_size[1]))
    return jnp.stack([found.get(place, zeros) for place in places]).reshape(
        *kernel_size, channels, features
    )


def _transposed_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T @ b; for tall ones quicker if the narrower is transposed in memory before."""
    wide = accumulator(a.dtype)
    if a.shape[0] not in _TALL:
        product = lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=wide)
    elif a.shape[1] <= b.shape[1]:
        product = jnp.matmul(lax.optimization_barrier(a.T), b, preferred_element_type=wide)
    else:
        product = jnp.matmul(lax.optimization_barrier(b.T), a, preferred_element_type=wide).T
    return product.astype(a.dtype)


def accumulator(dtype: Any) -> Any:
    """Dtype that products of this dtype are summed in."""
    return jnp.promote_types(dtype, jnp.float32)


# Every output's receptive field gathered as a row, then one matrix product ("im2col"). ---------


def _patches(settings: Settings, images: jax.Array, kernel_size: Pair) -> jax.Array:
    outputs = output_size(images.shape, kernel_size, settings)
    low_high = [(max(0, low), max(0, high)) for low, high in settings.padding]
    crop = [(max(0, -low), max(0, -high)) for low, high in settings.padding]
    images = images[
        :,
        crop[0][0] : images.shape[1] - crop[0][1],
        crop[1][0] : images.shape[2] - crop[1][1],
    ]
    images = jnp.pad(images, ((0, 0), *low_high, (0, 0)))
    steps = settings.strides
    shifted = [
        images[
            :,
            row : row + (outputs[0] - 1) * steps[0] + 1 : steps[0],
            column : column + (outputs[1] - 1) * steps[1] + 1 : steps[1],
        ]
        for row, column in itertools.product(range(kernel_size[0]), range(kernel_size[1]))
    ]
    together = jnp.concatenate(shifted, axis=-1)
    return together.reshape(-1, together.shape[-1])


def patches_forward(settings: Settings, images: jax.Array, kernel: jax.Array) -> jax.Array:
    """(rows of patches) @ kernel."""
    rows = _patches(settings, images, window_size(kernel))
    outputs = jnp.matmul(
        rows,
        kernel.reshape(-1, kernel.shape[-1]),
        preferred_element_type=accumulator(images.dtype),
    ).astype(images.dtype)
    size = output_size(images.shape, kernel.shape, settings)
    return outputs.reshape(images.shape[0], *size, -1)


def patches_kernel_gradient(
    settings: Settings, images: jax.Array, kernel_size: Pair, slopes: jax.Array
) -> jax.Array:
    """(rows of patches)^T @ slopes."""
    features = slopes.shape[-1]
    rows = _patches(settings, images, kernel_size)
    product = _transposed_product(rows, slopes.reshape(-1, features))
    return product.reshape(*kernel_size, images.shape[-1], features)


# XLA's own convolution, channels last. ----------------------------------------------------------


def _xla(images: jax.Array, kernel: jax.Array, settings: Settings, dilation: Pair) -> jax.Array:
    return lax.conv_general_dilated(
        images,
        kernel,
        settings.strides,
        settings.padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def xla_forward(settings: Settings, images: jax.Array, kernel: jax.Array) -> jax.Array:
    """XLA's; where the kernels are vmapped (to a grouped convolution, which is slow) the taps."""

    @jax.custom_batching.custom_vmap
    def apply(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return _xla(images, kernel, settings, (1, 1))

    @apply.def_vmap
    def _vmapped(axis_size: int, batched: list[bool], images: jax.Array, kernel: jax.Array):
        del axis_size
        return _over_runs(
            batched,
            partial(taps_forward, settings),
            lambda images: xla_forward(settings, images, kernel),
            images,
            kernel,
        )

    return apply(images, kernel)


def _over_runs(
    batched: list[bool],
    each: Callable[..., jax.Array],
    joined: Callable[..., jax.Array],
    first: jax.Array,
    second: jax.Array,
) -> tuple[jax.Array, bool]:
    """The vmapped form: runs that share a kernel are more examples of one convolution."""
    if not batched[1]:
        runs, examples = first.shape[:2]
        outputs = joined(first.reshape(runs * examples, *first.shape[2:]))
        return outputs.reshape(runs, examples, *outputs.shape[1:]), True
    axes = (0 if batched[0] else None, 0)
    return jax.vmap(each, in_axes=axes)(first, second), True


def xla_kernel_gradient(
    settings: Settings, images: jax.Array, kernel_size: Pair, slopes: jax.Array
) -> jax.Array:
    """XLA's convolution of the images with the slopes, channels and examples changing places."""

    @jax.custom_batching.custom_vmap
    def apply(images: jax.Array, slopes: jax.Array) -> jax.Array:
        # Rows and columns that no window reaches would give further, unwanted taps.
        used = [
            (count - 1) * stride + taps
            for count, stride, taps in zip(
                slopes.shape[1:3], settings.strides, kernel_size, strict=True
            )
        ]
        padding = [
            (low, used[axis] - images.shape[1 + axis] - low)
            for axis, (low, _) in enumerate(settings.padding)
        ]
        product = _xla(
            jnp.transpose(images, (3, 1, 2, 0)),
            jnp.transpose(slopes, (1, 2, 0, 3)),
            Settings((1, 1), tuple(padding)),  # pyright: ignore[reportArgumentType]
            settings.strides,
        )
        return jnp.transpose(product, (1, 2, 0, 3))

    @apply.def_vmap
    def _vmapped(axis_size: int, batched: list[bool], images: jax.Array, slopes: jax.Array):
        del axis_size
        each = lambda images, slopes: taps_kernel_gradient(settings, images, kernel_size, slopes)  # noqa: E731
        axes = tuple(0 if is_batched else None for is_batched in batched)
        return jax.vmap(each, in_axes=axes)(images, slopes), True

    return apply(images, slopes)


FORMS: dict[str, Form] = {
    "taps": Form(taps_forward, taps_kernel_gradient),
    "patches": Form(patches_forward, patches_kernel_gradient),
    "xla": Form(xla_forward, xla_kernel_gradient),
}
