"""Collects a sweep's records: one row a point, curves over examples seen, all damage by name.

Nothing read is executed, and nothing read is trusted: a run folder may be missing, half-written,
damaged or somebody else's. Such a run is named and left out; it never stops the report.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bs_jax.errors import UserError
from bs_jax.records.files import (
    Unreadable,
    check_marks,
    number,
    read_lines,
    read_object,
)
from bs_jax.records.index import Index
from bs_jax.records.run_folders import RunFolders, open_folders
from bs_jax.records.stores import storage
from bs_jax.records.sweep_file import (
    MAX_EXAMPLES,
    Point,
    parse_points,
    parse_sweep,
    text_of,
    texts_of,
)
from bs_jax.records.types import (
    DAMAGED,
    DIVERGED,
    DONE,
    MISSING,
    UNFINISHED,
    Curve,
    Results,
    Row,
    Run,
    Sweep,
)

__all__ = [
    "DAMAGED",
    "DIVERGED",
    "DONE",
    "MISSING",
    "UNFINISHED",
    "Curve",
    "Results",
    "Row",
    "Run",
    "Sweep",
    "load_results",
]


@storage.plainly()
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
    if isinstance(workdir, str):
        workdir = storage.to_path(workdir)
    path = workdir / "sweep.json"
    try:
        content = read_object(path)
    except Unreadable as error:
        raise UserError(
            f"{path}: {error}; run `python main.py --workdir={workdir}` first, "
            "or name the workdir of a sweep"
        ) from None
    sweep = parse_sweep(content, path)
    problems: list[str] = []
    points = parse_points(content, sweep, path, problems)
    with contextlib.closing(open_folders(workdir / "runs")) as folders:
        runs = _load_runs(points, sweep, problems, Index(workdir, sweep.accuracy_metric), folders)
        present = folders.present
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


def _load_runs(
    points: Sequence[Point], sweep: Sweep, problems: list[str], index: Index, folders: RunFolders
) -> dict[str, Run]:
    """Every distinct run: what the index has of it where its files are the same, or read anew."""
    distinct: dict[str, Point] = {}
    for point in points:
        distinct.setdefault(point.run_id, point)
    # Only names found in the folder are opened, so no run_id can point outside it.
    stamps = {
        run_id: [*folders.stamp(run_id), [point.batch_size]]
        for run_id, point in distinct.items()
        if run_id in folders.present
    }
    known = {id_: index.get(id_, stamp, _from_index) for id_, stamp in stamps.items()}
    folders.fetch([run_id for run_id, found in known.items() if found is None])
    runs: dict[str, Run] = {}
    for run_id, point in distinct.items():
        lines: list[str] = []
        if run_id not in stamps:
            run = _load_run(point, None, sweep, lines)
        elif known[run_id] is not None:
            run, lines = known[run_id]
        else:
            run = _load_run(point, folders.folder(run_id), sweep, lines)
            if run.status in (DONE, DIVERGED):  # the others are about to change
                curves = {
                    n: [c.examples.tolist(), c.values.tolist()] for n, c in run.curves.items()
                }
                index.put(run_id, stamps[run_id], [{**vars(run), "curves": curves}, lines])
        runs[run_id] = run
        problems.extend(lines)
    index.save(runs)
    return runs


def _from_index(found: Any) -> tuple[Run, list[str]]:
    """What `_load_runs` stored; raises whatever it may if that is not what is there."""
    content, lines = found
    curves = {
        name: Curve(np.asarray(examples, np.int64), np.asarray(values, np.float64))
        for name, (examples, values) in content["curves"].items()
    }
    warnings = tuple(content["warnings"])
    varying = [*content["base"].values(), *content["scaled"].values()]
    if not (
        content["status"] in (DONE, DIVERGED)
        and all(isinstance(value, float) for value in content["metrics"].values())
        and all(value is None or isinstance(value, float) for value in varying)
        and isinstance(content["summary"], dict)
        and all(isinstance(text, str) for text in (content["rule"], *warnings, *lines))
        and all(c.examples.shape == c.values.shape == (c.values.size,) for c in curves.values())
    ):
        raise ValueError("of another form")
    return Run(**{**content, "curves": curves, "warnings": warnings}), list(lines)


def _load_run(point: Point, folder: Path | None, sweep: Sweep, problems: list[str]) -> Run:
    run_id = point.run_id
    files = storage.names(folder) if folder else set()
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
        rule=text_of(hparams.get("rule")),
        base=_hyperparams(hparams.get("base")),
        scaled=_hyperparams(hparams.get("scaled")),
        warnings=texts_of(hparams.get("warnings")),
        curves=curves,
        summary=summary,
    )


def _checked_hparams(path: Path, point: Point) -> dict[str, Any]:
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
        if type(examples) is not int or not 0 <= examples < MAX_EXAMPLES:
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
