"""--mode=noise_scale: one run, and its gradient noise scale beside its batch size."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from bs_jax.cli import common, config, train
from bs_jax.errors import UserError
from bs_jax.records import run_folder as records
from bs_jax.records.run_folder import Run
from bs_jax.records.stores import storage

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


def plan(recipe: Mapping[str, Any]) -> Run:
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
    from bs_jax.sweep.points import default_micro_batch_size, resolve
    from bs_jax.training import validate

    planned = resolve(recipe)
    batch, micro = planned.config["batch_size"], planned.config["micro_batch_size"]
    if not recipe["micro_batch_size"] and batch > 1:
        micro = min(micro, default_micro_batch_size(batch, recipe["base_batch_size"]))
    validate.check_two_micro_batches("--mode=noise_scale", batch, micro)
    if planned.config["bn_cross_device"]:
        raise UserError(
            "config.bn_cross_device couples the gradients of all devices, which hides the noise "
            "between them; set it to False for --mode=noise_scale"
        )
    measured = {**planned.config, "micro_batch_size": micro, "measure_noise": True}
    validate.check_run(measured)
    return Run(f"{planned.run_id}-noise", measured, planned.hparams)


def read(folder: Path, planned: Run) -> NoiseScaleCurve:
    """Read the noise scale from the metrics of a run.

    Args:
        folder: of the run.
        planned: of `plan`.

    Returns:
        The curve, up to the first number that is not finite.

    Raises:
        UserError: the records hold no noise.
    """
    from bs_jax.statistics.noise_curve import from_metrics

    path = folder / "metrics.jsonl"
    with records.disk_errors(path):
        lines = storage.read_bytes(path).decode().splitlines()
    return from_metrics(
        [json.loads(line) for line in lines],
        batch_size=planned.config["batch_size"],
        base_batch_size=planned.hparams["base_batch_size"],
        where=str(path),
    )


def write(curve: NoiseScaleCurve, folder: Path) -> list[Path]:
    """Write ``noise_scale.csv``, ``.json`` and ``.png`` into a folder; return their paths."""
    from bs_jax.report import plots, style

    paths = [folder / f"noise_scale.{suffix}" for suffix in ("csv", "json", "png")]
    figure = plots.noise_scale_figure(curve.rows, curve.batch_size, curve.base_batch_size, ERRORS)
    with records.disk_errors(folder):
        storage.write_bytes(paths[0], curve.to_csv().encode())
        records.write_json(paths[1], dataclasses.asdict(curve))
        storage.write_bytes(paths[2], style.to_png(figure))
    return paths
