"""How much memory a training program takes, and so how many runs fit side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend

# Of the memory that is free. Compiled for an H200, groups of runs hold 1.2 times the estimate
# (`benchmarks.compiled --runs`); a TPU pads short axes, and allocators leave gaps.
_SHARE = 0.4


def runs_at_once(bytes_per_run: int, shared_bytes: int, budget_bytes: int, wanted: int) -> int:
    """How many runs to advance in one program: as many as fit, in groups of about equal size.

    Equal groups, since a group of another size is another program to compile.

    Args:
        bytes_per_run: of one run's state, batch and intermediate values.
        shared_bytes: of what all runs use together: the data.
        budget_bytes: of the device.
        wanted: runs that there are.

    Returns:
        At least 1, at most `wanted`.

    >>> runs_at_once(bytes_per_run=10, shared_bytes=0, budget_bytes=150, wanted=16)
    6
    >>> runs_at_once(bytes_per_run=10, shared_bytes=0, budget_bytes=10_000, wanted=16)
    16
    """
    fitting = max(1, int(_SHARE * (budget_bytes - shared_bytes) / max(1, bytes_per_run)))
    groups = -(-wanted // fitting)
    return -(-wanted // groups) if groups else 1


def peak_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Memory that one call takes at its height, if every operation writes its result.

    Traces, but neither compiles nor runs. A compiler that fuses operations or reuses buffers needs
    less; one that copies between layouts, a little more.

    Args:
        function: of arrays.
        arguments: arrays, or their shapes as `jax.ShapeDtypeStruct`; pytrees of them.

    >>> import jax.numpy as jnp
    >>> peak_bytes(lambda x: jnp.sum(jnp.exp(x) + 1.0), jnp.zeros(1000))  # exp(x) beside x
    8000
    """
    if hasattr(function, "trace"):  # jitted: its compiler options forbid another trace around it
        return _peak(function.trace(*arguments).jaxpr.jaxpr)  # pyright: ignore[reportFunctionMemberAccess]
    return _peak(jax.make_jaxpr(function)(*arguments).jaxpr)


def _peak(jaxpr: Any, held: int = 0) -> int:
    """The peak of one jaxpr; of its arguments the first `held` stay to its end."""
    last_use = {
        variable: number
        for number, equation in enumerate(jaxpr.eqns)
        for variable in equation.invars
        if not isinstance(variable, jax.extend.core.Literal)
    }
    last_use |= {
        variable: len(jaxpr.eqns)
        for variable in (*jaxpr.outvars, *jaxpr.invars[:held])
        if not isinstance(variable, jax.extend.core.Literal)
    }
    live = sum(_bytes(variable) for variable in {*jaxpr.invars, *jaxpr.constvars})
    dying: dict[int, set[Any]] = {}
    for variable, number in last_use.items():
        dying.setdefault(number, set()).add(variable)
    peak = live
    for number, equation in enumerate(jaxpr.eqns):
        parts = _parts(equation)
        within = max((_peak(part, held) - _outer_bytes(part) for part, held in parts), default=0)
        live += sum(_bytes(variable) for variable in equation.outvars)
        peak = max(peak, live + within)
        live -= sum(_bytes(variable) for variable in dying.get(number, ()))
        live -= sum(_bytes(v) for v in equation.outvars if v not in last_use)
    return peak


def _outer_bytes(jaxpr: Any) -> int:
    """What a part's caller has counted already: its arguments and results."""
    return sum(_bytes(variable) for variable in (*jaxpr.invars, *jaxpr.outvars))


# What every round of a loop reads is there until the last: parameters with their numbers.
_READ_BY_ROUNDS = {
    "jaxpr": "num_consts",
    "body_jaxpr": "body_nconsts",
    "cond_jaxpr": "cond_nconsts",
}


def _parts(equation: Any) -> list[tuple[Any, int]]:
    """The jaxprs within an equation, each with how many of its arguments stay to its end."""
    found = []
    for name, value in equation.params.items():
        held = equation.params.get(_READ_BY_ROUNDS.get(name), 0)
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)  # a closed one holds an open one
            if hasattr(part, "eqns"):
                found.append((part, held))
    return found


def _bytes(variable: Any) -> int:
    shape = getattr(variable.aval, "shape", ())
    itemsize = getattr(getattr(variable.aval, "dtype", None), "itemsize", 0)
    return math.prod(shape) * itemsize
