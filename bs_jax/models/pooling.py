"""Pools as maxima and means of shifted slices, at PyTorch's sizes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


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
    return _max_pool(size, stride, padding, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _max_pool(size: int, stride: int, padding: int, x: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, _windows(_pad_lowest(x, padding), size, stride))


def _max_pool_forward(size, stride, padding, x):
    y = _max_pool(size, stride, padding, x)
    return y, (x, y)


def _max_pool_backward(size, stride, padding, kept, dy):
    x, y = kept
    padded = _pad_lowest(x, padding)
    _, pull_back = jax.vjp(lambda p: _windows(p, size, stride), padded)
    free, shares = jnp.ones(y.shape, bool), []
    for window in _windows(padded, size, stride):
        wins = free & (window == y)
        free &= ~wins
        shares.append(jnp.where(wins, dy, 0))
    (dx,) = pull_back(shares)
    _, height, width, _ = x.shape
    return (dx[:, padding : padding + height, padding : padding + width],)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


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
    return _mean_of_pairs(_mean_of_pairs(x, 1), 2)


def _mean_of_pairs(x: jax.Array, axis: int) -> jax.Array:
    x = _pad_edge(x, axis)
    return 0.5 * (_every_second(x, axis, 0) + _every_second(x, axis, 1))


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
    return _blur(_blur(max_pool(x, 3, 1, padding=1), 1), 2)


def _blur(x: jax.Array, axis: int) -> jax.Array:
    size = x.shape[axis]
    widths = [(2, 2 + size % 2) if a == axis else (0, 0) for a in range(4)]
    # A mirror needs two positions; one alone is repeated.
    x = jnp.pad(x, widths, mode="reflect" if size > 1 else "edge")
    length = (size + 1) // 2
    tap = [_every_second(x, axis, start, length) for start in range(6)]
    outer, middle, inner = tap[0] + tap[5], tap[1] + tap[4], tap[2] + tap[3]
    return outer * (1 / 32) + middle * (5 / 32) + inner * (10 / 32)


def _every_second(x: jax.Array, axis: int, start: int, length: int | None = None) -> jax.Array:
    length = x.shape[axis] // 2 if length is None else length
    return jax.lax.slice_in_dim(x, start, start + 2 * (length - 1) + 1, 2, axis)


def _pad_edge(x: jax.Array, axis: int) -> jax.Array:
    """Repeat the last position of an odd axis: its mean with itself is itself."""
    if x.shape[axis] % 2 == 0:
        return x
    return jnp.concatenate([x, jax.lax.slice_in_dim(x, x.shape[axis] - 1, None, 1, axis)], axis)


def _pad_lowest(x: jax.Array, padding: int) -> jax.Array:
    if not padding:
        return x
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jnp.pad(x, around, constant_values=-jnp.inf)


def _windows(x: jax.Array, size: int, stride: int) -> list[jax.Array]:
    """Slice out every window's value at each place of the window, row by row."""
    _, height, width, _ = x.shape
    bottom, right = height - size + 1, width - size + 1
    return [
        x[:, row : row + bottom : stride, column : column + right : stride]
        for row in range(size)
        for column in range(size)
    ]
