"""--mode=critical_batch: what it prints and writes, and which flags it takes."""

import ast
import csv
import dataclasses
import json
import math
import re

import pytest
from helpers import commands
from helpers.training import tiny_config

from bs_jax.cli import critical_batch
from bs_jax.scaling.critical_batch import from_losses
from bs_jax.sweep.points import resolve

MODE = "--mode=critical_batch"
LAGGING = {16: [1.0, 1.1], 32: [2.0, 2.1]}


def points():
    early = {16: [2.0, 2.1, 2.2], 32: [2.0, 2.1, 2.2], 64: [2.5, 2.6, 2.8]}
    late = {16: [1.0, 1.1, 1.2], 32: [1.001, 1.1, 1.2], 64: [math.nan, 1.1, 1.2]}
    return [
        critical_batch.Point(
            128,
            from_losses(early, tolerance=0.01, noise_scale=40.0),
            {"noise_scale": 40.0, "low": 20.0, "high": 90.0},
        ),
        critical_batch.Point(
            256,
            from_losses(late, tolerance=0.01),
            dict.fromkeys(("noise_scale", "low"), math.nan) | {"high": math.inf},
        ),
    ]


def test_the_table_has_a_line_a_point_with_the_noise_scale_beside():
    lines = critical_batch.table(points()).splitlines()
    assert [line.split() for line in lines] == [
        ["examples", "critical", "batch", "about", "noise", "scale", "from", "to"],
        ["128", "32", "to", "64", "32.4", "40", "20", "90"],
        ["256", "32", "to", "64", "32", "-", "-", "-"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_the_advised_ramp_is_a_recipe_and_says_what_it_saves():
    text = critical_batch.advice(points(), 512)
    assert "--config.batch_size=32 " in text
    stages = ast.literal_eval(re.search("stages='(.*?)'", text)[1])
    assert stages == ((0, 16), (128, 32))
    # 8 updates of 16, then 12 of 32, where 32 of 16 would be.
    assert "(38 % fewer updates than batch size 16 throughout)" in text
    ramp = {"batch_size": 32, "batch_ramp.kind": "stages", "batch_ramp.stages": stages}
    assert resolve(tiny_config(train_examples=512, **ramp)).batch_sizes == (16, 32)
    early = [dataclasses.replace(points()[0], found=from_losses(LAGGING, tolerance=0.01))]
    assert critical_batch.advice(early, 512).startswith("No batch size above 16 was shown")


def test_the_numbers_are_written_and_those_that_are_not_finite_are_null(tmp_path):
    paths = critical_batch.write(points(), tmp_path)
    assert [path.name for path in paths] == ["critical_batch.csv", "critical_batch.json"]
    with open(paths[0], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["examples"], row["batch_size"], row["verdict"]) for row in rows] == [
        (str(point), str(size), verdict)
        for point in (128, 256)
        for size, verdict in ((16, "follows"), (32, "follows"), (64, "lags"))
    ]
    assert [float(rows[2][f"loss_{i}"]) for i in range(3)] == [2.5, 2.6, 2.8]
    early, late = json.loads(paths[1].read_text())
    assert (early["low"], early["high"], early["noise_scale_low"]) == (32, 64, 20.0)
    assert late["noise_scale_high"] is None


def test_the_plan_is_printed_before_anything_is_trained(tmp_path):
    code, out = commands.run(
        MODE, "--dry_run", "--branch_at=0.2,0.5", f"--workdir={tmp_path}/new", "--seeds=3,4"
    )
    assert code == 0, out
    assert "2 points (128, 384 examples), 8 branches of 128 examples at each" in out
    assert "batch size 128 (rule invariant): learning_rate" in out
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--branch_at=a",), "--branch_at=a: give numbers"),
        (("--tolerance=0",), "--tolerance=0: give a positive number"),
        (("--seeds=1",), "--seeds=1: give two or more different seeds"),
    ],
)
def test_impossible_flags_are_one_line(flags, message):
    code, out = commands.run(MODE, *flags)
    assert code == 2, out
    assert message in out
    assert "Traceback" not in out


@pytest.mark.long
def test_the_whole_command_and_again_after_a_kill(tmp_path):
    flags = (MODE, "--branch_at=0.3", "--branch_batch_sizes=16,32", "--seeds=0,1")
    whole, parts = (f"--workdir={tmp_path}/{name}" for name in ("whole", "parts"))
    code, out = commands.run(*flags, whole)
    assert code == 0, out
    assert "noise scale" in out
    process = commands.start(*flags, parts)
    while not list((tmp_path / "parts").glob("*/b*/summary.json")):
        assert process.poll() is None
    process.kill()
    commands.finish(process)
    code, out = commands.run(*flags, parts)
    assert code == 0, out
    for name in ("critical_batch.csv", "critical_batch.json"):
        left = (tmp_path / "parts" / name).read_bytes()
        assert left == (tmp_path / "whole" / name).read_bytes()
