"""Optimizer states that an earlier version saved, made what this one goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bs_jax.errors import UserError
from bs_jax.scaling.clock import ExampleClock
from bs_jax.scaling.noise import NoiseScaleState
from bs_jax.scaling.rules import PyTree
from bs_jax.scaling.state import InForce, ScaleByBatchState

_LARGEST_INT32 = np.iinfo(np.int32).max


class FirstState(NamedTuple):
    """What a ``scale_by_batch`` state held in version 0.1.0, in its order.

    Attributes:
        examples: examples seen; an int32 scalar that stopped at its largest value.
        batch_size: examples in the last update.
        hyperparams: values in force in the last update, by name.
        noise: running noise scale; ``()`` where the rule needed none for q.
        variance: averaged noise part of each invariant second moment.
        inner_state: the optimizer's own state.
    """

    examples: Any
    batch_size: Any
    hyperparams: dict[str, Any]
    noise: Any
    variance: Any
    inner_state: Any


def first_structure(state: PyTree, *, noise: bool) -> PyTree:
    """Return a state in the structure of version 0.1.0: a template to read what it saved.

    Args:
        state: the state of today's transformation, or a tree that holds one.
        noise: whether a noise scale was kept, as under ``"noise_aware"``.

    Returns:
        The tree with a ``FirstState`` for every ``ScaleByBatchState``; values are placeholders.
    """

    def first(x: Any) -> Any:
        if not isinstance(x, ScaleByBatchState):
            return x
        values = {n: v for n, v in x.in_force.to_dict().items() if n not in _OF_THE_GUARD}
        kept = x.noise if noise else ()
        return FirstState(x.batch_size, x.batch_size, values, kept, x.variance, x.inner_state)

    return jax.tree.map(first, state, is_leaf=lambda x: isinstance(x, ScaleByBatchState))


_OF_THE_GUARD = ("guard", "noise_scale")


def upgrade_state(saved: PyTree, state: PyTree, *, examples: int | None = None) -> PyTree:
    """Return a saved optimizer state in the structure of today's transformation.

    What version 0.1.0 saved has an int32 count of examples in place of the clock, values in force
    by name, and often no noise scale. The noise scales that it lacks begin anew: until they are
    known a guarded rule takes steps of the base batch size.

    Args:
        saved: the state as it was saved, or a tree that holds it: tuples of the former structure,
            or the nested dicts and lists that Orbax gives without a template.
        state: of today's ``init`` for the same optimizer and parameters; gives structure, shapes
            and dtypes.
        examples: examples really seen; needed where the old count stopped at its largest value.

    Returns:
        A state like ``state``, with what was saved.

    Raises:
        UserError: for a state of another optimizer or other parameters, or a count that stopped.

    Example:
        >>> import optax, bs_jax
        >>> params = jnp.ones(3)
        >>> tx = bs_jax.scale_by_batch(optax.adam, batch_size=256, base_batch_size=64)(1e-3)
        >>> fresh = tx.init(params)
        >>> saved = first_structure(fresh, noise=False)._replace(examples=jnp.int32(2560))
        >>> int(upgrade_state(saved, fresh).examples)
        2560
    """
    return _upgraded(saved, state, (), examples)


def _upgraded(saved: Any, like: Any, path: tuple[str, ...], examples: int | None) -> Any:
    if isinstance(like, ScaleByBatchState):
        return _upgraded_scaled(saved, like, path, examples)
    children, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=lambda x: x is not like)
    if children and not children[0][0]:  # an array
        return _upgraded_array(saved, like, path)
    return treedef.unflatten(
        _upgraded(_child(saved, key[0], path), child, (*path, _name(key[0])), examples)
        for key, child in children
    )


def _upgraded_scaled(
    saved: Any, like: ScaleByBatchState, path: tuple[str, ...], examples: int | None
) -> ScaleByBatchState:
    def kept(name: str) -> Any:
        found = _child(saved, name, path, None)
        return () if found is None else found

    def running(name: str) -> Any:
        # What was not measured, and what is measured no more, is as in a fresh state.
        fresh, found = getattr(like, name), kept(name)
        measured = isinstance(fresh, NoiseScaleState) and found != ()
        return _upgraded(found, fresh, (*path, name), examples) if measured else fresh

    def part(name: str) -> Any:
        return _upgraded(kept(name), getattr(like, name), (*path, name), examples)

    if _child(saved, "clock", path, None) is not None:
        clock, values = part("clock"), part("in_force")
    else:
        seen = int(_upgraded_array(_child(saved, "examples", path), 0, (*path, "examples")))
        if seen == _LARGEST_INT32 and examples is None:
            raise UserError(
                f"{'.'.join((*path, 'examples'))} stopped at {seen:,}, its largest value: give the"
                " examples really seen, upgrade_state(..., examples=updates * batch_size)"
            )
        clock = ExampleClock.at(
            seen if examples is None else examples, int(like.clock.base_batch_size)
        )
        before = dict(_child(saved, "hyperparams", path, None) or {})
        values = InForce.of({n: before.get(n, v) for n, v in like.in_force.to_dict().items()})
    return ScaleByBatchState(
        clock=clock,
        batch_size=part("batch_size"),
        in_force=values,
        noise=running("noise"),
        limit=running("limit"),
        variance=part("variance"),
        inner_state=part("inner_state"),
    )


def _upgraded_array(saved: Any, like: Any, path: tuple[str, ...]) -> Any:
    shape = None if isinstance(saved, (Mapping, tuple, list)) else jnp.shape(saved)
    if shape != jnp.shape(like):
        found = "a tree" if shape is None else f"of shape {shape}"
        raise UserError(
            f"the saved state's {'.'.join(path) or 'only array'} is {found}, where the"
            f" optimizer's is of shape {jnp.shape(like)}: it belongs to another optimizer or"
            " other parameters"
        )
    return jnp.asarray(saved, jnp.result_type(like))


_REQUIRED = object()


def _name(key: Any) -> str:
    """Return the name of a child: of a field, a key, or an index."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _child(saved: Any, key: Any, path: tuple[str, ...], default: Any = _REQUIRED) -> Any:
    """Return the part of a saved tree that a field's name, a key or an index stands for."""
    name = _name(key)
    if hasattr(saved, "_asdict"):  # a tuple has methods as well as fields
        saved = saved._asdict()
    if isinstance(saved, Mapping):
        for candidate in (getattr(key, "key", name), name):
            if candidate in saved:
                return saved[candidate]
    elif isinstance(saved, Sequence):
        if name.isdigit() and int(name) < len(saved):
            return saved[int(name)]
    elif hasattr(saved, name):
        return getattr(saved, name)
    if default is _REQUIRED:
        raise UserError(
            f"the saved state has no {'.'.join((*path, name))}: it belongs to another optimizer or"
            " other parameters"
        )
    return default
