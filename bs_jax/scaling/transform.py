"""scale_by_batch: any optax optimizer, its hyperparameters scaled to the batch size in use."""

from __future__ import annotations

import collections
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from bs_jax.errors import UserError
from bs_jax.scaling import moments, noise
from bs_jax.scaling.clock import ExampleClock
from bs_jax.scaling.clocked import SMALLEST_DECAY, adafactor_decay
from bs_jax.scaling.hyperparameters import (
    Noise,
    Scaled,
    ScalingWarning,
    check_batch_sizes,
    check_decays,
    given_batch_size,
    is_narrow,
    is_number,
    rounded_away,
)
from bs_jax.scaling.limit import GUARD_ERRORS, guard_decay
from bs_jax.scaling.microbatch import MicrobatchStats, PyTree
from bs_jax.scaling.noise import NoiseByGroupState, NoiseScale, NoiseScaleState
from bs_jax.scaling.optimizers import Recipe, missing_noise, resolve_factory
from bs_jax.scaling.rules import Scalar, ScalingRule, resolve_rule

P = ParamSpec("P")
_State = TypeVar("_State")
# A noise scale that the user gives: as noise, or as a schedule of examples.
Known: TypeAlias = Noise | Callable[[Any], Any] | None


class _Values(NamedTuple):
    values: tuple[jax.Array, ...]


class InForce(_Values):
    """The hyperparameters of one update: float32 scalars, their names apart.

    The names are no keys of the state: optax's ``tree_get(state, "learning_rate")`` finds what a
    user may set, and a value that is computed at every update may not be set. They belong to the
    type instead, a named tuple of one field: so whatever takes a state apart and puts it together
    again by its types keeps them (JAX, optax, flax's serialization).

    Attributes:
        values: in the order of ``names``.
        names: of the factory's arguments; then ``"guard"`` and ``"noise_scale"`` under a guard.
    """

    __slots__ = ()
    names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> InForce:
        """Return the values as float32 scalars."""
        numbers = tuple(jnp.asarray(value, jnp.float32) for value in values.values())
        return _in_force_type(tuple(values))(numbers)

    def to_dict(self) -> dict[str, jax.Array]:
        """Return name -> value."""
        return dict(zip(self.names, self.values, strict=True))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the names: the type itself has no place in a module."""
        return _in_force, (self.names, self.values)


@functools.cache
def _in_force_type(names: tuple[str, ...]) -> type[InForce]:
    return type("InForce", (InForce,), {"names": names, "__slots__": ()})


def _in_force(names: tuple[str, ...], values: tuple[jax.Array, ...]) -> InForce:
    return _in_force_type(names)(values)


@jax.tree_util.register_pytree_node_class
class ReadOnly(Mapping[str, Any]):
    """Values in force, which nobody may set: a value put here would be ignored without a word."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)

    def __setitem__(self, name: str, value: Any) -> None:
        raise UserError(
            f"{name} in force follows from what the factory was given, at every update; to set it"
            " while training use optax.inject_hyperparams(bs_jax.scale_by_batch(...)), then"
            f" optax.tree.set(state, {name}=...), at the base batch size"
        )

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        """Return values and names, for JAX."""
        return tuple(self._values.values()), tuple(self._values)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], values: Iterable[Any]) -> ReadOnly:
        """Return the values by name again."""
        return cls(dict(zip(names, values, strict=True)))


class ScaleByBatchState(NamedTuple):
    """State of a ``scale_by_batch`` transformation; one structure for every kind of update.

    Attributes:
        clock: examples seen, in base-size updates.
        batch_size: examples in the last update; int32 scalar.
        in_force: the hyperparameters of the last update; read them by ``hyperparams``.
        noise: running noise scale of the gradient, as the rule averages it; ``()`` for what takes
            no steps and needs none.
        limit: running noise scale in the metric that the optimizer moves in, for the guard; ``()``
            for what takes no steps.
        variance: averaged noise part of each second moment, or ``()`` where it is not made
            invariant.
        inner_state: the optimizer's own state.
    """

    clock: ExampleClock
    batch_size: jax.Array
    in_force: InForce
    noise: NoiseScaleState | tuple[()]
    limit: NoiseScaleState | tuple[()]
    variance: tuple[PyTree, ...]
    inner_state: Any

    @property
    def examples(self) -> Any:
        """Examples seen: exact int64 outside jit; a rounded float32 inside."""
        return self.clock.examples

    @property
    def hyperparams(self) -> Mapping[str, jax.Array]:
        """The hyperparameters of the last update by name, to read."""
        return ReadOnly(self.in_force.to_dict())

    def __getattr__(self, name: str) -> Any:
        """Say where a field of the optimizer's own state is.

        Raises:
            AttributeError: always.
        """
        where = f"; the optimizer's own state has it: use state.inner_state.{name}"
        own = hasattr(self.inner_state, name)
        raise AttributeError(f"ScaleByBatchState has no {name!r}{where if own else ''}")


def scale_by_batch(
    factory: Callable[P, Any] | str,
    *,
    batch_size: int,
    base_batch_size: int,
    rule: str | ScalingRule = "invariant",
    roles: Mapping[str, str] | None = None,
    family: str | None = None,
    guard: bool | None = None,
    noise_scale: float | Callable[[Any], Any] | None = None,
    noise_decay: float | None = None,
    variance_floor: float = moments.VARIANCE_FLOOR,
) -> Callable[P, optax.GradientTransformationExtraArgs]:
    r"""Wrap an optax factory: hyperparameters tuned at one batch size, training at another.

    Every hyperparameter becomes what the rule says at ``k = batch_size / base_batch_size``; for
    Adam under ``"invariant"``: ``lr k``, ``b1^k``, ``b2^k``, and the second moment estimated as
    the base batch size would have shown it. A schedule written in updates of the base batch size
    serves unchanged: an update reads it at the middle of the base-size updates that it stands for.

    Beyond the gradient noise scale no rule that keeps the movement per example can be right. So a
    rule that measures is guarded: at k > 1 steps grow by ``min(k, max(1, phi))``, with phi the
    noise scale over the base batch size, measured while training in the metric that the optimizer
    moves in. Up to the noise scale it is the rule unguarded; beyond it no step is shorter than the
    square-root rule's, coordinate by coordinate where the second moment is invariant. SGD's alone
    falls back to the base's: it grows with the gradient by itself.

    Args:
        factory: an optax factory, its name, or your own function (then pass ``roles``).
        batch_size: examples in one update, over all devices; sequences or tokens, as long as all
            sizes count the same.
        base_batch_size: examples per update that the hyperparameters were tuned at.
        rule: a name in ``RULES``, ``"power(a)"``, or a ``ScalingRule``.
        roles: hyperparameter -> role, for your own factory; what has no role is left alone.
        family: of your own factory, needed by rules that follow the noise.
        guard: whether steps grow with the batch only up to the noise scale; ``None``: as the rule
            says (``"invariant"`` and ``"noise_aware"``: yes).
        noise_scale: gradient noise scale in examples, where it is known: a number, a scalar array,
            which may be traced, or a schedule in base-size updates. It then guards every rule.
        noise_decay: decay per base-size update of the running noise scale that ``"noise_aware"``
            reads; ``None``: that of the second moment it stands for, else 0.99.
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
    if noise_decay is not None and (not is_number(noise_decay) or not 0 <= noise_decay < 1):
        raise UserError(f"noise_decay is {noise_decay!r}; give a decay below 1, e.g. 0.99")
    if not is_number(variance_floor) or not 0 < variance_floor <= 1:
        raise UserError(f"variance_floor is {variance_floor!r}; give a share in (0, 1], e.g. 0.7")
    if guard is not None and not isinstance(cast(object, guard), bool):
        raise UserError(f"guard is {guard!r}; give True, False, or None: as the rule says")
    resolved, rule = resolve_factory(factory), resolve_rule(rule).replace(guard=guard)
    known: Known = noise_scale if callable(noise_scale) else None
    if noise_scale is not None and known is None:
        known = Noise.from_scale(noise_scale, base_batch_size)

    @functools.wraps(resolved)
    def scaled_factory(*args: P.args, **kwargs: P.kwargs) -> optax.GradientTransformationExtraArgs:
        recipe = Recipe.of(resolved, args, kwargs, roles=roles, family=family, whole_call=True)
        check_decays(recipe.at(rule, batch_size / base_batch_size, _at_start(known)))
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
    known_noise: Known,
    noise_decay: float | None,
    floor: float,
) -> optax.GradientTransformationExtraArgs:
    """Return a recipe's transformation: updates are static where all numbers are known before.

    The static update is plain optax's, with numbers scaled beforehand; the traced one scales while
    training: a batch size that is given, values that are arrays, noise that is measured.
    """
    k = batch_size / base_batch_size
    start = _at_start(known_noise)
    at_k = recipe.at(rule, k, start, limit=None if start is None else start.scale)
    second_moment = recipe.family.second_moment if recipe.family is not None else "none"
    kind = recipe.invariant_moment(rule)
    decay_name = at_k.only("second_moment_decay") if kind in ("ema", "layer") else ""
    metric = recipe.metric(rule)
    # What clips and takes no step stands in front of something that does.
    has_norms = bool(at_k.with_role("gradient_norm"))
    clips = has_norms and not at_k.with_role("learning_rate")
    in_moment = kind is not None and at_k.guards_moment
    # kind: the second moment that is made the base's, or None. measures: q needs measured noise.
    # guarded: steps have a limit; guards: one that is measured here. static: numbers are known.
    measures = known_noise is None and recipe.needs_noise(rule)
    guarded = metric is not None and (known_noise is not None or rule.measures)
    guards = guarded and known_noise is None
    constant = all(is_number(v) or n in recipe.schedules for n, v in recipe.values.items())
    constant = constant and (start is None or is_number(start.noise)) and not callable(known_noise)
    static = constant and (at_k.is_identity or not (measures or kind or (guards and k > 1)))
    fixed = {name: at_k.schedule_or_value(name) for name in recipe.values} if static else {}
    plain = recipe.build(fixed, recipe.clock(at_k)) if static else None
    # Never run: its updates' dtypes, with Python numbers, are those that ours follow.
    stand_ins = {n: 1 if recipe.roles[n].name == "period" else 0.5 for n in recipe.values}
    base_optimizer = recipe.build(
        {n: stand_ins[n] for n, v in recipe.values.items() if not is_number(v)}
    )

    def read(clock: ExampleClock, schedule: Callable[[Any], Any], size: Any) -> Any:
        return clock.read(schedule, size, base_batch_size, middle=rule.reads_middle)

    def base_values(clock: ExampleClock, size: Any) -> dict[str, Any]:
        """Return base values now: schedules are read on the clock of base-size updates."""
        return {n: read(clock, v, size) if callable(v) else v for n, v in recipe.values.items()}

    def noise_at(clock: ExampleClock, size: Any, state: ScaleByBatchState | None) -> Any:
        """Return the noise that the rule reads, and the limit of the guard, as they are now."""
        found = known_noise
        if callable(found):
            found = Noise.from_scale(read(clock, found, size), base_batch_size)
        if found is not None:
            return found, found.scale if guarded else None
        if state is None:
            return None, None
        measured = _measured(state.noise, base_batch_size) if measures else None
        limit = None
        if guards:
            limit = (
                noise.estimate(cast(NoiseScaleState, state.limit), GUARD_ERRORS).low
                / base_batch_size
            )
        return measured, limit

    def shown(scaled: Scaled, values: Mapping[str, Any]) -> InForce:
        """Return what is in force, the limit included."""
        if not guarded:
            return InForce.of(values)
        limit = 0.0 if scaled.limit is None else scaled.limit
        return InForce.of({**values, "guard": scaled.guard, "noise_scale": limit * base_batch_size})

    def init(params: PyTree) -> ScaleByBatchState:
        for caution in rounded_away(recipe.roles, fixed, params):
            warnings.warn(caution, ScalingWarning, stacklevel=2)
        clock = ExampleClock.at(0, base_batch_size)
        steps = any(role.name == "learning_rate" for role in recipe.roles.values())
        # Each has arrays of its own: a state whose arrays are shared cannot be donated.
        state = ScaleByBatchState(
            clock=clock,
            batch_size=jnp.asarray(batch_size, jnp.int32),
            in_force=InForce.of({}),
            noise=noise.init_noise_scale() if steps or measures else (),
            limit=noise.init_noise_scale() if steps else (),
            variance=(),
            inner_state=(),
        )
        noise_now, limit = noise_at(clock, batch_size, state)
        scaled = recipe.at(rule, k, noise_now, base_values(clock, batch_size), limit)
        values = scaled.all()
        inner_state = (plain or recipe.build(values, recipe.clock(scaled))).init(params)
        return state._replace(
            in_force=shown(scaled, values),
            variance=moments.init_variance(inner_state, scaled) if kind else (),
            inner_state=inner_state,
        )

    def running_noise(
        state: ScaleByBatchState, updates: PyTree, size: Any, microbatch: MicrobatchStats | None
    ) -> ScaleByBatchState:
        """Return the state with this update's statistics taken into the noise scales."""
        k = size / base_batch_size
        if microbatch is None:
            small = is_number(k) and k <= 1
            if (measures and not recipe.at(rule, k).is_identity) or (guards and not small):
                raise missing_noise(recipe, rule, by_coordinate=kind is not None)
            return state
        noise.check_microbatch(microbatch, updates)
        if clips and rule.measures and microbatch.mean is None:
            # By itself the clip is right; what stands behind it is not seen from here.
            warnings.warn(
                f"microbatch.mean is None, and {recipe.optimizer.name} rescales the gradient, so an"
                " optimizer behind it would compare the clipped gradient with statistics of the"
                " raw one: give the mean gradient before clipping, microbatch._replace(mean=grads);"
                " value_grad_and_stats and GradientAccumulator keep it",
                ScalingWarning,
                stacklevel=3,
            )
        new_noise, limit = state.noise, state.limit
        if isinstance(new_noise, NoiseScaleState):
            decay = _noise_decay(noise_decay, recipe) ** k
            if second_moment == "sum":
                # What the optimizer sums without end is compared with a noise averaged likewise.
                done = state.clock.updates(k, base_batch_size)
                decay = done / (done + 1)
            new_noise = noise.update_noise_scale(
                new_noise, updates, microbatch, batch_size=size, decay=decay
            )
        if isinstance(limit, NoiseScaleState):
            limit = noise.update_noise_scale(
                limit,
                updates,
                microbatch,
                batch_size=size,
                decay=guard_decay(k),
                metric=metric or (recipe.family.metric if recipe.family else None) or "plain",
            )
        return state._replace(noise=new_noise, limit=limit)

    def static_update(
        plain: optax.GradientTransformationExtraArgs,
        updates: PyTree,
        state: ScaleByBatchState,
        params: PyTree,
        microbatch: MicrobatchStats | None,
        extra_args: dict[str, Any],
    ) -> tuple[PyTree, ScaleByBatchState]:
        # Not the state's: a checkpoint of another batch size holds what was in force there.
        values = {
            n: at_k.with_base(n, read(state.clock, recipe.values[n], batch_size))
            if callable(v)
            else v
            for n, v in fixed.items()
        }
        state = running_noise(state, updates, batch_size, microbatch)
        updates, inner_state = plain.update(updates, state.inner_state, params, **extra_args)
        return updates, state._replace(
            clock=state.clock.advance(batch_size, base_batch_size),
            in_force=shown(at_k, values),
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
            size = given_batch_size(given_size, base_batch_size)
        k = size / base_batch_size
        state = running_noise(state, updates, size, microbatch)
        noise_now, limit = noise_at(state.clock, size, state)
        base = base_values(state.clock, size)
        scaled = recipe.at(rule, k, noise_now, base, limit)
        if changing and is_number(size):
            check_decays(scaled)
        values, clock = scaled.all(), recipe.clock(scaled)
        inner_state, count = state.inner_state, None
        if changing:
            old = recipe.at(rule, state.batch_size / base_batch_size, noise_now, base, limit)
            inner_state = moments.carry(inner_state, old, scaled)
            if rule.time_constants and second_moment != "layer":
                count = state.clock.updates(k, base_batch_size)
        # At the base size the optimizer's own square serves, unless its count is a fraction.
        at_base = scaled.is_identity and microbatch is None and count is None
        replaces, used = kind is not None and not at_base, values
        if replaces and decay_name:
            used = {**values, decay_name: _usable_decay(values[decay_name])}
        optimizer = recipe.build(used, clock)
        seen = updates
        if has_norms:
            # optax's clips select between what is clipped and a product with the threshold, which
            # is float32 here where a Python float would have taken the gradient's type.
            seen = _widened(updates)

        def own_step(inner_state: Any) -> tuple[PyTree, Any]:
            return optimizer.update(seen, inner_state, params, **extra_args)

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
                share=scaled.guard if in_moment else 1.0,
                power=rule.guard_power,
                known=scaled.known,
            )
            new_updates, inner_state, variance = moments.update_with_base_moment(
                step, inner_state, updates, state.variance, moment
            )
        else:
            (new_updates, inner_state), variance = step(inner_state), state.variance
        new_state = ScaleByBatchState(
            clock=state.clock.advance(size, base_batch_size),
            batch_size=jnp.asarray(size, jnp.int32),
            in_force=shown(scaled, values),
            noise=state.noise,
            limit=state.limit,
            variance=variance,
            inner_state=inner_state,
        )
        # Float32 hyperparameters would otherwise widen a bfloat16 state or update.
        as_optax = jax.eval_shape(
            lambda u, s, p: base_optimizer.update(u, s, p, **extra_args)[0],
            updates,
            state.inner_state,
            params,
        )
        return _cast_like((new_updates, new_state), (as_optax, state))

    def update(
        updates: PyTree,
        state: ScaleByBatchState,
        params: PyTree = None,
        *,
        batch_size: Any = None,
        microbatch: MicrobatchStats | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByBatchState]:
        is_static = plain is not None and batch_size is None
        _check_state(state, recipe, base_batch_size, static=is_static)
        if plain is not None and batch_size is None:
            return static_update(plain, updates, state, params, microbatch, extra_args)
        return traced_update(updates, state, params, batch_size, microbatch, extra_args)

    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, update))


def _check_state(state: Any, recipe: Recipe, base_batch_size: int, *, static: bool) -> None:
    """Raise a ``UserError`` for a state that an update of this transformation would misread.

    One that is not its own, one that counts other base-size updates, and one whose own values
    would overrule those that are traced.
    """
    name = recipe.optimizer.name
    if not isinstance(state, ScaleByBatchState):
        raise UserError(
            f"{name}: the state given to update is a {type(state).__name__}, not that of"
            " scale_by_batch; give what init or the last update returned"
        )
    counted = state.clock.base_batch_size
    if not isinstance(counted, Tracer) and int(counted) != base_batch_size:
        raise UserError(
            f"{name}: the state counts updates of base_batch_size={int(counted)}, this"
            f" transformation's is {base_batch_size}: schedules would be read at another time; keep"
            " the base batch size, which belongs to the recipe, and change batch_size alone"
        )
    injected = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
    is_injected = lambda x: isinstance(x, injected)  # noqa: E731
    leaves = [] if static else jax.tree.leaves(state.inner_state, is_leaf=is_injected)
    if any(map(is_injected, leaves)):
        raise UserError(
            f"{name}: optax.inject_hyperparams inside scale_by_batch keeps the values of the first"
            " update, so those that change while training would be ignored; put it outside:"
            " optax.inject_hyperparams(bs_jax.scale_by_batch(...))"
        )


def _at_start(known: Known) -> Noise | None:
    """Return the noise that is known before training; of a schedule, one that stands for it."""
    return Noise(1.0, 1.0) if callable(known) else known


def _noise_decay(given: float | None, recipe: Recipe) -> Scalar:
    """Return the decay per base-size update of the noise that q is made of.

    It stands beside the second moment, so it averages over as many examples.
    """
    if given is not None:
        return given
    decays = [n for n, role in recipe.roles.items() if role.name == "second_moment_decay"]
    found = [recipe.values[n] for n in decays if n in recipe.values]
    return found[0] if found else noise.DECAY


def _widened(tree: PyTree) -> PyTree:
    """Return a tree with float32 in place of narrower types."""
    wide = lambda x: x.astype(jnp.float32) if is_narrow(jnp.result_type(x)) else x  # noqa: E731
    return jax.tree.map(wide, tree)


def _measured(online: Any, base_batch_size: int) -> Noise:
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


def _cast_like(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.result_type(y)), tree, like)


def hyperparams(state: Any, *, as_floats: bool = False) -> dict[str, Any]:
    """Return the hyperparameters in force in the last update.

    Under a guard ``"guard"`` is the share of k by which every step may grow (1 inside the noise
    scale), and ``"noise_scale"`` the lower end, in examples, that it goes by: 0 as long as none is
    known.

    Args:
        state: the state of a ``scale_by_batch`` transformation, or of anything that holds one: a
            chain's, a ``TrainState``, an ``nnx.Optimizer``.
        as_floats: whether to return Python floats, for logging, instead of float32 scalars.

    Returns:
        name -> value. Where a state holds several transformations (a scaled clip beside its
        optimizer, say), a name that more than one has is prefixed ``"0/"``, ``"1/"``, ...

    Raises:
        UserError: if the state holds none.
    """
    found = [_plain_arrays(x.in_force).to_dict() for x in _states_in(state)]
    if not found:
        raise UserError("the state holds no scale_by_batch state; give the state of its optimizer")
    if as_floats:
        shapes = {jnp.shape(value) for values in found for value in values.values()} - {()}
        if shapes:
            raise UserError(
                f"the values are arrays of shape {shapes.pop()}, of several runs side by side (vmap"
                " or pmap): take one run's state, jax.tree.map(lambda x: x[0], state), or leave"
                " as_floats out"
            )
        found = [{name: float(value) for name, value in values.items()} for values in found]
    held = collections.Counter(name for values in found for name in values)
    return {
        f"{i}/{name}" if held[name] > 1 else name: value
        for i, values in enumerate(found)
        for name, value in values.items()
    }


def guard_share(state: Any) -> Any:
    """Return the smallest share of k that a guard in a state lets steps grow by; 1 without one."""
    found = [_plain_arrays(x.in_force).to_dict().get("guard", 1.0) for x in _states_in(state)]
    return functools.reduce(jnp.minimum, found, jnp.ones(()))


def noise_scale_estimate(state: Any) -> NoiseScale | None:
    """Return the noise scale held anywhere in an optimizer state; ``None`` if it keeps none.

    Args:
        state: the state of a ``scale_by_batch`` transformation or of anything that holds one (a
            chain's, a ``TrainState``, an ``nnx.Optimizer``), or a ``NoiseScaleState``.

    Returns:
        The estimate with its range, NaN where nothing is known yet; ``preconditioned`` is the same
        in the metric that the optimizer moves in.
    """
    if isinstance(state, NoiseScaleState):
        return noise.estimate(_plain_arrays(state))
    found = [x for x in _states_in(state) if isinstance(x.noise, NoiseScaleState)]
    # What takes steps comes first: a clip beside it keeps only what its threshold needs.
    found.sort(key=lambda x: not isinstance(x.limit, NoiseScaleState))
    if not found:
        return None
    running = _plain_arrays((found[0].noise, found[0].limit))
    limit = noise.estimate(running[1]) if isinstance(running[1], NoiseScaleState) else None
    return noise.estimate(running[0])._replace(preconditioned=limit)


def noise_scale_by_group(state: Any) -> dict[str, NoiseScale]:
    """Return the noise scale of each group of parameters that ``noise_by_group`` measures.

    Args:
        state: an optimizer state that holds a ``noise_by_group`` transformation's.

    Returns:
        label -> estimate with its range, NaN where nothing is known yet.

    Raises:
        UserError: if the state holds none.
    """
    found = _states_in(state, NoiseByGroupState)
    if not found:
        raise UserError(
            "the state measures no groups; put noise_by_group(labels, ...) in its chain"
        )
    groups = {name: running for one in found for name, running in one.groups.items()}
    return {name: noise.estimate(_plain_arrays(running)) for name, running in groups.items()}


def _states_in(state: Any, kind: type[_State] = ScaleByBatchState) -> list[_State]:
    """Return the states of one kind inside a state."""
    # flax's nnx.Optimizer is no pytree of its optimizer's state.
    state = getattr(state, "opt_state", state)
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in leaves if isinstance(x, kind)]


def _plain_arrays(tree: Any) -> Any:
    """Return a tree with nnx's variables read."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    read = lambda x: x.get_value() if is_variable(x) else x  # noqa: E731
    return jax.tree.map(read, tree, is_leaf=is_variable)


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
