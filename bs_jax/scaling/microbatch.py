"""Gradient statistics over micro-batches, and the loss function that gathers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from bs_jax.errors import UserError

PyTree = Any


class MicrobatchStats(NamedTuple):
    """What n micro-batches of one update say about the noise of the gradient.

    Attributes:
        mean_square: mean over micro-batches of the elementwise squared gradient; a tree like the
            gradients, float32.
        count: n, the number of micro-batches (over all devices); at least 2.
        mean: the mean gradient as it came from the loss. Only needed where something between the
            loss and the optimizer rescales gradients (clipping); ``None``: the update's own.
    """

    mean_square: PyTree
    count: Any
    mean: PyTree = None


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def tree_map(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Map over the leaves that an optimizer under ``optax.masked`` really has."""
    return jax.tree.map(
        lambda x, *xs: x if _is_masked(x) else fn(x, *xs), tree, *rest, is_leaf=_is_masked
    )


def tree_sum(tree: PyTree) -> jax.Array:
    """Return the sum over all entries of all leaves, float32."""
    return sum((jnp.sum(x) for x in jax.tree.leaves(tree)), start=jnp.zeros((), jnp.float32))


def check_microbatch(stats: MicrobatchStats, grads: PyTree) -> None:
    """Raise a ``UserError`` unless these are statistics of at least two such gradients."""
    if not isinstance(stats, MicrobatchStats):
        raise UserError(
            f"microbatch is a {type(stats).__name__}; give bs_jax.MicrobatchStats(mean_square,"
            " count), e.g. from bs_jax.value_grad_and_stats"
        )
    if not isinstance(stats.count, Tracer) and float(stats.count) < 2:
        raise UserError(
            f"microbatch.count is {stats.count}: the noise shows only between micro-batches; split"
            " the batch into 2 or more (value_grad_and_stats(..., microbatches=2))"
        )
    for name, tree in (("mean_square", stats.mean_square), ("mean", stats.mean)):
        if tree is None:
            continue
        try:
            same = tree_map(lambda g, s: jnp.shape(g) == jnp.shape(s), grads, tree)
        except (ValueError, TypeError):
            same = False
        if not all(jax.tree.leaves(same)):
            raise UserError(
                f"microbatch.{name} is no tree of the shapes of the gradients; give both as"
                " bs_jax.value_grad_and_stats returned them"
            )


def abs_square(x: jax.Array) -> jax.Array:
    """Return the elementwise squared magnitude, float32; of complex numbers |x|^2."""
    if jnp.iscomplexobj(x):
        return abs_square(jnp.real(x)) + abs_square(jnp.imag(x))
    return jnp.square(x.astype(jnp.float32))


def signal_and_noise(mean: jax.Array, mean_square: jax.Array, count: Any) -> tuple[Any, Any]:
    r"""Split squared micro-batch gradients into signal and noise, elementwise and unbiased.

    With s the mean square and g the mean over n micro-batches: ``c = (n g^2 - s)/(n - 1)``,
    ``E c = |E g|^2``; ``w = s - c = n (s - g^2)/(n - 1) >= 0``, E w = variance of one micro-batch.

    Args:
        mean: mean gradient over the micro-batches.
        mean_square: mean of the squared micro-batch gradients.
        count: n.

    Returns:
        c and w, float32.
    """
    square = abs_square(mean)
    # Rounding may push the difference of two near-equal numbers below zero.
    variance = jnp.maximum(mean_square.astype(jnp.float32) - square, 0.0)
    return square - variance / (count - 1), variance * (count / (count - 1))


def value_grad_and_stats(
    loss_fn: Callable[..., Any],
    *,
    microbatches: int,
    axis_name: str | None = None,
    has_aux: bool = False,
    method: Literal["scan", "vmap"] = "scan",
    unroll: int = 1,
    interleave: bool = False,
) -> Callable[..., tuple[Any, PyTree, MicrobatchStats | None]]:
    r"""Return a function that gives loss, gradient and micro-batch statistics of one batch.

    The batch is split into ``microbatches`` equal parts whose gradients are averaged (gradient
    accumulation); the mean of their squares is gathered beside it.

    Args:
        loss_fn: ``loss_fn(params, batch, *args) -> loss`` (or ``(loss, aux)``), a mean over the
            examples of its batch.
        microbatches: parts that this device's batch is split into.
        axis_name: a mapped axis (``pmap``, ``shard_map``) to average over as well; each device
            then counts as further micro-batches.
        has_aux: whether ``loss_fn`` also returns auxiliary output, which is averaged too.
        method: ``"scan"``: one part at a time, lean on memory; ``"vmap"``: all at once.
        unroll: of the scan.
        interleave: whether part i holds examples i, i + n, i + 2 n, ... instead of the i-th n-th
            of the batch. For a batch that ``jit`` shards over devices: each part then lies on all
            of them, where one whole piece lies on few, and the scan has every device compute it.

    Returns:
        ``f(params, batch, *args, rng=None) -> (value, grads, stats)`` with value the loss or
        ``(loss, aux)``. Every leaf of batch has a leading dimension divisible by ``microbatches``.
        A given ``rng`` is folded with the index of the part (and the device) and passed to
        ``loss_fn`` as ``rng=``. stats is ``None`` if there is one part and one device.

    Raises:
        UserError: if the batch cannot be split evenly.

    Example:
        >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
        >>> f = value_grad_and_stats(loss, microbatches=2)
        >>> value, grads, stats = f(jnp.ones(3), jnp.eye(3).repeat(2, axis=0))
        >>> value.shape, grads.shape, stats.count
        ((), (3,), 2)
    """
    whole = isinstance(microbatches, int | np.integer) and not isinstance(microbatches, bool)
    if not whole or microbatches < 1:
        raise UserError(f"microbatches is {microbatches!r}; give a whole number of at least 1")
    microbatches = int(microbatches)
    if method not in ("scan", "vmap"):
        raise UserError(f"method is {method!r}; choose 'scan' or 'vmap'")

    def fn(params: PyTree, batch: PyTree, *args: Any, rng: Any = None) -> Any:
        # Under shard_map the gradient of replicated parameters is already summed over the devices:
        # of their own copies every device keeps its own gradient.
        params = params if axis_name is None else _own_copy(params, axis_name)
        index = 0 if axis_name is None else jax.lax.axis_index(axis_name) * microbatches

        def part(xs: tuple[Any, PyTree]) -> tuple[Any, PyTree, PyTree]:
            i, piece = xs
            kwargs = {} if rng is None else {"rng": jax.random.fold_in(rng, index + i)}
            run = jax.value_and_grad(lambda p: loss_fn(p, piece, *args, **kwargs), has_aux=has_aux)
            value, grads = run(params)
            squares = jax.tree.map(abs_square, grads)
            return value, grads, squares

        pieces = _split(batch, microbatches, interleave)
        if microbatches == 1:
            sums = part((0, batch))
        elif method == "vmap":
            parts = jax.vmap(part)((jnp.arange(microbatches), pieces))
            sums = jax.tree.map(lambda x: jnp.sum(_wide(x), axis=0), parts)
        else:
            sums = _scan_sum(part, (jnp.arange(microbatches), pieces), unroll, axis_name)
        means = jax.tree.map(lambda x: x / microbatches, sums) if microbatches > 1 else sums
        count = microbatches
        if axis_name is not None:
            means = jax.lax.pmean(means, axis_name)
            count = microbatches * jax.lax.axis_size(axis_name)
        value, wide, squares = means
        # The statistics keep the mean as it was summed: rounded to bfloat16 its square would differ
        # from the mean square by more than a small noise does. Where nothing is rounded, the two
        # trees hold the same arrays, which tells the optimizer that nothing rescaled them.
        grads = jax.tree.map(_as_dtype_of, wide, params)
        stats = MicrobatchStats(squares, count, mean=wide) if count > 1 else None
        return value, grads, stats

    return fn


def _as_dtype_of(gradient: jax.Array, param: Any) -> jax.Array:
    dtype = jnp.result_type(param)
    return gradient if gradient.dtype == dtype else gradient.astype(dtype)


def _wide(x: jax.Array) -> jax.Array:
    # Sums of bfloat16 lose the small terms, sums of integers their mean.
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _split(batch: PyTree, parts: int, interleave: bool) -> PyTree:
    sizes = {x.shape[0] if jnp.ndim(x) else 0 for x in jax.tree.leaves(batch)}
    if len(sizes) > 1:
        found = " and ".join(str(size) if size else "no" for size in sorted(sizes))
        raise UserError(
            f"the batch's arrays hold {found} examples: each needs the same number in front; pass"
            " what is no example as a further argument of the loss"
        )
    size = sizes.pop() if sizes else 0
    if not size or size % parts:
        raise UserError(
            f"a batch of {size or 'no'} examples cannot be split into {parts} equal micro-batches;"
            f" use a batch size divisible by {parts} or another number of micro-batches"
        )
    if interleave:
        return jax.tree.map(
            lambda x: x.reshape(size // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
        )
    return jax.tree.map(lambda x: x.reshape(parts, size // parts, *x.shape[1:]), batch)


def _own_copy(tree: PyTree, axis_name: str) -> PyTree:
    """Let values that are the same on every device of a ``shard_map`` count as each device's."""

    def own(x: Any) -> Any:
        try:
            return jax.lax.pcast(x, axis_name, to="varying")
        except ValueError:  # they are so already, or the axis is a vmap's
            return x

    return jax.tree.map(own, tree)


def _scan_sum(fn: Callable[[Any], Any], xs: Any, unroll: int, axis_name: str | None) -> Any:
    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], xs))
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes
    )
    zeros = zeros if axis_name is None else _own_copy(zeros, axis_name)

    def body(carry: Any, x: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda c, v: c + _wide(v), carry, fn(x)), None

    total, _ = jax.lax.scan(body, zeros, xs, unroll=unroll)
    return total
