"""Optimizers whose own clock counts updates: built anew so that it counts base-size updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bs_jax.scaling.formulas import Scaler
from bs_jax.scaling.ranger import around
from bs_jax.scaling.roles import Spec
from bs_jax.scaling.values import is_number


def clock_of(scaler: Scaler) -> dict[str, Any] | None:
    """Return what an optimizer is to be built anew with, by name; ``None``: its factory serves.

    Args:
        scaler: rule, optimizer, base values and k.

    Returns:
        Numbers (or scalars) for the registry entry's ``build``.

    Example:
        >>> import optax
        >>> from bs_jax.scaling.roles import resolve
        >>> from bs_jax.scaling.rules import RULES
        >>> spec = resolve(optax.radam, {})
        >>> clock_of(Scaler(RULES["sqrt"], spec, {"b2": 0.99}, 4.0))
        {'k': 4.0, 'base_b2': 0.99, 'unrectified': 2.0}
    """
    entry, rule = scaler.spec.entry, scaler.rule
    unchanged = not rule.time_constants or rule.is_identity(scaler.k)
    if entry is None or entry.clock is None or unchanged:
        return None
    return entry.clock(scaler)


def build(
    spec: Spec, arguments: Mapping[str, Any], clock: Mapping[str, Any] | None
) -> optax.GradientTransformationExtraArgs:
    """Build an optimizer from all its arguments: by its factory, or anew with a clock.

    Args:
        spec: the optimizer.
        arguments: name -> value in force.
        clock: from ``clock_of``.

    Returns:
        The transformation.
    """
    entry = spec.entry
    if clock is None or entry is None or entry.build is None:
        return optax.with_extra_args_support(spec.factory(**arguments))
    return optax.with_extra_args_support(entry.build(arguments, clock))


# optax.scale_by_factored_rms divides by nothing, but our second moment does by this decay.
_SMALLEST_DECAY = 1e-6


def scale_by_radam(
    b1: Any,
    b2: Any,
    eps: Any,
    eps_root: Any,
    threshold: Any,
    nesterov: bool,
    *,
    base_b2: Any,
    k: Any,
    unrectified: Any,
) -> optax.GradientTransformation:
    r"""RAdam's rescaling with its rectification on the clock of base-size updates.

    ``r = r(k t, b2)`` with the base b2 and t updates of the present size: with b2^k in its place
    the rectification never switches on once b2^k < 0.6.

    Args:
        b1: decay of the first moment, in force.
        b2: decay of the second moment, in force.
        eps: outside the root.
        eps_root: inside the root.
        threshold: of the rectification.
        nesterov: whether to use Nesterov momentum.
        base_b2: decay of the second moment at the base batch size.
        k: base-size updates in one update.
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
        moments: Any = new_state
        count = optax.safe_increment(state.count)
        base_count = jnp.asarray(count * k, jnp.float32)
        b2t = base_b2**base_count
        ro = ro_inf - 2 * base_count * b2t / (1 - b2t)
        rectified = ro >= threshold
        safe = jnp.where(rectified, ro, ro_inf)
        r = jnp.sqrt((safe - 4) * (safe - 2) * ro_inf / ((ro_inf - 4) * (ro_inf - 2) * safe))
        first = _first_moment(updates, moments.mu, b1, count, nesterov)
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


def radam_clock(scaler: Scaler) -> dict[str, Any] | None:
    """Return b2's k and base, and the factor from the learning rate to the linear rule's."""
    rule = scaler.rule
    k, lr_k = (rule.k_of(name, scaler.k) for name in ("b2", "learning_rate"))
    k = 1.0 if k is None else k
    unrectified = 1.0 if lr_k is None else lr_k / scaler.lr_factor(lr_k)
    if not rule.own_clocks or (_is_one(k) and _is_one(unrectified)):
        return None
    return {"k": k, "base_b2": scaler.values["b2"], "unrectified": unrectified}


def _is_one(value: Any) -> bool:
    return is_number(value) and value == 1


def _radam_core(arguments: Mapping[str, Any], clock: Mapping[str, Any], nesterov: bool) -> Any:
    return scale_by_radam(
        arguments["b1"],
        arguments["b2"],
        arguments["eps"],
        arguments["eps_root"],
        arguments["threshold"],
        nesterov,
        **clock,
    )


def radam(arguments: Mapping[str, Any], clock: Mapping[str, Any]) -> optax.GradientTransformation:
    """Build ``optax.radam`` on the base clock."""
    return optax.chain(
        _radam_core(arguments, clock, arguments["nesterov"]),
        optax.scale_by_learning_rate(arguments["learning_rate"]),
    )


def ranger(arguments: Mapping[str, Any], clock: Mapping[str, Any]) -> optax.GradientTransformation:
    """Build ``ranger`` with its RAdam on the base clock."""
    rest = {n: v for n, v in arguments.items() if n not in ("b1", "b2", "eps", "eps_root")}
    rest.pop("threshold")
    return around(_radam_core(arguments, clock, nesterov=False), **rest)


def adafactor_decay(count: Any, rate: Any, offset: Any, k: Any) -> Any:
    r"""Decay of Adafactor's second moment over one update of k base sizes.

    The decay of base-size update t is ``1 - t^-c``; k of them multiply up to about
    ``(1 - (t + (k + 1)/2)^-c)^k`` from t on.
    """
    base_steps = jnp.asarray(count, jnp.float32) * k - offset
    middle = jnp.maximum(base_steps + (k + 1) / 2, 1.0)
    kept = (1.0 - middle**-rate) ** k
    return jnp.maximum(jnp.where(base_steps > 0, kept, 0.0), _SMALLEST_DECAY)


def adafactor_clock(scaler: Scaler) -> dict[str, Any] | None:
    """Return the growing decay's k."""
    k = scaler.rule.k_of("decay_rate", scaler.k)
    return {"k": k} if scaler.rule.own_clocks and k is not None and not _is_one(k) else None


def adafactor(
    arguments: Mapping[str, Any], clock: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Build ``optax.adafactor`` with its growing decay on the base clock."""
    a = arguments
    parts = [
        optax.scale_by_factored_rms(
            a["factored"],
            a["decay_rate"],
            0,
            a["min_dim_size_to_factor"],
            a["eps"],
            lambda count, rate: adafactor_decay(count, rate, a["decay_offset"], clock["k"]),
        )
    ]
    if a["clipping_threshold"] is not None:
        parts.append(optax.clip_by_block_rms(a["clipping_threshold"]))
    parts.append(optax.scale_by_learning_rate(a["learning_rate"], flip_sign=False))
    if a["multiply_by_parameter_scale"]:
        parts.append(optax.scale_by_param_block_rms())
    if a["momentum"] is not None:
        momentum = {"debias": False, "accumulator_dtype": a["dtype_momentum"]}
        parts.append(optax.ema(a["momentum"], **momentum))
    if a["weight_decay_rate"] is not None:
        parts.append(optax.add_decayed_weights(a["weight_decay_rate"], a["weight_decay_mask"]))
    return optax.chain(*parts, optax.scale(-1))


def trace_clock(scaler: Scaler) -> dict[str, Any]:
    """Return the factor that keeps the length of a sum of gradients."""
    return {"gain": scaler.momentum_gain()}


def trace(arguments: Mapping[str, Any], clock: Mapping[str, Any]) -> optax.GradientTransformation:
    """Build ``optax.trace`` with the length of its output kept: the learning rate is elsewhere."""
    plain, gain = optax.trace(**arguments), clock["gain"]

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = plain.update(updates, state, params)
        return jax.tree.map(lambda u: u * gain, updates), state

    return optax.GradientTransformation(plain.init, update)
