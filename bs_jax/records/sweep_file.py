"""Reads `sweep.json`: the sweep's description and its points; what is wrong in it is named."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bs_jax.errors import UserError
from bs_jax.records.files import number
from bs_jax.records.types import Point, Sweep

MAX_EXAMPLES = 1 << 53


def text_of(value: Any) -> str:
    """The value where it is text, else nothing."""
    return value if isinstance(value, str) else ""


def texts_of(value: Any) -> tuple[str, ...]:
    """The texts of a list."""
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _count(value: Any) -> int | None:
    """A whole number a batch or a data set can have; None for anything else."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 < value < MAX_EXAMPLES else None


def parse_sweep(content: Mapping[str, Any], path: Path) -> Sweep:
    """Read the description of a sweep; a field of the wrong kind is named."""

    def refuse(field: str, wanted: str) -> UserError:
        found = repr(content.get(field))[:60]
        return UserError(
            f"{path}: {field} is {found}, not {wanted}; run the sweep again to write it anew"
        )

    base = _count(content.get("base_batch_size"))
    if base is None:
        raise refuse("base_batch_size", "a positive whole number")
    margin = number(content.get("margin"))
    if margin is None or not 0 < margin < math.inf:
        raise refuse("margin", "a positive number")
    metrics = {}
    for field in ("accuracy_metric", "loss_metric", "curve_metric"):
        metrics[field] = text_of(content.get(field))
        if not metrics[field]:
            raise refuse(field, "the name of a metric")
    texts = ("name", "config_name", "title", "command", "data", "model")
    return Sweep(
        base_batch_size=base,
        margin=margin,
        warnings=texts_of(content.get("warnings")),
        train_examples=_count(content.get("train_examples")),
        smoothed_metric=text_of(content.get("smoothed_metric")),
        **metrics,
        **{field: text_of(content.get(field)) for field in texts},
    )


def parse_points(
    content: Mapping[str, Any], sweep: Sweep, path: Path, problems: list[str]
) -> list[Point]:
    """Read the points; what is not a point is named among the problems."""
    listed = content.get("points")
    points = []
    for index, item in enumerate(listed if isinstance(listed, list) else []):
        point = _parse_point(item, sweep)
        if point is None:
            problems.append(f"{path.name}: point {index} is not a point: {repr(item)[:80]}")
        else:
            points.append(point)
    if not points:
        raise UserError(f"{path}: names no points; run the sweep again to write it anew")
    return points


def _parse_point(item: Any, sweep: Sweep) -> Point | None:
    if not isinstance(item, dict):
        return None
    arm, run_id, seed = item.get("arm"), item.get("run_id"), item.get("seed")
    batch_size, offset = _count(item.get("batch_size")), number(item.get("offset"))
    if not (isinstance(arm, str) and isinstance(run_id, str) and arm and run_id):
        return None
    if not isinstance(seed, int) or isinstance(seed, bool) or batch_size is None:
        return None
    if offset is None or not 0 < offset < math.inf:
        return None
    k = batch_size / sweep.base_batch_size
    return Point(arm, batch_size, k, offset, seed, run_id)
