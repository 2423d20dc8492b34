"""--mode=critical_batch: branch a run, and say up to which batch size the loss follows."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from bs_jax.cli import common, config, noise_scale, sweep
from bs_jax.errors import UserError
from bs_jax.recipe import Recipe
from bs_jax.records import json_files, stores
from bs_jax.run import ResolvedRun

if TYPE_CHECKING:  # they import JAX, which the other modes need not
    from bs_jax.scaling.critical_batch import CriticalBatch
    from bs_jax.sweep.branches import Branching

FLAGS = flags.FLAGS
FLAG_NAMES = (
    *common.FLAG_NAMES,
    "seeds",
    "branch_at",
    "branch_batch_sizes",
    "branch_examples",
    "tolerance",
)


def define_flags() -> None:
    """Define the flags of this mode."""
    flags.DEFINE_list(
        "branch_at", ["0.1", "0.3", "0.6"], "Shares of the training at which the run is branched."
    )
    flags.DEFINE_list(
        "branch_batch_sizes",
        [],
        "Batch sizes of the branches; default: 1, 2, 4 and 8 times config.batch_size.",
    )
    flags.DEFINE_integer(
        "branch_examples", 0, "Examples that a branch sees; 0: a tenth of the training."
    )
    flags.DEFINE_float(
        "tolerance",
        0.01,
        "Differences of the loss (config.report.loss_metric) up to this count as equal.",
    )


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of the training: what branches say there, and what the noise scale says.

    Attributes:
        examples: seen where the branches start.
        found: the critical batch size.
        noise: ``noise_scale``, ``low`` and ``high`` in examples; NaN where it was not measured.
    """

    examples: int
    found: CriticalBatch
    noise: Mapping[str, float]


def run() -> int:
    """Train the trunk and its branches; write and print what they say."""
    from bs_jax.sweep.branches import Branches, Branching
    from bs_jax.sweep.stopping import StopRequest
    from bs_jax.training import compilation
    from bs_jax.training.train import Interrupted

    nested = config.plain()
    recipe = Recipe.parse(nested)
    if not 0 < FLAGS.tolerance < math.inf:
        raise UserError(f"--tolerance={FLAGS.tolerance:g}: give a positive number of the loss")
    branching = Branching.plan(
        recipe,
        shares=_numbers("branch_at", float),
        batch_sizes=_numbers("branch_batch_sizes", int),
        examples=FLAGS.branch_examples,
        seeds=sweep.given_seeds() or (0, 1, 2),
    )
    trunk = _trunk(nested)
    workdir = common.workdir(f"runs/{FLAGS.config.name}-critical_batch/{trunk.run_id}")
    with StopRequest(FLAGS.grace_seconds) as stop:
        branches = Branches(nested, branching, trunk, workdir, stop, print)
        _describe(branching, branches.runs, workdir)
        if FLAGS.dry_run:
            return 0
        stores.check_writable(workdir)
        config.load_data([trunk])
        compilation.enable_cache()
        points = []
        try:
            for examples in branching.points:
                noise = _noise(branches.train_trunk(examples), trunk)
                losses = branches.train_branches(examples)
                points.append(_compared(examples, losses, noise))
                print(f"After {examples:,} examples:\n{points[-1].found.to_text()}", flush=True)
        except Interrupted:
            print("stopped; give the same command again to continue")
            return 128 + (stop.number or 15)
    print(table(points))
    print(advice(points, recipe.train_examples))
    print(f"Numbers: {', '.join(str(path) for path in write(points, workdir))}")
    return 0


def _trunk(nested: Mapping[str, Any]) -> ResolvedRun:
    """The run that is branched, measuring the gradient noise where it can."""
    from bs_jax.sweep.points import resolve

    plain = resolve(nested)  # what cannot be trained at all is an error
    try:
        return noise_scale.plan(nested)
    except UserError as error:
        print(f"warning: the noise scale is not measured beside: {error}")
        return plain


def _describe(branching: Branching, runs: Sequence[ResolvedRun], workdir: Path) -> None:
    print(
        f"{len(branching.points)} points ({', '.join(f'{p:,}' for p in branching.points)} "
        f"examples), {len(runs)} branches of {branching.examples:,} examples at each, records in "
        f"{workdir}"
    )
    for run in runs:
        if run.seed == branching.seeds[0]:
            values = ", ".join(
                f"{name} {'measured' if value is None else format(value, '.6g')}"
                for name, value in run.scaled.values.items()
            )
            print(f"  batch size {run.batch_size} (rule {run.scaled.rule}): {values}")
            for warning in run.scaled.warnings:
                print(f"  warning: {warning}")


def _numbers(name: str, kind: type) -> list[Any]:
    texts: list[str] = FLAGS[name].value or []
    try:
        return [kind(text) for text in texts]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"--{name}={','.join(texts)}: give {what}, e.g. 1,2") from None


def _noise(rows: Sequence[Mapping[str, Any]], trunk: ResolvedRun) -> dict[str, float]:
    """The noise scale at the end of the trunk's rows."""
    names = ("noise_scale", "low", "high")
    if not trunk.measures_noise:
        return dict.fromkeys(names, math.nan)
    curve = noise_scale.curve_of(rows, trunk)
    return {name: curve.rows[-1][name] for name in names}


def _compared(
    examples: int, losses: Mapping[int, Sequence[float]], noise: Mapping[str, float]
) -> Point:
    from bs_jax.scaling import critical_batch

    scale = noise["noise_scale"]
    found = critical_batch.from_losses(
        losses,
        tolerance=FLAGS.tolerance,
        noise_scale=scale if math.isfinite(scale) else None,
    )
    return Point(examples, found, noise)


def table(points: Sequence[Point]) -> str:
    """Return a line a point: the critical batch size by branches beside the noise scale."""
    header = ("examples", "critical batch", "about", "noise scale", "from", "to")
    cells: list[tuple[str, ...]] = [header]
    for point in points:
        low, high = point.found.low, point.found.high
        cells.append(
            (
                f"{point.examples:,}",
                f"{low} to {high:g}" if math.isfinite(high) else f"{low} or more",
                *(
                    f"{value:.3g}" if math.isfinite(value) else "-"
                    for value in (point.found.estimate, *point.noise.values())
                ),
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def advice(points: Sequence[Point], train_examples: int) -> str:
    """Return the batch ramp that stays below the critical batch, and what it saves.

    Args:
        points: what was measured, in order of the training.
        train_examples: length of the training.
    """
    smallest = points[0].found.branches[0].batch_size
    stages = [(0, smallest)]
    for point in points:
        if point.found.low > stages[-1][1]:
            stages.append((point.examples, point.found.low))
    if len(stages) == 1:
        return f"No batch size above {smallest} was shown to follow: no ramp is advised."
    ends = [*(start for start, _ in stages[1:]), train_examples]
    updates = sum((end - start) / size for (start, size), end in zip(stages, ends, strict=True))
    saved = 1 - updates * smallest / train_examples
    return (
        f"A ramp below the critical batch: --config.batch_size={stages[-1][1]} "
        f"--config.batch_ramp.kind=stages --config.batch_ramp.stages='{tuple(stages)}' "
        f"({100 * saved:.0f} % fewer updates than batch size {smallest} throughout)"
    )


def write(points: Sequence[Point], folder: Path) -> list[Path]:
    """Write ``critical_batch.csv`` (a row a branch size and point) and ``.json``."""
    rows = [
        {
            "examples": point.examples,
            "batch_size": branch.batch_size,
            "difference": branch.difference,
            "low_95": branch.low,
            "high_95": branch.high,
            "verdict": branch.verdict,
            **{f"loss_{i}": loss for i, loss in enumerate(branch.losses.tolist())},
        }
        for point in points
        for branch in point.found.branches
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    content = [
        {
            "examples": point.examples,
            "low": point.found.low,
            "high": point.found.high,
            "estimate": point.found.estimate,
            "tolerance": point.found.tolerance,
            "noise_scale": point.noise["noise_scale"],
            "noise_scale_low": point.noise["low"],
            "noise_scale_high": point.noise["high"],
        }
        for point in points
    ]
    paths = [folder / "critical_batch.csv", folder / "critical_batch.json"]
    with stores.disk_errors(folder):
        stores.write_bytes(paths[0], text.getvalue().encode())
    json_files.write_json(paths[1], content)
    return paths
