"""Branches of a run: what they begin with, what they see, and that nothing is trained twice."""

import dataclasses
import json

import jax
import pytest
from helpers.training import rows, tiny_config, tiny_data, train

from bs_jax.errors import UserError
from bs_jax.recipe import Recipe
from bs_jax.sweep.branches import Branches, Branching
from bs_jax.sweep.points import resolve
from bs_jax.training import inputs
from bs_jax.training.train import Interrupted

PLAN = Branching(points=(64, 128), batch_sizes=(16, 32), examples=64, seeds=(0, 1))


@pytest.fixture(autouse=True)
def one_device_with_tiny_data(monkeypatch):
    from bs_jax.training import parallel

    monkeypatch.setattr(inputs, "load_data", lambda data: tiny_data())
    monkeypatch.setattr(parallel, "training_devices", lambda: jax.devices()[:1])


def branched(workdir, recipe, should_stop=lambda: False, branching=PLAN):
    """The losses of all points."""
    told = []
    branches = Branches(recipe, branching, resolve(recipe), workdir, should_stop, told.append)
    losses = {}
    for point in branching.points:
        trunk = branches.train_trunk(point)
        assert trunk[-1]["examples"] == point
        assert [row["step"] for row in trunk] == sorted({row["step"] for row in trunk})
        losses[point] = branches.train_branches(point)
    return losses, told


def of_training(found, start=0):
    return [row["train/loss"] for row in found if row["examples"] > start]


@pytest.mark.long
def test_a_branch_like_its_trunk_is_the_run_itself_however_often_it_is_stopped(tmp_path):
    cadences = {"eval_every_examples": 64, "checkpoint_every_examples": 64}
    whole = train(tmp_path / "whole", cadences)
    recipe = tiny_config(**{"scaling.rule": "sqrt"})
    calls = iter([False, False, False, True, False, True])  # a branch, then the second trunk
    for _ in range(2):
        with pytest.raises(Interrupted):
            branched(tmp_path, recipe, lambda: next(calls))
    losses, told = branched(tmp_path, recipe)
    assert len(told) == 8
    # Batch size 16 and seed 0 are the trunk's own: its branches go on as the whole run does.
    for point in PLAN.points:
        (folder,) = (tmp_path / str(point)).glob("b16-s0-*")
        assert of_training(rows(folder)) == of_training(whole, point)[: 64 // 32]
        ends = [row for row in whole if row["examples"] == point + 64]
        assert losses[point][16][0] == ends[0]["eval/loss"]
        assert json.loads((folder / "summary.json").read_text())["examples"] == point + 64
    # Other seeds see other examples, other batch sizes the same ones in larger updates.
    assert len({loss for point in losses.values() for size in point.values() for loss in size}) == 8
    (larger,) = (tmp_path / "64").glob("b32-s0-*")
    assert [row["step"] for row in rows(larger)] == [3, 4]

    def never():
        raise AssertionError("something is trained again")

    assert branched(tmp_path, recipe, never)[0] == losses
    # A further seed needs the trunk's state.
    (tmp_path / "64/trunk/checkpoints").rename(tmp_path / "gone")
    more = dataclasses.replace(PLAN, seeds=(0, 1, 2))
    with pytest.raises(UserError, match="no checkpoint that can be read"):
        branched(tmp_path, recipe, branching=more)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": [16]}, "--branch_batch_sizes=16: give two or more"),
        ({"batch_sizes": [0, 16]}, "--branch_batch_sizes=0,16: give two or more"),
        ({"seeds": [3]}, "--seeds=3: give two or more"),
        ({"examples": -1}, "--branch_examples=-1"),
        ({"shares": [0.0]}, "--branch_at=0: give shares of the training above 0"),
        ({"shares": [1.5]}, "--branch_at=1.5: give shares"),
        ({"shares": []}, "--branch_at names no point"),
        ({"recipe": {"batch_ramp.kind": "noise"}}, "a branch keeps one batch size"),
        ({"batch_sizes": [16, 160]}, "a branch of 160 examples .* do not fit into 192"),
    ],
)
def test_impossible_plans_are_named(changes, message):
    given = {"shares": [0.5], "batch_sizes": [16, 32], "examples": 32, "seeds": [0, 1]}
    given |= changes
    recipe = Recipe.parse(tiny_config(**given.pop("recipe", {})))
    with pytest.raises(UserError, match=message):
        Branching.plan(recipe, **given)
