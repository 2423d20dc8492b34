"""Carrying an optimizer's moments and step counts over a change of the batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bs_jax.scaling.formulas import Scaler
from bs_jax.scaling.microbatch import tree_map

_MOMENTS = ("mu", "nu", "nu_max", "ema", "trace", "sum_of_squares", "v_row")


def _holds_moments(node: Any) -> bool:
    fields = getattr(node, "_fields", ()) if isinstance(node, tuple) else ()
    return any(name in fields for name in _MOMENTS)


def _is_counted(node: Any) -> bool:
    return _holds_moments(node) and "count" in node._fields


def carry_moments(inner_state: Any, old: Scaler, new: Scaler) -> Any:
    r"""Restate an optimizer's moments for another batch size.

    A gradient average keeps its value. A second moment is multiplied by (d'/d)^2, where d is the
    rule's factor on what the optimizer divides by. A sum of gradients taken with decay m is
    multiplied by (1 - m)/(1 - m'); one taken after the learning rate holds steps, which grow with
    F'd/(F d').

    Args:
        inner_state: the optimizer's state.
        old: the formulas at the batch size of the last update.
        new: the formulas now.

    Returns:
        The state, restated; unchanged if both sizes are the same.
    """
    family = new.spec.family
    if family is None or (new.rule.is_identity(1.0) and not new.rule.time_constants):
        return inner_state
    root = new.denominator_factor(new.k) / old.denominator_factor(old.k)
    filtered = 1.0
    for name, role in new.spec.roles.items():
        if role == "undamped_momentum" and name in new.values:
            filtered = filtered * (1 - old.value(name)) / (1 - new.value(name))
    step = (new.lr_factor(new.k) / old.lr_factor(old.k)) / root
    trace = step if family.trace_after_lr else filtered
    first = filtered / root if family.second_moment == "layer" else 1.0
    second = root if family.second_moment == "max" else root**2
    factors = {
        "mu": first,
        "nu": second,
        "nu_max": second,
        "sum_of_squares": second,
        "v_row": second,
        "v_col": second,
        "v": second,
        "trace": trace,
        "ema": step if family.trace_after_lr else 1.0,
    }

    def restate(node: Any) -> Any:
        if not _holds_moments(node):
            return node
        present = {n: f for n, f in factors.items() if n in node._fields}
        if family.second_moment == "centered_raw":
            # Only the spread about the average changes with the batch size.
            spread = tree_map(
                lambda n, m: jnp.square(m) + second * (n - jnp.square(m)), node.nu, node.mu
            )
            return node._replace(nu=spread)
        return node._replace(
            **{n: tree_map(lambda x, f=f: x * f, getattr(node, n)) for n, f in present.items()}
        )

    return jax.tree.map(restate, inner_state, is_leaf=_holds_moments)


def with_effective_counts(
    update: Callable[[Any], tuple[Any, Any]], inner_state: Any, count: Any
) -> tuple[Any, Any]:
    r"""Run an update whose bias corrections see ``count`` in place of the number of updates.

    The decays used so far multiply up to ``decay^(examples/B0)``, which a single count and the
    decay in force express as ``(decay^k)^(examples/B)``: so the count is examples/B, a fraction.
    Exact where all decays are scaled by the same k.

    Args:
        update: ``inner_state -> (updates, inner_state)``.
        inner_state: the optimizer's state.
        count: updates of the present size that the examples seen so far amount to, or ``None``.

    Returns:
        updates and the new state, its counts being updates done.
    """
    if count is None:
        return update(inner_state)
    leaves, treedef = jax.tree.flatten(inner_state, is_leaf=_is_counted)
    shown = [
        node._replace(count=jnp.asarray(count, jnp.float32)) if _is_counted(node) else node
        for node in leaves
    ]
    updates, new_state = update(jax.tree.unflatten(treedef, shown))
    new_leaves, new_treedef = jax.tree.flatten(new_state, is_leaf=_is_counted)
    done = [
        new._replace(count=optax.safe_increment(old.count)) if _is_counted(new) else new
        for new, old in zip(new_leaves, leaves, strict=True)
    ]
    return updates, jax.tree.unflatten(new_treedef, done)
