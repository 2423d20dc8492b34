"""The flags of main.py and the modes behind them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags

from bs_jax.cli.flags import (
    define_run_flags,
    given_seeds,
    join_processes,
    print_commands,
    train_runs,
)
from bs_jax.errors import UserError
from bs_jax.records.stores import storage
from bs_jax.training.form import check_form

_MODES = ("sweep", "train", "report", "explain", "noise_scale")
_OF_A_SWEEP = ("launcher", "only", "run_axis", "seeds", "workers")
_OF_ONE_RUN = ("profile", "restore_from")
_OF_MANY_PROCESSES = ("coordinator_address", "num_processes", "process_id")
_WITHOUT_EFFECT = {
    "sweep": _OF_ONE_RUN,
    "train": _OF_A_SWEEP,
    "noise_scale": (*_OF_A_SWEEP, *_OF_ONE_RUN, *_OF_MANY_PROCESSES),
}
_DEFAULT_CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "fashion_mnist.py")
FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags of main.py."""
    from ml_collections import config_flags

    config_flags.DEFINE_config_file(
        "config", _DEFAULT_CONFIG, "The recipe; override a field by --config.batch_size=256."
    )
    flags.DEFINE_enum(
        "mode",
        "sweep",
        _MODES,
        "sweep: train every point of --sweep, then report. train: one run of the config. report: "
        "from the records in --workdir. explain: the hyperparameters before and after scaling. "
        "noise_scale: one run, and its gradient noise scale beside its batch size.",
    )
    flags.DEFINE_string("sweep", "rules", "A function `sweep_NAME` of the config file.")
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the records, or gs://BUCKET/PATH, s3://BUCKET/PATH; default: "
        "runs/<config>-<sweep>.",
    )
    flags.DEFINE_bool("dry_run", False, "List the points and their hyperparameters; train nothing.")
    flags.DEFINE_enum("format", "text", ("text", "markdown", "json"), "Output of --mode=explain.")
    flags.DEFINE_bool(
        "profile",
        False,
        "With --mode=train: write a trace of ten updates and an evaluation to WORKDIR/profile, for "
        "TensorBoard, xprof or Perfetto, and say what takes the time, instead of training.",
    )
    define_run_flags()


def run() -> int:
    """Do what the flags say.

    Returns:
        The exit code: 0 done, 1 some runs failed, 128 + n stopped by signal n; 75 where another
        process of a joined run was lost.

    Raises:
        UserError: a mistake of the user's.
    """
    _refuse_without_effect()
    modes: dict[str, Callable[[], int]] = {
        "sweep": _sweep,
        "train": _train,
        "report": _report,
        "explain": _explain,
        "noise_scale": _noise_scale,
    }
    if FLAGS.mode in ("sweep", "train") and not FLAGS.dry_run and join_processes():
        from bs_jax.training import distributed

        if not distributed.is_first():  # process 0 tells all
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        with distributed.ending_together():
            return modes[FLAGS.mode]()
    return modes[FLAGS.mode]()


def _refuse_without_effect() -> None:
    """Refuse a flag that this mode would pass over: who gave it expects something else."""
    for name in _WITHOUT_EFFECT.get(FLAGS.mode, ()):
        if FLAGS[name].value != FLAGS[name].default:
            raise UserError(
                f"--{name} has no effect with --mode={FLAGS.mode}; leave it out, or use --mode="
                + ("sweep" if name in _OF_A_SWEEP else "train")
            )


def one_line(error: Exception) -> str:
    r"""An error's message in one line; for a misspelt config field, the one that was meant.

    >>> one_line(AttributeError("'bach_size'\nDid you mean \"batch_size\" instead?"))
    "config has no field 'bach_size'; did you mean 'batch_size'?"
    """
    text = str(error.args[0]) if error.args else str(error)
    # ml_collections puts the traceback into the message of what a config file raises.
    *_, text = text.rsplit("bs_jax.errors.UserError: ", 1)
    names = re.findall(r"[\w.]+", text.split("Did you mean")[0])
    meant = re.search(r'Did you mean "([^"]*)"', text)
    if meant and names:
        return f"config has no field {names[0]!r}; did you mean {meant[1]!r}?"
    if isinstance(error, AttributeError | KeyError) and names:
        return f"config has no field {names[0]!r}; see the fields in the config file"
    return re.sub(r"\s+", " ", text).strip()


def _config() -> dict[str, Any]:
    """The config as plain nested data, of the right form."""
    try:
        config = json.loads(FLAGS.config.to_json())
    except OSError as error:  # config_flags keeps its failure to load until the first use
        raise UserError(f"--config: {one_line(error)}") from error
    check_form(config)
    return config


def _config_module() -> ModuleType:
    from ml_collections import config_flags

    # What follows a colon is the argument of get_config, the name of a form of the recipe.
    path = config_flags.get_config_filename(FLAGS["config"]).split(":", 1)[0]
    spec = importlib.util.spec_from_file_location("bs_jax_config", path)
    assert spec is not None  # the flag has loaded it before
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _points() -> list[Any]:
    from bs_jax.training import validate

    module = _config_module()
    prefix = "sweep_"
    known = [name.removeprefix(prefix) for name in vars(module) if name.startswith(prefix)]
    validate.choose("sweep", FLAGS.sweep, known)
    return getattr(module, prefix + FLAGS.sweep)()


def _refuse_overridden(points: list[Any]) -> None:
    """Refuse a flag that every point of the sweep would overwrite: it would be without effect."""
    from ml_collections import config_flags

    given = config_flags.get_override_values(FLAGS["config"])
    for field, value in given.items():
        if all(field in point.overrides for point in points):
            raise UserError(
                f"--config.{field}={value} has no effect on sweep {FLAGS.sweep!r}, which sets that "
                "field itself; leave the flag out, or use "
                + ("--seeds=0,1,2" if field == "seed" else "--mode=train")
            )


def _workdir(default: str) -> Path:
    return storage.to_path(FLAGS.workdir or default)


def _sweep_workdir() -> Path:
    return _workdir(f"runs/{FLAGS.config.name}-{FLAGS.sweep}")


def _command() -> str:
    return shlex.join(["python", *sys.argv])


def _sweep() -> int:
    from bs_jax.records import run_folder as records
    from bs_jax.sweep import plan as sweep
    from bs_jax.sweep import progress
    from bs_jax.sweep.points import with_seeds
    from bs_jax.sweep.stopping import Stopped
    from bs_jax.training import compilation, distributed, plan, validate

    if FLAGS.workers < 0:
        raise UserError(f"--workers is {FLAGS.workers}; use 0 for one a core, or a positive number")
    config = _config()
    validate.check_config(plan.with_length(config))
    points = _points()
    _refuse_overridden(points)
    if seeds := given_seeds():
        points = with_seeds(points, seeds)
    planned = sweep.plan_sweep(FLAGS.sweep, config, points)
    only = [run_id for run_id in FLAGS.only.split(",") if run_id]
    for run_id in only:
        validate.choose("run in --only", run_id, [run.run_id for run in planned.runs])
    if FLAGS.dry_run:
        print(sweep.listing(planned))
        return 0
    distributed.check_same("config", json.dumps([config, [run.run_id for run in planned.runs]]))
    workdir = _sweep_workdir()
    distributed.on_first(lambda: records.check_writable(workdir))
    data = _load_data(planned.runs)

    def prepare() -> list[str]:
        folders = storage.each(workdir, lambda run: sweep.run_folder(workdir, run), planned.runs)
        with records.disk_errors(workdir):
            listed = storage.exists(workdir / "sweep.json")
        if not only or not listed:  # else the whole sweep's stays
            sweep.write_sweep_file(planned, workdir, config, command=_command(), data=data)
        done = storage.each(workdir, lambda folder: folder.done, folders)
        return [f.run.run_id for f, finished in zip(folders, done, strict=True) if not finished]

    open_ids = set(distributed.on_first(prepare))
    wanted = [run for run in planned.runs if not only or run.run_id in only]
    pending = [run for run in wanted if run.run_id in open_ids]
    if FLAGS.launcher == "print":
        print_commands(pending, workdir)
        return 0
    failures: list[str] = []
    if not pending:
        print(f"All {len(wanted)} runs are done already.")
    else:
        compilation.enable_cache()
        print(
            f"{len(planned.rows)} points, {len(wanted)} runs, {len(pending)} to train, "
            f"records in {workdir}"
        )
        with progress.Display(
            wanted, len(wanted) - len(pending), quiet=not distributed.is_first()
        ) as display:
            display.pending(pending)
            try:
                failures = train_runs(pending, planned.runs, workdir, display)
            except Stopped as stopped:
                display.note("stopped; give the same command again to go on")
                return 128 + stopped.signal_number
    writes = distributed.is_first()
    distributed.shutdown()
    if writes and not only:
        _write_report(workdir)
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failures else 0


def _load_data(runs: list[Any]) -> str:
    """Load each data set once, before anything compiles: it is checked, and cached for workers."""
    from bs_jax.training import inputs, validate

    loaded = {}
    for run in runs:
        key = inputs.data_key(run.config)
        if key not in loaded:
            loaded[key] = inputs.load_data(run.config)
        data = loaded[key]
        validate.check_data(run.config, len(data.train), data.image_shape[-1])
    return "; ".join(
        f"{data.description}: {len(data.train):,} to train on, {len(data.eval):,} to evaluate"
        for data in loaded.values()
    )


def _train() -> int:
    from bs_jax.sweep.points import resolve

    run = resolve(_config())
    default = f"runs/{FLAGS.config.name}-train/{run.run_id}"
    if FLAGS.profile:
        return _profile(run, _workdir(default))
    if FLAGS.restore_from is None:
        return _train_run(run, _workdir(default))
    from bs_jax.training import distributed
    from bs_jax.training.carry_over import OtherRun
    from bs_jax.training.plan import with_length

    path = storage.to_path(FLAGS.restore_from, "--restore_from")
    workdir = _workdir(f"{default}-from-{path.name}")
    other = OtherRun(path, with_length(_config())) if distributed.is_first() else None
    if other:
        other.check(workdir)
    run.hparams["restored_from"] = str(path)
    return _train_run(run, workdir, other)


def _profile(run: Any, workdir: Path) -> int:
    import jax

    from bs_jax.records import run_folder as records
    from bs_jax.training import compilation, inputs, profiling

    records.check_writable(workdir)
    compilation.enable_cache()
    found = profiling.profile(
        run.config, inputs.load_data(run.config), jax.local_devices(), workdir / "profile"
    )
    print(found.to_text())
    return 0


def _noise_scale() -> int:
    from bs_jax.cli import noise_scale

    run = noise_scale.plan(_config())
    workdir = _workdir(f"runs/{FLAGS.config.name}-noise_scale/{run.run_id}")
    code = _train_run(run, workdir)
    if code or FLAGS.dry_run:
        return code
    curve = noise_scale.read(workdir, run)
    print(curve.to_text())
    print(f"Plot and numbers: {', '.join(str(path) for path in noise_scale.write(curve, workdir))}")
    return 0


def _train_run(run: Any, workdir: Path, other_run: Any = None) -> int:
    import jax

    from bs_jax.records import run_folder as records
    from bs_jax.records.run_folder import RunFolder
    from bs_jax.sweep import launchers, progress
    from bs_jax.training import compilation, distributed, validate

    distributed.check_same("config", run.run_id)
    print(progress.describe(run))
    for name, value in run.hparams["scaled"].items():
        shown = "estimated while training" if value is None else f"{value:.6g}"
        print(f"  {name}: {run.hparams['base'][name]:.6g} -> {shown}")
    for warning in run.hparams["warnings"]:
        print(f"warning: {warning}")
    if FLAGS.dry_run:
        return 0
    distributed.on_first(lambda: records.check_writable(workdir))
    _load_data([run])

    def open_folder(writes: bool = True) -> RunFolder:
        return RunFolder(workdir, run, writes=writes, allow_change=FLAGS.allow_config_change)

    if not distributed.on_first(lambda: open_folder().done):
        compilation.enable_cache()
        validate.check_devices(run.config, jax.device_count())
        folder = open_folder(distributed.is_first())
        with progress.Display([run], 0, quiet=not distributed.is_first()) as display:
            display.pending([run])
            try:
                launchers.run_one(
                    folder, display, grace_seconds=FLAGS.grace_seconds, other_run=other_run
                )
            except launchers.Stopped as stopped:
                display.note("stopped; give the same command again to go on")
                return 128 + stopped.signal_number
    if not distributed.is_first():
        return 0
    summary = RunFolder(workdir, run).summary()
    print(f"{summary['status']} after {summary['examples']:,} examples; records in {workdir}")
    for name, value in summary["final"].items():
        print(f"  {name}: {value:.4f}")
    return 0


def _report() -> int:
    _write_report(_sweep_workdir())
    return 0


def _write_report(workdir: Path) -> None:
    from rich.console import Console

    from bs_jax.records import results
    from bs_jax.report import write as report
    from bs_jax.statistics import analysis

    found = results.load_results(workdir)
    analysed = analysis.analyse(found)
    path = report.write_report(workdir, found, analysed)
    console = Console()
    console.print(report.terminal_table(analysed))
    if (answers := report.terminal_findings(analysed)) is not None:
        console.print(answers)
    print(f"Report: {path}")


def _explain() -> int:
    from bs_jax.training import optimizers, plan

    explanation = optimizers.explain_recipe(plan.with_length(_config()))
    render = {
        "text": explanation.to_text,
        "markdown": explanation.to_markdown,
        "json": explanation.to_json,
    }
    print(render[FLAGS.format]())
    return 0
