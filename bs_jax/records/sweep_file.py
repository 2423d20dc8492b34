"""``sweep.json``: what a sweep compares, and the point that each run stands for."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bs_jax.errors import UserError
from bs_jax.records import stores
from bs_jax.records.json_files import (
    Unreadable,
    number,
    read_object,
    text,
    texts,
    whole,
    write_json,
)

SWEEP = "sweep.json"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The description of a sweep.

    Attributes:
        name: of the sweep.
        config_name: of the recipe.
        title: one line for the report.
        command: what the user typed.
        base_batch_size: examples per update that the recipe was tuned at.
        accuracy_metric: the final metric that verdicts are about.
        loss_metric: the final loss.
        curve_metric: the metric whose curves are compared.
        margin: accuracies closer than this count as equal; in units of `accuracy_metric`.
        warnings: what makes the comparison unfair.
        data: one line about the data set.
        model: name of the network.
        train_examples: examples seen by a run; None if not known.
        smoothed_metric: a second metric in the units of `accuracy_metric`; "": none.
    """

    name: str
    config_name: str
    title: str
    command: str
    base_batch_size: int
    accuracy_metric: str
    loss_metric: str
    curve_metric: str
    margin: float
    warnings: tuple[str, ...]
    data: str
    model: str
    train_examples: int | None
    smoothed_metric: str = ""


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """One point of a sweep. Points that come to the same training share a run.

    Attributes:
        arm: name of the compared thing, such as a rule.
        batch_size: examples per update.
        offset: factor on everything scaled; 1 is the rule as it is.
        seed: of the run.
        run_id: name of the run's folder under ``runs/``.
    """

    arm: str
    batch_size: int
    offset: float
    seed: int
    run_id: str


def write_sweep(
    workdir: Path, sweep: Sweep, points: Sequence[SweepPoint], recipe: Mapping[str, Any]
) -> None:
    """Write ``sweep.json``.

    Args:
        workdir: the sweep's work folder.
        sweep: its description.
        points: what it compares.
        recipe: the config that every point begins with, for the reader's information.
    """
    listed = [dataclasses.asdict(point) for point in points]
    write_json(workdir / SWEEP, {**dataclasses.asdict(sweep), "recipe": recipe, "points": listed})


def read_sweep(workdir: Path) -> tuple[Sweep, list[SweepPoint], list[str]]:
    """Read ``sweep.json``, whoever wrote it.

    Args:
        workdir: the sweep's work folder.

    Returns:
        The description, the points, and a line for each item that is not a point.

    Raises:
        UserError: the file is missing or damaged, a field that the report needs is of another type,
            or there are no points.
    """
    path = workdir / SWEEP
    try:
        content = read_object(path)
    except Unreadable as error:
        flag = shlex.join([f"--workdir={stores.text_of(workdir)}"])
        raise UserError(
            f"{path}: {error}; run `python main.py {flag}` first, or name the workdir of a sweep"
        ) from None
    sweep = _parse_sweep(content, path)
    problems, points = [], []
    listed = content.get("points")
    for index, item in enumerate(listed if isinstance(listed, list) else []):
        point = _parse_point(item)
        if point is None:
            problems.append(f"{path.name}: point {index} is not a point: {repr(item)[:80]}")
        else:
            points.append(point)
    if not points:
        raise UserError(f"{path}: names no points; run the sweep again to write it anew")
    return sweep, points, problems


def _parse_sweep(content: Mapping[str, Any], path: Path) -> Sweep:
    def refuse(field: str, wanted: str) -> UserError:
        found = repr(content.get(field))[:60]
        return UserError(
            f"{path}: {field} is {found}, not {wanted}; run the sweep again to write it anew"
        )

    base = whole(content.get("base_batch_size"))
    if not base:
        raise refuse("base_batch_size", "a positive whole number")
    margin = number(content.get("margin"))
    if margin is None or not 0 < margin < math.inf:
        raise refuse("margin", "a positive number")
    texts_by_name = {
        field.name: text(content.get(field.name))
        for field in dataclasses.fields(Sweep)
        if field.type == "str"
    }
    for field in ("accuracy_metric", "loss_metric", "curve_metric"):
        if not texts_by_name[field]:
            raise refuse(field, "the name of a metric")
    return Sweep(
        base_batch_size=base,
        margin=margin,
        warnings=texts(content.get("warnings")),
        train_examples=whole(content.get("train_examples")) or None,
        **texts_by_name,
    )


def _parse_point(item: Any) -> SweepPoint | None:
    if not isinstance(item, dict):
        return None
    arm, run_id, seed = text(item.get("arm")), text(item.get("run_id")), item.get("seed")
    batch_size, offset = whole(item.get("batch_size")), number(item.get("offset"))
    if not (arm and run_id and batch_size):
        return None
    if not isinstance(seed, int) or isinstance(seed, bool):
        return None
    if offset is None or not 0 < offset < math.inf:
        return None
    return SweepPoint(arm, batch_size, offset, seed, run_id)
