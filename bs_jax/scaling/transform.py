"""scale_by_batch: any optax optimizer, its hyperparameters scaled to the batch size in use."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, cast

import jax
import jax.numpy as jnp
import optax

from bs_jax.errors import UserError
from bs_jax.scaling import moments, noise
from bs_jax.scaling.clocked import SMALLEST_DECAY, adafactor_decay
from bs_jax.scaling.hyperparameters import (
    MAX_EXAMPLES,
    Noise,
    ScalingWarning,
    check_batch_sizes,
    check_decays,
    decays_rounded_to_one,
    is_number,
    is_numeric,
)
from bs_jax.scaling.noise import MicrobatchStats, NoiseScaleState, PyTree
from bs_jax.scaling.optimizers import Recipe, missing_noise, resolve_factory
from bs_jax.scaling.rules import Scalar, ScalingRule, resolve_rule

P = ParamSpec("P")


class ScaleByBatchState(NamedTuple):
    """State of a ``scale_by_batch`` transformation; one structure for every kind of update.

    Attributes:
        examples: examples seen; int32 scalar, stops at its largest value.
        batch_size: examples in the last update; int32 scalar.
        hyperparams: values in force in the last update; float32 scalars.
        noise: running noise scale, or ``()`` where the rule needs none.
        variance: averaged noise part of each second moment, or ``()`` where it is not made
            invariant.
        inner_state: the optimizer's own state.
    """

    examples: jax.Array
    batch_size: jax.Array
    hyperparams: dict[str, jax.Array]
    noise: NoiseScaleState | tuple[()]
    variance: tuple[PyTree, ...]
    inner_state: Any


def scale_by_batch(
    factory: Callable[P, Any] | str,
    *,
    batch_size: int,
    base_batch_size: int,
    rule: str | ScalingRule = "invariant",
    roles: Mapping[str, str] | None = None,
    family: str | None = None,
    noise_scale: float | None = None,
    noise_decay: float = noise.DECAY,
    variance_floor: float = moments.VARIANCE_FLOOR,
) -> Callable[P, optax.GradientTransformationExtraArgs]:
    r"""Wrap an optax factory: hyperparameters tuned at one batch size, training at another.

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
    known = None if noise_scale is None else Noise.from_scale(noise_scale, base_batch_size)
    resolved, rule = resolve_factory(factory), resolve_rule(rule)

    @functools.wraps(resolved)
    def scaled_factory(*args: P.args, **kwargs: P.kwargs) -> optax.GradientTransformationExtraArgs:
        recipe = Recipe.of(resolved, args, kwargs, roles=roles, family=family, whole_call=True)
        check_decays(recipe.at(rule, batch_size / base_batch_size, known))
        for caution in recipe.cautions(rule):
            warnings.warn(caution, ScalingWarning, stacklevel=2)
        return _transformation(
            recipe,
            rule,
            batch_size=int(batch_size),
            base_batch_size=int(base_batch_size),
            known_noise=known,
            noise_decay=noise_decay,
            floor=variance_floor,
        )

    return scaled_factory


def _transformation(
    recipe: Recipe,
    rule: ScalingRule,
    *,
    batch_size: int,
    base_batch_size: int,
    known_noise: Noise | None,
    noise_decay: float,
    floor: float,
) -> optax.GradientTransformationExtraArgs:
    """Return a recipe's transformation: updates are static where all numbers are known before.

    The static update is plain optax's, with numbers scaled beforehand; the traced one scales while
    training: a batch size that is given, values that are arrays, noise that is measured.
    """
    k = batch_size / base_batch_size
    at_k = recipe.at(rule, k, known_noise)
    second_moment = recipe.family.second_moment if recipe.family is not None else "none"
    kind = recipe.invariant_moment(rule)
    decay_name = at_k.only("second_moment_decay") if kind in ("ema", "layer") else ""
    measures = known_noise is None and recipe.needs_noise(rule)
    constant = all(is_number(v) or n in recipe.schedules for n, v in recipe.values.items())
    constant = constant and (known_noise is None or is_number(known_noise.noise))
    static = constant and (at_k.is_identity or not (measures or kind))
    fixed = {name: at_k.schedule_or_value(name) for name in recipe.values} if static else {}
    plain = recipe.build(fixed, recipe.clock(at_k)) if static else None

    def base_values(examples: jax.Array, changing: bool = False) -> dict[str, Any]:
        """Return base values now: schedules are read on the clock of base-size updates."""
        if not changing and batch_size % base_batch_size == 0:
            steps = examples // base_batch_size
        else:
            steps = examples / base_batch_size
        return {n: v(steps) if callable(v) else v for n, v in recipe.values.items()}

    def init(params: PyTree) -> ScaleByBatchState:
        for caution in decays_rounded_to_one(recipe.roles, fixed, params):
            warnings.warn(caution, ScalingWarning, stacklevel=2)
        examples = jnp.zeros((), jnp.int32)
        online = noise.init_noise_scale() if measures else ()
        noise_now = _measured(online, base_batch_size) if online else known_noise
        scaled = recipe.at(rule, k, noise_now, base_values(examples))
        values = scaled.all()
        inner_state = (plain or recipe.build(values, recipe.clock(scaled))).init(params)
        return ScaleByBatchState(
            examples=examples,
            batch_size=jnp.asarray(batch_size, jnp.int32),
            hyperparams=_as_float32(values),
            noise=online,
            variance=moments.init_variance(inner_state, scaled) if kind else (),
            inner_state=inner_state,
        )

    def static_update(
        plain: optax.GradientTransformationExtraArgs,
        updates: PyTree,
        state: ScaleByBatchState,
        params: PyTree,
        extra_args: dict[str, Any],
    ) -> tuple[PyTree, ScaleByBatchState]:
        # Not the state's: a checkpoint of another batch size holds what was in force there.
        done = state.examples // batch_size
        values = {n: v(done) if callable(v) else v for n, v in fixed.items()}
        updates, inner_state = plain.update(updates, state.inner_state, params, **extra_args)
        return updates, state._replace(
            examples=_add_examples(state.examples, batch_size),
            hyperparams=_as_float32(values),
            inner_state=inner_state,
        )

    def traced_update(
        updates: PyTree,
        state: ScaleByBatchState,
        params: PyTree,
        given_size: Any,
        microbatch: MicrobatchStats | None,
        extra_args: dict[str, Any],
    ) -> tuple[PyTree, ScaleByBatchState]:
        size, changing = batch_size, given_size is not None
        if changing:
            size = given_size
            if is_number(size) or not is_numeric(size):
                check_batch_sizes(size, base_batch_size)
        if microbatch is not None:
            noise.check_microbatch(microbatch, updates)
        k = size / base_batch_size
        online, noise_now = state.noise, known_noise
        if isinstance(online, NoiseScaleState):
            online = measured(online, updates, state.examples, k, size, microbatch)
            noise_now = _measured(online, base_batch_size)
        base = base_values(state.examples, changing)
        scaled = recipe.at(rule, k, noise_now, base)
        values, clock = scaled.all(), recipe.clock(scaled)
        inner_state, count = state.inner_state, None
        if changing:
            old = recipe.at(rule, state.batch_size / base_batch_size, noise_now, base)
            inner_state = moments.carry(inner_state, old, scaled)
            if rule.time_constants and second_moment != "layer":
                count = state.examples / size
        # At the base size the optimizer's own square serves, unless its count is a fraction.
        at_base = scaled.is_identity and microbatch is None and count is None
        replaces, used = kind is not None and not at_base, values
        if replaces and decay_name:
            used = {**values, decay_name: _usable_decay(values[decay_name])}
        optimizer = recipe.build(used, clock)

        def own_step(inner_state: Any) -> tuple[PyTree, Any]:
            return optimizer.update(updates, inner_state, params, **extra_args)

        step = own_step if count is None else moments.at_count(own_step, count, known=scaled.known)
        if replaces:
            if microbatch is None and not scaled.is_identity:
                raise missing_noise(recipe, rule, by_coordinate=True)
            moment = moments.BaseMoment(
                kind=second_moment,
                decay=used[decay_name] if decay_name else _growing_decay(used, clock, count),
                k=k,
                square=noise.base_square(updates, microbatch, k),
                floor=floor,
                eps=used["eps"] if kind == "factored" else 0.0,
                known=scaled.known,
            )
            new_updates, inner_state, variance = moments.update_with_base_moment(
                step, inner_state, updates, state.variance, moment
            )
        else:
            (new_updates, inner_state), variance = step(inner_state), state.variance
        new_state = ScaleByBatchState(
            examples=_add_examples(state.examples, size),
            batch_size=jnp.asarray(size, jnp.int32),
            hyperparams=_as_float32(values),
            noise=online,
            variance=variance,
            inner_state=inner_state,
        )
        # Float32 hyperparameters would otherwise widen a bfloat16 state or update.
        return _cast_like((new_updates, new_state), (updates, state))

    def measured(
        online: NoiseScaleState,
        updates: PyTree,
        examples: jax.Array,
        k: Scalar,
        size: Scalar,
        microbatch: MicrobatchStats | None,
    ) -> NoiseScaleState:
        """Return the running noise scale with this update's statistics taken in."""
        if microbatch is None:
            if not recipe.at(rule, k).is_identity:
                raise missing_noise(recipe, rule)
            return online
        decay = noise_decay**k
        if second_moment == "sum":
            # What the optimizer sums without end is compared with a noise averaged likewise.
            done = examples / size
            decay = done / (done + 1)
        return noise.update_noise_scale(online, updates, microbatch, batch_size=size, decay=decay)

    def update(
        updates: PyTree,
        state: ScaleByBatchState,
        params: PyTree = None,
        *,
        batch_size: Any = None,
        microbatch: MicrobatchStats | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByBatchState]:
        if plain is not None and batch_size is None:
            return static_update(plain, updates, state, params, extra_args)
        return traced_update(updates, state, params, batch_size, microbatch, extra_args)

    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


def _measured(online: NoiseScaleState, base_batch_size: int) -> Noise:
    # Only the ratio matters, so neither is divided by the weight; nothing known yet reads as all
    # noise, the more cautious end for a larger batch.
    signal = jnp.maximum(online.signal, 0.0)
    per_base_batch = online.noise / base_batch_size
    return Noise(signal, jnp.where(signal + per_base_batch > 0, per_base_batch, 1.0))


def _usable_decay(decay: Scalar) -> Scalar:
    """Return a decay that is large enough to divide by."""
    if is_number(decay):
        return max(decay, SMALLEST_DECAY)
    return jnp.maximum(decay, SMALLEST_DECAY)


def _growing_decay(
    values: Mapping[str, Any], clock: Mapping[str, Scalar], count: Scalar | None
) -> Callable[[Any], Scalar] | float:
    """Return Adafactor's decay as a function of its own count; 1 where there is no decay."""
    if "decay_rate" not in values:
        return 1.0
    rate, offset, k = values["decay_rate"], values["decay_offset"], clock.get("k", 1.0)
    return lambda done: adafactor_decay(done if count is None else count, rate, offset, k)


def _add_examples(examples: jax.Array, batch_size: Any) -> jax.Array:
    more = jnp.asarray(batch_size, jnp.int32)
    return jnp.where(examples > MAX_EXAMPLES - more, MAX_EXAMPLES, examples + more)


def _as_float32(values: Mapping[str, Any]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def _cast_like(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.result_type(y)), tree, like)


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
