"""A sweep: points resolved to runs, each distinct run trained once, the list of points on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bs_jax.errors import UserError
from bs_jax.recipe import Recipe
from bs_jax.records import sweep_file
from bs_jax.records.run_folder import RunFolder
from bs_jax.run import ResolvedRun
from bs_jax.sweep.points import Point, resolve
from bs_jax.training import checks
from bs_jax.training.ramp import planned_chunks


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Points and the runs they come to.

    Attributes:
        name: of the sweep.
        rows: a dict a point: arm, batch_size, offset, seed, run_id.
        runs: the distinct runs, by priority, then in order of first appearance.
        priorities: run_id -> the least priority of its points; what decides most has the least.
        warnings: what would make the comparison unfair.
    """

    name: str
    rows: list[dict[str, Any]]
    runs: list[ResolvedRun]
    priorities: dict[str, int]
    warnings: list[str]


def plan_sweep(name: str, config: Mapping[str, Any], points: Sequence[Point]) -> Sweep:
    """Resolve every point against the recipe.

    Args:
        name: of the sweep.
        config: the recipe.
        points: what to compare.

    Returns:
        The sweep; points that come to the same training share a run.

    Raises:
        UserError: no points, or a point that cannot be trained (named).
    """
    if not points:
        raise UserError(f"sweep {name!r} has no points")
    runs: dict[str, ResolvedRun] = {}
    priorities: dict[str, int] = {}
    rows = []
    for point in points:
        try:
            run = resolve(config, point.overrides)
        except UserError as error:
            settings = ", ".join(f"{field}={value!r}" for field, value in point.overrides.items())
            raise UserError(f"sweep {name!r}, point {point.arm} ({settings}): {error}") from error
        runs.setdefault(run.run_id, run)
        priorities[run.run_id] = min(point.priority, priorities.get(run.run_id, point.priority))
        rows.append(
            {
                "arm": point.arm,
                "batch_size": run.batch_size,
                "offset": point.overrides.get("scaling.offset", config["scaling"]["offset"]),
                "seed": run.seed,
                "run_id": run.run_id,
            }
        )
    distinct = sorted(runs.values(), key=lambda run: priorities[run.run_id])
    return Sweep(name, rows, distinct, priorities, checks.comparison_warnings(distinct))


def columns_of(
    sweep: Sweep, seconds: Mapping[str, str] | None = None
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Every point with its hyperparameters and the run it comes to, as columns of text.

    Args:
        sweep: the sweep.
        seconds: run id -> how long it takes, where that is known.

    Returns:
        Name -> a cell a point; and name -> value of what is the same at all points. "measured"
        marks a value that the rule finds while training.
    """
    runs = {run.run_id: run for run in sweep.runs}
    values = [runs[row["run_id"]].scaled.values for row in sweep.rows]
    names = list(dict.fromkeys(name for scaled in values for name in scaled))
    cells = {name: [_number(scaled.get(name)) for scaled in values] for name in names}
    same = {name: column[0] for name, column in cells.items() if len(set(column)) == 1}
    columns = {
        "arm": [row["arm"] for row in sweep.rows],
        "batch_size": [str(row["batch_size"]) for row in sweep.rows],
        "offset": [f"{row['offset']:g}" for row in sweep.rows],
        "updates": [_updates(runs[row["run_id"]]) for row in sweep.rows],
        **({"seconds": [seconds[row["run_id"]] for row in sweep.rows]} if seconds else {}),
        **{name: column for name, column in cells.items() if name not in same},
        "seed": [str(row["seed"]) for row in sweep.rows],
        "run": [row["run_id"] for row in sweep.rows],
    }
    return columns, same


def listing(sweep: Sweep, seconds: Mapping[str, str] | None = None) -> str:
    """Every point on a line; what is the same at all points is said once, at the end."""
    columns, same = columns_of(sweep, seconds)
    widths = [max(map(len, (name, *column))) for name, column in columns.items()]
    lines = [list(columns), *zip(*columns.values(), strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([*text, *notes(sweep, same)])


def notes(sweep: Sweep, same: Mapping[str, str]) -> list[str]:
    """The lines below a list of points.

    Args:
        sweep: the sweep.
        same: of `columns_of`.
    """
    lines = [f"at all points: {', '.join(f'{n} {v}' for n, v in same.items())}"] if same else []
    lines.append(f"{len(sweep.rows)} points, {len(sweep.runs)} runs")
    guarded = sorted({run.scaled.rule for run in sweep.runs if run.scaled.k > 1 and run.is_guarded})
    if guarded:
        lines.append(
            f"guard: beyond the measured noise scale steps of {' and '.join(guarded)} are those of "
            "the square-root rule; --config.scaling.guard=False lets them grow on"
        )
    return [*lines, *(f"warning: {warning}" for warning in sweep.warnings)]


def _updates(run: ResolvedRun) -> str:
    """How many updates a run has; of one whose batch follows the noise, the least."""
    if run.batch_ramp.kind != "stages":
        least = run.train_examples // run.batch_size
        return f"{least:,}+" if run.ramps else f"{least:,}"
    *_, last = planned_chunks(run)
    return f"{last.end:,}"


def _number(value: Any) -> str:
    return "measured" if value is None else f"{value:.6g}"


def run_folder(workdir: Path, run: ResolvedRun, *, writes: bool = True) -> RunFolder:
    """The folder of one run of a sweep; see `RunFolder`."""
    return RunFolder(workdir / "runs" / run.run_id, run, writes=writes)


def write_sweep_file(
    sweep: Sweep, workdir: Path, config: Mapping[str, Any], *, command: str, data: str
) -> None:
    """Write ``sweep.json``, which ties points to runs for the report.

    Args:
        sweep: the sweep.
        workdir: its folder.
        config: the recipe.
        command: what the user typed.
        data: one line about the data set.
    """
    recipe = Recipe.parse(config)
    described = sweep_file.Sweep(
        name=sweep.name,
        config_name=recipe.name,
        title=recipe.title,
        command=command,
        base_batch_size=recipe.base_batch_size,
        accuracy_metric=recipe.report.accuracy_metric,
        loss_metric=recipe.report.loss_metric,
        curve_metric=recipe.report.curve_metric,
        margin=recipe.report.margin,
        warnings=tuple(sweep.warnings),
        data=data,
        model=recipe.model.name,
        train_examples=recipe.train_examples,
        smoothed_metric=recipe.report.smoothed_metric,
    )
    points = [sweep_file.SweepPoint(**row) for row in sweep.rows]
    sweep_file.write_sweep(workdir, described, points, config)
