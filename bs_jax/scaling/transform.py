"""scale_by_batch: any optax optimizer, its hyperparameters scaled to the batch size in use."""

from __future__ import annotations

import difflib
import functools
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from bs_jax.errors import UserError
from bs_jax.scaling import invariant
from bs_jax.scaling import noise_scale as noise_scale_lib
from bs_jax.scaling.cautions import ScalingWarning, check_float32, warn_of_narrow_decays
from bs_jax.scaling.formulas import Noise, Scaler
from bs_jax.scaling.optimizer import ScaleByBatchState, ScaledOptimizer
from bs_jax.scaling.roles import Spec, bind, factory_name, fill_implied, resolve, resolve_factory
from bs_jax.scaling.rules import ScalingRule, resolve_rule
from bs_jax.scaling.values import check_batch_sizes, check_value, is_number, is_numeric


def scale_by_batch(
    factory: Callable[..., Any] | str,
    *,
    batch_size: int,
    base_batch_size: int,
    rule: str | ScalingRule = "invariant",
    roles: Mapping[str, str] | None = None,
    family: str | None = None,
    noise_scale: float | None = None,
    noise_decay: float = noise_scale_lib.DECAY,
    variance_floor: float = invariant.VARIANCE_FLOOR,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    r"""Let an optax factory take hyperparameters tuned at one batch size and serve another.

    Every hyperparameter becomes what the rule says at ``k = batch_size / base_batch_size``; for
    Adam under ``"invariant"``: ``lr k``, ``b1^k``, ``b2^k``, and the second moment estimated as
    the base batch size would have shown it. A schedule written in updates of the base batch size
    serves unchanged: it is read at ``examples seen / base_batch_size``, under every rule.

    Args:
        factory: an optax factory, its name, or your own function (then pass ``roles``).
        batch_size: examples in one update, over all devices. The clock of examples is an int32:
            count sequences rather than tokens where a run would see more than 2,147,483,647.
        base_batch_size: examples per update that the hyperparameters were tuned at.
        rule: a name in ``RULES``, ``"power(a)"``, or a ``ScalingRule``.
        roles: hyperparameter -> role, for your own factory; what has no role is left alone.
        family: of your own factory, needed by rules that follow the noise.
        noise_scale: gradient noise scale in examples, where it is known; a number, or a scalar
            array, which may be traced.
        noise_decay: decay per base-size update of the running noise scale.
        variance_floor: smallest share of the averaged noise variance that an invariant second
            moment may fall to.

    Returns:
        A factory with the signature of the given one. Its transformation is an ordinary
        ``GradientTransformationExtraArgs`` whose ``update`` also takes ``batch_size=`` (may be
        traced and may change; then give it at every update) and ``microbatch=``.

    Raises:
        UserError: for invalid numbers, an unknown rule, or noise that is needed and not given.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale_by_batch(optax.adamw, batch_size=256, base_batch_size=64, rule="sqrt")(
        ...     learning_rate=1e-3, weight_decay=0.1)
        >>> state = tx.init({"w": jnp.ones(3)})
        >>> round(float(hyperparams(state)["learning_rate"]), 6)
        0.002

    Reference:
        Malladi et al. 2022 (square-root rule); Wang & Aitchison 2024 (invariant Adam).
    """
    check_batch_sizes(batch_size, base_batch_size)
    if not is_number(noise_decay) or not 0 <= noise_decay < 1:
        raise UserError(f"noise_decay is {noise_decay!r}; give a decay below 1, e.g. 0.99")
    if not is_number(variance_floor) or not 0 < variance_floor <= 1:
        raise UserError(f"variance_floor is {variance_floor!r}; give a share in (0, 1], e.g. 0.7")
    factory, rule = resolve_factory(factory), resolve_rule(rule)
    noise = None if noise_scale is None else Noise.from_scale(noise_scale, base_batch_size)

    @functools.wraps(factory)
    def scaled_factory(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        arguments = bind(factory, args, kwargs)
        spec = resolve(factory, arguments, roles, family)
        arguments = fill_implied(arguments, spec)
        for name in spec.roles.keys() & arguments.keys():
            check_value(name, spec.roles[name], arguments[name])
        scaled = {n: v for n, v in arguments.items() if n in spec.roles and v is not None}
        check_float32(Scaler(rule, spec, scaled, batch_size / base_batch_size, noise))
        warn_of_narrow_decays(scaled, spec)
        _warn_of_unknown(spec, arguments)
        _warn_of_misspelt(rule, spec, arguments)
        _warn_of_idle_roles(spec, arguments, roles or {})
        optimizer = ScaledOptimizer(
            rule=rule,
            spec=spec,
            scaled=scaled,
            others={n: v for n, v in arguments.items() if n not in scaled},
            batch_size=int(batch_size),
            base_batch_size=int(base_batch_size),
            noise=noise,
            noise_decay=noise_decay,
            floor=variance_floor,
        )
        return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)

    return scaled_factory


# What a schedule is called, where only a name tells it from other functions (masks, say).
_SCHEDULE_NAMES = re.compile(r"rate|lr|schedule|step_size|decay")


def _warn_of_unknown(spec: Spec, arguments: Mapping[str, Any]) -> None:
    unknown = [
        n
        for n, v in arguments.items()
        if n not in spec.roles and (is_numeric(v) or _is_schedule(n, v))
    ]
    if unknown:
        # AdamW's roles serve as an example: most optimizers name the same things alike.
        usual = resolve(optax.adamw, {}).roles
        example = {name: usual.get(name, "decay") for name in unknown[:2]}
        all_of_it = "" if spec.roles else " and so the same at every batch size"
        warnings.warn(
            f"{factory_name(spec.factory)}: no role is known for {', '.join(unknown)}: left as"
            f" given{all_of_it}; pass roles={example} (or 'unchanged') to say what each is",
            ScalingWarning,
            stacklevel=3,
        )


def _is_schedule(name: str, value: Any) -> bool:
    return callable(value) and "mask" not in name and bool(_SCHEDULE_NAMES.search(name))


def _warn_of_misspelt(rule: ScalingRule, spec: Spec, arguments: Mapping[str, Any]) -> None:
    # A rule may serve more than the optimizer (BatchNorm's decay, say), so a name that it does not
    # take is no mistake in itself; one that is nearly one of its names is.
    known = {*arguments, *spec.roles}
    for name, _ in rule.overrides:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if name not in known and near:
            warnings.warn(
                f"rule {rule.name!r} changes {name!r}, which {factory_name(spec.factory)} does not"
                f" take; did you mean {near[0]!r}?",
                ScalingWarning,
                stacklevel=3,
            )


def _warn_of_idle_roles(spec: Spec, arguments: Mapping[str, Any], roles: Mapping[str, str]) -> None:
    idle = [name for name in roles if name not in arguments]
    if idle:
        warnings.warn(
            f"roles= names {', '.join(idle)}, which {factory_name(spec.factory)} does not take;"
            f" it takes {', '.join(arguments)}",
            ScalingWarning,
            stacklevel=3,
        )


def hyperparams(state: Any) -> dict[str, jax.Array]:
    """Return the hyperparameters in force in the last update.

    Args:
        state: the state of a ``scale_by_batch`` transformation, or of anything that holds one.

    Returns:
        name -> float32 scalar; prefixed ``"0/"``, ``"1/"``, ... if the state holds several.

    Raises:
        UserError: if the state holds none.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, ScaleByBatchState))
    found = [x.hyperparams for x in leaves if isinstance(x, ScaleByBatchState)]
    if not found:
        raise UserError("the state holds no scale_by_batch state; give the state of its optimizer")
    if len(found) == 1:
        return dict(found[0])
    return {f"{i}/{name}": v for i, values in enumerate(found) for name, v in values.items()}


def invariant_adamw(
    learning_rate: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    *,
    batch_size: int,
    base_batch_size: int,
    **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with the invariant second moment: ``scale_by_batch(optax.adamw, rule="invariant")``.

    Args:
        learning_rate: at the base batch size, a number or a schedule in base-size updates.
        b1: decay of the first moment, at the base batch size.
        b2: decay of the second moment, at the base batch size.
        eps: beside the root of the second moment; stays as it is.
        weight_decay: multiplied by the learning rate; stays as it is.
        batch_size: examples in one update.
        base_batch_size: examples per update that the values were tuned at.
        **kwargs: further arguments of ``optax.adamw``.

    Returns:
        A transformation whose ``update`` takes ``microbatch=`` (not needed at the base size).

    Raises:
        UserError: for invalid numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> from bs_jax.scaling import MicrobatchStats
        >>> tx = invariant_adamw(1e-3, batch_size=256, base_batch_size=64)
        >>> stats = MicrobatchStats(mean_square=jnp.ones(3), count=4)
        >>> updates, _ = tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3), microbatch=stats)

    Reference:
        Wang & Aitchison, Batch size invariant Adam, 2024.
    """
    scaled = scale_by_batch(
        optax.adamw, batch_size=batch_size, base_batch_size=base_batch_size, rule="invariant"
    )
    return scaled(learning_rate, b1, b2, eps, weight_decay=weight_decay, **kwargs)
