"""Flags about where and how runs are trained; what is trained is the config's business."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from bs_jax.errors import UserError
from bs_jax.records.stores import storage

if TYPE_CHECKING:
    from bs_jax.records.run_folder import Run
    from bs_jax.sweep.progress import Display

FLAGS = flags.FLAGS


def define_run_flags() -> None:
    """Define the flags of this module."""
    flags.DEFINE_enum(
        "launcher",
        "local",
        ("local", "ray", "print"),
        "local: on this machine. ray: on a Ray cluster. print: a shell command a run, for others.",
    )
    flags.DEFINE_integer(
        "workers", 0, "Processes of a sweep; 0: one a core on a CPU, else this process alone."
    )
    flags.DEFINE_enum(
        "run_axis",
        "loop",
        ("loop", "vmap"),
        "Runs that share a compiled program go one after another, or side by side.",
    )
    flags.DEFINE_list("seeds", [], "Train every point of the sweep with these: 0,1,2,...")
    flags.DEFINE_string("only", "", "Train these runs of the sweep alone: RUN_ID,...; no report.")
    flags.DEFINE_string("ray_address", None, "Of a Ray cluster; default: $RAY_ADDRESS, or here.")
    flags.DEFINE_float("ray_cpus", 1.0, "CPU cores of a task.", lower_bound=0.0)
    flags.DEFINE_float("ray_gpus", -1.0, "GPUs of a task; -1: one where the cluster has any.")
    flags.DEFINE_float(
        "grace_seconds",
        20.0,
        "After SIGTERM: save and exit with code 143; after so long exit in any case.",
        lower_bound=0.0,
    )
    flags.DEFINE_string(
        "restore_from",
        None,
        "Folder or URL of another run: begin with its newest state, also at another batch size.",
    )
    flags.DEFINE_bool(
        "allow_config_change", False, "Go on with a run in --workdir whose config was another."
    )
    flags.DEFINE_enum(
        "distributed",
        "auto",
        ("auto", "off"),
        "Train one run on the processes of a Slurm, Open MPI, Kubernetes or Cloud TPU job.",
    )
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0 of a run on many.")
    flags.DEFINE_integer("num_processes", None, "Processes that train one run together.")
    flags.DEFINE_integer("process_id", None, "This one's number, from 0.")


def given_seeds() -> list[int]:
    """The seeds of ``--seeds``, in order; none where it is not given.

    Raises:
        UserError: not distinct whole numbers from 0.
    """
    texts = [text.strip() for text in FLAGS.seeds]
    seeds = [int(text) for text in texts if text.isascii() and text.isdecimal()]
    if len(set(seeds)) < len(texts):
        raise UserError(
            f"--seeds={','.join(texts)}: give whole numbers from 0, none twice, e.g. --seeds=0,1,2"
        )
    return seeds


def join_processes() -> bool:
    """Join the processes of one run, if the flags or the cluster say so."""
    from bs_jax.training import distributed

    if FLAGS.launcher != "local":
        return False  # this process trains nothing itself

    return distributed.initialize(
        FLAGS.distributed, FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id
    )


def train_runs(
    pending: Sequence[Run], runs: Sequence[Run], workdir: Path, display: Display
) -> list[str]:
    """Train runs of a sweep by the launcher of the flags.

    Args:
        pending: what is to be trained.
        runs: all runs of the sweep.
        workdir: its folder.
        display: shows progress.

    Returns:
        A line for each run that failed.

    Raises:
        Stopped: SIGTERM or SIGINT came; the states are saved.
        UserError: a mistake of the user's.
    """
    from bs_jax.sweep import launchers

    settings = {"run_axis": FLAGS.run_axis, "grace_seconds": FLAGS.grace_seconds}
    if FLAGS.run_axis == "vmap":
        pending = launchers.with_cohorts(pending, runs)
    if FLAGS.launcher == "ray":
        from bs_jax.sweep import ray_cluster as ray_launcher

        return ray_launcher.run_ray(
            pending,
            workdir,
            display,
            address=FLAGS.ray_address,
            cpus=FLAGS.ray_cpus,
            gpus=FLAGS.ray_gpus,
            **settings,
        )
    if workers := _worker_count(len(pending)):
        return launchers.run_processes(pending, workdir, display, workers=workers, **settings)
    return launchers.run_inline(pending, workdir, display, **settings)


def _worker_count(pending: int) -> int:
    """How many worker processes; 0 for this process alone."""
    import jax

    from bs_jax.training import distributed

    if distributed.process_count() > 1:
        return 0
    if FLAGS.workers:
        return min(FLAGS.workers, pending)
    if jax.default_backend() != "cpu" or FLAGS.run_axis == "vmap":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, pending)


def print_commands(pending: Sequence[Run], workdir: Path) -> None:
    """Print a shell command for each run, or for each cohort where they are vmapped."""
    from bs_jax.sweep.launchers import Schedule

    text = shlex.join(sys.argv[1:])
    given = shlex.split(re.sub(r"--?launcher[= ]\w+", "", text))
    schedule = Schedule(pending, at_once=len(pending) if FLAGS.run_axis == "vmap" else 1)
    while assignment := schedule.next(0):
        only = ",".join(run.run_id for run in assignment)
        words = [sys.executable, os.path.abspath(sys.argv[0]), *given, "--distributed=off"]
        print(shlex.join([*words, f"--workdir={storage.text_of(workdir)}", f"--only={only}"]))
