"""A time budget: what is trained first, when it ends, what it says beforehand."""

import dataclasses
import math
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.runs import fake_run

from bs_jax.records.run_files import Summary
from bs_jax.sweep import budget
from bs_jax.sweep.cohorts import Schedule
from bs_jax.sweep.stopping import StopRequest

ROOT = Path(__file__).resolve().parents[1]


def handed_out(schedule, workers=1):
    found = []
    while True:
        given = [schedule.next(worker) for worker in range(workers)]
        if not any(given):
            return found
        found += [[run.run_id for run in one.runs] for one in given if one]


def test_runs_of_a_priority_come_before_all_of_the_next_and_stay_with_their_cohort():
    runs = [fake_run(f"{name}{n}", 8 + "ab".index(name)) for name in "ab" for n in range(3)]
    priorities = {"a2": 0, "b0": 0, "b1": 0, "a0": 1, "b2": 1, "a1": 2}
    order = [ids[0] for ids in handed_out(Schedule(runs, priorities=priorities))]
    assert sorted(order) == [run.run_id for run in runs]
    assert [priorities[run_id] for run_id in order] == [0, 0, 0, 1, 1, 2]
    changes = sum(one[0] != other[0] for one, other in pairwise(order))
    assert changes == 2  # b b a, a b, a: two programs are made again, no more
    both = [ids[0] for ids in handed_out(Schedule(runs, priorities=priorities), workers=2)]
    assert [priorities[run_id] for run_id in both] == [0, 0, 0, 1, 1, 2]


def test_without_priorities_the_order_is_as_before():
    runs = [fake_run(f"{name}{n}", 8 + "ab".index(name)) for name in "ab" for n in range(3)]
    assert handed_out(Schedule(runs)) == handed_out(Schedule(runs, priorities={}))


def test_a_cohort_side_by_side_has_the_priority_of_its_first_unfinished_run():
    runs = [fake_run(f"{name}{n}", 8 + "ab".index(name)) for name in "ab" for n in range(2)]
    priorities = {"a0": 0, "a1": 2, "b0": 1, "b1": 1}  # a0 is done
    schedule = Schedule(runs[1:], runs, lambda run: True, priorities)
    assert handed_out(schedule) == [["b0", "b1"], ["a0", "a1"]]


def test_the_budget_stops_as_a_signal_does_and_says_that_it_was_the_time():
    before = signal.getsignal(signal.SIGTERM)
    began = time.monotonic()
    said = []
    with budget.Budget(0.02, 20.0, began, said.append) as limit, StopRequest(30.0) as stop:
        while not stop() and time.monotonic() - began < 5:
            time.sleep(0.005)
        assert stop.number == signal.SIGTERM
    assert limit.over
    assert said == ["the time of --budget_minutes is nearly over"]
    assert not limit.room_for_report
    assert 0.5 < time.monotonic() - began < 1.2  # a third is kept for saving and the report
    assert limit.grace_seconds == pytest.approx(0.2)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_time_that_is_up_before_training_waits_until_a_signal_can_be_noted():
    with budget.Budget(0.001, 20.0, time.monotonic() - 60) as limit:
        time.sleep(0.2)  # here the signal would kill the process
        with StopRequest(30.0) as stop:
            deadline = time.monotonic() + 5
            while not stop() and time.monotonic() < deadline:
                time.sleep(0.005)
            assert stop()
    assert limit.over


@pytest.mark.parametrize(("minutes", "grace"), [(0.0, 20.0), (1e12, 16.0)])
def test_no_budget_or_a_huge_one_is_no_limit(minutes, grace):
    with budget.Budget(minutes, 20.0, time.monotonic() - 1e6) as limit:
        assert limit.grace_seconds == grace
        assert limit.room_for_report
    assert not limit.over


def test_what_gets_done_is_told_from_the_speed_of_finished_runs():
    """A run of 100 examples took 60 s: in 10 minutes two workers do 20 of 30."""
    runs = [fake_run(f"a{n}", 8) for n in range(31)]

    def ended(seconds, resumed=0):
        return Summary("done", {}, examples=100, wall_time_seconds=seconds, resumed_at_step=resumed)

    # One that was resumed tells its last process's time alone.
    for none in ({}, {"a0": ended(5.0, resumed=3)}):
        assert "not known" in budget.forecast(runs, budget.Speed.of(runs, none), 2, 10.0)
    summaries = {"a0": ended(60.0), "a1": ended(1.0, resumed=3)}
    said = budget.forecast(runs[1:], budget.Speed.of(runs, summaries), 2, 10.0)
    assert "30 runs take about 15, so about 20 of them get done" in said
    side_by_side = {"a0": dataclasses.replace(ended(60.0), runs_at_once=4)}
    assert budget.Speed.of(runs, side_by_side).seconds(runs[1]) == pytest.approx(15.0)


def test_a_size_that_was_not_measured_is_estimated_from_those_that_were():
    """Images/s of a card at 8, 64 and 256, as measured: from two the third to two fifths."""
    per_example = {8: 1 / 1940, 64: 1 / 7710, 256: 1 / 14850}
    run = fake_run("a", 8, examples=6400)
    for left_out, seconds in per_example.items():
        known = {size: value for size, value in per_example.items() if size != left_out}
        run = dataclasses.replace(run, batch_size=left_out, micro_batch_size=left_out)
        assert budget.Speed(known).seconds(run) == pytest.approx(6400 * seconds, rel=0.4)
        assert budget.Speed(per_example).seconds(run) == pytest.approx(6400 * seconds)
    assert math.isnan(budget.Speed({}).seconds(run))
    assert budget.Speed({64: 1.0}).seconds(run) == pytest.approx(6400 * (1 + 20 / 256) / (84 / 64))
    assert budget.Speed({64: 1.0, 128: 2.0}).seconds(run) > 0  # other work on the machine


@pytest.mark.long
def test_a_sweep_ends_within_its_budget_and_goes_on(tmp_path):
    command = [sys.executable, "main.py", "--config=tests/faults/recipe.py", "--sweep=tiny"]
    command += ["--config.train_examples=300000", "--workers=2", f"--workdir={tmp_path}"]
    began = time.monotonic()
    first = subprocess.run(
        [*command, "--budget_minutes=0.75"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert first.returncode == 0, first.stderr
    assert time.monotonic() - began < 45
    assert "the 0.75 minutes are over; give the same command again" in first.stderr
    saved = {path.parents[1].name for path in tmp_path.glob("runs/*/checkpoints/*")}
    assert len(saved) == 2
    second = subprocess.run(
        [*command, "--budget_minutes=0.75"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert second.returncode == 0, second.stderr
    for folder in tmp_path.glob("runs/*/summary.json"):
        assert '"resumed_at_step": 0,' not in folder.read_text()
