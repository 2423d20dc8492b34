"""Collects a sweep's records: one row a point, curves over examples seen, all damage by name.

A run folder may be missing, half-written, damaged or somebody else's. Such a run is named and left
out; it never stops the report.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bs_jax.records import run_files, stores
from bs_jax.records.index import Index
from bs_jax.records.json_files import Unreadable, finite
from bs_jax.records.metrics_file import Curve, read_curves
from bs_jax.records.run_files import DIVERGED, FINISHED, Hparams, Summary
from bs_jax.records.sweep_file import Sweep, SweepPoint, read_sweep

DONE = FINISHED
UNFINISHED = "unfinished"
MISSING = "missing"
DAMAGED = "damaged"

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


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        run_id: name of the folder.
        status: `DONE`, `DIVERGED`, `UNFINISHED`, `MISSING` or `DAMAGED`.
        metrics: final metrics of a run that is done; NaN for a number that was not finite.
        rule: name of the scaling rule.
        base: hyperparameters at the base batch size; None: varies during the run.
        scaled: hyperparameters in use; None: varies during the run.
        warnings: about this run.
        curves: metric -> curve over examples seen; also ``batch_size`` and, where it was measured,
            ``noise_scale``, ``noise_scale_low`` and ``noise_scale_high`` (in examples; NaN: not
            known), see `bs_jax.records.metrics_file`.
        summary: how it ended and what it ran on; None unless done or diverged.
    """

    run_id: str
    status: str
    metrics: Mapping[str, float]
    rule: str
    base: Mapping[str, float | None]
    scaled: Mapping[str, float | None]
    warnings: tuple[str, ...]
    curves: Mapping[str, Curve]
    summary: Summary | None


@dataclass(frozen=True)
class Row:
    """A point of the sweep and what came of it; points that share a run share its numbers.

    Attributes:
        arm: name of the compared thing.
        batch_size: examples per update.
        k: batch size over base batch size.
        offset: factor on everything scaled.
        seed: of the run.
        run_id: of the run.
        status: of the run.
        metrics: of the run.
        scaled: hyperparameters of the run.
    """

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
        rows: one a point, in the order of ``sweep.json``.
        runs: run_id -> run, each distinct run once.
        problems: one line a damaged or refused record, with the file's name.
        foreign: names under ``runs/`` that belong to no point.
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


@stores.store_errors()
def load_results(workdir: str | Path) -> Results:
    """Read ``sweep.json`` and every run folder that its points name.

    Args:
        workdir: a sweep's work folder.

    Returns:
        The `Results`; runs that are missing, unfinished or damaged are in it, with that status.

    Raises:
        UserError: there is no usable ``sweep.json``.

    >>> load_results("/nowhere")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    bs_jax.errors.UserError: /nowhere/sweep.json: missing; run `python main.py ...
    """
    if isinstance(workdir, str):
        workdir = stores.to_path(workdir)
    sweep, points, problems = read_sweep(workdir)
    distinct: dict[str, SweepPoint] = {}
    for point in points:
        distinct.setdefault(point.run_id, point)
    index = Index(workdir, sweep.accuracy_metric)
    with contextlib.closing(stores.open_folders(workdir / "runs", run_files.RUN_FILES)) as folders:
        runs = _load_runs(distinct, sweep.accuracy_metric, problems, index, folders)
    rows = tuple(
        Row(
            **asdict(point),
            k=point.batch_size / sweep.base_batch_size,
            status=runs[point.run_id].status,
            metrics=runs[point.run_id].metrics,
            scaled=runs[point.run_id].scaled,
        )
        for point in points
    )
    others = (name for name in folders.present - runs.keys() if not name.startswith("."))
    return Results(workdir, sweep, rows, runs, tuple(problems), tuple(sorted(others)))


def _load_runs(
    points: Mapping[str, SweepPoint],
    accuracy_metric: str,
    problems: list[str],
    index: Index,
    folders: stores.Folders,
) -> dict[str, Run]:
    """Every distinct run: from the index if its files have not changed, else read again."""
    # Only names found in the folder are opened, so no run_id can point outside it.
    stamps = {
        run_id: [*folders.stamp(run_id), [point.batch_size]]
        for run_id, point in points.items()
        if run_id in folders.present
    }
    known = {run_id: index.get(run_id, stamp, _from_index) for run_id, stamp in stamps.items()}
    folders.fetch([run_id for run_id, found in known.items() if found is None])
    runs: dict[str, Run] = {}
    for run_id, point in points.items():
        if run_id not in stamps:
            runs[run_id] = Run(run_id, MISSING, {}, "", {}, {}, (), {}, None)
            continue
        if known[run_id] is not None:
            run, lines = known[run_id]
        else:
            run, lines = _read_run(folders.folder(run_id), point, accuracy_metric)
            if run.status in (DONE, DIVERGED):  # the others are about to change
                index.put(run_id, stamps[run_id], _for_index(run, lines))
        runs[run_id] = run
        problems.extend(lines)
    index.save(runs)
    return runs


def _read_run(folder: Path, point: SweepPoint, accuracy_metric: str) -> tuple[Run, list[str]]:
    """A run, and a line for each of its files that is damaged."""
    run_id, problems = point.run_id, []
    files = stores.names(folder)
    status, hparams, summary = (UNFINISHED if files else MISSING), Hparams(), None
    try:
        if run_files.HPARAMS in files:
            hparams = Hparams.read(folder, point.batch_size)
        if run_files.DONE in files:
            summary = _finished(folder, accuracy_metric)
            status = summary.status if summary else UNFINISHED
    except Unreadable as error:
        status = DAMAGED
        problems.append(f"runs/{run_id}: {error}")
    curves: dict[str, Curve] = {}
    if summary:
        try:
            curves, refused = read_curves(folder / run_files.METRICS)
            if refused:
                problems.append(
                    f"runs/{run_id}: metrics.jsonl: {refused} damaged lines or values skipped"
                )
        except Unreadable as error:
            problems.append(f"runs/{run_id}: metrics.jsonl: {error}; its final metrics are used")
    run = Run(
        run_id,
        status,
        summary.final if summary else {},
        hparams.rule,
        hparams.base,
        hparams.scaled,
        hparams.warnings,
        curves,
        summary,
    )
    return run, problems


def _finished(folder: Path, accuracy_metric: str) -> Summary | None:
    """The summary of a run that calls itself done; None if it was interrupted.

    Raises:
        Unreadable: a file has changed since, or does not say how the run ended.
    """
    try:
        changed = run_files.damaged_files(folder)
    except OSError:
        changed = [run_files.DONE]
    if changed:
        names = ", ".join(changed)
        raise Unreadable(f"{names}: changed since the run was done; give the command again")
    summary = Summary.read(folder)
    if summary.status == run_files.INTERRUPTED:
        return None
    if summary.status == DONE and accuracy_metric not in summary.final:
        raise Unreadable(f"summary.json: no final {accuracy_metric!r}")
    return summary


def _for_index(run: Run, problems: list[str]) -> Any:
    curves = {n: [c.examples.tolist(), c.values.tolist()] for n, c in run.curves.items()}
    summary = finite(asdict(run.summary)) if run.summary else None
    return [{**vars(run), "curves": curves, "summary": summary}, problems]


def _from_index(found: Any) -> tuple[Run, list[str]]:
    """What `_for_index` stored; raises whatever it may if that is not what is there."""
    content, problems = found
    curves = {
        name: Curve(np.asarray(examples, np.int64), np.asarray(values, np.float64))
        for name, (examples, values) in content["curves"].items()
    }
    warnings = tuple(content["warnings"])
    varying = [*content["base"].values(), *content["scaled"].values()]
    summary = Summary.parse(content["summary"])
    if not (
        content["status"] == summary.status in (DONE, DIVERGED)
        and all(isinstance(value, float) for value in content["metrics"].values())
        and all(value is None or isinstance(value, float) for value in varying)
        and all(isinstance(line, str) for line in (content["rule"], *warnings, *problems))
        and all(c.examples.shape == c.values.shape == (c.values.size,) for c in curves.values())
    ):
        raise ValueError("of another form")
    changes = {"curves": curves, "warnings": warnings, "summary": summary}
    return Run(**{**content, **changes}), list(problems)
