"""Collects a sweep's records: one row a point, curves over examples seen, all damage by name.

Nothing read is executed, and nothing read is trusted: a run folder may be missing, half-written,
damaged or somebody else's. Such a run is named and left out; it never stops the report.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bs_jax.errors import UserError
from bs_jax.experiments._report_files import (
    Unreadable,
    check_marks,
    number,
    read_lines,
    read_object,
)
from bs_jax.experiments._report_index import Index, stamp_of

DONE = "done"
DIVERGED = "diverged"
UNFINISHED = "unfinished"
MISSING = "missing"
DAMAGED = "damaged"

_MAX_EXAMPLES = 1 << 53


@dataclass(frozen=True)
class Sweep:
    """What `sweep.json` says of the whole sweep; `margin` is in units of `accuracy_metric`.

    `smoothed_metric` is a second witness in the same units; empty where there is none.
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


@dataclass(frozen=True)
class Curve:
    """One metric over examples seen: int64 `examples`, ascending, and float64 `values`."""

    examples: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Run:
    """One run folder. `metrics` holds NaN for a number that was not finite.

    `scaled` and `base` are hyperparameters by name, None where they vary during the run.
    """

    run_id: str
    status: str
    metrics: Mapping[str, float]
    rule: str
    base: Mapping[str, float | None]
    scaled: Mapping[str, float | None]
    warnings: tuple[str, ...]
    curves: Mapping[str, Curve]
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One point of the sweep and what came of it; points that share a run share its numbers."""

    arm: str
    batch_size: int
    k: float
    offset: float
    seed: int
    run_id: str
    status: str
    metrics: Mapping[str, float]
    scaled: Mapping[str, float | None]


@dataclass(frozen=True)
class Results:
    """Everything a report is made from.

    Attributes:
      workdir: the folder it came from.
      sweep: the sweep's description.
      rows: one a point, in the order of `sweep.json`.
      runs: run_id -> run, each distinct run once.
      problems: one line a damaged or refused record, with the file's name.
      foreign: names under `runs/` that belong to no point.
    """

    workdir: Path
    sweep: Sweep
    rows: tuple[Row, ...]
    runs: Mapping[str, Run]
    problems: tuple[str, ...]
    foreign: tuple[str, ...]

    @property
    def curves(self) -> dict[str, Mapping[str, Curve]]:
        """run_id -> metric -> curve over examples seen."""
        return {run_id: run.curves for run_id, run in self.runs.items()}


def load_results(workdir: str | Path) -> Results:
    """Reads `sweep.json` and every run folder that its points name.

    Args:
      workdir: a sweep's work folder.

    Returns:
      The `Results`; runs that are missing, unfinished or damaged are in it, with that status.

    Raises:
      UserError: there is no usable `sweep.json`.

    >>> load_results("/nowhere")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    bs_jax.errors.UserError: /nowhere/sweep.json: missing; run `python main.py ...
    """
    workdir = Path(workdir)
    path = workdir / "sweep.json"
    try:
        content = read_object(path)
    except Unreadable as error:
        raise UserError(
            f"{path}: {error}; run `python main.py --workdir={workdir}` first, "
            "or name the workdir of a sweep"
        ) from None
    sweep = _parse_sweep(content, path)
    problems: list[str] = []
    points = _parse_points(content, sweep, path, problems)
    folder = workdir / "runs"
    present = _names(folder)
    runs: dict[str, Run] = {}
    index = Index(workdir, sweep.accuracy_metric)
    for point in points:
        if point.run_id not in runs:
            # Only names found in the folder are opened, so no run_id can point outside it.
            found = folder / point.run_id if point.run_id in present else None
            runs[point.run_id] = _load_indexed(point, found, sweep, problems, index)
    index.save(runs)
    rows = tuple(
        Row(
            **vars(point),
            status=runs[point.run_id].status,
            metrics=runs[point.run_id].metrics,
            scaled=runs[point.run_id].scaled,
        )
        for point in points
    )
    foreign = tuple(sorted(name for name in present - runs.keys() if not name.startswith(".")))
    return Results(workdir, sweep, rows, runs, tuple(problems), foreign)


@dataclass(frozen=True)
class _Point:
    arm: str
    batch_size: int
    k: float
    offset: float
    seed: int
    run_id: str


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _count(value: Any) -> int | None:
    """A whole number a batch or a data set can have; None for anything else."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 < value < _MAX_EXAMPLES else None


def _parse_sweep(content: Mapping[str, Any], path: Path) -> Sweep:
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
        metrics[field] = _text(content.get(field))
        if not metrics[field]:
            raise refuse(field, "the name of a metric")
    texts = ("name", "config_name", "title", "command", "data", "model")
    return Sweep(
        base_batch_size=base,
        margin=margin,
        warnings=_texts(content.get("warnings")),
        train_examples=_count(content.get("train_examples")),
        smoothed_metric=_text(content.get("smoothed_metric")),
        **metrics,
        **{field: _text(content.get(field)) for field in texts},
    )


def _parse_points(
    content: Mapping[str, Any], sweep: Sweep, path: Path, problems: list[str]
) -> list[_Point]:
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


def _parse_point(item: Any, sweep: Sweep) -> _Point | None:
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
    return _Point(arm, batch_size, k, offset, seed, run_id)


def _load_indexed(
    point: _Point, folder: Path | None, sweep: Sweep, problems: list[str], index: Index
) -> Run:
    """`_load_run`, or what it found when the folder's files were the same."""
    if folder is None:
        return _load_run(point, None, sweep, problems)
    stamp = [*stamp_of(folder), [point.batch_size]]
    known = index.get(point.run_id, stamp, _from_index)
    if known is not None:
        run, lines = known
    else:
        lines = []
        run = _load_run(point, folder, sweep, lines)
        if run.status in (DONE, DIVERGED):  # the others are about to change
            curves = {n: [c.examples.tolist(), c.values.tolist()] for n, c in run.curves.items()}
            index.put(point.run_id, stamp, [{**vars(run), "curves": curves}, lines])
    problems.extend(lines)
    return run


def _from_index(found: Any) -> tuple[Run, list[str]]:
    content, lines = found
    curves = {
        name: Curve(np.asarray(examples, np.int64), np.asarray(values, np.float64))
        for name, (examples, values) in content["curves"].items()
    }
    warnings = tuple(content["warnings"])
    return Run(**{**content, "curves": curves, "warnings": warnings}), list(lines)


def _load_run(point: _Point, folder: Path | None, sweep: Sweep, problems: list[str]) -> Run:
    run_id = point.run_id
    files = _names(folder) if folder else set()
    if folder is None or not files:
        return Run(run_id, MISSING, {}, "", {}, {}, (), {}, {})
    summary: Mapping[str, Any] = {}
    metrics: dict[str, float] = {}
    hparams: Mapping[str, Any] = {}
    status = UNFINISHED
    try:
        if "hparams.json" in files:
            hparams = _checked_hparams(folder / "hparams.json", point)
        if "DONE" in files:
            check_marks(folder)
            summary = read_object(folder / "summary.json")
            status, metrics = _final(summary, sweep)
    except Unreadable as error:
        status = DAMAGED
        problems.append(f"runs/{run_id}: {error}")
    curves: dict[str, Curve] = {}
    if status in (DONE, DIVERGED):
        curves = _load_curves(folder / "metrics.jsonl", run_id, problems)
    return Run(
        run_id=run_id,
        status=status,
        metrics=metrics,
        rule=_text(hparams.get("rule")),
        base=_hyperparams(hparams.get("base")),
        scaled=_hyperparams(hparams.get("scaled")),
        warnings=_texts(hparams.get("warnings")),
        curves=curves,
        summary=summary,
    )


def _checked_hparams(path: Path, point: _Point) -> dict[str, Any]:
    try:
        hparams = read_object(path)
    except Unreadable as error:
        raise Unreadable(f"hparams.json: {error}") from None
    recorded = hparams.get("batch_size")
    if recorded != point.batch_size:
        raise Unreadable(
            f"hparams.json: batch_size {recorded!r} where the sweep says {point.batch_size}"
        )
    return hparams


def _final(summary: Mapping[str, Any], sweep: Sweep) -> tuple[str, dict[str, float]]:
    """Status and final metrics of a run that calls itself done."""
    status, final = summary.get("status"), summary.get("final")
    if status == "interrupted":
        return UNFINISHED, {}
    if status not in (DONE, DIVERGED) or not isinstance(final, dict):
        raise Unreadable(f"summary.json: status {status!r} with final {type(final).__name__}")
    metrics = {name: number(value) for name, value in final.items()}
    wrong = [name for name, value in metrics.items() if value is None]
    if wrong:
        raise Unreadable(f"summary.json: final {wrong[0]!r} is {final[wrong[0]]!r:.40}")
    if status == DONE and sweep.accuracy_metric not in metrics:
        raise Unreadable(f"summary.json: no final {sweep.accuracy_metric!r}")
    return status, {name: value for name, value in metrics.items() if value is not None}


def _hyperparams(content: Any) -> dict[str, float | None]:
    if not isinstance(content, dict):
        return {}
    read = {name: number(value) for name, value in content.items()}
    # null is how a hyperparameter that varies is written, so here it is not a broken number.
    return {
        name: None if value is not None and math.isnan(value) else value
        for name, value in read.items()
        if value is not None
    }


def _load_curves(path: Path, run_id: str, problems: list[str]) -> dict[str, Curve]:
    try:
        lines, refused = read_lines(path)
    except Unreadable as error:
        problems.append(f"runs/{run_id}: metrics.jsonl: {error}; its final metrics are used")
        return {}
    columns: dict[str, dict[int, float]] = {}
    for line in lines:
        examples = line.pop("examples", None)
        line.pop("step", None)
        if type(examples) is not int or not 0 <= examples < _MAX_EXAMPLES:
            refused += 1
            continue
        for name, value in line.items():
            # A resumed run may have written an example count twice: the later line counts.
            converted = value if type(value) is float else number(value)
            if converted is None:
                refused += 1
            else:
                columns.setdefault(name, {})[examples] = converted
    if refused:
        problems.append(f"runs/{run_id}: metrics.jsonl: {refused} damaged lines or values skipped")
    return {name: _curve(values) for name, values in columns.items()}


def _curve(values: Mapping[int, float]) -> Curve:
    examples = np.fromiter(values.keys(), np.int64, len(values))
    numbers = np.fromiter(values.values(), np.float64, len(values))
    order = np.argsort(examples, kind="stable")
    return Curve(examples[order], numbers[order])
