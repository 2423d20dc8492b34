"""Runs on other machines: shares, Ray with a node that is lost, printed commands."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from helpers import commands
from helpers.runs import fake_run

from bs_jax.errors import UserError
from bs_jax.records.metrics_file import MetricsFile
from bs_jax.records.run_files import Summary
from bs_jax.sweep import ray_cluster
from bs_jax.sweep.cohorts import Assignment, Schedule
from bs_jax.sweep.plan import run_folder
from bs_jax.sweep.worker import Setup

ROOT = Path(__file__).resolve().parents[1]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")


def test_a_share_is_of_one_cohort_and_there_are_as_many_as_run_at_once():
    runs = [fake_run(f"a{n}", 8) for n in range(5)] + [fake_run(f"b{n}", 9) for n in range(2)]
    for slots, sizes in ((1, [5, 2]), (2, [5, 2]), (4, [2, 2, 1, 2]), (99, [1] * 7)):
        shares = ray_cluster.shares_of(Schedule(runs), slots)
        assert [len(share) for share in shares] == sizes
        ids = [[run.run_id for assignment in share for run in assignment.runs] for share in shares]
        assert all(len({run_id[0] for run_id in share}) == 1 for share in ids)
        assert sorted(run_id for share in ids for run_id in share) == [run.run_id for run in runs]
    whole = ray_cluster.shares_of(Schedule(runs, vmapped=lambda run: True), 99)
    assert [[len(assignment.runs) for assignment in share] for share in whole] == [[5], [2]]


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus", "slots"),
    [({"CPU": 8.0}, 1, 0, 8), ({"CPU": 8.0, "GPU": 2.0}, 2, 1, 2), ({"CPU": 1.0}, 4, 0, 1)],
)
def test_tasks_at_once_are_what_the_cluster_can_hold(resources, cpus, gpus, slots):
    assert ray_cluster.slots(resources, cpus, gpus) == slots


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'bs_jax\[ray\]'"):
        ray_cluster.connect(None)


def test_a_worker_that_dies_is_told_from_a_run_that_fails(tmp_path, monkeypatch):
    setup = Setup(workdir=str(tmp_path), grace_seconds=5.0)
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\ncat > /dev/null\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    share = [Assignment([fake_run("a0", 8)])]
    with pytest.raises(ray_cluster.WorkerLost, match="code -9"):
        ray_cluster.train_share(share, setup, lambda event: None)
    crashed = '{"event": "crashed", "message": "ValueError: no"}'
    script.write_text(f"#!/bin/sh\ncat > /dev/null\necho '{crashed}'\n")
    (failure,) = ray_cluster.train_share(share, setup, lambda event: None)
    assert failure == "base recipe, batch size 16 (k = 1), seed 0: ValueError: no"


def test_a_run_that_a_lost_node_recorded_and_did_not_tell_of_is_told_once(tmp_path):
    runs = [fake_run(f"b8-s{seed}-x", 8) for seed in range(3)]
    for run in runs[:2]:
        folder = run_folder(tmp_path, run)
        folder.begin()
        MetricsFile(folder.path / "metrics.jsonl", 0).close()
        folder.finish(Summary("diverged", {}))
    events = []
    display = types.SimpleNamespace(event=lambda task, event: events.append((task, event)))
    told = ray_cluster.Told(display, tmp_path)
    first = {"event": "run_finished", "run_id": runs[0].run_id, "status": "diverged"}
    told.event(0, first)
    told.event(1, first)  # of two attempts
    told.event(1, {**first, "run_id": runs[2].run_id, "status": "interrupted"})
    told.ended(1, runs)
    told.ended(1, runs)
    second = {**first, "run_id": runs[1].run_id}
    assert [event for _, event in events] == [
        first, {**first, "run_id": runs[2].run_id, "status": "interrupted"}, second
    ]  # fmt: skip


@pytest.mark.long
@needs_ray
def test_on_ray_every_run_finishes_once_though_a_node_is_lost(tmp_path):
    found = subprocess.run(
        [sys.executable, str(ROOT / "tests/helpers/ray_sweep.py"), str(tmp_path), "remove"],
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    result = json.loads(found.stdout.strip().splitlines()[-1])
    assert result["failures"] == []
    assert sorted(result["finished"]) == sorted(result["planned"])  # each once
    done = [path.parent.name for path in tmp_path.glob("runs/*/DONE")]
    assert sorted(done) == sorted(result["planned"])


RECIPE = ("--config=tests/faults/recipe.py", "--sweep=tiny")


def main(*flags):
    code, out = commands.run(*flags, recipe=RECIPE)
    assert code == 0, out
    return out


@pytest.mark.long
@needs_ray
def test_main_on_a_ray_of_its_own(tmp_path):
    assert "Report:" in main("--launcher=ray", f"--workdir={tmp_path}")
    assert len(list(tmp_path.glob("runs/*/DONE"))) == 3


@pytest.mark.processes
def test_printed_commands_train_each_run_and_the_report_follows(tmp_path):
    lines = main("--launcher=print", f"--workdir={tmp_path}").splitlines()
    assert len(lines) == 3
    assert all("--only=" in line and "--launcher" not in line for line in lines)
    ids = [line.rsplit("--only=", 1)[1] for line in lines]
    # From any folder: the recipe's path is written out, though it was given relative to this one.
    done = subprocess.run(
        lines[0], shell=True, cwd="/", capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert [path.parent.name for path in tmp_path.glob("runs/*/DONE")] == [ids[0]]
    assert not (tmp_path / "report").exists()
    # What is done is not printed again.
    assert len(main("--launcher=print", f"--workdir={tmp_path}").splitlines()) == 2


def test_an_unknown_run_is_refused(tmp_path):
    code, out = commands.run("--only=b16-s0-nothing", f"--workdir={tmp_path}", recipe=RECIPE)
    assert code == 2
    assert "unknown run in --only 'b16-s0-nothing'" in out
