"""The invariant second moment: what the base batch size would have shown, from micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bs_jax.scaling.noise_scale import MicrobatchStats, PyTree, signal_and_noise, tree_map
from bs_jax.scaling.rules import Scalar

# Smallest share of the averaged noise variance that the second moment may fall to: the estimate of
# its signal part is unbiased, so it can be negative. Chosen by the study in docs/scaling.md.
VARIANCE_FLOOR = 0.1
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
        squares = tree_map(lambda g: jnp.square(g.astype(jnp.float32)), grads)
        return squares, squares
    mean = grads if stats.mean is None else stats.mean
    share = k / stats.count

    def leaf(grad: jax.Array, mean: jax.Array, mean_square: jax.Array) -> Any:
        c, w = signal_and_noise(mean, mean_square, stats.count)
        noise = w * share
        v0 = mean_square.astype(jnp.float32) if _is_one(share) else c + noise
        if mean is not grad:
            # Clipping and the like rescaled the gradient after the statistics were taken.
            seen, raw = (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in (grad, mean))
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


class _Layout(NamedTuple):
    """Where a kind of second moment lives in an optimizer's state, and how it grows."""

    field: str
    reduce: Callable[[jax.Array], jax.Array]


_LAYOUTS: Mapping[str, _Layout] = {
    "ema": _Layout("nu", lambda x: x),
    "sum": _Layout("sum_of_squares", lambda x: x),
    "layer": _Layout("nu", jnp.sum),
}


def _holds(field: str) -> Callable[[Any], bool]:
    return lambda node: isinstance(node, tuple) and field in getattr(node, "_fields", ())


def init_variance(inner_state: Any, kind: str) -> tuple[PyTree, ...]:
    """Return zeros for the averaged noise part of every second moment in an optimizer state."""
    field = _LAYOUTS[kind].field
    nodes = jax.tree.leaves(inner_state, is_leaf=_holds(field))
    return tuple(
        jax.tree.map(jnp.zeros_like, getattr(node, field)) for node in nodes if _holds(field)(node)
    )


def update_with(
    update: Callable[[Any], tuple[PyTree, Any]],
    grads: PyTree,
    inner_state: Any,
    variance: tuple[PyTree, ...],
    moment: tuple[PyTree, PyTree],
    *,
    kind: str,
    decay: Scalar,
    k: Scalar,
    floor: float = VARIANCE_FLOOR,
) -> tuple[PyTree, Any, tuple[PyTree, ...]]:
    r"""Run an optimizer's own update with its second moment made that of the base batch size.

    The optimizer computes ``decay * nu + (1 - decay) * g^2`` itself. It is handed the nu for which
    this comes out as ``max(nu', floor W')``, where nu' and W' are the moving averages of v0 and of
    its noise part; afterwards nu' itself is put into the state. So every optimizer that keeps its
    second moment in this way is served, and the floor never accumulates.

    Args:
        update: ``inner_state -> (updates, inner_state)``, the optimizer's own.
        grads: the gradients that it sees.
        inner_state: its state.
        variance: W, one tree for each second moment in the state.
        moment: v0 and its noise part, from ``base_second_moment``.
        kind: how the second moment is kept: ``"ema"``, ``"sum"`` or ``"layer"``.
        decay: of the second moment, in force; unused for ``"sum"``.
        k: batch size over base batch size.
        floor: smallest share of W.

    Returns:
        updates, the new inner state, the new W.
    """
    layout = _LAYOUTS[kind]
    holds = _holds(layout.field)
    keep, add = (1.0, k) if kind == "sum" else (decay, 1 - decay)
    own = 1.0 if kind == "sum" else 1 - decay
    v0, noise = moment
    leaves, treedef = jax.tree.flatten(inner_state, is_leaf=holds)
    averages, widths, nodes = [], [], []
    for node in leaves:
        if not holds(node):
            nodes.append(node)
            continue
        width = variance[len(widths)]

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            return keep * old.astype(jnp.float32) + add * layout.reduce(new)

        second = getattr(node, layout.field)
        mean, wide = tree_map(average, second, v0), tree_map(average, width, noise)

        def handed(mean: jax.Array, wide: jax.Array, grad: jax.Array) -> jax.Array:
            square = layout.reduce(jnp.square(grad.astype(jnp.float32)))
            target = jnp.maximum(jnp.maximum(mean, floor * wide), _ROUNDING_FLOOR * square)
            return (target - own * square) / keep

        averages.append(mean)
        widths.append(wide)
        nodes.append(node._replace(**{layout.field: tree_map(handed, mean, wide, grads)}))
    updates, new_state = update(jax.tree.unflatten(treedef, nodes))
    new_leaves, new_treedef = jax.tree.flatten(new_state, is_leaf=holds)
    kept = iter(averages)
    restored = [
        node._replace(**{layout.field: next(kept)}) if holds(node) else node for node in new_leaves
    ]
    return updates, jax.tree.unflatten(new_treedef, restored), tuple(widths)


def is_masked_tree(tree: PyTree) -> bool:
    """Whether an optimizer sees only part of the tree."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return any(isinstance(x, optax.MaskedNode) for x in leaves)
