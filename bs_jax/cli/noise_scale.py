"""--mode=noise_scale: one run, and its gradient noise scale beside its batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from bs_jax.cli import common, config, train
from bs_jax.errors import UserError
from bs_jax.recipe import Recipe
from bs_jax.records import json_files, metrics_file, stores
from bs_jax.run import ResolvedRun

if TYPE_CHECKING:  # it imports JAX, which the other modes need not
    from bs_jax.statistics.noise_curve import NoiseScaleCurve

FLAGS = flags.FLAGS
FLAG_NAMES = (*common.FLAG_NAMES, "allow_config_change", "distributed")


def define_flags() -> None:
    """Define the flags of this mode: none of its own."""


def run() -> int:
    """Train the run, then write and print its noise scale."""
    planned = plan(config.plain())
    workdir = common.workdir(f"runs/{FLAGS.config.name}-noise_scale/{planned.run_id}")
    code = train.train_run(planned, workdir)
    if code or FLAGS.dry_run:
        return code
    curve = read(workdir, planned)
    print(curve.to_text())
    print(f"Plot and numbers: {', '.join(str(path) for path in write(curve, workdir))}")
    return 0


def plan(recipe: Mapping[str, Any]) -> ResolvedRun:
    """Resolve a recipe to a run that measures the noise beside its training, whatever its rule.

    A rule whose factors are known before training would take the batch in one piece. Here it is
    split as for the rules that measure, into micro-batches of the base size or half the batch.
    Without ``ghost_batch_size`` BatchNorm then normalises such a micro-batch.

    Args:
        recipe: the recipe, nested.

    Returns:
        The run. Its id is that of the same training, with ``-noise`` behind it.

    Raises:
        UserError: the batch cannot be split, the gradients are not independent, or the recipe
            cannot be trained.
    """
    from bs_jax.sweep.points import resolve
    from bs_jax.training.resolve import default_micro_batch_size

    base, planned = Recipe.parse(recipe), resolve(recipe)
    batch, micro = planned.batch_size, planned.micro_batch_size
    if not base.micro_batch_size and batch > 1:
        micro = min(micro, default_micro_batch_size(batch, base.base_batch_size))
    if planned.bn_cross_device and batch // micro > 1:
        raise UserError(
            "config.bn_cross_device couples the gradients of all devices, which hides the noise "
            "between them; set it to False for --mode=noise_scale"
        )
    measured = dataclasses.replace(
        planned,
        run_id=f"{planned.run_id}-noise",
        micro_batch_size=micro,
        measures_noise=True,
    )
    measured.check_two_micro_batches("--mode=noise_scale")
    return measured


def read(folder: Path, planned: ResolvedRun) -> NoiseScaleCurve:
    """Read the noise scale from the metrics of a run.

    Args:
        folder: of the run.
        planned: of `plan`.

    Returns:
        The curve, up to the first number that is not finite.

    Raises:
        UserError: the records hold no noise.
    """
    path = folder / "metrics.jsonl"
    with stores.disk_errors(path):
        rows = metrics_file.read_rows(path)
    return curve_of(rows, planned, where=str(path))


def curve_of(
    rows: Sequence[Mapping[str, Any]], planned: ResolvedRun, where: str = "the records"
) -> NoiseScaleCurve:
    """The noise scale in rows of metrics; see `read`.

    Args:
        rows: of the run's metrics, from its beginning.
        planned: of `plan`.
        where: the rows come from, for the error.
    """
    from bs_jax.statistics.noise_curve import from_metrics

    return from_metrics(
        rows,
        batch_size=planned.batch_size,
        base_batch_size=planned.scaled.base_batch_size,
        where=where,
    )


def write(curve: NoiseScaleCurve, folder: Path) -> list[Path]:
    """Write ``noise_scale.csv``, ``.json`` and ``.png`` into a folder; return their paths."""
    from bs_jax.report import plots, style
    from bs_jax.scaling.noise import ERRORS

    paths = [folder / f"noise_scale.{suffix}" for suffix in ("csv", "json", "png")]
    figure = plots.noise_scale_figure(curve.rows, curve.batch_size, curve.base_batch_size, ERRORS)
    with stores.disk_errors(folder):
        stores.write_bytes(paths[0], curve.to_csv().encode())
        json_files.write_json(paths[1], dataclasses.asdict(curve))
        stores.write_bytes(paths[2], style.to_png(figure))
    return paths
