"""What an optimizer's state holds: the only file that knows in which fields optax keeps moments.

A step is an optimizer's own update with all but its state given: ``state -> (updates, state)``.
``at_count`` and ``update_with_base_moment`` show the optimizer another count, or another second
moment, than its state holds.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bs_jax.errors import UserError
from bs_jax.scaling.clocked import SMALLEST_DECAY
from bs_jax.scaling.hyperparameters import Scaled, ScalingWarning, is_number, larger
from bs_jax.scaling.noise import abs_square, tree_map
from bs_jax.scaling.rules import Family, PyTree, Scalar

State: TypeAlias = Any
Step: TypeAlias = Callable[[State], tuple[PyTree, State]]

# Smallest share of the averaged noise variance that the second moment may fall to. The estimate of
# its signal part is unbiased, so it can be negative, while the true one cannot: all of the variance
# would be right on average, somewhat less also undoes that 1/sqrt of a noisy number is too large.
# Chosen by the study in docs/notes/variance-floor.md.
VARIANCE_FLOOR = 0.7
# Smallest share of the step's own squared gradient, far below anything a second moment reaches; it
# keeps rounding from making the optimizer's own sum negative.
_ROUNDING_FLOOR = 1e-5

# The fields that hold moments of the gradient, by the class of the state. Classes go by name:
# optax does not export all of them.
_KNOWN: dict[str, tuple[str, ...]] = {
    "ScaleByAdamState": ("mu", "nu"),
    "ScaleByAmsgradState": ("mu", "nu", "nu_max"),
    "ScaleByBeliefState": ("mu", "nu"),
    "ScaleByNovogradState": ("mu", "nu"),
    "ScaleByRmsState": ("nu",),
    "ScaleByRmsWithCountState": ("nu",),
    "ScaleByRStdDevState": ("mu", "nu"),
    "ScaleByRStdDevWithCountState": ("mu", "nu"),
    "ScaleByRssState": ("sum_of_squares",),
    "FactoredState": ("v_row", "v_col", "v"),
    "ScaleByLionState": ("mu",),
    "MuonState": ("mu",),
    "TraceState": ("trace",),
    "EmaState": ("ema",),
}
# Of a user's own optimizer a state counts as one that holds moments by the names of its fields.
_MOMENTS = ("mu", "nu", "nu_max", "ema", "trace", "sum_of_squares")
# States with arrays that are no moments: they stay the same over a change of the batch size.
_NO_MOMENTS = ("ScheduleFreeState", "SlowWeightsState", "LookaheadState", "AddNoiseState")

# Reduces a squared gradient to what a leaf of the field adds up: (square, leaf) -> addend.
_Reduce: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def _mean_over(axis_from_end: int) -> _Reduce:
    # optax factors the two largest dimensions: rows average over the largest, columns over the
    # second largest. A leaf too small to be factored has placeholders of one entry instead.
    def reduce(square: jax.Array, leaf: jax.Array) -> jax.Array:
        if leaf.shape == (1,):
            return jnp.zeros_like(leaf, jnp.float32)
        axis = int(np.argsort(square.shape)[-axis_from_end])
        return jnp.mean(square, axis=axis)

    return reduce


def _unfactored(square: jax.Array, leaf: jax.Array) -> jax.Array:
    return square if leaf.shape == square.shape else jnp.zeros_like(leaf, jnp.float32)


# By the family's second moment: the fields that hold it, and what each adds up.
_SECOND: dict[str, dict[str, _Reduce]] = {
    "ema": {"nu": lambda square, leaf: square},
    "sum": {"sum_of_squares": lambda square, leaf: square},
    "layer": {"nu": lambda square, leaf: jnp.sum(square)},
    "factored": {"v_row": _mean_over(1), "v_col": _mean_over(2), "v": _unfactored},
    "centered": {"nu": lambda square, leaf: square},
    "centered_raw": {"nu": lambda square, leaf: square},
}


def _fields(node: object) -> tuple[str, ...]:
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return tuple(field.name for field in dataclasses.fields(node))
    return getattr(node, "_fields", ()) if isinstance(node, tuple) else ()


def _moments_of(node: object, known: bool) -> tuple[str, ...]:
    """Return the names of the fields that hold moments; none for anything but a state of them.

    Names decide in a user's own optimizer alone: parameters may have fields called "mu" too.
    """
    if type(node).__module__.partition(".")[0] == "optax":
        return _KNOWN.get(type(node).__name__, ())
    named = not known and (isinstance(node, tuple) or dataclasses.is_dataclass(node))
    return tuple(name for name in _MOMENTS if hasattr(node, name)) if named else ()


def _states(state: State, known: bool) -> list[Any]:
    """Return the states with moments inside a state."""
    leaves = jax.tree.leaves(state, is_leaf=lambda node: bool(_moments_of(node, known)))
    return [leaf for leaf in leaves if _moments_of(leaf, known)]


def _replace(node: Any, changes: Mapping[str, Any]) -> Any:
    if isinstance(node, tuple):
        return node._replace(**changes)  # pyright: ignore[reportAttributeAccessIssue]
    return dataclasses.replace(node, **changes)


def _described(state: State) -> str:
    """Return the classes and fields in a state, for messages."""
    found = dict.fromkeys(
        f"{type(node).__name__}({', '.join(_fields(node))})" for node in _nodes(state)
    )
    return ", ".join(found) or f"a {type(state).__name__} without named fields"


def _nodes(state: State) -> Iterator[Any]:
    """Walk through the named states in a user's own state, down to those that hold moments."""
    if _fields(state):
        yield state
        if not _moments_of(state, known=False):
            for name in _fields(state):
                yield from _nodes(getattr(state, name))
    elif isinstance(state, (tuple, list)):
        for item in state:
            yield from _nodes(item)
    elif isinstance(state, dict):
        for item in state.values():
            yield from _nodes(item)


def init_variance(state: State, scaled: Scaled, params: PyTree) -> tuple[PyTree, ...]:
    """Return zeros for the averaged noise part of every second moment in an optimizer's state.

    Args:
        state: the optimizer's.
        scaled: the recipe under a rule that makes the second moment invariant.
        params: the parameters.

    Returns:
        A tree for each field that holds a second moment.

    Raises:
        UserError: if the state holds no second moment, or none that is a tree like the parameters;
            names the state's fields.
    """
    family = scaled.family
    kind = family.second_moment if family is not None else "none"
    first, known = next(iter(_SECOND[kind])), scaled.known
    nodes = [n for n in _states(state, known) if first in _moments_of(n, known)]
    if not nodes:
        raise UserError(
            f"rule {scaled.rule.name!r} makes the second moment of {scaled.optimizer} that of the"
            f" base batch size, but its state has none: found {_described(state)}; name the field"
            f" {first!r} if it keeps one as optax's optimizers of that family do, give the family"
            " that fits, or use rule='noise_aware'"
        )
    # Lookahead's fast parameters alone have gradients.
    params = params.fast if isinstance(params, optax.LookaheadParams) else params
    if not all(_is_like(getattr(node, first), params) for node in nodes):
        raise UserError(
            f"rule {scaled.rule.name!r} restates the second moment of {scaled.optimizer} leaf by"
            f" leaf, but its {first!r} is no tree like the parameters: leave out what reshapes them"
            " inside (optax.flatten, split_real_and_imaginary), or use rule='noise_aware'"
        )
    if kind == "layer" and any("count" not in _fields(node) for node in nodes):
        raise UserError(
            f"the second moment of {scaled.optimizer} starts as its first gradient's, which needs a"
            f" field 'count' beside it: found {_described(state)}; add it, or use"
            " rule='noise_aware'"
        )
    return tuple(jax.tree.map(jnp.zeros_like, getattr(n, f)) for n in nodes for f in _SECOND[kind])


def _is_like(moment: PyTree, params: PyTree) -> bool:
    """Whether a moment has a leaf for each parameter that is not masked."""
    try:
        found = tree_map(lambda _, p: jax.tree_util.all_leaves([p]), moment, params)
    except (ValueError, TypeError):
        return False
    return all(jax.tree.leaves(found))


def carry(state: State, old: Scaled, new: Scaled) -> State:
    r"""Restate an optimizer's moments for another batch size.

    A gradient average keeps its value. A second moment is multiplied by (d'/d)^2, where d is the
    rule's factor on what the optimizer divides by. A sum of gradients taken with decay m is
    multiplied by (1 - m)/(1 - m'); one taken after the learning rate holds steps, which grow with
    F'd/(F d').

    Args:
        state: the optimizer's.
        old: the recipe at the batch size of the last update.
        new: the recipe now.

    Returns:
        The state, restated; unchanged if both sizes are the same.

    Raises:
        UserError: if the state does not hold a moment that has to be restated.

    Warns:
        ScalingWarning: if the state holds arrays, or a count, of which nothing is known.
    """
    family = new.family
    if not new.rule.time_constants:
        return state
    for caution in [] if new.known else _cautions(state):
        warnings.warn(f"{new.optimizer}: {caution}", ScalingWarning, stacklevel=2)
    if family is None:
        if _states(state, new.known):
            raise UserError(
                f"the batch size changes, and how the moments of {new.optimizer} follow depends on"
                " its family: pass family= (e.g. family='adam'), or keep the batch size constant"
            )
        return state
    _check_carried(state, new, family)
    root = new.denominator_factor(new.k) / old.denominator_factor(old.k)
    filtered: Scalar = 1.0
    for name in new.with_role("undamped_momentum"):
        filtered = filtered * (1 - old.value(name)) / (1 - new.value(name))
    step = (new.lr_factor(new.k) / old.lr_factor(old.k)) / root
    second = root if family.second_moment == "max" else root**2
    factors: dict[str, Scalar] = {
        "mu": filtered / root if family.second_moment == "layer" else 1.0,
        "trace": step if family.trace_after_lr else filtered,
        "ema": step if family.trace_after_lr else 1.0,
    }

    def spread(nu: jax.Array, mu: jax.Array) -> jax.Array:
        # Of a raw second moment only the spread about the average changes with the batch size.
        return jnp.square(mu) + second * (nu - jnp.square(mu))

    def restate(node: Any) -> Any:
        changes: dict[str, PyTree] = {}
        for name in _moments_of(node, new.known):
            factor = factors.get(name, second)
            if name == "nu" and family.second_moment == "centered_raw":
                changes[name] = tree_map(spread, node.nu, node.mu)
            else:
                changes[name] = tree_map(lambda x, f=factor: x * f, getattr(node, name))
        return _replace(node, changes) if changes else node

    return jax.tree.map(restate, state, is_leaf=lambda node: bool(_moments_of(node, new.known)))


def _check_carried(state: State, scaled: Scaled, family: Family) -> None:
    """Raise a ``UserError`` unless the state holds what this recipe has to restate."""
    states = _states(state, scaled.known)
    held = {name for node in states for name in _moments_of(node, scaled.known)}
    wanted: list[tuple[str, set[str]]] = []
    if family.second_moment != "none":
        wanted.append(("second moment", {"nu", "sum_of_squares", "v_row"}))
    momenta = [scaled.values[name] for name in scaled.with_role("undamped_momentum")]
    if any(not is_number(m) or m != 0 for m in momenta):
        wanted.append(("momentum", {"mu" if family.second_moment == "layer" else "trace"}))
    for moment, names in wanted:
        if not held & names:
            raise UserError(
                f"the batch size changes, and the {moment} of {scaled.optimizer} has to follow, but"
                f" its state has none: found {_described(state)}; name the field"
                f" {' or '.join(map(repr, sorted(names)))}, or keep the batch size constant"
            )


def _cautions(state: State) -> list[str]:
    """Return a sentence for each state with something that may have to follow the batch size."""
    found: list[str] = []
    for node in _nodes(state):
        own = {name: getattr(node, name) for name in _fields(node)}
        shown = f"{type(node).__name__}({', '.join(own)})"
        if _moments_of(node, known=False):
            if "count" not in own and any(map(_is_count, own.values())):
                found.append(
                    f"its state {shown} has no field 'count'; if one of them counts updates for a"
                    " bias correction, call it so: it has to follow the batch size"
                )
        elif type(node).__name__ not in _NO_MOMENTS and any(map(_has_arrays, own.values())):
            found.append(
                f"nothing is known of its state {shown}, which stays as it is while the batch size"
                f" changes; call fields that hold moments by optax's names ({', '.join(_MOMENTS)})"
            )
    return found


def _is_count(x: Any) -> bool:
    return jnp.issubdtype(getattr(x, "dtype", bool), jnp.integer) and jnp.ndim(x) == 0


def _has_arrays(x: Any) -> bool:
    """Whether a field is a tree of floating arrays, with no state inside."""
    leaves = [] if any(True for _ in _nodes(x)) else jax.tree.leaves(x)
    return any(jnp.ndim(y) and jnp.issubdtype(jnp.result_type(y), jnp.inexact) for y in leaves)


def at_count(step: Step, count: Scalar, *, known: bool = False) -> Step:
    r"""Let bias corrections see ``count`` in place of the number of updates.

    The decays used so far multiply up to ``decay^(examples/B0)``, which a single count and the
    decay in force express as ``(decay^k)^(examples/B)``: so the count is examples/B, a fraction.
    Exact where all decays are scaled by the same k.

    Args:
        step: the optimizer's own update.
        count: updates of the present size that the examples seen so far amount to.
        known: whether the optimizer is in the table (see ``Scaled``).

    Returns:
        The step; in the state that it returns, counts are updates done.
    """
    shown = jnp.asarray(count, jnp.float32)

    def is_counted(node: object) -> bool:
        return bool(_moments_of(node, known)) and "count" in _fields(node)

    def show(node: Any) -> Any:
        return _replace(node, {"count": shown}) if is_counted(node) else node

    def restore(new: Any, old: Any) -> Any:
        if not is_counted(new):
            return new
        return _replace(new, {"count": optax.safe_increment(old.count)})

    def run(state: State) -> tuple[PyTree, State]:
        leaves, treedef = jax.tree.flatten(state, is_leaf=is_counted)
        updates, new_state = step(treedef.unflatten([show(leaf) for leaf in leaves]))
        new_leaves, new_treedef = jax.tree.flatten(new_state, is_leaf=is_counted)
        restored = [restore(new, old) for new, old in zip(new_leaves, leaves, strict=True)]
        return updates, new_treedef.unflatten(restored)

    return run


@dataclasses.dataclass(frozen=True)
class Centering:
    r"""The average m of the gradient about which an optimizer takes its second moment.

    AdaBelief adds ``(g - m)^2`` with an m that holds g already, ``m = b m' + (1 - b) g``. So it
    adds ``b^2 (g - m')^2``: of the noise ``2 b^2/(1 + b)`` of a batch's, and of the signal the lag
    of m'. Behind a gradient that moves by a constant amount an example, m' lags by
    ``k/(1 - b)`` base-size updates. Both parts are restated for the base's decay b0.

    Attributes:
        decay: b, in force.
        base_decay: b0.
        k: batch size over base batch size.
    """

    decay: Scalar
    base_decay: Scalar
    k: Scalar

    @property
    def lag(self) -> Scalar:
        """By what the base's error, that of the signal, exceeds g - m'."""
        return self.base_decay * (1 - self.decay) / ((1 - self.base_decay) * self.k)

    @property
    def base_noise(self) -> Scalar:
        """The share of a base batch's noise that the base's squared error shows."""
        return 2 * self.base_decay**2 / (1 + self.base_decay)

    @property
    def gains(self) -> tuple[Scalar, Scalar]:
        """How k times the batch's own signal and noise part exceed the base's."""
        # Where b0 is 0 the average is the gradient, and there is no error to divide by: then b is
        # 0 as well, and so are both.
        base = dataclasses.replace(self, base_decay=larger(self.base_decay, SMALLEST_DECAY))
        noise = 2 * self.decay**2 / (1 + self.decay)
        return self.k * (self.decay / base.lag) ** 2, noise / base.base_noise

    def squared_mean(self, grad: jax.Array, mean: jax.Array) -> jax.Array:
        """Return the square of the average that holds the gradient."""
        return abs_square(self.decay * mean + (1 - self.decay) * grad)

    def squares(self, grad: jax.Array, mean: jax.Array, noise: jax.Array) -> Any:
        """Return the squared error that the optimizer adds, the base's, and its noise part."""
        square = abs_square(grad - mean)
        shown = square - 2 / (1 + self.decay) * noise / self.k
        shown = jnp.where(jnp.isposinf(noise), noise, shown)
        wide = self.base_noise * noise
        return self.decay**2 * square, self.lag**2 * shown + wide, wide


@dataclasses.dataclass(frozen=True)
class BaseMoment:
    """A second moment as the base batch size would show it: what one update adds to it.

    Attributes:
        kind: how the optimizer keeps its second moment (see ``Family``).
        decay: in force, or a function of the optimizer's count (unused for ``"sum"``).
        k: batch size over base batch size.
        square: v0 and its noise part, from ``noise.base_square``.
        floor: smallest share of the averaged noise part.
        eps: what the optimizer adds to each squared gradient.
        share: of k, by which every step may grow (see ``noise.step_share``).
        power: a: steps of coordinates whose signal dominates grow by k**a at least.
        known: whether the optimizer is in the table, so that it squares the gradients as given;
            what a user's own squares (behind clipping, say) is found by a trial update.
        centering: of the centered kinds.
    """

    kind: str
    decay: Any
    k: Scalar
    square: tuple[PyTree, PyTree]
    floor: float = VARIANCE_FLOOR
    eps: Scalar = 0.0
    share: Scalar = 1.0
    power: float = 0.5
    known: bool = False
    centering: Centering | None = None

    def guarded(self, target: jax.Array, mean: jax.Array, wide: jax.Array) -> jax.Array:
        r"""Return the second moment that a step is divided by, larger beyond the noise scale.

        ``k (nu' - W') + W'`` is k times the batch's own averaged square: divided by its root, a
        step of k times the base's rate is the square-root rule's. No coordinate needs more, and
        none gets less than ``share`` of its step.
        """
        if is_number(self.share) and self.share == 1:
            return target
        gains = self.k, 1.0
        if self.kind == "centered" and self.centering is not None:
            gains = self.centering.gains
        largest = jnp.maximum(target, gains[0] * (mean - wide) + gains[1] * wide)
        if self.power != 0.5:
            ratio = largest / jnp.where(target > 0, target, 1.0)
            largest = target * ratio ** (2 * (1 - self.power))
        return jnp.where(jnp.isposinf(target), target, jnp.minimum(largest, target / self.share**2))

    def weights(self, node: Any) -> tuple[Scalar, Scalar, Scalar, Scalar]:
        """Return the weights of v's last value and of v0, and those that the optimizer uses."""
        if self.kind == "sum":
            return 1.0, self.k, 1.0, 1.0
        keep: Scalar = self.decay(node.count) if callable(self.decay) else self.decay
        add = 1 - keep
        if self.kind == "layer":
            first = node.count == 0
            return jnp.where(first, 0.0, keep), jnp.where(first, 1.0, add), keep, add
        return keep, add, keep, add


def update_with_base_moment(
    step: Step, state: State, grads: PyTree, variance: tuple[PyTree, ...], moment: BaseMoment
) -> tuple[PyTree, State, tuple[PyTree, ...]]:
    r"""Run an optimizer's own update with the second moment of the base batch size.

    The optimizer computes ``decay * nu + (1 - decay) * g^2`` itself. It is handed the nu for which
    this comes out as ``max(nu', floor W')``, where nu' and W' are the moving averages of v0 and of
    its noise part (beyond the noise scale as ``BaseMoment.guarded`` says); afterwards nu' itself is
    put into the state. So every optimizer that keeps its second moment in this way is served, and
    the floor never accumulates. Per leaf: what the optimizer will add itself is ``own``; it is
    handed ``(target - own) / own_keep``, so that it computes ``target``; afterwards what is kept
    (nu') is written into the state.

    Args:
        step: the optimizer's own update.
        state: the optimizer's.
        grads: the gradients that it is given.
        variance: W, one tree for each second moment in the state.
        moment: how it keeps its second moment, and what is to be added.

    Returns:
        updates, the new state, the new W.
    """
    fields = _SECOND[moment.kind]
    first_field = next(iter(fields))

    holds = lambda node: first_field in _moments_of(node, moment.known)  # noqa: E731

    def leaf(
        reduce: _Reduce,
        weights: tuple[Scalar, Scalar, Scalar, Scalar],
        old: jax.Array,
        old_wide: jax.Array,
        v0: jax.Array,
        noise: jax.Array,
        square: jax.Array,
        center: jax.Array | float = 0.0,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return what the field is handed as, what is kept of it, and its new W."""
        keep, add, own_keep, own_add = weights
        # optax keeps the magnitude of complex numbers as complex.
        real, real_wide = (jnp.real(x).astype(jnp.float32) for x in (old, old_wide))
        mean = keep * real + add * reduce(v0 + moment.eps, old)
        wide = keep * real_wide + add * reduce(noise + moment.eps, old_wide)
        own = own_add * reduce(square + moment.eps, mean)
        spread = mean - center
        target = jnp.maximum(jnp.maximum(spread, moment.floor * wide), _ROUNDING_FLOOR * own)
        target = moment.guarded(target, spread, wide) + center
        # What overflowed stays infinite, so that the step is 0, as in plain optax.
        handed = jnp.where(jnp.isposinf(target), target, (target - own) / own_keep)
        # Float32 stays where the state is bfloat16, but gives way to float64 and complex states.
        dtype = jnp.promote_types(old.dtype, jnp.float32)
        return handed.astype(dtype), mean, wide

    given = tree_map(abs_square, grads)
    leaves, treedef = jax.tree.flatten(state, is_leaf=holds)
    held = [i for i, node in enumerate(leaves) if holds(node)]
    trial = None if moment.known else _trial(step, leaves, treedef, held, first_field)
    old_widths, widths = iter(variance), list[PyTree]()
    kept: dict[int, dict[str, Any]] = {i: {} for i in held}
    for i in held:
        node, own, square = leaves[i], given, moment.square
        weights, hand = moment.weights(node), dict[str, Any]()
        if trial is not None:
            own, square = _as_seen(trial[i], weights[3], given, moment.square)
        about: tuple[PyTree, ...] = ()
        if moment.centering is not None:
            if moment.kind == "centered":
                parts = tree_map(moment.centering.squares, grads, node.mu, square[1], outputs=3)
                own, square = parts[0], parts[1:]
            else:
                about = (tree_map(moment.centering.squared_mean, grads, node.mu),)
        for name, reduce in fields.items():
            trees = getattr(node, name), next(old_widths), *square, own, *about
            found = tree_map(functools.partial(leaf, reduce, weights), *trees, outputs=3)
            hand[name], kept[i][name], wide = found
            widths.append(wide)
        if moment.kind == "layer":
            # NovoGrad's first update takes the raw norm as it is; counted as a later one it
            # averages, and what it averages is ours.
            hand["count"] = jnp.maximum(node.count, 1)
            kept[i]["count"] = optax.safe_increment(node.count)
        leaves[i] = _replace(node, hand)
    updates, new_state = step(treedef.unflatten(leaves))
    leaves, treedef = jax.tree.flatten(new_state, is_leaf=holds)
    for i in held:
        leaves[i] = _replace(leaves[i], kept[i])
    return updates, treedef.unflatten(leaves), tuple(widths)


def block_shares(
    state: State, variance: tuple[PyTree, ...], square: tuple[PyTree, PyTree], k: Scalar
) -> PyTree:
    r"""Return by how much the normalised update of each leaf is smaller than the base's.

    Adafactor clips the root mean square of ``g/sqrt(v)`` over a leaf. With the invariant v that of
    a batch of k base sizes is ``sqrt(1 - (1 - 1/k) W/v)`` of the base's, W/v the mean over the
    leaf. Before the first update this update's own squares stand for v and W.

    Args:
        state: the optimizer's.
        variance: W, one tree for each second moment in the state.
        square: v0 and its noise part, from ``noise.base_square``.
        k: batch size over base batch size.

    Returns:
        A tree of scalars.
    """
    (node,) = [n for n in _states(state, known=True) if "v_row" in _moments_of(n, known=True)]

    def part_of(wide: jax.Array, whole: jax.Array) -> jax.Array:
        part = wide / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)
        return jnp.where(jnp.isposinf(wide), 1.0, part)

    def share(*of: jax.Array) -> jax.Array:
        row, v, row_wide, v_wide, v0, noise = (jnp.real(x).astype(jnp.float32) for x in of)
        known, wide = (v, v_wide) if v.shape == v0.shape else (row, row_wide)
        averaged, now = jnp.mean(part_of(wide, known)), part_of(jnp.sum(noise), jnp.sum(v0))
        part = jnp.clip(jnp.where(node.count > 0, averaged, now), 0.0, 1.0)
        return jnp.sqrt(1 - (1 - 1 / k) * part)

    row_wide, _, v_wide = variance
    return tree_map(share, node.v_row, node.v, row_wide, v_wide, *square)


def _trial(
    step: Step, leaves: list[Any], treedef: Any, held: list[int], field: str
) -> dict[int, PyTree]:
    """Return the second moments of the states in ``held`` after an update that starts from 0."""
    empty = list(leaves)
    for i in held:
        zeros = jax.tree.map(jnp.zeros_like, getattr(empty[i], field))
        empty[i] = _replace(empty[i], {field: zeros})
    parts = treedef.flatten_up_to(step(treedef.unflatten(empty))[1])
    return {i: getattr(parts[i], field) for i in held}


def _as_seen(
    seen: PyTree, added: Scalar, given: PyTree, square: tuple[PyTree, PyTree]
) -> tuple[PyTree, tuple[PyTree, PyTree]]:
    """Return the squares that the optimizer itself takes, and v0 scaled as the chain in front did.

    Leaf by leaf: a chain that clips or rescales changes v0 by the ratio of the summed squares.
    """

    def scaled(own: jax.Array, raw: jax.Array, v0: jax.Array, noise: jax.Array) -> Any:
        total = jnp.sum(raw)
        factor = jnp.sum(own) / jnp.where(total > 0, total, 1.0)
        known = jnp.isfinite(total) & jnp.isfinite(v0) & jnp.isfinite(noise)
        return jnp.where(known, v0 * factor, own), jnp.where(known, noise * factor, own)

    own = tree_map(lambda x: jnp.real(x).astype(jnp.float32) / added, seen)
    return own, tree_map(scaled, own, given, *square, outputs=2)
