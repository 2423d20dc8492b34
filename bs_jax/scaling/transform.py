"""scale_by_batch: any optax optimizer, its hyperparameters scaled to the batch size in use."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bs_jax.errors import UserError
from bs_jax.scaling import invariant, rebuild
from bs_jax.scaling import noise_scale as noise_lib
from bs_jax.scaling.carry import carry_moments, with_effective_counts
from bs_jax.scaling.formulas import (
    Noise,
    NoiseScaleNeeded,
    Scaler,
    check_batch_sizes,
    check_value,
    is_number,
    is_numeric,
    missing_noise,
    scale_one,
)
from bs_jax.scaling.noise_scale import MicrobatchStats, NoiseScaleState
from bs_jax.scaling.roles import Spec, bind, factory_name, fill_implied, resolve, resolve_factory
from bs_jax.scaling.rules import ScalingRule, resolve_rule

# Roles whose values optax itself accepts as schedules.
_SCHEDULED_ROLES = ("learning_rate", "weight_decay", "weight_decay_independent")
_MAX_EXAMPLES = np.iinfo(np.int32).max


class ScalingWarning(UserWarning):
    """Something about a scaled recipe that its user should look at."""


class ScaleByBatchState(NamedTuple):
    """State of a ``scale_by_batch`` transformation; one structure for every kind of update.

    Attributes:
        examples: examples seen; int32 scalar, stops at its largest value.
        batch_size: examples in the last update; int32 scalar.
        hyperparams: values in force in the last update; float32 scalars.
        noise: running noise scale, or ``()`` where the rule needs none.
        variance: averaged noise part of each second moment, or ``()`` (see ``invariant``).
        inner_state: the optimizer's own state.
    """

    examples: jax.Array
    batch_size: jax.Array
    hyperparams: dict[str, jax.Array]
    noise: NoiseScaleState | tuple[()]
    variance: tuple[Any, ...]
    inner_state: Any


def scale_by_batch(
    factory: Callable[..., Any] | str,
    *,
    batch_size: int,
    base_batch_size: int,
    rule: str | ScalingRule = "invariant",
    roles: Mapping[str, str] | None = None,
    family: str | None = None,
    noise_scale: float | None = None,
    noise_decay: float = 0.99,
    variance_floor: float = invariant.VARIANCE_FLOOR,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    r"""Let an optax factory take hyperparameters tuned at one batch size and serve another.

    Every hyperparameter becomes what the rule says at ``k = batch_size / base_batch_size``; for
    Adam under ``"invariant"``: ``lr k``, ``b1^k``, ``b2^k``, and the second moment estimated as
    the base batch size would have shown it. A schedule written in updates of the base batch size
    serves unchanged: it is read at ``examples seen / base_batch_size``, under every rule.

    Args:
        factory: an optax factory, its name, or your own function (then pass ``roles``).
        batch_size: examples in one update, over all devices.
        base_batch_size: examples per update that the hyperparameters were tuned at.
        rule: a name in ``RULES``, ``"power(a)"``, or a ``ScalingRule``.
        roles: hyperparameter -> role, for your own factory; what has no role is left alone.
        family: of your own factory, needed by rules that follow the noise.
        noise_scale: gradient noise scale in examples, where it is known and constant.
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
        raise UserError(f"variance_floor is {variance_floor!r}; give a share in (0, 1], e.g. 0.1")
    factory, rule = resolve_factory(factory), resolve_rule(rule)
    noise = None if noise_scale is None else Noise.from_scale(noise_scale, base_batch_size)

    @functools.wraps(factory)
    def scaled_factory(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        arguments = bind(factory, args, kwargs)
        spec = resolve(factory, arguments, roles, family)
        arguments = fill_implied(arguments, spec)
        scaled = {n: v for n, v in arguments.items() if n in spec.roles and v is not None}
        for name, value in scaled.items():
            check_value(name, spec.roles[name], value)
        _warn_of_unknown(spec, arguments)
        job = _Job(
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
        return optax.GradientTransformationExtraArgs(job.init, job.update)

    return scaled_factory


def _warn_of_unknown(spec: Spec, arguments: Mapping[str, Any]) -> None:
    unknown = [n for n, v in arguments.items() if n not in spec.roles and is_numeric(v)]
    if unknown:
        warnings.warn(
            f"{factory_name(spec.factory)}: no role is known for {', '.join(unknown)}: left as"
            f" given; pass roles={{{unknown[0]!r}: 'decay'}} (or 'unchanged') to say what it is",
            ScalingWarning,
            stacklevel=3,
        )


class _Job:
    """One optimizer under one rule: what init and update share."""

    def __init__(
        self,
        *,
        rule: ScalingRule,
        spec: Spec,
        scaled: dict[str, Any],
        others: dict[str, Any],
        batch_size: int,
        base_batch_size: int,
        noise: Noise | None,
        noise_decay: float,
        floor: float,
    ) -> None:
        self.rule, self.spec, self.scaled, self.others = rule, spec, scaled, others
        self.batch_size, self.base_batch_size = batch_size, base_batch_size
        self.noise, self.noise_decay, self.floor = noise, noise_decay, floor
        self.k = batch_size / base_batch_size
        kind = spec.family.second_moment if spec.family is not None else "none"
        can_be_invariant = spec.family is not None and spec.family.can_be_invariant
        self.moment_kind = kind if rule.invariant and can_be_invariant else None
        self.online = noise is None and self._asks_for_noise()
        constant = all(
            is_number(v) or (callable(v) and spec.roles[n] in _SCHEDULED_ROLES)
            for n, v in scaled.items()
        )
        identity = rule.is_identity(self.k)
        self.static = constant and (identity or not (self.online or self.moment_kind))
        self.static_values: dict[str, Any] = {}
        self.plain: Any = None
        if self.static:
            scaler = self._scaler(scaled, self.k, noise)
            self.static_values = {name: scale_one(scaler, name) for name in scaled}
            self.plain = self._build(self.static_values, scaler)

    def _asks_for_noise(self) -> bool:
        stand_ins = {n: v if is_number(v) else 0.5 for n, v in self.scaled.items()}
        scaler = Scaler(self.rule, self.spec, stand_ins, 2.0, None)
        try:
            scaler.all()
        except NoiseScaleNeeded:
            return True
        return False

    def _scaler(self, values: Mapping[str, Any], k: Any, noise: Noise | None) -> Scaler:
        return Scaler(self.rule, self.spec, values, k, noise)

    def _build(
        self, values: Mapping[str, Any], scaler: Scaler
    ) -> optax.GradientTransformationExtraArgs:
        arguments = {**self.others, **values}
        entry = self.spec.entry
        follows = self.rule.time_constants and not self.rule.is_identity(scaler.k)
        if entry is not None and entry.build is not None and follows:
            return optax.with_extra_args_support(entry.build(arguments, scaler))
        return optax.with_extra_args_support(self.spec.factory(**arguments))

    def _build_now(
        self, values: Mapping[str, Any], scaler: Scaler
    ) -> optax.GradientTransformationExtraArgs:
        """Build the optimizer for values in force now; its state as if schedules were its own."""
        now = {
            name: (lambda _, v=value: v) if self._is_schedule(name) else value
            for name, value in values.items()
        }
        return self._build(now, scaler)

    def _is_schedule(self, name: str) -> bool:
        return callable(self.scaled[name]) and self.spec.roles[name] in _SCHEDULED_ROLES

    def _base_values(self, examples: jax.Array, changing: bool = False) -> dict[str, Any]:
        """Return base values now: schedules are read on the clock of base-size updates."""
        if not changing and self.batch_size % self.base_batch_size == 0:
            steps = examples // self.base_batch_size
        else:
            steps = examples / self.base_batch_size
        return {n: v(steps) if callable(v) else v for n, v in self.scaled.items()}

    def init(self, params: Any) -> ScaleByBatchState:
        examples = jnp.zeros((), jnp.int32)
        online = noise_lib.init_noise_scale() if self.online else ()
        noise = _online_noise(online, self.base_batch_size) if self.online else self.noise
        scaler = self._scaler(self._base_values(examples), self.k, noise)
        values = scaler.all()
        inner = self.plain if self.static else self._build_now(values, scaler)
        inner_state = inner.init(params)
        kind = self.moment_kind
        return ScaleByBatchState(
            examples=examples,
            batch_size=jnp.asarray(self.batch_size, jnp.int32),
            hyperparams=_as_float32(values),
            noise=online,
            variance=invariant.init_variance(inner_state, kind) if kind else (),
            inner_state=inner_state,
        )

    def update(
        self,
        updates: Any,
        state: ScaleByBatchState,
        params: Any = None,
        *,
        batch_size: Any = None,
        microbatch: MicrobatchStats | None = None,
        **extra_args: Any,
    ) -> tuple[Any, ScaleByBatchState]:
        if self.static and batch_size is None:
            return self._update_static(updates, state, params, extra_args)
        return self._update_traced(updates, state, params, batch_size, microbatch, extra_args)

    def _update_static(
        self, updates: Any, state: ScaleByBatchState, params: Any, extra_args: dict[str, Any]
    ) -> tuple[Any, ScaleByBatchState]:
        values = dict(state.hyperparams)
        for name, value in self.static_values.items():
            if callable(value):
                values[name] = jnp.asarray(value(state.examples // self.batch_size), jnp.float32)
        updates, inner_state = self.plain.update(updates, state.inner_state, params, **extra_args)
        return updates, state._replace(
            examples=_add_examples(state.examples, self.batch_size),
            hyperparams=values,
            inner_state=inner_state,
        )

    def _update_traced(
        self,
        updates: Any,
        state: ScaleByBatchState,
        params: Any,
        given_batch_size: Any,
        microbatch: MicrobatchStats | None,
        extra_args: dict[str, Any],
    ) -> tuple[Any, ScaleByBatchState]:
        batch_size = self.batch_size if given_batch_size is None else given_batch_size
        if is_number(batch_size):
            check_batch_sizes(batch_size, self.base_batch_size)
        k = batch_size / self.base_batch_size
        if microbatch is not None:
            noise_lib.check_microbatch(microbatch)
        online, noise = self._noise_now(updates, state, k, batch_size, microbatch)
        changing = given_batch_size is not None
        base = self._base_values(state.examples, changing)
        scaler = self._scaler(base, k, noise)
        values = scaler.all()
        inner_state = state.inner_state
        if changing:
            old_k = state.batch_size / self.base_batch_size
            inner_state = carry_moments(inner_state, self._scaler(base, old_k, noise), scaler)
        counts = changing and self.rule.time_constants and self._kind() != "layer"
        count = state.examples / batch_size if counts else None
        updates_out, inner_state, variance = self._run(
            updates, state, inner_state, params, scaler, values, count, microbatch, extra_args
        )
        new_state = ScaleByBatchState(
            examples=_add_examples(state.examples, batch_size),
            batch_size=jnp.asarray(batch_size, jnp.int32),
            hyperparams=_as_float32(values),
            noise=online,
            variance=variance,
            inner_state=inner_state,
        )
        # Float32 hyperparameters would otherwise widen a bfloat16 state or update.
        return _cast_like(updates_out, updates), _cast_like(new_state, state)

    def _kind(self) -> str:
        return self.spec.family.second_moment if self.spec.family is not None else "none"

    def _run(
        self,
        updates: Any,
        state: ScaleByBatchState,
        inner_state: Any,
        params: Any,
        scaler: Scaler,
        values: dict[str, Any],
        count: Any,
        microbatch: MicrobatchStats | None,
        extra_args: dict[str, Any],
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        """Run the optimizer's own update, its second moment made invariant where the rule says."""
        identity = self.rule.is_identity(scaler.k)
        replaced = self.moment_kind is not None
        if replaced and identity and microbatch is None and count is None:
            replaced = False
        if replaced and microbatch is None and not identity:
            raise missing_noise(self.rule, self.spec)
        values = self._with_usable_decay(values) if replaced else values
        inner = self._build_now(values, scaler)

        def run(inner_state: Any) -> tuple[Any, Any]:
            def step(inner_state: Any) -> tuple[Any, Any]:
                return inner.update(updates, inner_state, params, **extra_args)

            return with_effective_counts(step, inner_state, count)

        if not replaced:
            updates, inner_state = run(inner_state)
            return updates, inner_state, state.variance
        moment = invariant.SecondMoment(
            kind=self.moment_kind or "none",
            decay=self._decay_of(values, scaler, count),
            k=scaler.k,
            base=invariant.base_second_moment(updates, microbatch, scaler.k),
            floor=self.floor,
            eps=values["eps"] if self.moment_kind == "factored" else 0.0,
            direct=self.spec.entry is not None,
        )
        return invariant.update_with(run, updates, inner_state, state.variance, moment)

    def _with_usable_decay(self, values: dict[str, Any]) -> dict[str, Any]:
        """Keep the second moment's decay large enough to divide by."""
        low = invariant.SMALLEST_DECAY
        usable = dict(values)
        for name, role in self.spec.roles.items():
            if role == "second_moment_decay" and name in values:
                value = values[name]
                usable[name] = max(value, low) if is_number(value) else jnp.maximum(value, low)
        return usable

    def _decay_of(
        self, values: Mapping[str, Any], scaler: Scaler, count: Any
    ) -> Callable[[Any], Any]:
        if self.moment_kind == "factored":
            rate, offset = values["decay_rate"], values["decay_offset"]

            def growing(node: Any) -> Any:
                done = node.count if count is None else count
                return rebuild.adafactor_decay(done, rate, offset, scaler.k)

            return growing
        names = [n for n, r in self.spec.roles.items() if r == "second_moment_decay"]
        return lambda node: values[names[0]]

    def _noise_now(
        self,
        updates: Any,
        state: ScaleByBatchState,
        k: Any,
        batch_size: Any,
        microbatch: MicrobatchStats | None,
    ) -> tuple[NoiseScaleState | tuple[()], Noise | None]:
        if not self.online:
            return (), self.noise
        online = state.noise
        if microbatch is not None:
            decay = self.noise_decay**k
            if self._kind() == "sum":
                # What the optimizer sums without end is compared with a noise averaged likewise.
                done = state.examples / batch_size
                decay = done / (done + 1)
            online = noise_lib.update_noise_scale(
                online, updates, microbatch, batch_size=batch_size, decay=decay
            )
        elif not self.rule.is_identity(k):
            raise missing_noise(self.rule, self.spec)
        return online, _online_noise(online, self.base_batch_size)


def _online_noise(online: NoiseScaleState, base_batch_size: int) -> Noise:
    # Only the ratio matters, so neither is divided by the weight; nothing known yet reads as all
    # noise, the more cautious end for a larger batch.
    signal = jnp.maximum(online.signal, 0.0)
    noise = online.noise / base_batch_size
    return Noise(signal, jnp.where(signal + noise > 0, noise, 1.0))


def _add_examples(examples: jax.Array, batch_size: Any) -> jax.Array:
    more = jnp.asarray(batch_size, jnp.int32)
    return jnp.where(examples > _MAX_EXAMPLES - more, _MAX_EXAMPLES, examples + more)


def _as_float32(values: Mapping[str, Any]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def _cast_like(tree: Any, like: Any) -> Any:
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
