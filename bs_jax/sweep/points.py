"""From a config and a sweep point to a run: overrides, scaled hyperparameters, a stable id."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from bs_jax.errors import UserError
from bs_jax.records.run_folder import Run

# What two runs may differ in and still be the same training, number for number.
_NOT_IDENTITY = ("name", "title", "report", "tensorboard", "checkpoint_every_examples")


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a sweep: the arm it belongs to, and what it changes in the config.

    Attributes:
        arm: name of the compared thing (a rule, a set of scaled hyperparameters).
        overrides: dotted field name -> value, e.g. ``{"scaling.rule": "sqrt", "seed": 1}``.
    """

    arm: str
    overrides: Mapping[str, Any]


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
        distinct.setdefault((point.arm, json.dumps(rest)), Point(point.arm, rest))
    return [
        Point(point.arm, {**point.overrides, "seed": seed})
        for point in distinct.values()
        for seed in seeds
    ]


def apply_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested config with dotted fields replaced; an unknown field is an error.

    >>> apply_overrides({"a": {"b": 1}}, {"a.b": 2})
    {'a': {'b': 2}}
    """
    result = json.loads(json.dumps(dict(config)))
    for path, value in overrides.items():
        *parents, leaf = path.split(".")
        node = result
        for depth, name in enumerate(parents):
            if not isinstance(node.get(name), dict):
                raise _unknown_field(".".join(parents[: depth + 1]), node)
            node = node[name]
        if leaf not in node:
            raise _unknown_field(path, node)
        node[leaf] = json.loads(json.dumps(value))
    return result


def _unknown_field(path: str, node: Mapping[str, Any]) -> UserError:
    name = path.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(name, list(node), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(node))}"
    return UserError(f"config has no field {path!r}; {hint}")


def resolve(config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Run:
    """Scale the recipe to the point's batch size and freeze the outcome as a run.

    A rule whose factors are known before training leaves plain numbers, so two points that come
    to the same numbers (every rule at k = 1, say) are one run with one id.

    Args:
        config: the recipe, nested mapping with the fields of ``configs/fashion_mnist.py``.
        overrides: dotted field -> value.

    Returns:
        The run. Nothing in it depends on the machine it will be trained on.

    Raises:
        UserError: unknown field, rule or optimizer, impossible numbers.
    """
    # Imported here, since config files import this module and `--mode=report` needs no JAX.
    from bs_jax.training import optimizers, validate
    from bs_jax.training.form import check_form
    from bs_jax.training.plan import with_length

    full = apply_overrides(config, overrides or {})
    check_form(full)
    full = with_length(full)
    validate.check_config(full)
    scaled = optimizers.scale_recipe(full)
    trained = json.loads(json.dumps(full))
    if not scaled.rule_while_training:
        trained["optimizer"]["hyperparams"] = {
            name: scaled.values[name] for name in full["optimizer"]["hyperparams"]
        } | scaled.defaults
        trained["scaling"] = {"rule": "fixed"} | ({"clock": scaled.clock} if scaled.clock else {})
        trained["base_batch_size"] = full["batch_size"]
        trained["micro_batch_size"] = full["micro_batch_size"] or full["batch_size"]
    else:
        trained["micro_batch_size"] = full["micro_batch_size"] or default_micro_batch_size(
            full["batch_size"], full["base_batch_size"]
        )
    trained["bn_decay"] = scaled.values["bn_decay"]
    trained["ema_decay"] = scaled.values["ema_decay"] if full["ema_decay"] else 0.0
    validate.check_run(trained)
    hparams = {
        "rule": full["scaling"]["rule"],
        "batch_size": full["batch_size"],
        "base_batch_size": full["base_batch_size"],
        "k": full["batch_size"] / full["base_batch_size"],
        "base": scaled.base,
        "scaled": scaled.values,
        "rows": scaled.rows,
        "warnings": scaled.warnings,
    }
    return Run(_run_id(trained), trained, hparams)


def default_micro_batch_size(batch_size: int, base_batch_size: int) -> int:
    """Examples per gradient sample: the base batch where the batch holds two of them, else half.

    With micro-batches of exactly the base batch the invariant second moment needs no
    extrapolation (Wang & Aitchison 2024). The largest divisor of the batch at or below the target
    is taken, so that the batch is split evenly.

    >>> default_micro_batch_size(256, 64), default_micro_batch_size(96, 64)
    (64, 48)
    """
    target = min(base_batch_size, batch_size // 2)
    return next(b for b in range(max(target, 1), 0, -1) if batch_size % b == 0)


def _run_id(config: Mapping[str, Any]) -> str:
    content = {name: value for name, value in config.items() if name not in _NOT_IDENTITY}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"b{config['batch_size']}-s{config['seed']}-{digest}"
