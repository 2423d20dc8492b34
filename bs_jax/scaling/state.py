"""What a scale_by_batch transformation keeps, and how to read it."""

from __future__ import annotations

import collections
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from bs_jax.errors import UserError
from bs_jax.scaling import noise
from bs_jax.scaling.clock import ExampleClock
from bs_jax.scaling.noise import NoiseByGroupState, NoiseScale, NoiseScaleState
from bs_jax.scaling.rules import PyTree

_State = TypeVar("_State")


# What a guard adds to the hyperparameters in force.
GUARD_NAMES = ("guard", "noise_scale")


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
        names: of the factory's arguments; then ``GUARD_NAMES`` under a guard.
    """

    __slots__ = ()
    names: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def named(names: tuple[str, ...]) -> type[InForce]:
        """Return the type with these names; the same one for the same names."""
        return _in_force_type(names)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> InForce:
        """Return the values as float32 scalars."""
        numbers = tuple(jnp.asarray(value, jnp.float32) for value in values.values())
        return cls.named(tuple(values))(numbers)

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
