"""From a config and a sweep point to a run: overrides, scaled hyperparameters, a stable id."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bs_jax.recipe import Recipe
from bs_jax.run import ResolvedRun
from bs_jax.schema import unknown_field


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a sweep: the arm it belongs to, and what it changes in the config.

    Attributes:
        arm: name of the compared thing (a rule, a set of scaled hyperparameters).
        overrides: dotted field name -> value, e.g. ``{"scaling.rule": "sqrt", "seed": 1}``.
        priority: what is trained first where time is short; 0 before 1.
    """

    arm: str
    overrides: Mapping[str, Any]
    priority: int = 0


def product(arm: Mapping[str, Mapping[str, Any]], **axes: Sequence[Any]) -> list[Point]:
    """Every combination of the arms with the axes; an axis is a config field and its values.

    >>> points = product(arm={"sqrt": {"scaling.rule": "sqrt"}}, batch_size=(32, 64), seed=(0, 1))
    >>> len(points), points[0].arm, points[0].overrides["batch_size"]
    (4, 'sqrt', 32)
    """
    return [
        Point(name, {**overrides, **dict(zip(axes, values, strict=True))})
        for name, overrides in arm.items()
        for values in itertools.product(*axes.values())
    ]


def with_seeds(points: Sequence[Point], seeds: Sequence[int]) -> list[Point]:
    """The same points, each trained with these seeds instead of its own.

    >>> points = product(arm={"no": {}}, batch_size=(32, 64), seed=(0, 1))
    >>> [tuple(point.overrides.values()) for point in with_seeds(points, [7, 8])]
    [(32, 7), (32, 8), (64, 7), (64, 8)]
    """
    distinct: dict[tuple[str, str], Point] = {}
    for point in points:
        rest = {name: value for name, value in point.overrides.items() if name != "seed"}
        one = dataclasses.replace(point, overrides=rest)
        distinct.setdefault((point.arm, json.dumps(rest)), one)
    return [
        dataclasses.replace(point, overrides={**point.overrides, "seed": seed})
        for point in distinct.values()
        for seed in seeds
    ]


def prioritized(
    points: Sequence[Point], *levels: Callable[[Mapping[str, Any]], bool]
) -> list[Point]:
    """The same points with priorities: 0 where the first level holds of the overrides, and so on.

    >>> points = product(arm={"no": {}}, batch_size=(32, 64), seed=(0,))
    >>> found = prioritized(points, lambda overrides: overrides["batch_size"] == 64)
    >>> [(point.overrides["batch_size"], point.priority) for point in found]
    [(32, 1), (64, 0)]
    """
    return [
        dataclasses.replace(
            point,
            priority=next(
                (number for number, holds in enumerate(levels) if holds(point.overrides)),
                len(levels),
            ),
        )
        for point in points
    ]


def apply_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested config with dotted fields replaced; an unknown field is an error.

    >>> apply_overrides({"a": {"b": 1}}, {"a.b": 2})
    {'a': {'b': 2}}
    """
    result = _copied(config)
    for path, value in overrides.items():
        *parents, leaf = path.split(".")
        node = result
        for depth, name in enumerate(parents):
            if not isinstance(node.get(name), dict):
                raise unknown_field(".".join(parents[: depth + 1]), node)
            node = node[name]
        if leaf not in node:
            raise unknown_field(path, node)
        node[leaf] = value
    return result


def _copied(node: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a config anew; their values are replaced, never changed."""
    return {
        name: _copied(value) if isinstance(value, Mapping) else value
        for name, value in node.items()
    }


def resolve(config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> ResolvedRun:
    """Read a config with a point's overrides and scale it to the point's batch size.

    Args:
        config: the recipe, nested data with the fields of ``configs/fashion_mnist.py``.
        overrides: dotted field -> value.

    Returns:
        The run. Nothing in it depends on the machine it will be trained on.

    Raises:
        UserError: unknown field, rule or optimizer, impossible numbers.
    """
    # Imported here, since config files import this module and `--mode=report` needs no JAX.
    from bs_jax.training.resolve import resolve_recipe

    return resolve_recipe(Recipe.parse(apply_overrides(config, overrides or {})))
