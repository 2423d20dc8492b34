"""Ranger: RAdam with Lookahead whose slow weights live in the optimizer's state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bs_jax.errors import UserError


class SlowWeightsState(NamedTuple):
    """State of ``look_ahead``.

    Attributes:
        slow: the slow weights, a tree like the parameters.
        since_sync: updates since the weights were last joined; int32 scalar.
    """

    slow: Any
    since_sync: jax.Array


def look_ahead(sync_period: Any, slow_step_size: Any) -> optax.GradientTransformation:
    r"""Every ``sync_period`` updates, move slow weights towards the fast ones; restart there.

    ``slow += a (fast - slow); fast = slow``. The last part of a chain.

    Args:
        sync_period: updates between joins; at least 1.
        slow_step_size: a, in (0, 1].

    Returns:
        The transformation.

    Reference:
        Zhang et al., Lookahead Optimizer: k steps forward, 1 step back, 2019.
    """

    def init(params: Any) -> SlowWeightsState:
        return SlowWeightsState(jax.tree.map(jnp.array, params), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise UserError("look_ahead needs the parameters: call update(grads, state, params)")
        join = state.since_sync + 1 >= sync_period

        def target(slow: jax.Array, param: jax.Array, update: jax.Array) -> jax.Array:
            return slow + slow_step_size * (param + update - slow)

        joined = jax.tree.map(target, state.slow, params, updates)
        out = jax.tree.map(
            lambda u, j, p: jnp.where(join, j - p, u).astype(u.dtype), updates, joined, params
        )
        slow = jax.tree.map(lambda s, j: jnp.where(join, j, s).astype(s.dtype), state.slow, joined)
        return out, SlowWeightsState(slow, jnp.where(join, 0, state.since_sync + 1))

    return optax.GradientTransformation(init, update)


def around(
    core: optax.GradientTransformation,
    *,
    learning_rate: Any,
    weight_decay: Any,
    mask: Any,
    sync_period: Any,
    slow_step_size: Any,
) -> optax.GradientTransformation:
    """Put weight decay, learning rate and slow weights around a rescaling of the gradient."""
    return optax.chain(
        core,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
        look_ahead(sync_period, slow_step_size),
    )


def ranger(
    learning_rate: Any,
    b1: Any = 0.95,
    b2: Any = 0.99,
    eps: Any = 1e-6,
    eps_root: Any = 0.0,
    weight_decay: Any = 0.0,
    mask: Any = None,
    *,
    threshold: Any = 5.0,
    sync_period: Any = 6,
    slow_step_size: Any = 0.5,
) -> optax.GradientTransformation:
    r"""RAdam, decoupled weight decay and Lookahead in one.

    ``u = radam(g) + wd w``, ``w <- w - lr u``, and every ``sync_period`` updates
    ``slow <- slow + a (w - slow)``, ``w <- slow``.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: outside the root.
        eps_root: inside the root.
        weight_decay: multiplied by the learning rate.
        mask: which leaves decay, as in ``optax.adamw``.
        threshold: of RAdam's rectification.
        sync_period: updates between joins of fast and slow weights.
        slow_step_size: share of the way that slow weights move.

    Returns:
        The transformation; it needs ``params`` in ``update``.

    Example:
        >>> tx = ranger(1e-3)
        >>> params = jnp.ones(3)
        >>> updates, state = tx.update(jnp.ones(3), tx.init(params), params)

    Reference:
        Wright, Ranger, 2019; Liu et al. 2020 (RAdam); Zhang et al. 2019 (Lookahead).
    """
    return around(
        optax.scale_by_radam(b1, b2, eps, eps_root, threshold),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        sync_period=sync_period,
        slow_step_size=slow_step_size,
    )
