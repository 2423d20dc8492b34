"""Optimizers that count their own updates, with that clock as a keyword.

RAdam's rectification and Adafactor's growing decay are functions of the number of updates. Here
they count updates of the base batch size, ``k`` for each update of the present size.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from bs_jax.errors import UserError
from bs_jax.scaling.hyperparameters import Scaled, is_number
from bs_jax.scaling.rules import PyTree, Scalar

# The invariant second moment divides by its decay, and the optimizer multiplies by it: below this
# it would overflow, and a memory this short is none.
SMALLEST_DECAY = 1e-6


def scale_by_radam(
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    threshold: Scalar,
    *,
    nesterov: bool = False,
    k: Scalar,
    base_b2: Scalar,
    unrectified: Scalar,
) -> optax.GradientTransformation:
    r"""RAdam's rescaling with its rectification on the clock of base-size updates.

    ``r = r(k t, b2)`` with the base b2 and t updates of the present size. With b2^k in its place
    the rectification would never switch on once b2^k < 0.6.

    Args:
        b1: decay of the first moment, in force.
        b2: decay of the second moment, in force.
        eps: outside the root.
        eps_root: inside the root.
        threshold: of the rectification.
        nesterov: whether to use Nesterov momentum.
        k: base-size updates in one update.
        base_b2: decay of the second moment at the base batch size; b2^k would underflow.
        unrectified: factor on the first, un-normalised updates, which follow the linear rule.

    Returns:
        A transformation with the state of ``optax.scale_by_radam``.

    Reference:
        Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, 2020.
    """
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov)
    ro_inf = 2.0 / (1.0 - base_b2) - 1.0

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        normalised, new_state = adam.update(updates, state, params)
        mu = cast(Any, new_state).mu
        count = optax.safe_increment(state.count)
        base_count = jnp.asarray(count * k, jnp.float32)
        b2t = base_b2**base_count
        ro = ro_inf - 2 * base_count * b2t / (1 - b2t)
        rectified = ro >= threshold
        safe = jnp.where(rectified, ro, ro_inf)
        r = jnp.sqrt((safe - 4) * (safe - 2) * ro_inf / ((ro_inf - 4) * (ro_inf - 2) * safe))
        first = _first_moment(updates, mu, b1, count, nesterov)
        out = jax.tree.map(
            lambda n, m: jnp.where(rectified, r * n, unrectified * m).astype(n.dtype),
            normalised,
            first,
        )
        return out, new_state

    return optax.GradientTransformation(adam.init, update)


def _first_moment(updates: Any, mu: Any, b1: Any, count: Any, nesterov: bool) -> Any:
    if not nesterov:
        return optax.tree.bias_correction(mu, b1, count)
    return jax.tree.map(
        lambda m, g: b1 * m + (1 - b1) * g,
        optax.tree.bias_correction(mu, b1, optax.safe_increment(count)),
        optax.tree.bias_correction(updates, b1, count),
    )


def radam(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    *,
    nesterov: bool = False,
    k: Scalar,
    base_b2: Scalar,
    unrectified: Scalar,
) -> optax.GradientTransformation:
    """``optax.radam`` with ``scale_by_radam`` of this module."""
    return optax.chain(
        scale_by_radam(
            b1,
            b2,
            eps,
            eps_root,
            threshold,
            nesterov=nesterov,
            k=k,
            base_b2=base_b2,
            unrectified=unrectified,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def radam_clock(scaled: Scaled) -> dict[str, Scalar]:
    """Return RAdam's clock keywords: b2's k and base, and F of the linear rule over F."""
    rule = scaled.rule
    k, lr_k = scaled.k_of("b2"), scaled.k_of("learning_rate")
    k = 1.0 if k is None else k
    unrectified = 1.0 if lr_k is None else lr_k * scaled.share / scaled.lr_factor(lr_k)
    if not rule.own_clocks or (_is_one(k) and _is_one(unrectified)):
        return {}
    return {"k": k, "base_b2": scaled.values["b2"], "unrectified": unrectified}


def _is_one(value: object) -> bool:
    return is_number(value) and value == 1


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

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
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


def _around(
    core: optax.GradientTransformation,
    *,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Scalar,
    mask: Any,
    sync_period: Scalar,
    slow_step_size: Scalar,
) -> optax.GradientTransformation:
    """Put weight decay, learning rate and slow weights around a rescaling of the gradient."""
    return optax.chain(
        core,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
        look_ahead(sync_period, slow_step_size),
    )


def ranger(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.95,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-6,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    *,
    threshold: Scalar = 5.0,
    sync_period: Scalar = 6,
    slow_step_size: Scalar = 0.5,
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
    return _around(
        optax.scale_by_radam(b1, b2, eps, eps_root, threshold),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        sync_period=sync_period,
        slow_step_size=slow_step_size,
    )


def clocked_ranger(
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    threshold: Scalar,
    k: Scalar,
    base_b2: Scalar,
    unrectified: Scalar,
    **rest: Any,
) -> optax.GradientTransformation:
    """``ranger`` with ``scale_by_radam`` of this module."""
    core = scale_by_radam(
        b1, b2, eps, eps_root, threshold, k=k, base_b2=base_b2, unrectified=unrectified
    )
    return _around(core, **rest)


def adafactor_decay(count: Scalar, rate: Scalar, offset: Scalar, k: Scalar) -> jax.Array:
    r"""Decay of Adafactor's second moment over one update of k base sizes.

    The decay of base-size update t is ``1 - t^-c``; k of them multiply up to about
    ``(1 - (t + (k + 1)/2)^-c)^k`` from t on.
    """
    base_steps = jnp.asarray(count, jnp.float32) * k - offset
    middle = jnp.maximum(base_steps + (k + 1) / 2, 1.0)
    kept = (1.0 - middle**-rate) ** k
    return jnp.maximum(jnp.where(base_steps > 0, kept, 0.0), SMALLEST_DECAY)


def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    min_dim_size_to_factor: int = 128,
    decay_rate: Scalar = 0.8,
    decay_offset: Scalar = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Scalar | None = 1.0,
    momentum: Scalar | None = None,
    dtype_momentum: Any = jnp.float32,
    weight_decay_rate: Scalar | None = None,
    eps: Scalar = 1e-30,
    factored: bool = True,
    weight_decay_mask: Any = None,
    *,
    k: Scalar = 1.0,
    block_shares: PyTree = None,
) -> optax.GradientTransformation:
    """``optax.adafactor`` with ``adafactor_decay`` of this module as its growing decay.

    With ``block_shares`` each leaf has a threshold of its own: so much of ``clipping_threshold``.
    """
    parts: list[optax.GradientTransformation] = [
        optax.scale_by_factored_rms(
            factored,
            decay_rate,
            0,
            min_dim_size_to_factor,
            eps,
            lambda count, rate: adafactor_decay(count, rate, decay_offset, k),
        )
    ]
    if block_shares is not None:
        parts.append(_clip_each_block(clipping_threshold, block_shares))
    elif clipping_threshold is not None:
        parts.append(optax.clip_by_block_rms(clipping_threshold))
    parts.append(optax.scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        parts.append(optax.scale_by_param_block_rms())
    if momentum is not None:
        parts.append(optax.ema(momentum, debias=False, accumulator_dtype=dtype_momentum))
    if weight_decay_rate is not None:
        parts.append(optax.add_decayed_weights(weight_decay_rate, weight_decay_mask))
    return optax.chain(*parts, optax.scale(-1))


def _clip_each_block(threshold: Scalar, shares: PyTree) -> optax.GradientTransformation:
    """``optax.clip_by_block_rms`` with a threshold for each leaf: its share of the given one."""

    def clip(update: jax.Array, share: Scalar) -> jax.Array:
        rms = jnp.sqrt(jnp.mean(jnp.square(update)))
        return update / jnp.maximum(1.0, rms / (threshold * share))

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates, shares))


def adafactor_clock(scaled: Scaled) -> dict[str, Scalar]:
    """Return Adafactor's clock keyword: the k of its growing decay."""
    k = scaled.k_of("decay_rate")
    return {} if not scaled.rule.own_clocks or k is None or _is_one(k) else {"k": k}


def trace(
    decay: Scalar, nesterov: bool = False, accumulator_dtype: Any = None, *, gain: Scalar
) -> optax.GradientTransformation:
    """``optax.trace`` times ``gain``: the learning rate that would keep its length is elsewhere."""
    plain = optax.trace(decay, nesterov, accumulator_dtype)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        updates, state = plain.update(updates, state, params)
        return jax.tree.map(lambda u: u * gain, updates), state

    return optax.GradientTransformation(plain.init, update)


def trace_gain(scaled: Scaled) -> dict[str, Scalar]:
    """Return the factor that keeps the length of a sum of gradients."""
    return {"gain": scaled.momentum_gain()}
