"""A run restored elsewhere: on other devices, at another batch size, with a changed config."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers.training import (
    counted_compilations,
    rows,
    tiny_config,
    tiny_data,
    train,
    trainer_of,
)

from bs_jax.errors import UserError
from bs_jax.recipe import Recipe
from bs_jax.records.metrics_file import metrics_digest
from bs_jax.records.run_folder import RunFolder
from bs_jax.scaling import ScaleByBatchState
from bs_jax.scaling.upgrade import first_structure
from bs_jax.sweep.points import resolve
from bs_jax.training import step
from bs_jax.training.carry_over import OtherRun
from bs_jax.training.checkpoint import Checkpoints
from bs_jax.training.train import Interrupted, Trainer


def losses(found):
    return np.array([row["train/loss"] for row in found])


def interrupted(path, devices=1, chunks=1, **overrides):
    """A run that was stopped after so many chunks, of 96 examples each."""
    run = resolve(tiny_config(**overrides))
    folder = RunFolder(path, run)
    calls = iter(range(chunks))
    with pytest.raises(Interrupted):
        trainer_of(run, devices=devices).train(
            [folder], should_stop=lambda: next(calls, None) == chunks - 1
        )
    return folder


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_on_another_number_of_devices(tmp_path):
    whole = train(tmp_path / "whole")
    folder = interrupted(tmp_path / "parts", devices=1)
    found = train(tmp_path / "parts", devices=2)
    assert folder.summary().resumed_at_step == 6
    np.testing.assert_allclose(losses(found), losses(whole), rtol=2e-3)


def other_run(tmp_path, recipe, source=None):
    source = interrupted(tmp_path / "source", **(source or {}))
    return OtherRun(source.path, Recipe.parse(recipe))


def blank_state(run):
    """A state of a run, of zeros: what it is made of, and nothing is compiled."""
    programs = step.make_programs(run, 3, (8, 8, 1), jax.devices()[:1])
    shapes = jax.eval_shape(programs.init, step.run_inputs(run))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def state_at(recipe, other):
    run = resolve(recipe)
    return other.state_for(run, blank_state(run), 3, (8, 8, 1)), other._newest(3, (8, 8, 1))


@pytest.mark.parametrize(
    ("rule", "batch_size", "second"),
    # (d'/d)^2 of what Adam divides by, from k = 1 to k: 1/k, 1, and q^2 with noise scale 16.
    [("sqrt", 32, 1 / 2), ("linear", 8, 1.0), ("invariant", 32, 1.0), ("noise_aware", 32, 3 / 4)],
)
def test_at_another_batch_size_the_moments_are_carried_over(tmp_path, rule, batch_size, second):
    recipe = tiny_config(
        **{"batch_size": batch_size, "scaling.rule": rule, "scaling.noise_scale": 16.0}
    )
    state, source = state_at(recipe, other_run(tmp_path, recipe))
    assert (int(state.step), int(state.examples)) == (96 // batch_size, 96)
    jax.tree.map(np.testing.assert_array_equal, state.params, source.params)
    inner = state.opt_state
    if isinstance(inner, ScaleByBatchState):
        assert int(inner.examples) == 96
        inner = inner.inner_state
    assert int(inner[0].count) == 96 // batch_size
    jax.tree.map(np.testing.assert_array_equal, inner[0].mu, source.opt_state[0].mu)
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new, second * old, rtol=1e-6),
        inner[0].nu,
        source.opt_state[0].nu,
    )


def test_at_the_same_batch_size_a_restored_run_is_the_rest_of_the_other(tmp_path):
    whole = train(tmp_path / "whole")
    other = other_run(tmp_path, tiny_config())
    folder = RunFolder(tmp_path / "rest", resolve(tiny_config()))
    trainer_of(folder.run).train([folder], other_run=other)
    assert rows(folder.path) == [row for row in whole if row["examples"] > 96]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_that_goes_on_within_a_chunk_does_not_train_on_what_fills_it_up(tmp_path, streamed):
    # Both cadences give chunks of one length each: six updates, and two.
    overrides = {"data.streamed": streamed, "log_every_examples": 96}
    whole = train(tmp_path / "whole", overrides)
    often = overrides | {"checkpoint_every_examples": 32}
    train(tmp_path / "parts", often, until_examples=32)
    resumed = train(tmp_path / "parts", overrides)
    other = OtherRun(tmp_path / "other", Recipe.parse(tiny_config(**often)))
    train(other.path, often, until_examples=64)
    restored = train(tmp_path / "rest", overrides, other_run=other)
    for found in (resumed, restored):
        assert [row["eval/loss"] for row in found if "eval/loss" in row] == pytest.approx(
            [row["eval/loss"] for row in whole], rel=1e-6
        )


def test_a_restored_run_that_is_interrupted_needs_the_other_no_more(tmp_path):
    recipe = tiny_config(**{"batch_size": 32, "scaling.rule": "sqrt", "eval_every_examples": 32})
    other, run = other_run(tmp_path, recipe), resolve(recipe)
    trainer = trainer_of(run)
    whole, parts = RunFolder(tmp_path / "whole", run), RunFolder(tmp_path / "parts", run)
    trainer.train([whole], other_run=other)
    assert [row["examples"] for row in rows(whole.path)] == [128, 160, 192]
    with pytest.raises(Interrupted):
        trainer.train([parts], should_stop=lambda: True, other_run=other)
    shutil.rmtree(tmp_path / "source")
    anew = OtherRun(
        tmp_path / "source", Recipe.parse(recipe)
    )  # as the same command does when given again
    anew.check(parts.path)
    trainer.train([parts], other_run=anew)
    assert parts.summary().resumed_at_step == 4
    assert rows(parts.path) == rows(whole.path)


@pytest.mark.parametrize(
    ("overrides", "source", "message"),
    [
        ({"batch_size": 64, "train_examples": 256}, {}, "seen 96 examples; going on needs a mult"),
        ({"train_examples": 96}, {}, "below train_examples 96"),
        ({"optimizer.name": "sgd", "optimizer.hyperparams": {"learning_rate": 0.1}}, {},
         "another model or optimizer"),
        ({"batch_size": 32, "scaling.rule": "noise_aware", "micro_batch_size": 8}, {},
         "give --config.scaling.noise_scale=EXAMPLES"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_over_is_refused(tmp_path, overrides, source, message):
    recipe = tiny_config(**overrides)
    other = other_run(tmp_path, recipe, source)
    with pytest.raises(UserError, match=message):
        state_at(recipe, other)


def test_a_state_that_does_not_fit_is_refused_before_training_is_compiled(tmp_path):
    recipe = tiny_config(batch_size=64, train_examples=256)
    other, run = other_run(tmp_path, recipe), resolve(recipe)
    trainer = Trainer(run, tiny_data(), jax.devices()[:1])
    with (
        counted_compilations() as found,
        pytest.raises(UserError, match="seen 96 examples; going on needs a mult"),
    ):
        trainer.train([RunFolder(tmp_path / "rest", run)], other_run=other)
    programs = {name for event, name in found if event == "backend_compile_duration"}
    assert not programs & {"jit(train_chunk)", "jit(evaluate)"}


def test_each_program_of_a_run_that_begins_with_another_is_compiled_once(tmp_path):
    other, run = other_run(tmp_path, tiny_config()), resolve(tiny_config())
    trainer = Trainer(run, tiny_data(), jax.devices()[:1])
    with counted_compilations() as found:
        trainer.train([RunFolder(tmp_path / "rest", run)], other_run=other)
    programs = [name for event, name in found if event == "backend_compile_duration"]
    for program in ("init", "train_chunk", "evaluate"):
        assert programs.count(f"jit({program})") == 1


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no run with a readable config\.json"):
        OtherRun(tmp_path, Recipe.parse(tiny_config())).check(tmp_path / "new")
    train(tmp_path / "bare", {"checkpoint_every_examples": 0})
    assert not (tmp_path / "bare" / "checkpoints").exists()
    with pytest.raises(UserError, match="no checkpoint that can be read"):
        state_at(
            tiny_config(batch_size=32), OtherRun(tmp_path / "bare", Recipe.parse(tiny_config()))
        )


def test_a_changed_config_is_refused_with_what_changed_and_the_flag_that_permits_it(tmp_path):
    folder = interrupted(tmp_path)
    changed = {"train_examples": 288, "optimizer.hyperparams.weight_decay": 0.2}
    longer = resolve(tiny_config(**changed))
    with pytest.raises(UserError) as refused:
        RunFolder(tmp_path, longer)
    assert "train_examples is 192 there and 288 here" in str(refused.value)
    assert "optimizer.hyperparams.weight_decay is 0.1 there and 0.2 here" in str(refused.value)
    assert "--allow_config_change" in str(refused.value)
    folder = RunFolder(tmp_path, longer, allow_change=True)
    trainer_of(longer).train([folder])
    assert rows(tmp_path)[-1]["examples"] == 288
    assert folder.done
    assert json.loads((tmp_path / "config.json").read_text())["train_examples"] == 288
    # A finished run is gone on from as well.
    again = RunFolder(tmp_path, resolve(tiny_config(train_examples=384)), allow_change=True)
    assert not again.done


@pytest.fixture(scope="module")
def fresh():
    """The first state of a run that measures the noise."""
    run = resolve(tiny_config(**{"batch_size": 32, "scaling.rule": "noise_aware"}))
    programs = step.make_programs(run, 3, (8, 8, 1), jax.devices()[:1])
    return jax.device_get(programs.init(step.run_inputs(run)))


@pytest.mark.parametrize("noise", [False, True])
def test_a_checkpoint_of_the_first_version_is_upgraded(tmp_path, fresh, noise):
    state = fresh._replace(
        step=np.asarray(3, np.int32),
        examples=np.asarray(96, np.int32),
        params=jax.tree.map(lambda leaf: np.asarray(leaf + 1), fresh.params),
    )
    old = first_structure(state.opt_state, noise=noise)
    old = old._replace(examples=np.asarray(96, np.int32))
    (tmp_path / "metrics.jsonl").write_text("")
    checkpoints = Checkpoints(
        tmp_path / "checkpoints",
        lambda examples: metrics_digest(tmp_path / "metrics.jsonl", examples),
    )
    try:
        saved = state._replace(opt_state=jax.tree.map(np.asarray, old))
        checkpoints.save(saved, metrics_digest(tmp_path / "metrics.jsonl", 96))
        found = checkpoints.restore(fresh)
    finally:
        checkpoints.close()
    assert jax.tree.structure(found) == jax.tree.structure(fresh)
    assert int(found.opt_state.examples) == int(found.examples) == 96
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3"]


@pytest.mark.parametrize("override", [{"batch_size": 32}, {"seed": 5}, {"model.name": "resnet8"}])
def test_what_a_state_means_nothing_without_cannot_be_changed_in_place(tmp_path, override):
    interrupted(tmp_path)
    with pytest.raises(UserError, match="with --restore_from="):
        RunFolder(tmp_path, resolve(tiny_config(**override)), allow_change=True)
