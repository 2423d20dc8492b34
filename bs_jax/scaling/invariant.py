"""The invariant second moment: what the base batch size would have shown, from micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bs_jax.scaling.microbatch import (
    MicrobatchStats,
    PyTree,
    abs_square,
    signal_and_noise,
    tree_map,
)
from bs_jax.scaling.rules import Scalar

# Smallest share of the averaged noise variance that the second moment may fall to. The estimate of
# its signal part is unbiased, so it can be negative, while the true one cannot: all of the variance
# would be right on average, somewhat less also undoes that 1/sqrt of a noisy number is too large.
# Chosen by the study in docs/scaling.md.
VARIANCE_FLOOR = 0.7
# Smallest share of the step's own squared gradient, far below anything a second moment reaches; it
# keeps rounding from making the optimizer's own sum negative.
_ROUNDING_FLOOR = 1e-5
# The optimizer multiplies by its decay what we divided by it: below this it would overflow, and a
# memory this short is none.
SMALLEST_DECAY = 1e-6


def base_second_moment(
    grads: PyTree,
    stats: MicrobatchStats | None,
    k: Scalar,
) -> tuple[PyTree, PyTree]:
    r"""Estimate the squared gradient that a batch of the base size would have shown.

    ``v0 = c + w b/B0``, elementwise, with c and w from ``signal_and_noise`` and b = B/n examples
    a micro-batch: ``E v0 = |E g|^2 + Sigma/B0``. At b = B0 it is the mean square itself.

    Args:
        grads: the gradients that the optimizer sees.
        stats: of the update's micro-batches; ``None``: the batch is of the base size, so the
            gradient's own square serves.
        k: batch size over base batch size.

    Returns:
        v0, and its noise part (never negative), float32.

    Reference:
        Wang & Aitchison, Batch size invariant Adam, 2024 (the case b = B0).
    """
    if stats is None:
        squares = tree_map(abs_square, grads)
        return squares, squares
    mean = grads if stats.mean is None else stats.mean
    share = k / stats.count

    def leaf(grad: jax.Array, mean: jax.Array, mean_square: jax.Array) -> Any:
        c, w = signal_and_noise(mean, mean_square, stats.count)
        noise = w * share
        v0 = mean_square.astype(jnp.float32) if _is_one(share) else c + noise
        if mean is not grad:
            # Clipping and the like rescaled the gradient after the statistics were taken.
            seen, raw = (jnp.sum(abs_square(x)) for x in (grad, mean))
            scale = seen / jnp.where(raw > 0, raw, 1.0)
            v0, noise = v0 * scale, noise * scale
        return _Pair(v0, noise)

    pairs = tree_map(leaf, grads, mean, stats.mean_square)
    return _unzip(pairs)


class _Pair:
    """Two arrays that a tree map returns as one leaf."""

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second


def _unzip(tree: PyTree) -> tuple[PyTree, PyTree]:
    return tree_map(lambda p: p.first, tree), tree_map(lambda p: p.second, tree)


def _is_one(x: Any) -> bool:
    return isinstance(x, (int, float)) and x == 1


class _Field(NamedTuple):
    """One field of an optimizer's state that averages or sums squared gradients."""

    name: str
    reduce: Callable[[jax.Array, jax.Array], jax.Array]  # (square, field's leaf) -> what is added


def _mean_over(axis_from_end: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    # optax factors the two largest dimensions: rows average over the largest, columns over the
    # second largest. A leaf too small to be factored has placeholders of one entry instead.
    def reduce(square: jax.Array, leaf: jax.Array) -> jax.Array:
        if leaf.shape == (1,):
            return jnp.zeros_like(leaf, jnp.float32)
        axis = int(np.argsort(square.shape)[-axis_from_end])
        return jnp.mean(square, axis=axis)

    return reduce


def _unfactored(square: jax.Array, leaf: jax.Array) -> jax.Array:
    return square if leaf.shape == square.shape else jnp.zeros_like(leaf, jnp.float32)


_FIELDS: Mapping[str, tuple[_Field, ...]] = {
    "ema": (_Field("nu", lambda square, leaf: square),),
    "sum": (_Field("sum_of_squares", lambda square, leaf: square),),
    "layer": (_Field("nu", lambda square, leaf: jnp.sum(square)),),
    "factored": (
        _Field("v_row", _mean_over(1)),
        _Field("v_col", _mean_over(2)),
        _Field("v", _unfactored),
    ),
}


def _holder(kind: str) -> Callable[[Any], bool]:
    first = _FIELDS[kind][0].name
    return lambda node: isinstance(node, tuple) and first in getattr(node, "_fields", ())


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, tree)


def init_variance(inner_state: Any, kind: str) -> tuple[PyTree, ...]:
    """Return zeros for the averaged noise part of every second moment in an optimizer state."""
    holds = _holder(kind)
    nodes = [x for x in jax.tree.leaves(inner_state, is_leaf=holds) if holds(x)]
    return tuple(_zeros(getattr(node, f.name)) for node in nodes for f in _FIELDS[kind])


@dataclasses.dataclass(frozen=True)
class SecondMoment:
    """How an optimizer keeps its second moment, and what this update adds to it.

    Attributes:
        kind: ``"ema"``, ``"sum"``, ``"layer"`` or ``"factored"``.
        decay: state node -> decay in force (unused for ``"sum"``).
        k: batch size over base batch size.
        base: v0 and its noise part, from ``base_second_moment``.
        floor: smallest share of the averaged noise part.
        eps: what the optimizer adds to each squared gradient.
        direct: whether the optimizer squares the gradients as given; otherwise (a user's own
            chain with, say, clipping in front) what it squares is found by a trial update.
    """

    kind: str
    decay: Callable[[Any], Scalar]
    k: Scalar
    base: tuple[PyTree, PyTree]
    floor: float = VARIANCE_FLOOR
    eps: Scalar = 0.0
    direct: bool = True


def update_with(
    update: Callable[[Any], tuple[PyTree, Any]],
    grads: PyTree,
    inner_state: Any,
    variance: tuple[PyTree, ...],
    moment: SecondMoment,
) -> tuple[PyTree, Any, tuple[PyTree, ...]]:
    r"""Run an optimizer's own update with its second moment made that of the base batch size.

    The optimizer computes ``decay * nu + (1 - decay) * g^2`` itself. It is handed the nu for which
    this comes out as ``max(nu', floor W')``, where nu' and W' are the moving averages of v0 and of
    its noise part; afterwards nu' itself is put into the state. So every optimizer that keeps its
    second moment in this way is served, and the floor never accumulates.

    Args:
        update: ``inner_state -> (updates, inner_state)``, the optimizer's own.
        grads: the gradients that it is given.
        inner_state: its state.
        variance: W, one tree for each second moment in the state.
        moment: how it keeps its second moment, and what is to be added.

    Returns:
        updates, the new inner state, the new W.
    """
    holds = _holder(moment.kind)
    squares = tree_map(abs_square, grads)
    leaves, treedef = jax.tree.flatten(inner_state, is_leaf=holds)
    seen = [None] * len(leaves) if moment.direct else _seen(update, leaves, treedef, moment)
    old_widths = iter(variance)
    handed_nodes, kept, widths = [], [], []
    for node, own_squares in zip(leaves, seen, strict=True):
        if not holds(node):
            handed_nodes.append(node)
            continue
        own, base = squares, moment.base
        if own_squares is not None:
            own, base = own_squares, _rescaled(moment.base, own_squares, squares)
        handed, keep = {}, {}
        for field in _FIELDS[moment.kind]:
            old = getattr(node, field.name)
            args = (field, moment, node, old, next(old_widths), base, own)
            given, keep[field.name], wide = _field_update(*args)
            handed[field.name] = tree_map(_at_least_as_wide, given, old)
            widths.append(wide)
        kept.append(keep)
        if moment.kind == "layer":
            # NovoGrad's first update takes the raw norm as it is; counted as a later one it
            # averages, and what it averages is ours.
            handed["count"] = jnp.maximum(node.count, 1)
            keep["count"] = optax.safe_increment(node.count)
        handed_nodes.append(node._replace(**handed))
    updates, new_state = update(jax.tree.unflatten(treedef, handed_nodes))
    new_leaves, new_treedef = jax.tree.flatten(new_state, is_leaf=holds)
    to_keep = iter(kept)
    restored = [node._replace(**next(to_keep)) if holds(node) else node for node in new_leaves]
    return updates, jax.tree.unflatten(new_treedef, restored), tuple(widths)


def _at_least_as_wide(x: jax.Array, old: jax.Array) -> jax.Array:
    """Float32 stays where the state is bfloat16, but gives way to float64 and complex states."""
    return x.astype(jnp.promote_types(old.dtype, jnp.float32))


def _field_update(
    field: _Field,
    moment: SecondMoment,
    node: Any,
    old: PyTree,
    old_wide: PyTree,
    base: tuple[PyTree, PyTree],
    own_squares: PyTree,
) -> tuple[PyTree, PyTree, PyTree]:
    """Return what one field is handed as, what is kept of it, and its new W."""
    if moment.kind == "sum":
        keep, add, own_add = 1.0, moment.k, 1.0
    else:
        keep = moment.decay(node)
        add = own_add = 1 - keep
        if moment.kind == "layer":
            first = node.count == 0
            keep_old, add = jnp.where(first, 0.0, keep), jnp.where(first, 1.0, add)
            return _finish(
                field, moment, (keep_old, keep, add, own_add), old, old_wide, base, own_squares
            )
    return _finish(field, moment, (keep, keep, add, own_add), old, old_wide, base, own_squares)


def _finish(
    field: _Field,
    moment: SecondMoment,
    weights: tuple[Scalar, Scalar, Scalar, Scalar],
    old: PyTree,
    old_wide: PyTree,
    base: tuple[PyTree, PyTree],
    own_squares: PyTree,
) -> tuple[PyTree, PyTree, PyTree]:
    keep_old, keep, add, own_add = weights

    def average(leaf: jax.Array, new: jax.Array) -> jax.Array:
        old = jnp.real(leaf).astype(jnp.float32)  # optax keeps that of complex numbers as complex
        return keep_old * old + add * field.reduce(new + moment.eps, leaf)

    mean, wide = tree_map(average, old, base[0]), tree_map(average, old_wide, base[1])

    def handed(mean: jax.Array, wide: jax.Array, square: jax.Array) -> jax.Array:
        own = own_add * field.reduce(square + moment.eps, mean)
        target = jnp.maximum(jnp.maximum(mean, moment.floor * wide), _ROUNDING_FLOOR * own)
        return (target - own) / keep

    return tree_map(handed, mean, wide, own_squares), mean, wide


def _seen(
    update: Callable[[Any], tuple[PyTree, Any]],
    leaves: list[Any],
    treedef: Any,
    moment: SecondMoment,
) -> list[PyTree | None]:
    """Return the squares that the optimizer itself takes, from an update with empty moments."""
    holds = _holder(moment.kind)
    names = [field.name for field in _FIELDS[moment.kind]]
    empty = [
        node._replace(**{name: _zeros(getattr(node, name)) for name in names})
        if holds(node)
        else node
        for node in leaves
    ]
    _, trial = update(jax.tree.unflatten(treedef, empty))
    (name,) = names
    found = []
    for old, new in zip(leaves, jax.tree.leaves(trial, is_leaf=holds), strict=True):
        if not holds(old):
            found.append(None)
            continue
        share = 1.0 if moment.kind == "sum" else 1 - moment.decay(old)
        found.append(
            tree_map(lambda x, s=share: jnp.real(x).astype(jnp.float32) / s, getattr(new, name))
        )
    return found


def _rescaled(base: tuple[PyTree, PyTree], seen: PyTree, given: PyTree) -> tuple[PyTree, PyTree]:
    """Scale v0 as the chain in front of the optimizer scaled the gradient, leaf by leaf."""

    def scale(seen: jax.Array, given: jax.Array, x: jax.Array) -> jax.Array:
        raw = jnp.sum(given)
        return x * (jnp.sum(seen) / jnp.where(raw > 0, raw, 1.0))

    first, second = (tree_map(scale, seen, given, part) for part in base)
    return first, second
