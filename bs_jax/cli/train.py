"""--mode=train: one run of the recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

from bs_jax.cli import common, config, processes
from bs_jax.recipe import Recipe
from bs_jax.records import stores
from bs_jax.run import ResolvedRun

FLAGS = flags.FLAGS
FLAG_NAMES = (
    *common.FLAG_NAMES,
    *processes.FLAG_NAMES,
    "restore_from",
    "allow_config_change",
    "profile",
)


def define_flags() -> None:
    """Define the flags of this mode."""
    flags.DEFINE_string(
        "restore_from",
        None,
        "Folder or URL of another run: begin with its newest state, also at another batch size.",
    )
    flags.DEFINE_bool(
        "allow_config_change", False, "Go on with a run in --workdir whose config was another."
    )
    flags.DEFINE_bool(
        "profile",
        False,
        "Instead of training, write a trace of ten updates and an evaluation to WORKDIR/profile, "
        "for TensorBoard, xprof or Perfetto, and say what takes the time.",
    )


def run() -> int:
    """Train the run, alone or together with other processes."""
    return _train() if FLAGS.dry_run else processes.together(_train)


def _train() -> int:
    from bs_jax.sweep.points import resolve

    planned = resolve(config.plain())
    default = f"runs/{FLAGS.config.name}-train/{planned.run_id}"
    if FLAGS.profile:
        return _profile(planned, common.workdir(default))
    if FLAGS.restore_from is None:
        return train_run(planned, common.workdir(default))
    from bs_jax.training import distributed
    from bs_jax.training.carry_over import OtherRun

    path = stores.to_path(FLAGS.restore_from, "--restore_from")
    workdir = common.workdir(f"{default}-from-{path.name}")
    other = OtherRun(path, Recipe.parse(config.plain())) if distributed.is_first() else None
    if other:
        other.check(workdir)
    scaled = dataclasses.replace(planned.scaled, restored_from=str(path))
    planned = dataclasses.replace(planned, scaled=scaled)
    return train_run(planned, workdir, other)


def _profile(planned: ResolvedRun, workdir: Path) -> int:
    import jax

    from bs_jax.training import compilation, inputs, profiling

    stores.check_writable(workdir)
    compilation.enable_cache()
    found = profiling.profile(
        planned, inputs.load_data(planned.data), jax.local_devices(), workdir / "profile"
    )
    print(found.to_text())
    return 0


def train_run(planned: ResolvedRun, workdir: Path, other_run: Any = None) -> int:
    """Train one run in a folder of its own; with ``--dry_run`` print its hyperparameters alone.

    Args:
        planned: the run.
        workdir: its folder.
        other_run: an `OtherRun` to begin with.

    Returns:
        The exit code.

    Raises:
        UserError: a mistake of the user's.
    """
    from bs_jax.records.run_folder import RunFolder
    from bs_jax.sweep import local, progress
    from bs_jax.sweep.stopping import Stopped
    from bs_jax.training import checks, compilation, distributed, parallel

    distributed.check_same("config", planned.run_id)
    print(progress.describe(planned))
    for name, value in planned.scaled.values.items():
        shown = "estimated while training" if value is None else f"{value:.6g}"
        print(f"  {name}: {planned.scaled.base[name]:.6g} -> {shown}")
    if planned.is_guarded and planned.scaled.k > 1:
        print("  guard: beyond the measured noise scale steps fall back to the square-root rule's")
        print("         (SGD's to the base's); --config.scaling.guard=False lets them grow on")
    for warning in planned.scaled.warnings:
        print(f"warning: {warning}")
    if FLAGS.dry_run:
        return 0
    distributed.on_first(lambda: stores.check_writable(workdir))
    config.load_data([planned])

    def open_folder(writes: bool = True) -> RunFolder[ResolvedRun]:
        return RunFolder(workdir, planned, writes=writes, allow_change=FLAGS.allow_config_change)

    if not distributed.on_first(lambda: open_folder().done):
        compilation.enable_cache()
        checks.check_devices(planned, len(parallel.training_devices()))
        folder = open_folder(distributed.is_first())
        with progress.Display([planned], 0, quiet=not distributed.is_first()) as display:
            display.pending([planned])
            try:
                local.train_one(
                    folder, display, grace_seconds=FLAGS.grace_seconds, other_run=other_run
                )
            except Stopped as stopped:
                display.note("stopped; give the same command again to go on")
                return 128 + stopped.signal_number
    if not distributed.is_first():
        return 0
    summary = RunFolder(workdir, planned).summary()
    print(f"{summary.status} after {summary.examples:,} examples; records in {workdir}")
    for name, value in summary.final.items():
        print(f"  {name}: {progress.number(value)}")
    return 0
