"""Scheduling, real worker processes, signals and kills."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys

import pytest
from faults.bench import outcome
from helpers.commands import lines, run, start, wait_for
from helpers.runs import fake_run
from helpers.training import rows
from rich.console import Console

from bs_jax.sweep.cohorts import Schedule
from bs_jax.sweep.progress import Display


def test_a_worker_stays_with_its_cohort_and_then_helps_another():
    runs = [fake_run(f"a{n}", 8) for n in range(4)] + [fake_run(f"b{n}", 9) for n in range(2)]
    schedule = Schedule(runs)
    order = [schedule.next(worker).runs[0].run_id for worker in (0, 1, 0, 1, 1, 0)]
    # Worker 0 takes the larger cohort, worker 1 the other, then part of the first.
    assert order == ["a0", "b0", "a1", "b1", "a2", "a3"]
    assert schedule.next(0) is None


def test_vmapped_assignments_hold_a_whole_cohort_finished_runs_included():
    runs = [fake_run(f"a{n}", 8) for n in range(3)] + [fake_run("b0", 9), fake_run("c0", 10)]
    schedule = Schedule(runs[1:4], runs, vmapped=lambda run: True)
    found = [schedule.next(0), schedule.next(0)]
    assert [[run.run_id for run in a.runs] for a in found] == [["a0", "a1", "a2"], ["b0"]]
    assert all(assignment.vmapped for assignment in found)
    assert schedule.next(0) is None


def test_a_cohort_is_vmapped_or_not_by_itself():
    runs = [fake_run(f"a{n}", 8) for n in range(2)] + [fake_run(f"b{n}", 9) for n in range(2)]
    schedule = Schedule(runs, vmapped=lambda run: run.run_id.startswith("a"))
    found = [schedule.next(0) for _ in range(3)]
    assert sorted([run.run_id for run in assignment.runs] for assignment in found) == [
        ["a0", "a1"],
        ["b0"],
        ["b1"],
    ]


def test_progress_without_a_terminal_is_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr("bs_jax.sweep.progress._PLAIN_SECONDS", 0.0)
    run, other = fake_run("a0", 8), fake_run("a1", 8)
    console = Console(file=sys.stdout, force_terminal=False, width=200)
    with Display([run, other], 1, console) as display:
        display.pending([run])
        display.starting(0, run)
        display.event(
            0,
            {
                "event": "progress",
                "run_id": "a0",
                "examples": 50,
                "train_examples": 100,
                "metrics": {"train/loss": 0.5},
                "noise_scale": 90.0,
                "noise_scale_low": 60.4,
                "noise_scale_high": None,
            },
        )
        display.event(0, {"event": "run_finished", "run_id": "a0", "status": "diverged"})
    out = capsys.readouterr().out
    assert "50 of 100 examples, " in out
    assert "images/s, train loss 0.500, noise scale 90 (60 or more)" in out
    assert "diverged (recorded; the sweep goes on)" in out
    assert out.splitlines()[-1] == "2 of 2 runs done, all done in 0 s"


def test_a_single_run_counts_examples_and_the_time_left_leaves_compilation_out(capsys, monkeypatch):
    """500 of 1,000 examples in 70 s, of which 60 s compiled: 50 images/s, 10 s left."""
    now = [1000.0]
    monkeypatch.setattr("bs_jax.sweep.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("bs_jax.sweep.progress._PLAIN_SECONDS", 0.0)
    run = fake_run("a0", 8, examples=1000)
    with Display([run], 0, Console(file=sys.stdout, force_terminal=False, width=200)) as display:
        display.pending([run])
        display.starting(0, run)
        now[0] += 5  # imports
        display.event(0, {"event": "compiling", "run_id": "a0"})
        now[0] += 70
        said = {"event": "progress", "run_id": "a0", "examples": 700, "train_examples": 1000}
        display.event(0, said | {"metrics": {}, "compile_seconds": 60.0, "resumed_at": 200})
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "compiling"
    assert second.startswith("700 of 1,000 examples, about 6 s left; ")
    assert "50 images/s" in second


def test_programs_that_are_still_to_be_made_count_in_the_time_left(monkeypatch):
    """One of two cohorts is done: 10 s of compiling and 100 s of training; as much is left."""
    now = [1000.0]
    monkeypatch.setattr("bs_jax.sweep.progress.time.monotonic", lambda: now[0])
    runs = [fake_run("a0", 8, examples=1000), fake_run("b0", 9, examples=1000)]
    shown = []
    console = Console(file=io.StringIO(), force_terminal=False)
    with Display(runs, 0, console) as display:
        display.pending(runs)
        display.event(0, {"event": "compiling", "run_id": "a0"})
        now[0] += 110
        said = {"event": "progress", "run_id": "a0", "examples": 1000, "train_examples": 1000}
        display.event(0, said | {"metrics": {}, "compile_seconds": 10.0})
        display.event(0, {"event": "run_finished", "run_id": "a0", "status": "done"})
        shown.append(console.file.getvalue())
    assert "0 of 2 runs, about 1 min 50 s left" in shown[0]


def test_a_run_that_was_interrupted_does_not_count_as_done(capsys, monkeypatch):
    monkeypatch.setattr("bs_jax.sweep.progress._PLAIN_SECONDS", 0.0)
    run, other = fake_run("a0", 8), fake_run("a1", 8)
    with Display([run, other], 0, Console(file=sys.stdout, force_terminal=False)) as display:
        display.event(0, {"event": "run_finished", "run_id": "a0", "status": "interrupted"})
    assert "0 of 2 runs done" in capsys.readouterr().out


def training(workdir, *flags, **options):
    """A command that has begun to train."""
    process = start(*flags, f"--workdir={workdir}", **options)

    def trains():
        return any(lines(path) for path in workdir.rglob("metrics.jsonl"))

    wait_for(lambda: trains() or process.poll() is not None)
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A training run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, out = run("--mode=train", f"--workdir={workdir}")
    assert code == 0, out
    return workdir


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.processes),
        pytest.param(signal.SIGTERM, marks=pytest.mark.processes),
    ],
)
def test_a_killed_run_goes_on_to_bit_equal_metrics(tmp_path, undisturbed, number):
    process = training(tmp_path, "--mode=train")
    if number == signal.SIGINT:  # Ctrl-C comes to the whole group
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    if process.returncode != 0:  # the run was quick enough to be over otherwise
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), out
        assert not (tmp_path / "DONE").exists()
    code, out = run("--mode=train", f"--workdir={tmp_path}")
    assert code == 0, out
    assert rows(tmp_path) == rows(undisturbed)
    assert (tmp_path / "DONE").exists()


SWEEP = (
    "--config=tests/faults/recipe.py",
    "--sweep=tiny",
    "--workers=2",
    "--grace_seconds=120",  # to save in, on a busy machine
    "--config.train_examples=3072",
    "--config.checkpoint_every_examples=0",  # so that only a signal saves
)


TRIES = 4  # a sweep takes a second or two: on a busy machine it may be over before it is hit


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep one of whose workers was killed; what it printed."""
    for _ in range(TRIES):
        workdir = tmp_path_factory.mktemp("swept")
        process = training(workdir, recipe=SWEEP)
        found = subprocess.run(
            ["pgrep", "-P", str(process.pid), "-f", "sweep.worker"],
            capture_output=True,
            text=True,
        )
        for worker in found.stdout.split()[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(worker), signal.SIGKILL)
        out, _ = process.communicate(timeout=280)
        assert process.returncode == 0, out
        if "starting another" in out:
            break
    return workdir, out


@pytest.mark.processes
def test_a_sweep_in_processes_survives_a_killed_worker_and_is_done_then(swept):
    workdir, out = swept
    assert "starting another" in out
    sweep = json.loads((workdir / "sweep.json").read_text())
    run_ids = {point["run_id"] for point in sweep["points"]}
    assert len(run_ids) == 3
    assert {path.parent.name for path in (workdir / "runs").glob("*/DONE")} == run_ids
    code, again = run(f"--workdir={workdir}", recipe=SWEEP)
    assert code == 0, again
    assert "All 3 runs are done already" in again
    assert (workdir / "report" / "index.html").exists()


@pytest.mark.processes
def test_control_c_ends_a_sweep_with_its_states_saved_and_it_goes_on(tmp_path, swept):
    """To the bits of the sweep that lost a worker, so that neither changed any."""
    for number in range(TRIES):
        workdir = tmp_path / str(number)
        process = training(workdir, recipe=SWEEP)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=280)
        metrics = [path for path in workdir.glob("runs/*/metrics.jsonl") if path.stat().st_size]
        trained = [path.parent for path in metrics if not (path.parent / "DONE").exists()]
        if trained:
            break
    assert process.returncode == 128 + signal.SIGINT, out
    assert trained
    for path in trained:
        saved = max(int(step.name) for step in (path / "checkpoints").iterdir())
        assert saved == rows(path)[-1]["step"] < 192
    code, out = run(f"--workdir={workdir}", recipe=SWEEP)
    assert code == 0, out
    finished = list(swept[0].glob("runs/*/metrics.jsonl"))
    assert len(finished) == 3
    for metrics in finished:
        twin = workdir / metrics.relative_to(swept[0])
        assert twin.read_bytes() == metrics.read_bytes()
        began_at = json.loads(twin.with_name("summary.json").read_text())["resumed_at_step"]
        assert (began_at > 0) == (twin.parent in trained)


@pytest.mark.processes
def test_a_sweep_whose_own_process_is_killed_goes_on(tmp_path, swept):
    """Its workers notice at their next event; the same command waits for them and finishes."""
    for number in range(TRIES):
        workdir = tmp_path / str(number)
        process = training(workdir, recipe=SWEEP)
        process.kill()
        process.communicate(timeout=120)
        if len(list(workdir.glob("runs/*/DONE"))) < 3:
            break
    assert process.returncode == -signal.SIGKILL
    assert len(list(workdir.glob("runs/*/DONE"))) < 3
    code, out = run(f"--workdir={workdir}", recipe=SWEEP)
    assert code == 0, out
    assert outcome(workdir) == outcome(swept[0])
