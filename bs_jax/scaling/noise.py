"""The noise of the gradient: micro-batch statistics, the noise scale, the base batch's square."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from bs_jax.errors import UserError
from bs_jax.scaling.rules import Scalar

PyTree: TypeAlias = Any

DECAY = 0.99  # of the running noise scale, per base-size update
ERRORS = 2.0  # standard errors to either side that the range of a noise scale spans
SAMPLE = ("signal", "noise", "signal_square", "noise_square", "product")  # what `sample` returns


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
    whole = isinstance(cast(object, microbatches), int | np.integer) and not isinstance(
        microbatches, bool
    )
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


def tree_map(fn: Callable[..., Any], tree: PyTree, *rest: PyTree, outputs: int = 1) -> Any:
    """Map over the leaves that an optimizer under ``optax.masked`` really has.

    Args:
        fn: leaf, leaves of ``rest`` -> a leaf, or a tuple of ``outputs`` leaves.
        tree: gives the structure; what it masks is left masked.
        *rest: trees of that structure; where it masks, they may have anything.
        outputs: number of trees to return.

    Returns:
        One tree, or a tuple of trees.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    columns = [leaves, *map(treedef.flatten_up_to, rest)]
    done: list[Any] = []
    for row in zip(*columns, strict=True):
        if isinstance(row[0], optax.MaskedNode):
            done.append(row[0] if outputs == 1 else (row[0],) * outputs)
        else:
            done.append(fn(*row))
    if outputs == 1:
        return treedef.unflatten(done)
    return tuple(treedef.unflatten([x[i] for x in done]) for i in range(outputs))


def _tree_sum(tree: PyTree) -> jax.Array:
    return sum((jnp.sum(x) for x in jax.tree.leaves(tree)), start=jnp.zeros((), jnp.float32))


def check_microbatch(stats: MicrobatchStats, grads: PyTree) -> None:
    """Raise a ``UserError`` unless these are statistics of at least two such gradients."""
    if not isinstance(cast(object, stats), MicrobatchStats):
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


def signal_and_noise(square: Any, mean_square: Any, count: Any) -> tuple[Any, Any]:
    r"""Split squared micro-batch gradients into signal and noise, unbiased.

    With s the mean square and g the mean over n micro-batches: ``c = (n g^2 - s)/(n - 1)``,
    ``E c = |E g|^2``; ``w = s - c = n (s - g^2)/(n - 1) >= 0``, E w = variance of one micro-batch.

    Args:
        square: g^2, elementwise or summed over any number of coordinates; float32.
        mean_square: s, elementwise or summed likewise.
        count: n.

    Returns:
        c and w, float32.
    """
    # Rounding may push the difference of two near-equal numbers below zero.
    variance = jnp.maximum(mean_square - square, 0.0)
    return square - variance / (count - 1), variance * (count / (count - 1))


def base_square(grads: PyTree, stats: MicrobatchStats | None, k: Scalar) -> tuple[PyTree, PyTree]:
    r"""Estimate the squared gradient that a batch of the base size would have shown.

    ``v0 = c + w b/B0``, elementwise, with c and w from ``signal_and_noise`` and b = B/n examples
    a micro-batch: ``E v0 = |E g|^2 + Sigma/B0``. At b = B0 it is the mean square itself.

    Args:
        grads: the gradients that the optimizer sees.
        stats: of the update's micro-batches; ``None``: the batch is of the base size, so the
            gradient's own square serves.
        k: batch size over base batch size.

    Returns:
        v0, and its noise part (never negative); trees of float32 arrays.

    Reference:
        Wang & Aitchison, Batch size invariant Adam, 2024 (the case b = B0).
    """
    if stats is None:
        squares = tree_map(abs_square, grads)
        return squares, squares
    count, share = stats.count, k / stats.count
    exact = isinstance(share, (int, float)) and share == 1

    def leaf(grad: jax.Array, mean: jax.Array, mean_square: jax.Array) -> tuple[Any, Any]:
        mean_square = mean_square.astype(jnp.float32)
        c, w = signal_and_noise(abs_square(mean), mean_square, count)
        noise = w * share
        v0 = mean_square if exact else c + noise
        if mean is not grad:
            # Clipping and the like rescaled the gradient after the statistics were taken.
            seen, raw = (jnp.sum(abs_square(x)) for x in (grad, mean))
            scale = seen / jnp.where(raw > 0, raw, 1.0)
            v0, noise = v0 * scale, noise * scale
        return v0, noise

    mean = grads if stats.mean is None else stats.mean
    return tree_map(leaf, grads, mean, stats.mean_square, outputs=2)


class NoiseScaleState(NamedTuple):
    """Running estimate of the gradient noise scale.

    Attributes:
        signal: moving average of |g|^2, not yet divided by ``weight``.
        noise: moving average of tr(Sigma), per example.
        signal_square: of the squared per-update values of |g|^2; for the spread.
        noise_square: of the squared per-update values of tr(Sigma).
        product: of both.
        weight: 1 - the product of the decays used.
        weight_square: sum of squared weights of the average: 1 / effective number of updates.
    """

    signal: jax.Array
    noise: jax.Array
    signal_square: jax.Array
    noise_square: jax.Array
    product: jax.Array
    weight: jax.Array
    weight_square: jax.Array


class NoiseScale(NamedTuple):
    """The gradient noise scale, as estimated.

    Attributes:
        noise_scale: tr(Sigma)/|g|^2 in examples: the batch size at which noise and signal of the
            gradient are alike. Infinite where no signal can be told from zero.
        standard_error: of ``noise_scale``, by the delta method from the spread over updates;
            infinite before the second update.
        low: lower end of the range in which it lies: |g|^2/tr(Sigma) with ``ERRORS`` standard
            errors added, inverted. The signal is what is known worst, and may be zero, so this
            range has no symmetric form.
        high: its upper end; infinite where the signal may be zero.
        signal: |g|^2.
        noise: tr(Sigma), per example.
    """

    noise_scale: jax.Array
    standard_error: jax.Array
    low: jax.Array
    high: jax.Array
    signal: jax.Array
    noise: jax.Array


def init_noise_scale() -> NoiseScaleState:
    """Return the estimate before any update."""
    return NoiseScaleState(*(jnp.zeros((), jnp.float32) for _ in NoiseScaleState._fields))


def sample(grads: PyTree, stats: MicrobatchStats, *, batch_size: Scalar) -> dict[str, jax.Array]:
    r"""Return one update's estimates of |g|^2 and tr(Sigma), and what their spread is made of.

    ``|g|^2 ~ sum c``, ``tr(Sigma) ~ b sum w`` with b examples a micro-batch. Each is unbiased, so
    means of them over updates are, too; their ratio is not, so it is taken last.

    Args:
        grads: mean gradient; of the statistics only the leaves that it has are used.
        stats: of this update; its own ``mean`` comes before ``grads``, which may be clipped.
        batch_size: examples in this update, over all micro-batches.

    Returns:
        ``signal`` and ``noise`` (per example), their squares and their product; float32 scalars.

    Raises:
        UserError: if the statistics come from a single micro-batch.

    Reference:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018.
    """
    check_microbatch(stats, grads)
    mean = grads if stats.mean is None else stats.mean
    # Mapped over the gradients first: under optax.masked they have fewer leaves than statistics.
    square = _tree_sum(tree_map(lambda _, m: _squared_norm(m), grads, mean))
    mean_square = _tree_sum(tree_map(lambda _, s: s.astype(jnp.float32), grads, stats.mean_square))
    signal, noise = signal_and_noise(square, mean_square, stats.count)
    noise = noise * (batch_size / stats.count)
    return {
        "signal": signal,
        "noise": noise,
        "signal_square": signal * signal,
        "noise_square": noise * noise,
        "product": signal * noise,
    }


def _squared_norm(x: jax.Array) -> jax.Array:
    # Without the barrier XLA takes these squares and the optimizer's for one array, as large as
    # the parameters, and writes it to memory.
    return jnp.sum(abs_square(jax.lax.optimization_barrier(x)))


def average(
    state: NoiseScaleState, means: Mapping[str, Any], *, updates: int = 1, decay: Scalar
) -> NoiseScaleState:
    """Take the mean of the samples of some updates into the running estimate.

    Args:
        state: the estimate so far.
        means: of ``sample`` over the updates, by name.
        updates: how many.
        decay: of the average, per update.

    Returns:
        The new estimate.
    """
    keep = decay if updates == 1 else decay**updates
    new = {name: means[name] for name in SAMPLE} | {"weight": 1.0}
    averaged = {name: keep * getattr(state, name) + (1 - keep) * x for name, x in new.items()}
    weight_square = keep**2 * state.weight_square + (1 - keep) ** 2 / updates
    return NoiseScaleState(**averaged, weight_square=weight_square)


def update_noise_scale(
    state: NoiseScaleState,
    grads: PyTree,
    stats: MicrobatchStats,
    *,
    batch_size: Scalar,
    decay: Scalar = DECAY,
) -> NoiseScaleState:
    """Take one update's micro-batch statistics into the running estimate.

    Args:
        state: the estimate so far.
        grads: mean gradient (used where ``stats.mean`` is ``None``).
        stats: of this update.
        batch_size: examples in this update, over all micro-batches.
        decay: of the average, per update.

    Returns:
        The new estimate.

    Raises:
        UserError: if the statistics come from a single micro-batch.
    """
    return average(state, sample(grads, stats, batch_size=batch_size), decay=decay)


def estimate(state: NoiseScaleState) -> NoiseScale:
    """Read the noise scale and its spread out of the running estimate."""
    weight = jnp.where(state.weight > 0, state.weight, 1.0)
    signal, noise = state.signal / weight, state.noise / weight
    var_signal = jnp.maximum(state.signal_square / weight - signal**2, 0.0)
    var_noise = jnp.maximum(state.noise_square / weight - noise**2, 0.0)
    covariance = state.product / weight - signal * noise
    # With x = signal/noise, dx = (d signal - x d noise)/noise; the sample variance of an average
    # over few updates is too small by 1 - share.
    share = state.weight_square / weight**2
    x = _ratio(signal, noise)
    spread = jnp.maximum(var_signal - 2 * x * covariance + x**2 * var_noise, 0.0)
    few = (share > 1 - 1e-5) | (state.weight == 0)
    error = jnp.sqrt(spread * share / jnp.where(few, 1.0, 1 - share))
    error = jnp.where(few, jnp.inf, _ratio(error, noise))
    scale = _ratio(noise, jnp.maximum(signal, 0.0))
    return NoiseScale(
        noise_scale=scale,
        standard_error=jnp.where(jnp.isinf(scale), jnp.inf, error * scale**2),
        low=_ratio(jnp.ones(()), jnp.maximum(x + ERRORS * error, 0.0)),
        high=_ratio(jnp.ones(()), jnp.maximum(x - ERRORS * error, 0.0)),
        signal=signal,
        noise=noise,
    )


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """A quotient that is infinite, never undefined, where its denominator is zero."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), jnp.inf)


def noise_scale_estimate(state: Any) -> NoiseScale | None:
    """Return the noise scale held anywhere in an optimizer state; ``None`` if it keeps none.

    Args:
        state: the state of a ``scale_by_batch`` transformation or of a chain that holds one, or a
            ``NoiseScaleState``.

    Returns:
        The estimate with its standard error.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, NoiseScaleState))
    found = [x for x in leaves if isinstance(x, NoiseScaleState)]
    return estimate(found[0]) if found else None
