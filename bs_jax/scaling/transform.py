"""scale_by_batch: any optax optimizer, its hyperparameters scaled to the batch size in use.

``_Setup`` is what is decided before training; ``update`` is one update from top to bottom.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeAlias, cast

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
    larger,
    rounded_away,
)
from bs_jax.scaling.noise import (
    GUARD_DECAY,
    GUARD_ERRORS,
    SMALLEST_GUARD_DECAY,
    MicrobatchStats,
    NoiseScaleState,
    step_share,
)
from bs_jax.scaling.optimizers import MOMENT_DECAYS, Recipe, missing_noise, resolve_factory
from bs_jax.scaling.rules import PyTree, Scalar, ScalingRule, resolve_rule
from bs_jax.scaling.state import GUARD_NAMES, InForce, ScaleByBatchState

P = ParamSpec("P")
# A noise scale that the user gives: as noise, or as a schedule of examples.
GivenNoise: TypeAlias = Noise | Callable[[Any], Any] | None


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
    square-root rule's, coordinate by coordinate where an invariant second moment alone sets its
    length. SGD's alone falls back to the base's: it grows with the gradient by itself.

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
        >>> from bs_jax.scaling import hyperparams
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
    given: GivenNoise = noise_scale if callable(noise_scale) else None
    if noise_scale is not None and given is None:
        given = Noise.from_scale(noise_scale, base_batch_size)

    @functools.wraps(resolved)
    def scaled_factory(*args: P.args, **kwargs: P.kwargs) -> optax.GradientTransformationExtraArgs:
        recipe = Recipe.of(resolved, args, kwargs, roles=roles, family=family, whole_call=True)
        check_decays(recipe.at(rule, batch_size / base_batch_size, _at_start(given)))
        for caution in recipe.cautions(rule):
            warnings.warn(caution, ScalingWarning, stacklevel=2)
        setup = _Setup.of(
            recipe,
            rule,
            batch_size=int(batch_size),
            base_batch_size=int(base_batch_size),
            given_noise=given,
            noise_decay=noise_decay,
            floor=variance_floor,
        )
        return _transformation(setup)

    return scaled_factory


@dataclasses.dataclass(frozen=True)
class _Setup:
    """What is decided before training; an update only reads it.

    Attributes:
        recipe: the optimizer's arguments and what they mean.
        scaled: the recipe under the rule at the batch size given. An update puts the values, k,
            noise and share of now in place of its own.
        batch_size: examples in one update, unless an update is given another number.
        base_batch_size: examples per update that the recipe was tuned at.
        given_noise: the noise as the user gave it; ``None``: it is measured, where it is needed.
        noise_decay: decay per base-size update of the running noise that q is made of.
        floor: smallest share of the averaged noise part that an invariant second moment may be.
        second_moment: how the optimizer keeps it (see ``rules.Family``).
        invariant: whether it is made what the base batch size would have shown.
        moment_decay: the name of its decay then; empty where it has none of that role.
        centering_decay: the name of the decay of the average that it is taken about; or empty.
        moment_eps: the name of what is added to it at each update; or empty.
        block_clip: the name of the threshold that each leaf's update is clipped at; or empty.
        metric: in which the noise scale is measured that limits steps.
        steps: whether the optimizer has a learning rate; a clip or an average has none.
        clips: whether it compares raw gradient norms with a threshold.
        guarded: whether steps grow only up to a noise scale.
        measures_q: whether q follows the noise measured here.
        measures_phi: whether the guard goes by the noise scale measured here.
        plain: optax's optimizer with numbers scaled beforehand, where all of them are known.
        unscaled: never run: its updates' dtypes, with Python numbers, are those that ours follow.
    """

    recipe: Recipe
    scaled: Scaled
    batch_size: int
    base_batch_size: int
    given_noise: GivenNoise
    noise_decay: Scalar
    floor: float
    second_moment: str
    invariant: bool
    moment_decay: str
    centering_decay: str
    moment_eps: str
    block_clip: str
    metric: str
    steps: bool
    clips: bool
    guarded: bool
    measures_q: bool
    measures_phi: bool
    plain: optax.GradientTransformationExtraArgs | None
    unscaled: optax.GradientTransformationExtraArgs

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        rule: ScalingRule,
        *,
        batch_size: int,
        base_batch_size: int,
        given_noise: GivenNoise,
        noise_decay: float | None,
        floor: float,
    ) -> _Setup:
        """Decide what an update of this recipe needs.

        Raises:
            UserError: if the rule promises what it cannot do for this optimizer.
        """
        k = batch_size / base_batch_size
        start = _at_start(given_noise)
        scaled = recipe.at(rule, k, start, phi=None if start is None else start.phi)
        second_moment = recipe.family.second_moment if recipe.family is not None else "none"
        invariant = recipe.invariant_moment(rule) is not None
        decays = MOMENT_DECAYS.get(second_moment, ()) if invariant else ()
        moment_decay, centering_decay, *_ = [*map(scaled.only, decays), "", ""]
        block_clips = scaled.with_role("update_norm") if second_moment == "factored" else []
        added = {"factored": ["eps"], "centered": scaled.with_role("eps_sum")}
        guarded = recipe.metric(rule) is not None and (given_noise is not None or rule.measures)
        measures_q = given_noise is None and recipe.needs_noise(rule)
        measures_phi = guarded and given_noise is None
        numbers = not callable(given_noise) and (start is None or is_number(start.noise))
        numbers = numbers and all(
            is_number(v) or n in recipe.schedules for n, v in recipe.values.items()
        )
        measures = measures_q or invariant or (measures_phi and k > 1)
        plain = None
        if numbers and (scaled.is_identity or not measures):
            fixed = {name: scaled.schedule_or_value(name) for name in recipe.values}
            plain = build(recipe, fixed, scaled.clock())
        stand_ins = {n: 1 if recipe.roles[n].name == "period" else 0.5 for n in recipe.values}
        return cls(
            recipe=recipe,
            scaled=scaled,
            batch_size=batch_size,
            base_batch_size=base_batch_size,
            given_noise=given_noise,
            noise_decay=_noise_decay(noise_decay, recipe),
            floor=floor,
            second_moment=second_moment,
            invariant=invariant,
            moment_decay=moment_decay,
            centering_decay=centering_decay,
            moment_eps=next(iter(added.get(second_moment, ())), ""),
            block_clip=next((n for n in block_clips if scaled.k_of(n) is not None), ""),
            metric=(recipe.family.metric if recipe.family is not None else None) or "plain",
            steps=any(role.name == "learning_rate" for role in recipe.roles.values()),
            clips=bool(scaled.with_role("gradient_norm")),
            guarded=guarded,
            measures_q=measures_q,
            measures_phi=measures_phi,
            plain=plain,
            unscaled=build(
                recipe, {n: stand_ins[n] for n, v in recipe.values.items() if not is_number(v)}
            ),
        )


def build(
    recipe: Recipe, values: Mapping[str, Any], clock: Mapping[str, Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Build the optimizer of a recipe.

    Args:
        recipe: the recipe.
        values: name -> value in force, in place of the recipe's; numbers, traced scalars or
            schedules. A number in place of a schedule is wrapped as a constant schedule, so that
            the state keeps its structure.
        clock: from ``Scaled.clock``; with it the clocked factory is built.

    Returns:
        The transformation.
    """
    arguments = {**recipe.arguments, **values}
    for name in recipe.schedules:
        if not callable(arguments[name]):
            arguments[name] = lambda _, value=arguments[name]: value
    if clock and recipe.optimizer.clocked is not None:
        return optax.with_extra_args_support(recipe.optimizer.clocked(**arguments, **clock))
    return optax.with_extra_args_support(recipe.optimizer.factory(**arguments))


def _transformation(setup: _Setup) -> optax.GradientTransformationExtraArgs:
    """Return the transformation of a setup.

    An update is static where all numbers are known before: plain optax's, with numbers scaled
    beforehand. Otherwise it is traced, and scales while training: a batch size that is given,
    values that are arrays, noise that is measured.
    """
    recipe, rule, base_batch_size = setup.recipe, setup.scaled.rule, setup.base_batch_size
    middle = rule.reads_middle
    in_force = InForce.named((*recipe.values, *(GUARD_NAMES if setup.guarded else ())))

    def init(params: PyTree) -> ScaleByBatchState:
        static = setup.plain is not None
        # Each has arrays of its own: a state whose arrays are shared cannot be donated.
        state = ScaleByBatchState(
            clock=ExampleClock.at(0, base_batch_size),
            batch_size=jnp.asarray(setup.batch_size, jnp.int32),
            in_force=InForce.of({}),
            noise=noise.init_noise_scale() if setup.steps or setup.measures_q else (),
            limit=noise.init_noise_scale() if setup.steps else (),
            variance=(),
            inner_state=(),
        )
        scaled, values, _, shown = scaled_now(state, setup.batch_size, static=static)
        for caution in rounded_away(recipe.roles, values if static else {}, params):
            warnings.warn(caution, ScalingWarning, stacklevel=2)
        inner_state = (setup.plain or build(recipe, values, scaled.clock())).init(params)
        state = state._replace(in_force=shown, inner_state=inner_state)
        restates = setup.invariant and not static and not setup.scaled.is_identity
        _check_state(state, recipe, base_batch_size, static=static, restates=restates)
        variance = moments.init_variance(inner_state, scaled, params) if setup.invariant else ()
        return state._replace(variance=variance)

    def update(
        updates: PyTree,
        state: ScaleByBatchState,
        params: PyTree = None,
        *,
        batch_size: Any = None,
        microbatch: MicrobatchStats | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByBatchState]:
        # 1. The batch: k base sizes.
        changing = batch_size is not None
        size = given_batch_size(batch_size, base_batch_size) if changing else setup.batch_size
        k, plain = size / base_batch_size, None if changing else setup.plain
        as_it_is = not changing and setup.scaled.is_identity and microbatch is None
        restates = changing and rule.time_constants
        restates |= setup.invariant and plain is None and not as_it_is
        _check_state(state, recipe, base_batch_size, static=plain is not None, restates=restates)

        # 2. What its parts say about the noise.
        state = with_statistics(state, updates, size, microbatch)

        # 3. How far steps may grow, and 4. the hyperparameters at this k.
        scaled, values, phi, shown = scaled_now(state, size, static=plain is not None)
        if changing and is_number(size):
            check_decays(scaled)
        clock = state.clock.advance(size, base_batch_size)

        # 5. The optimizer's own update with these numbers.
        if plain is not None:
            new_updates, inner_state = plain.update(
                updates, state.inner_state, params, **extra_args
            )
            return new_updates, state._replace(clock=clock, in_force=shown, inner_state=inner_state)
        inner_state, count, variance = state.inner_state, None, state.variance
        if changing:  # its moments and its count are told in the last batch size
            last_k = state.batch_size / base_batch_size
            last = dataclasses.replace(scaled, k=last_k, share=step_share(last_k, phi))
            inner_state = moments.carry(inner_state, last, scaled)
            if rule.time_constants and setup.second_moment != "layer":
                count = state.clock.updates(k, base_batch_size)
        # At the base size the optimizer's own square serves, unless its count is a fraction.
        at_base = scaled.is_identity and microbatch is None and count is None
        invariant, used = setup.invariant and not at_base, dict(values)
        if invariant and setup.moment_decay:
            used[setup.moment_decay] = larger(values[setup.moment_decay], SMALLEST_DECAY)
        own_clock = scaled.clock()
        if invariant:
            if microbatch is None and not scaled.is_identity:
                raise missing_noise(recipe, rule, by_coordinate=True)
            square = noise.base_square(updates, microbatch, k)
            if setup.block_clip and microbatch is not None:
                used[setup.block_clip] = scaled.values[setup.block_clip]
                clip_k = cast(Scalar, scaled.k_of(setup.block_clip))
                shares = moments.block_shares(inner_state, variance, square, clip_k)
                own_clock["block_shares"] = shares
        optimizer = build(recipe, used, own_clock)
        # optax's clips select between what is clipped and a product with the threshold, which is
        # float32 here where a Python float would have taken the gradient's type.
        seen = _widened(updates) if setup.clips else updates
        step: moments.Step = lambda inner: optimizer.update(seen, inner, params, **extra_args)  # noqa: E731
        if count is not None:
            step = moments.at_count(step, count, known=scaled.known)
        if not invariant:
            new_updates, inner_state = step(inner_state)
        else:
            decay, centering = used.get(setup.moment_decay), None
            eps = used.get(setup.moment_eps, 0.0)
            if setup.centering_decay:
                name = setup.centering_decay
                centering = moments.Centering(used[name], scaled.values[name], k)
                eps = eps / (1 - used[setup.moment_decay])
            moment = moments.BaseMoment(
                kind=setup.second_moment,
                decay=_growing_decay(used, own_clock, count) if decay is None else decay,
                k=k,
                square=square,
                floor=setup.floor,
                eps=eps,
                share=scaled.share if scaled.guards_moment else 1.0,
                power=rule.guard_power,
                known=scaled.known,
                centering=centering,
            )
            new_updates, inner_state, variance = moments.update_with_base_moment(
                step, inner_state, updates, variance, moment
            )

        # 6. The state after it, in its own dtypes, and the updates in those of optax's own: float32
        # hyperparameters would otherwise widen them where they are bfloat16.
        new_state = state._replace(
            clock=clock,
            batch_size=jnp.asarray(size, jnp.int32),
            in_force=shown,
            variance=variance,
            inner_state=inner_state,
        )
        like = jax.eval_shape(
            lambda u, s, p: setup.unscaled.update(u, s, p, **extra_args)[0],
            updates,
            state.inner_state,
            params,
        )
        return jax.tree.map(
            lambda x, y: jnp.asarray(x, jnp.result_type(y)), (new_updates, new_state), (like, state)
        )

    def with_statistics(
        state: ScaleByBatchState, updates: PyTree, size: Any, microbatch: MicrobatchStats | None
    ) -> ScaleByBatchState:
        """Return the state with this update's statistics taken into the noise scales."""
        k = size / base_batch_size
        if microbatch is None:
            changes = not dataclasses.replace(setup.scaled, k=k).is_identity
            grows = not (is_number(k) and k <= 1)
            if (setup.measures_q and changes) or (setup.measures_phi and grows):
                raise missing_noise(recipe, rule, by_coordinate=setup.invariant)
            return state
        noise.check_microbatch(microbatch, updates)
        if setup.clips and not setup.steps and rule.measures and microbatch.mean is None:
            # By itself the clip is right; what stands behind it is not seen from here.
            warnings.warn(
                f"microbatch.mean is None, and {recipe.optimizer.name} rescales the gradient, so an"
                " optimizer behind it would compare the clipped gradient with statistics of the"
                " raw one: give the mean gradient before clipping, microbatch._replace(mean=grads);"
                " value_grad_and_stats and GradientAccumulator keep it",
                ScalingWarning,
                stacklevel=3,
            )
        running, in_metric, found = state.noise, state.limit, None
        if isinstance(running, NoiseScaleState):
            decay = setup.noise_decay**k
            if setup.second_moment == "sum":
                # What the optimizer sums without end is compared with a noise averaged likewise.
                done = state.clock.updates(k, base_batch_size)
                decay = done / (done + 1)
            found = noise.sample(updates, microbatch, batch_size=size)
            running = noise.average(running, found, decay=decay)
        if isinstance(in_metric, NoiseScaleState):
            if found is None or setup.metric != "plain":
                found = noise.sample(updates, microbatch, batch_size=size, metric=setup.metric)
            decay = larger(GUARD_DECAY**k, SMALLEST_GUARD_DECAY)
            in_metric = noise.average(in_metric, found, decay=decay)
        return state._replace(noise=running, limit=in_metric)

    def scaled_now(
        state: ScaleByBatchState, size: Any, *, static: bool
    ) -> tuple[Scaled, dict[str, Any], Scalar | None, InForce]:
        """Return what is in force now: the recipe, its values, phi, and what the state shows."""
        k = size / base_batch_size
        read = functools.partial(
            state.clock.read,
            batch_size=size,
            base_batch_size=base_batch_size,
            middle=middle,
        )
        # 3. The noise as it is known or measured, and the share of k that it lets steps grow by.
        found, phi = setup.given_noise, None
        if callable(found):
            found = Noise.from_scale(read(found), base_batch_size)
        if found is not None:
            phi = found.phi if setup.guarded else None
        elif not static:
            found = _measured(state.noise, base_batch_size) if setup.measures_q else None
            if setup.measures_phi:
                low = noise.estimate(cast(NoiseScaleState, state.limit), GUARD_ERRORS).low
                phi = low / base_batch_size
        share = step_share(k, phi)
        # 4. The values tuned at the base size; schedules are read on the clock of its updates.
        base = {n: read(v) if callable(v) else v for n, v in recipe.values.items()}
        scaled = dataclasses.replace(setup.scaled, values=base, k=k, noise=found, share=share)
        values = {name: scaled.value(name) for name in recipe.values}
        limit = (0.0 if phi is None else phi) * base_batch_size
        shown = (*values.values(), *((share, limit) if setup.guarded else ()))
        return scaled, values, phi, in_force(tuple(jnp.asarray(x, jnp.float32) for x in shown))

    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, update))


# What applies some updates and leaves the others out.
_LEAVES_OUT = (
    optax.MultiStepsState,
    optax.ApplyIfFiniteState,
    optax.ConditionallyTransformState,
    optax.ConditionallyMaskState,
)


def _check_state(
    state: Any, recipe: Recipe, base_batch_size: int, *, static: bool, restates: bool
) -> None:
    """Raise a ``UserError`` for a state that an update of this transformation would misread.

    One that is not its own, one that counts other base-size updates, one whose own values would
    overrule those that are traced, and one that leaves updates out of moments that are restated.
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
    leaves_out = lambda x: isinstance(x, _LEAVES_OUT)  # noqa: E731
    leaves = jax.tree.leaves(state.inner_state, is_leaf=leaves_out) if restates else []
    for found in filter(leaves_out, leaves):
        raise UserError(
            f"{name}: a {type(found).__name__} inside scale_by_batch leaves out updates whose"
            " moments are restated all the same; put that wrapper outside, around"
            " bs_jax.scale_by_batch(...)(...); micro-batches of one update are gathered by"
            " bs_jax.value_grad_and_stats or GradientAccumulator"
        )


def _at_start(given: GivenNoise) -> Noise | None:
    """Return the noise that is known before training; of a schedule, one that stands for it."""
    return Noise(1.0, 1.0) if callable(given) else given


def _noise_decay(given: float | None, recipe: Recipe) -> Scalar:
    """Return the decay per base-size update of the noise that q is made of.

    It stands beside the second moment, so it averages over as many examples; a schedule has no one
    number of them.
    """
    if given is not None:
        return given
    decays = [n for n, role in recipe.roles.items() if role.name == "second_moment_decay"]
    found = [recipe.values[n] for n in decays if n in recipe.values]
    return found[0] if found and not callable(found[0]) else noise.DECAY


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


def _growing_decay(
    values: Mapping[str, Any], clock: Mapping[str, Scalar], count: Scalar | None
) -> Callable[[Any], Scalar] | float:
    """Return Adafactor's decay as a function of its own count; 1 where there is no decay."""
    if "decay_rate" not in values:
        return 1.0
    rate, offset, k = values["decay_rate"], values["decay_offset"], clock.get("k", 1.0)
    return lambda done: adafactor_decay(done if count is None else count, rate, offset, k)


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
