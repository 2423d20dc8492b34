"""What the parts of a batch say about its gradient's noise.

Statistics of micro-batches give the noise scale (running, with its range), the share of k by which
steps may then grow, and the squared gradient that a batch of the base size would have shown.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from bs_jax.errors import UserError
from bs_jax.scaling.hyperparameters import check_batch_sizes
from bs_jax.scaling.rules import PyTree, Scalar

DECAY = 0.99  # of the running noise scale, per base-size update
ERRORS = 2.0  # standard errors to either side that the range of a noise scale spans
SAMPLE = ("signal", "noise", "signal_square", "noise_square", "product")  # what `sample` returns
# The guard's noise scale is averaged over about fifty base-size updates, however large k is over
# a few updates at least: a spread cannot be told from fewer.
GUARD_DECAY = 0.98
SMALLEST_GUARD_DECAY = 0.8
# Standard errors that the guard takes off: what is not known must not lengthen a step.
GUARD_ERRORS = 1.0


class MicrobatchStats(NamedTuple):
    """What n micro-batches of one update say about the noise of the gradient.

    The micro-batches must be random parts of the batch: parts sorted by label, length or source
    differ by more than noise, and every noise scale made of them is too large: ``"noise_aware"``
    becomes ``"sqrt"``, and a guard holds nothing back. Nothing warns of it.

    Attributes:
        mean_square: mean over micro-batches of the elementwise squared gradient, each weighted as
            in the mean gradient; a tree like the gradients, float32.
        count: n, the number of micro-batches (over all devices); at least 2.
        mean: the mean gradient as it came from the loss. Only needed where something between the
            loss and the optimizer rescales gradients (clipping); ``None``: the update's own.
    """

    mean_square: PyTree
    count: Any
    mean: PyTree = None


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


def abs_square(x: jax.Array) -> jax.Array:
    """Return the elementwise squared magnitude, float32; of complex numbers |x|^2."""
    if jnp.iscomplexobj(x):
        return abs_square(jnp.real(x)) + abs_square(jnp.imag(x))
    return jnp.square(jnp.asarray(x, jnp.float32))


def check_microbatch(stats: MicrobatchStats, grads: PyTree) -> None:
    """Raise a ``UserError`` unless these are statistics of at least two such gradients."""
    if not isinstance(cast(object, stats), MicrobatchStats):
        raise UserError(
            f"microbatch is a {type(stats).__name__}; give bs_jax.MicrobatchStats(mean_square,"
            " count), e.g. from bs_jax.value_grad_and_stats"
        )
    count = stats.count
    is_scalar = isinstance(count, int | float) or getattr(count, "shape", None) == ()
    if not is_scalar or (not isinstance(count, Tracer) and not float(count) >= 2):
        shown = count if is_scalar else repr(count)
        raise UserError(
            f"microbatch.count is {shown}: the noise shows only between micro-batches; split"
            " the batch into 2 or more (value_grad_and_stats(..., microbatches=2))"
        )
    # Of an array or a number; a tree has none.
    shape = lambda x: None if isinstance(x, (dict, list, tuple)) else getattr(x, "shape", ())  # noqa: E731
    for name, tree in (("mean_square", stats.mean_square), ("mean", stats.mean)):
        if tree is None and name == "mean":
            continue
        try:
            same = tree_map(lambda g, s: shape(g) == shape(s), grads, tree)
        except (ValueError, TypeError):
            same = False
        if not all(jax.tree.leaves(same)):
            raise UserError(
                f"microbatch.{name} is no tree of the shapes of the gradients; give both as"
                " bs_jax.value_grad_and_stats returned them (optax.flatten changes the shapes of"
                " gradients alone, so it cannot wrap what reads statistics)"
            )


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

    Squares of gradients beyond 1e19 overflow float32. There the gradient's own square serves, as
    in plain optax: infinite, so that the step is 0, or finite behind a clip.

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
    count, size = stats.count, k / stats.count  # of a micro-batch, in base batch sizes
    exact = isinstance(size, (int, float)) and size == 1

    def leaf(grad: jax.Array, mean: jax.Array, mean_square: jax.Array) -> tuple[Any, Any]:
        mean_square = jnp.asarray(mean_square, jnp.float32)
        c, w = signal_and_noise(abs_square(mean), mean_square, count)
        noise = w * size
        v0, own = mean_square if exact else c + noise, abs_square(grad)
        known = jnp.isfinite(v0) & jnp.isfinite(noise)
        if mean is not grad:
            # Clipping and the like rescaled the gradient after the statistics were taken.
            seen, raw = jnp.sum(own), jnp.sum(abs_square(mean))
            scale = seen / jnp.where(raw > 0, raw, 1.0)
            v0, noise, known = v0 * scale, noise * scale, known & jnp.isfinite(raw)
        return jnp.where(known, v0, own), jnp.where(known, noise, own)

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
            gradient are alike. Infinite where no signal can be told from zero; NaN as long as
            nothing is known (fewer than two updates).
        standard_error: of ``noise_scale``, by the delta method from the spread over updates;
            infinite as long as nothing is known.
        low: lower end of the range in which it lies: |g|^2/tr(Sigma) with ``ERRORS`` standard
            errors added, inverted. The signal is what is known worst, and may be zero, so this
            range has no symmetric form. 0 as long as nothing is known: a batch that is to grow
            with the noise scale should ask for this end.
        high: its upper end; infinite where the signal may be zero.
        signal: |g|^2.
        noise: tr(Sigma), per example.
        preconditioned: the same in the metric that the optimizer moves in (see ``noise.sample``),
            where the state keeps it: the guard's limit. ``None`` elsewhere, and in itself.
    """

    noise_scale: jax.Array
    standard_error: jax.Array
    low: jax.Array
    high: jax.Array
    signal: jax.Array
    noise: jax.Array
    preconditioned: NoiseScale | None = None

    @property
    def is_known(self) -> Any:
        """Whether two updates or more have been measured."""
        return ~jnp.isnan(self.noise_scale)


def init_noise_scale() -> NoiseScaleState:
    """Return the estimate before any update."""
    return NoiseScaleState(*(jnp.zeros((), jnp.float32) for _ in NoiseScaleState._fields))


def sample(
    grads: PyTree, stats: MicrobatchStats, *, batch_size: Scalar, metric: str = "plain"
) -> dict[str, jax.Array]:
    r"""Return one update's estimates of |g|^2 and tr(Sigma), and what their spread is made of.

    ``|g|^2 ~ sum p c``, ``tr(Sigma) ~ b sum p w`` with b examples a micro-batch and p by the
    metric. Each is unbiased, so means of them over updates are, too; their ratio is not, so it is
    taken last.

    Args:
        grads: mean gradient; of the statistics only the leaves that it has are used.
        stats: of this update; its own ``mean`` comes before ``grads``, which may be clipped.
        batch_size: examples in this update, over all micro-batches.
        metric: ``"plain"``: p = 1, as SGD moves. ``"coordinate"``: p = 1/sqrt(s) with s the mean
            square of the coordinate, as Adam moves. ``"layer"``: 1/sqrt(sum of s over the leaf), as
            optimizers move that normalise each layer. Squares do not know the signs that make the
            signal, so p does not bias it where there is none.

    Returns:
        ``signal`` and ``noise`` (per example), their squares and their product; float32 scalars.

    Raises:
        UserError: if the statistics come from a single micro-batch.

    Reference:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018.
    """
    check_microbatch(stats, grads)
    mean = grads if stats.mean is None else stats.mean

    def sums(_: Any, mean: jax.Array, mean_square: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Without the barrier XLA takes these squares and the optimizer's for one array, as large
        # as the parameters, and writes it to memory.
        square = abs_square(jax.lax.optimization_barrier(mean))
        mean_square = jnp.asarray(mean_square, jnp.float32)
        if metric != "coordinate":
            square, mean_square = jnp.sum(square), jnp.sum(mean_square)
        if metric == "plain":
            return square, mean_square
        positive = mean_square > 0
        p = jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, mean_square, 1.0)), 0.0)
        if metric == "layer":
            return square * p, mean_square * p
        # s/sqrt(s) is a root: a second use of p would have XLA write it to memory.
        return jnp.sum(square * p), jnp.sum(jnp.sqrt(mean_square))

    # Mapped over the gradients first: under optax.masked they have fewer leaves than statistics.
    squares, mean_squares = tree_map(sums, grads, mean, stats.mean_square, outputs=2)
    square, mean_square = (
        sum(jax.tree.leaves(found), start=jnp.zeros((), jnp.float32))
        for found in (squares, mean_squares)
    )
    signal, noise = signal_and_noise(square, mean_square, stats.count)
    noise = noise * (batch_size / stats.count)
    return {
        "signal": signal,
        "noise": noise,
        "signal_square": signal * signal,
        "noise_square": noise * noise,
        "product": signal * noise,
    }


def average(
    state: NoiseScaleState, means: Mapping[str, Any], *, updates: int = 1, decay: Scalar
) -> NoiseScaleState:
    """Take the mean of the samples of some updates into the running estimate.

    A sample that is not finite is passed over: in an average it would stay for good.

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
    finite = jnp.isfinite(new["signal"]) & jnp.isfinite(new["noise"])
    new_state = NoiseScaleState(**averaged, weight_square=weight_square)
    return jax.tree.map(functools.partial(jnp.where, finite), new_state, state)


# One program, in place of twenty small ones, where a loop asks for it outside jit.
@functools.partial(jax.jit, static_argnames="errors", inline=True)
def estimate(state: NoiseScaleState, errors: float = ERRORS) -> NoiseScale:
    """Read the noise scale and its spread out of the running estimate.

    Args:
        state: the running estimate.
        errors: standard errors to either side that ``low`` and ``high`` span.
    """
    weight = jnp.where(state.weight > 0, state.weight, 1.0)
    signal, noise = state.signal / weight, state.noise / weight
    var_signal = jnp.maximum(state.signal_square / weight - signal**2, 0.0)
    var_noise = jnp.maximum(state.noise_square / weight - noise**2, 0.0)
    covariance = state.product / weight - signal * noise
    # With x = signal/noise, dx = (d signal - x d noise)/noise; the sample variance of an average
    # over few updates is too small by 1 - 1/n, n their effective number.
    inverse_n = state.weight_square / weight**2
    x = _ratio(signal, noise)
    spread = jnp.maximum(var_signal - 2 * x * covariance + x**2 * var_noise, 0.0)
    few = (inverse_n > 1 - 1e-5) | (state.weight == 0) | ((signal == 0) & (noise == 0))
    error = jnp.sqrt(spread * inverse_n / jnp.where(few, 1.0, 1 - inverse_n))
    # Squares of very large gradients overflow: then the spread is not known either.
    few = few | ~jnp.isfinite(error)
    error = jnp.where(few, jnp.inf, _ratio(error, noise))
    scale = _ratio(noise, jnp.maximum(signal, 0.0))
    one = jnp.ones(())
    return NoiseScale(
        noise_scale=jnp.where(few, jnp.nan, scale),
        standard_error=jnp.where(few | jnp.isinf(scale), jnp.inf, error * scale**2),
        low=jnp.where(few, 0.0, _ratio(one, jnp.maximum(x + errors * error, 0.0))),
        high=jnp.where(few, jnp.inf, _ratio(one, jnp.maximum(x - errors * error, 0.0))),
        signal=signal,
        noise=noise,
    )


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """A quotient that is infinite, never undefined, where its denominator is zero."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), jnp.inf)


def step_share(k: Scalar, phi: Scalar | None) -> Scalar:
    r"""Return the guard: the share of k by which every step may grow.

    A batch of k base sizes replaces k steps by one. Where noise dominates (k below phi, the noise
    scale over the base batch size), the k steps would have gone in k random directions, and one
    step k times as long ends where they do. Where the signal dominates they would have followed
    the curvature on their way, and a step k times as long overshoots. So::

        k share = min(k, max(1, phi))

    and 1 for k <= 1.

    Args:
        k: batch size over base batch size.
        phi: noise scale over base batch size, in the metric that the optimizer moves in; 0 where
            it is not known yet, ``None`` where nothing limits steps.

    Returns:
        share, in (0, 1].

    Example:
        >>> step_share(8.0, 4.0), step_share(8.0, 0.5), step_share(8.0, 100.0)
        (0.5, 0.125, 1.0)

    Reference:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018, has the smooth form
        (1 + phi)/(1 + phi/k) for the best rate; docs/limit.md compares both.
    """
    if phi is None or (isinstance(k, (int, float)) and k <= 1):
        return 1.0
    if isinstance(k, (int, float)) and isinstance(phi, (int, float)):
        return min(1.0, max(1.0, phi) / k)
    return jnp.minimum(1.0, jnp.maximum(1.0, phi) / k)


class NoiseByGroupState(NamedTuple):
    """State of ``noise_by_group``.

    Attributes:
        groups: label -> running estimate.
    """

    groups: dict[str, NoiseScaleState]


def noise_by_group(
    labels: PyTree | Callable[[PyTree], PyTree],
    *,
    batch_size: int,
    metric: str = "plain",
    decay: float = DECAY,
) -> optax.GradientTransformationExtraArgs:
    r"""Measure the gradient noise scale of each group of parameters; changes no update.

    ``B_noise = tr(Sigma)/|g|^2``, the sums taken over the group's coordinates alone. An embedding,
    of which an example touches few rows, may have ten times the noise scale of the rest. Put it
    first in a chain, in front of what rescales gradients, and read ``noise_scale_by_group(state)``.

    Args:
        labels: a tree of strings that is a prefix of the parameters' tree, or a function from
            parameters to one, as for ``optax.multi_transform``.
        batch_size: examples in one update, unless ``update`` is given another.
        metric: as in ``sample``.
        decay: of the running averages, per update.

    Returns:
        A transformation whose ``update`` takes ``microbatch=`` and ``batch_size=``.

    Raises:
        UserError: for labels that are no prefix of the parameters, or an update without statistics.

    Example:
        >>> tx = optax.chain(noise_by_group({"embedding": "embedding", "head": "rest"},
        ...     batch_size=64), optax.adam(1e-3))
        >>> params = {"embedding": jnp.ones((9, 3)), "head": jnp.ones(3)}
        >>> stats = MicrobatchStats(jax.tree.map(lambda p: 2 * p, params), 4, mean=params)
        >>> _, state = tx.update(params, tx.init(params), params, microbatch=stats)
        >>> sorted(state[0].groups)
        ['embedding', 'rest']

    Reference:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018.
    """
    check_batch_sizes(batch_size, batch_size)
    if not 0 <= decay < 1:
        raise UserError(f"decay is {decay!r}; give a decay below 1, e.g. {DECAY}")

    def split(tree: PyTree, *rest: PyTree) -> dict[str, tuple[list[Any], ...]]:
        """Return the leaves of each group, of every tree."""
        named = labels(tree) if callable(labels) else labels
        names, treedef = jax.tree.flatten(named)
        try:
            columns = [treedef.flatten_up_to(t) for t in (tree, *rest)]
        except (ValueError, TypeError) as error:
            raise UserError(
                f"the labels are no prefix of the parameters' tree: {error}; give one string for"
                " each subtree, as for optax.multi_transform"
            ) from error
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise UserError(f"{wrong[0]!r} is no label of a group; give strings")
        found: dict[str, tuple[list[Any], ...]] = {}
        for name, *parts in zip(names, *columns, strict=True):
            group = found.setdefault(name, tuple([] for _ in columns))
            for leaves, part in zip(group, parts, strict=True):
                leaves.extend(jax.tree.leaves(part))
        return found

    def init(params: PyTree) -> NoiseByGroupState:
        return NoiseByGroupState({name: init_noise_scale() for name in sorted(split(params))})

    def update(
        updates: PyTree,
        state: NoiseByGroupState,
        params: PyTree = None,
        *,
        microbatch: MicrobatchStats | None = None,
        batch_size: Scalar = batch_size,
        **extra_args: Any,
    ) -> tuple[PyTree, NoiseByGroupState]:
        if microbatch is None:
            raise UserError(
                "noise_by_group measures micro-batches and was given none: give"
                " update(..., microbatch=) from bs_jax.value_grad_and_stats"
            )
        check_microbatch(microbatch, updates)
        mean = updates if microbatch.mean is None else microbatch.mean
        groups = {
            name: average(
                state.groups[name],
                sample(
                    own,
                    MicrobatchStats(squares, microbatch.count, means),
                    batch_size=batch_size,
                    metric=metric,
                ),
                decay=decay,
            )
            for name, (own, squares, means) in split(updates, microbatch.mean_square, mean).items()
        }
        return updates, NoiseByGroupState(groups)

    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, update))
