"""One optimizer under one rule: what init and update of a scaled transformation do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bs_jax.scaling import cautions, invariant, rebuild
from bs_jax.scaling import noise_scale as noise_lib
from bs_jax.scaling.carry import carry_moments, with_effective_counts
from bs_jax.scaling.formulas import Noise, NoiseScaleNeeded, Scaler, missing_noise, scale_one
from bs_jax.scaling.microbatch import MicrobatchStats, check_microbatch
from bs_jax.scaling.noise_scale import NoiseScaleState
from bs_jax.scaling.roles import Spec
from bs_jax.scaling.rules import ScalingRule
from bs_jax.scaling.values import MAX_EXAMPLES, check_batch_sizes, is_number, is_numeric

# Roles whose values optax itself accepts as schedules.
_SCHEDULED_ROLES = ("learning_rate", "weight_decay", "weight_decay_independent")


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


class ScaledOptimizer:
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
        constant = constant and (noise is None or is_number(noise.noise))
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
        return rebuild.build(self.spec, arguments, rebuild.clock_of(scaler))

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
        """Return the state before any update."""
        if self.static:
            cautions.warn_of_dtypes(self.static_values, self.spec, params)
        examples = jnp.zeros((), jnp.int32)
        online, noise = (), self.noise
        if self.online:
            online = noise_lib.init_noise_scale()
            noise = _online_noise(online, self.base_batch_size)
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
        state: Any,
        params: Any = None,
        *,
        batch_size: Any = None,
        microbatch: MicrobatchStats | None = None,
        **extra_args: Any,
    ) -> tuple[Any, ScaleByBatchState]:
        """Take one update; the interface is that of ``optax.GradientTransformationExtraArgs``."""
        if self.static and batch_size is None:
            return self._update_static(updates, state, params, extra_args)
        return self._update_traced(updates, state, params, batch_size, microbatch, extra_args)

    def _update_static(
        self, updates: Any, state: ScaleByBatchState, params: Any, extra_args: dict[str, Any]
    ) -> tuple[Any, ScaleByBatchState]:
        # Not the state's: a checkpoint of another batch size holds what was in force there.
        done = state.examples // self.batch_size
        values = {n: v(done) if callable(v) else v for n, v in self.static_values.items()}
        updates, inner_state = self.plain.update(updates, state.inner_state, params, **extra_args)
        return updates, state._replace(
            examples=_add_examples(state.examples, self.batch_size),
            hyperparams=_as_float32(values),
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
        if is_number(batch_size) or not is_numeric(batch_size):
            check_batch_sizes(batch_size, self.base_batch_size)
        k = batch_size / self.base_batch_size
        if microbatch is not None:
            check_microbatch(microbatch, updates)
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
            raise missing_noise(self.rule, self.spec, by_coordinate=True)
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
            k = (rebuild.clock_of(scaler) or {"k": 1.0})["k"]

            def growing(node: Any) -> Any:
                done = node.count if count is None else count
                return rebuild.adafactor_decay(done, rate, offset, k)

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
        online = state.noise
        if not isinstance(online, NoiseScaleState):
            return (), self.noise
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
    return jnp.where(examples > MAX_EXAMPLES - more, MAX_EXAMPLES, examples + more)


def _as_float32(values: Mapping[str, Any]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def _cast_like(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.result_type(y)), tree, like)
