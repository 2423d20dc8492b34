"""--mode=sweep: train every point of a sweep, then report."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from bs_jax.cli import common, config, processes
from bs_jax.errors import UserError
from bs_jax.recipe import Recipe
from bs_jax.records import stores
from bs_jax.run import ResolvedRun
from bs_jax.schema import choose

if TYPE_CHECKING:
    from rich.console import Console

    from bs_jax.records.run_files import Summary
    from bs_jax.sweep.cohorts import Schedule
    from bs_jax.sweep.plan import Sweep
    from bs_jax.sweep.points import Point
    from bs_jax.sweep.progress import Display

FLAGS = flags.FLAGS
_BEGAN = time.monotonic()  # of this process, nearly
_RAY = ("ray_address", "ray_cpus", "ray_gpus")
FLAG_NAMES = (
    *common.FLAG_NAMES,
    *processes.FLAG_NAMES,
    "sweep",
    "seeds",
    "only",
    "run_axis",
    "workers",
    "budget_minutes",
    "launcher",
    *_RAY,
)


def define_flags() -> None:
    """Define the flags of this mode."""
    flags.DEFINE_string("sweep", "rules", "A function `sweep_NAME` of the config file.")
    flags.DEFINE_list("seeds", [], "Train every point of the sweep with these: 0,1,2,...")
    flags.DEFINE_string("only", "", "Train these runs of the sweep alone: RUN_ID,...; no report.")
    flags.DEFINE_enum(
        "run_axis",
        "auto",
        ("auto", "loop", "vmap"),
        "How runs that share a compiled program are trained. loop: one after another. vmap: side "
        "by side, as many as fit in memory. auto: side by side on an accelerator where an update "
        "is too small to fill it.",
    )
    flags.DEFINE_float(
        "budget_minutes",
        0.0,
        "End before so many minutes are over: the runs that decide most come first, the states are "
        "saved, and the same command goes on later. 0: train all.",
        lower_bound=0.0,
    )
    flags.DEFINE_enum(
        "launcher",
        "local",
        ("local", "ray", "print"),
        "local: on this machine. ray: on a Ray cluster. print: a shell command a run, for others.",
    )
    flags.DEFINE_integer(
        "workers",
        0,
        "Processes of a sweep; 0: one a core on a CPU, one a card where there are several GPUs, "
        "else this process alone.",
    )
    flags.DEFINE_string("ray_address", None, "Of a Ray cluster; default: $RAY_ADDRESS, or here.")
    flags.DEFINE_float("ray_cpus", 1.0, "CPU cores of a task.", lower_bound=0.0)
    flags.DEFINE_float("ray_gpus", -1.0, "GPUs of a task; -1: one where the cluster has any.")


def run() -> int:
    """Train the sweep, alone or together with other processes, then write its report."""
    _check_flags()
    if FLAGS.dry_run or FLAGS.launcher != "local":  # this process trains nothing itself
        return _sweep()
    return processes.together(_sweep)


def workdir() -> Path:
    """The folder of the sweep."""
    return common.workdir(f"runs/{FLAGS.config.name}-{FLAGS.sweep}")


def _check_flags() -> None:
    """Reject flags that have no effect with this launcher, and impossible numbers."""
    if FLAGS.workers < 0:
        raise UserError(f"--workers is {FLAGS.workers}; use 0 for one a core, or a positive number")
    useless = {
        "local": _RAY,
        "ray": ("workers",),
        "print": (*_RAY, "workers", "budget_minutes"),
    }
    for name in useless[FLAGS.launcher]:
        if FLAGS[name].value != FLAGS[name].default:
            needed = "ray" if name in _RAY else "local"
            raise UserError(
                f"--{name} has no effect with --launcher={FLAGS.launcher}; leave it out, or use "
                f"--launcher={needed}"
            )


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


def _sweep() -> int:
    from rich.console import Console

    from bs_jax.sweep import budget, plan, progress
    from bs_jax.sweep.stopping import Stopped
    from bs_jax.training import compilation, distributed

    recipe = config.plain()
    planned = _plan(recipe)
    wanted = _wanted(planned)
    if FLAGS.dry_run:
        seconds, sentence = _times(planned, workdir())
        console = Console()
        if console.is_terminal:
            _show(planned, console, seconds)
            console.print(sentence, markup=False, highlight=False, end="\n" * bool(sentence))
        else:  # for other programs: every point on a line, with the name of its run
            print(plan.listing(planned, seconds))
            print(sentence, end="\n" * bool(sentence))
        return 0
    distributed.check_same("config", json.dumps([recipe, [run.run_id for run in planned.runs]]))
    folder = workdir()
    distributed.on_first(lambda: stores.check_writable(folder))
    data = config.load_data(planned.runs)
    open_ids = set(distributed.on_first(lambda: _begin(planned, folder, recipe, data)))
    pending = [run for run in wanted if run.run_id in open_ids]
    if FLAGS.launcher == "print":
        _print_commands(_schedule(pending, planned), folder)
        return 0
    failures: list[str] = []
    if not pending:
        print(f"All {len(wanted)} runs are done already.")
    else:
        compilation.enable_cache()
        print(
            f"{len(planned.rows)} points, {len(wanted)} runs, {len(pending)} to train, "
            f"records in {folder}"
        )
        if FLAGS.budget_minutes:
            print(_forecast(planned, pending, folder))
        display = progress.Display(
            wanted, len(wanted) - len(pending), quiet=not distributed.is_first()
        )
        schedule = _schedule(pending, planned)
        limit = budget.Budget(FLAGS.budget_minutes, FLAGS.grace_seconds, _BEGAN, display.note)
        with display, limit:
            display.pending(pending)
            try:
                failures = _train(schedule, len(pending), folder, display, limit.grace_seconds)
            except Stopped as stopped:
                again = "give the same command again to go on"
                if not limit.over:
                    display.note(f"stopped; {again}")
                    return 128 + stopped.signal_number
                display.note(f"the {FLAGS.budget_minutes:g} minutes are over; {again}")
                if not limit.room_for_report:
                    display.note("for the report give it with --mode=report")
                    return 0
    writes = distributed.is_first()
    distributed.shutdown()
    if writes and not FLAGS.only:
        from bs_jax.cli import report

        report.write_report(folder)
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failures else 0


def _plan(recipe: Mapping[str, Any]) -> Sweep:
    """The points of the sweep and the runs that they come to."""
    from bs_jax.sweep import plan
    from bs_jax.sweep.points import with_seeds

    Recipe.parse(recipe)  # its mistakes are told before those of its points
    points = config.points(FLAGS.sweep)
    _reject_overridden(points)
    if seeds := given_seeds():
        points = with_seeds(points, seeds)
    return plan.plan_sweep(FLAGS.sweep, recipe, points)


def _reject_overridden(points: Sequence[Point]) -> None:
    """Reject a config flag that every point of the sweep overwrites: it would have no effect."""
    for field, value in config.overrides().items():
        if all(field in point.overrides for point in points):
            raise UserError(
                f"--config.{field}={value} has no effect on sweep {FLAGS.sweep!r}, which sets that "
                "field itself; leave the flag out, or use "
                + ("--seeds=0,1,2" if field == "seed" else "--mode=train")
            )


def _show(planned: Sweep, console: Console, seconds: Mapping[str, str]) -> None:
    """Print the points as a table that fits the terminal, those that differ in the seed as one."""
    from bs_jax.cli.tables import tables
    from bs_jax.sweep import plan

    columns, same = plan.columns_of(planned, seconds)
    names = [name for name in columns if name not in ("seed", "run")]
    seeds: dict[tuple[str, ...], list[str]] = {}
    for at, seed in enumerate(columns["seed"]):
        seeds.setdefault(tuple(columns[name][at] for name in names), []).append(seed)
    rows = [[*map(_short, cells), ",".join(found)] for cells, found in seeds.items()]
    shown, names = list(zip(*rows, strict=True)), [*names, "seeds"]
    for name, cells in list(zip(names, shown, strict=True)):
        if len(set(cells)) == 1 and name in ("offset", "seeds"):
            same = {**same, name: cells[0]}
            names.remove(name)
            shown.remove(cells)
    keys = len({"arm", "batch_size", "offset"} & set(names))
    for part in tables(names, list(zip(*shown, strict=True)), console.width, keys):
        console.print(part)
    console.print("\n".join(plan.notes(planned, same)), markup=False, highlight=False)


def _short(cell: str) -> str:
    """A number to four digits; whatever else as it is."""
    try:
        return f"{float(cell):.4g}" if "." in cell or "e-" in cell else cell
    except ValueError:
        return cell


def _wanted(planned: Sweep) -> list[ResolvedRun]:
    """The runs of ``--only``; all where it is not given."""
    only = [run_id for run_id in FLAGS.only.split(",") if run_id]
    for run_id in only:
        choose("run in --only", run_id, [run.run_id for run in planned.runs])
    return [run for run in planned.runs if not only or run.run_id in only]


def _begin(planned: Sweep, folder: Path, recipe: Mapping[str, Any], data: str) -> list[str]:
    """Write what is known of the sweep; the ids of the runs that are not done."""
    from bs_jax.sweep import plan

    folders = stores.each(folder, lambda run: plan.run_folder(folder, run), planned.runs)
    with stores.disk_errors(folder):
        listed = stores.exists(folder / "sweep.json")
    if not FLAGS.only or not listed:  # else the whole sweep's stays
        command = shlex.join(["python", *sys.argv])
        plan.write_sweep_file(planned, folder, recipe, command=command, data=data)
    done = stores.each(folder, lambda one: one.done, folders)
    return [one.run.run_id for one, finished in zip(folders, done, strict=True) if not finished]


def _schedule(pending: Sequence[ResolvedRun], planned: Sweep) -> Schedule:
    from bs_jax.sweep import machine
    from bs_jax.sweep.cohorts import Schedule

    axis, priorities = FLAGS.run_axis, planned.priorities if FLAGS.budget_minutes else None
    if axis == "auto" and (FLAGS.launcher == "print" or FLAGS.only):
        return Schedule(pending, planned.runs)  # a run alone: its cohort is others' to train
    if axis == "auto" and FLAGS.launcher == "ray":
        vmapped = machine.Machine("gpu" if FLAGS.ray_gpus > 0 else "cpu", 1, 1).vmapped(axis)
        return Schedule(pending, planned.runs, vmapped, priorities)
    return Schedule(pending, planned.runs, machine.here().vmapped(axis), priorities)


def _train(
    schedule: Schedule, pending: int, folder: Path, display: Display, grace: float
) -> list[str]:
    """Train by the launcher of the flags; a line for each run that failed."""
    from bs_jax.sweep import local

    if FLAGS.launcher == "ray":
        from bs_jax.sweep import ray_cluster

        return ray_cluster.train_on_ray(
            schedule,
            folder,
            display,
            grace_seconds=grace,
            address=FLAGS.ray_address,
            cpus=FLAGS.ray_cpus,
            gpus=FLAGS.ray_gpus,
        )
    if workers := _worker_count(pending):
        return local.train_in_processes(
            schedule, folder, display, workers=workers, grace_seconds=grace
        )
    local.train_here(schedule, folder, display, grace_seconds=grace)
    return []


def _worker_count(pending: int) -> int:
    """How many worker processes; 0 for this process alone."""
    from bs_jax.sweep import machine
    from bs_jax.training import distributed

    if distributed.process_count() > 1:
        return 0
    return machine.here().workers(pending, FLAGS.workers, FLAGS.run_axis)


def _finished(planned: Sweep, folder: Path) -> dict[str, Summary]:
    """Run id -> summary of each run that is done; nothing is written."""
    from bs_jax.sweep import plan

    folders = [plan.run_folder(folder, run, writes=False) for run in planned.runs]
    found = stores.each(folder, lambda one: one.summary() if one.done else None, folders)
    return {
        run.run_id: summary for run, summary in zip(planned.runs, found, strict=True) if summary
    }


def _forecast(planned: Sweep, pending: Sequence[ResolvedRun], folder: Path) -> str:
    """What the budget is likely to get done."""
    from bs_jax.sweep import budget

    speed = budget.Speed.of(planned.runs, _finished(planned, folder))
    workers = max(_worker_count(len(pending)), 1)
    return budget.forecast(pending, speed, workers, FLAGS.budget_minutes)


def _times(planned: Sweep, folder: Path) -> tuple[dict[str, str], str]:
    """How long each run takes at the speed of those that are done, and a sentence; or nothing."""
    from bs_jax.report.numbers import duration
    from bs_jax.sweep import budget

    done = _finished(planned, folder)
    speed = budget.Speed.of(planned.runs, done)
    if not speed.seconds_per_example:
        return {}, ""
    pending = [run for run in planned.runs if run.run_id not in done]
    if not pending:
        return dict.fromkeys(done, "done"), f"All {len(done)} runs are done in {folder}"
    seconds = {run.run_id: speed.seconds(run) for run in pending}
    rates = [
        f"{1 / value:,.0f} images/s in micro-batches of {size}"
        for size, value in sorted(speed.seconds_per_example.items())
    ]
    shown = {run_id: f"{value:.0f}" for run_id, value in seconds.items()}
    return dict.fromkeys(done, "done") | shown, (
        f"{len(done)} runs are done in {folder}; at their speed ({', '.join(rates)}) the other "
        f"{len(pending)} take {duration(sum(seconds.values()))} in one process"
    )


def _print_commands(schedule: Schedule, folder: Path) -> None:
    from bs_jax.sweep.commands import commands

    program = [sys.executable, os.path.abspath(sys.argv[0]), *config.portable(sys.argv[1:])]
    for line in commands(schedule, folder, [*program, "--distributed=off"]):
        print(line)
