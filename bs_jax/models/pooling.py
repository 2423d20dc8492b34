"""Pools in the forms that XLA is quickest at on CPU, at PyTorch's sizes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bs_jax.models import layer_forms


def max_pool(x: jax.Array, size: int, stride: int, padding: int = 0) -> jax.Array:
    """Largest value of every window.

    Where values tie, the gradient goes to the first of them in the window, as in PyTorch.

    Args:
        x: [examples, height, width, channels].
        size: of the square window.
        stride: of both axes.
        padding: positions on each side that never win.

    Returns:
        [examples, height', width', channels], height' = (height + 2 padding - size) // stride + 1.

    Example:
        >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), 3, 2, padding=1)[0, :, :, 0].tolist()
        [[5.0, 7.0], [13.0, 15.0]]
    """
    if layer_forms.current().native_max_pool:
        pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        lowest = np.asarray(-jnp.inf, x.dtype)
        return jax.lax.reduce_window(
            x, lowest, jax.lax.max, (1, size, size, 1), (1, stride, stride, 1), pads
        )
    # Columns, then rows: the first of equal values is still the first of the window.
    for axis in (2, 1):
        x = _max_along(axis, size, stride, padding, x)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _max_along(axis: int, size: int, stride: int, padding: int, x: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, _windows(axis, size, stride, padding, x))


def _max_along_forward(axis, size, stride, padding, x):
    y = _max_along(axis, size, stride, padding, x)
    return y, (x, y)


def _max_along_backward(axis, size, stride, padding, kept, dy):
    x, y = kept
    windows, pull_back = jax.vjp(functools.partial(_windows, axis, size, stride, padding), x)
    free, shares = True, []
    for window in windows:
        wins = free & (window == y)
        free &= ~wins
        shares.append(jnp.where(wins, dy, 0))
    return pull_back(shares)


_max_along.defvjp(_max_along_forward, _max_along_backward)


def halving_max_pool(x: jax.Array) -> jax.Array:
    """Largest value of every 2x2 window, stride 2; sizes as `average_pool`'s.

    Example:
        >>> halving_max_pool(jnp.arange(9.0).reshape(1, 3, 3, 1))[0, :, :, 0].tolist()
        [[4.0, 5.0], [7.0, 8.0]]
    """
    return max_pool(_pad_edge(_pad_edge(x, 1), 2), 2, 2)


def average_pool(x: jax.Array) -> jax.Array:
    """Mean of every 2x2 window, stride 2; at an odd edge of the positions that are there.

    Args:
        x: [examples, height, width, channels].

    Returns:
        [examples, ceil(height / 2), ceil(width / 2), channels].

    Example:
        >>> average_pool(jnp.arange(9.0).reshape(1, 3, 3, 1))[0, :, :, 0].tolist()
        [[2.0, 3.5], [6.5, 8.0]]
    """
    x = _pad_edge(_pad_edge(x, 1), 2)
    examples, height, width, channels = x.shape
    return jnp.mean(x.reshape(examples, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


def max_blur_pool(x: jax.Array) -> jax.Array:
    """3x3 maxima at every position, blurred by six binomial taps an axis, stride 2.

    The taps [1 5 10 10 5 1] / 32 are the blur [1 4 6 4 1] / 16 and the mean of two neighbours in
    one; edges are mirrored.

    Args:
        x: [examples, height, width, channels].

    Returns:
        [examples, ceil(height / 2), ceil(width / 2), channels].

    Example:
        >>> max_blur_pool(jnp.ones((1, 4, 4, 1)))[0, :, :, 0].tolist()
        [[1.0, 1.0], [1.0, 1.0]]

    Reference:
        Zhang, Making Convolutional Networks Shift-Invariant Again, 2019.
    """
    x = max_pool(x, 3, 1, padding=1)
    rows, columns = (_blur_matrix(size).astype(x.dtype) for size in x.shape[1:3])
    # Products with small matrices: four times as quick on CPU as sums of shifted slices. By default
    # accelerators would round float32 images to 8 bits (TPU) or 11 (GPU); of bfloat16 they lose
    # nothing, and it costs nothing.
    x = jnp.einsum("pw,bhwc->bhpc", columns, x, precision="highest")
    return jnp.einsum("ph,bhwc->bpwc", rows, x, precision="highest")


def _blur_matrix(size: int) -> np.ndarray:
    """What each of `size` positions adds to each blurred one, [ceil(size / 2), size]."""
    # A mirror needs two positions; one alone is repeated.
    mirrored = np.pad(np.arange(size), (2, 2 + size % 2), "reflect" if size > 1 else "edge")
    matrix = np.zeros(((size + 1) // 2, size), np.float32)
    for row, weights in enumerate(matrix):
        np.add.at(weights, mirrored[2 * row : 2 * row + 6], np.array([1, 5, 10, 10, 5, 1]) / 32)
    return matrix


def _pad_edge(x: jax.Array, axis: int) -> jax.Array:
    """Repeat the last position of an odd axis: its mean with itself is itself."""
    if x.shape[axis] % 2 == 0:
        return x
    return jnp.concatenate([x, jax.lax.slice_in_dim(x, x.shape[axis] - 1, None, 1, axis)], axis)


def _windows(axis: int, size: int, stride: int, padding: int, x: jax.Array) -> list[jax.Array]:
    """Slice out every window's value at each place of the window along an axis."""
    if padding:
        widths = [(padding, padding) if a == axis else (0, 0) for a in range(4)]
        x = jnp.pad(x, widths, constant_values=-jnp.inf)
    length = (x.shape[axis] - size) // stride * stride + 1
    return [jax.lax.slice_in_dim(x, start, start + length, stride, axis) for start in range(size)]
