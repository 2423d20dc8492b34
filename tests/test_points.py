"""From points to runs: overrides, what is the same training, ids, checks before any compile."""

import json
from types import SimpleNamespace

import pytest
from helpers.training import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from bs_jax.cli import sweep as cli
from bs_jax.errors import UserError
from bs_jax.run import ScaledWhileTraining
from bs_jax.sweep.plan import plan_sweep
from bs_jax.sweep.points import (
    Point,
    apply_overrides,
    product,
    resolve,
    with_seeds,
)
from bs_jax.training import checks, optimizers
from bs_jax.training.resolve import default_micro_batch_size
from configs import fashion_mnist

RULES = ("none", "linear", "sqrt", "noise_aware", "invariant")


def recipe(**overrides):
    config = json.loads(fashion_mnist.get_config().to_json())
    return apply_overrides(config, {"optimizer.hyperparams.learning_rate": 2e-3} | overrides)


def test_the_rules_sweep_has_125_points_and_105_runs():
    planned = plan_sweep("rules", recipe(), fashion_mnist.sweep_rules())
    assert len(planned.rows) == 125
    assert len(planned.runs) == 105
    assert planned.warnings == []
    at_base = {row["run_id"] for row in planned.rows if row["batch_size"] == 64}
    assert len(at_base) == 5  # one run a seed, whatever the rule


@pytest.mark.parametrize("rule", [*RULES, "seed", "power(0.8)"])
def test_at_k_1_every_rule_is_the_base_run(rule):
    base = resolve(recipe(**{"scaling.rule": "none"}))
    assert resolve(recipe(**{"scaling.rule": rule})) == resolve(recipe(**{"scaling.rule": rule}))
    assert resolve(recipe(**{"scaling.rule": rule})).run_id == base.run_id
    assert resolve(recipe(**{"scaling.rule": rule})).config == base.config


def test_hyperparameters_follow_the_rule_and_the_record_says_so():
    run = resolve(recipe(**{"scaling.rule": "sqrt", "batch_size": 256}))
    hyperparams = run.optimizer.hyperparams
    assert hyperparams["learning_rate"] == pytest.approx(2e-3 * 2)
    assert hyperparams["b1"] == pytest.approx(0.9**4)
    assert hyperparams["b2"] == pytest.approx(0.99**4)
    assert hyperparams["weight_decay"] == pytest.approx(0.1 * 2)
    assert hyperparams["eps"] == pytest.approx(1e-8 / 2)
    assert run.bn_decay == pytest.approx(0.9**4)
    assert run.scaled.base["learning_rate"] == 2e-3
    assert run.scaled.values["bn_decay"] == run.bn_decay
    assert {row["hyperparameter"] for row in run.scaled.rows} >= {"b1", "bn_decay"}


def test_switches_and_offsets_act_on_one_hyperparameter():
    run = resolve(
        recipe(
            **{
                "scaling.rule": "linear",
                "batch_size": 128,
                "scaling.off": ("b2",),
                "scaling.offsets": (("learning_rate", 2.0),),
            }
        )
    )
    hyperparams = run.optimizer.hyperparams
    assert hyperparams["b2"] == 0.99
    assert hyperparams["learning_rate"] == pytest.approx(2e-3 * 4)
    assert hyperparams["b1"] == pytest.approx(0.81)


def test_a_rule_that_works_while_training_keeps_the_base_recipe():
    run = resolve(recipe(**{"scaling.rule": "noise_aware", "batch_size": 256}))
    assert isinstance(run.optimizer, ScaledWhileTraining)
    assert run.optimizer.hyperparams["learning_rate"] == 2e-3
    assert run.optimizer.base_batch_size == 64
    assert run.micro_batch_size == 64
    assert run.scaled.values["learning_rate"] is None
    known = resolve(
        recipe(**{"scaling.rule": "noise_aware", "batch_size": 256, "scaling.noise_scale": 1e12})
    )
    rate = known.optimizer.hyperparams["learning_rate"]
    assert rate == pytest.approx(2e-3 * 2, rel=1e-6)  # all noise: the square-root rule


def test_two_ways_to_the_same_numbers_are_one_run():
    sqrt = resolve(recipe(**{"scaling.rule": "sqrt", "batch_size": 256}))
    power = resolve(recipe(**{"scaling.rule": "power(0.5)", "batch_size": 256}))
    assert sqrt.run_id == power.run_id


def test_what_is_only_shown_does_not_change_the_id_and_what_is_trained_does():
    base = resolve(recipe())
    for field, value in (("tensorboard", True), ("name", "other"), ("report.margin", 0.5)):
        assert resolve(recipe(**{field: value})).run_id == base.run_id
    for field, value in (
        ("seed", 7),
        ("label_smoothing", 0.1),
        ("data.flip", True),
        ("optimizer.hyperparams.eps", 1e-7),
    ):
        assert resolve(recipe(**{field: value})).run_id != base.run_id


def test_cohorts_share_programs_across_seeds_values_and_fixed_rules():
    def key(**overrides):
        return optimizers.cohort_key(resolve(recipe(batch_size=32, **overrides)))

    fixed = key(**{"scaling.rule": "none"})
    assert key(**{"scaling.rule": "sqrt", "seed": 5}) == fixed
    assert key(**{"scaling.rule": "linear", "bn_decay": 0.5}) == fixed
    assert key(**{"scaling.rule": "invariant"}) != fixed
    assert key(**{"scaling.rule": "none", "label_smoothing": 0.1}) != fixed


@given(st.integers(2, 4096), st.integers(1, 4096))
def test_default_micro_batches_split_the_batch_evenly(batch_size, base_batch_size):
    micro = default_micro_batch_size(batch_size, base_batch_size)
    assert batch_size % micro == 0
    assert batch_size // micro >= 2
    assert micro <= base_batch_size


def test_product_is_every_combination():
    points = product(arm={"a": {"x": 1}, "b": {"x": 2}}, seed=(0, 1, 2))
    assert [(p.arm, p.overrides["x"], p.overrides["seed"]) for p in points] == [
        (arm, x, seed) for arm, x in (("a", 1), ("b", 2)) for seed in (0, 1, 2)
    ]


def test_other_seeds_replace_a_sweeps_own_at_every_point():
    planned = plan_sweep("rules", recipe(), with_seeds(fashion_mnist.sweep_rules(), [7, 3]))
    assert len(planned.rows) == 50
    assert len(planned.runs) == 42
    assert {row["seed"] for row in planned.rows} == {3, 7}
    again = plan_sweep("rules", recipe(), with_seeds(fashion_mnist.sweep_rules(), range(5)))
    usual = plan_sweep("rules", recipe(), fashion_mnist.sweep_rules())
    assert {run.run_id for run in again.runs} == {run.run_id for run in usual.runs}
    plain = with_seeds([Point("a", {"batch_size": 32})], [1])  # a sweep that names no seed
    assert plain == [Point("a", {"batch_size": 32, "seed": 1})]


@pytest.mark.parametrize("text", ["0,0", "-1", "a", "1.5", "0,,1", "٣"])
def test_seeds_on_the_command_line_are_distinct_whole_numbers(monkeypatch, text):
    monkeypatch.setattr(cli, "FLAGS", SimpleNamespace(seeds=text.split(",")))
    with pytest.raises(UserError, match=f"--seeds={text}: give whole numbers from 0, none twice"):
        cli.given_seeds()
    cli.FLAGS.seeds = ["3", " 0"]
    assert cli.given_seeds() == [3, 0]


MISTAKES = {
    "batch_size": (0, "whole number of at least 1"),
    "train_examples": (10, "less than one batch of 64"),
    "optimizer.hyperparams.learning_rate": (-0.1, "must be a finite number of at least 0"),
    "optimizer.hyperparams.b1": (1.5, "b1"),
    "optimizer.name": ("adamwz", "did you mean 'adamw'"),
    "scaling.rule": ("sqr", "did you mean 'sqrt'"),
    "scaling.off": (("weight_dcay",), "did you mean 'weight_decay'"),
    "scaling.offset": (0.0, "must be above 0"),
    "model.name": ("resnet81", "did you mean"),
    "model.dtype": ("float16", "float32, bfloat16"),
    "schedule.name": ("cosin", "flat_cosine"),
    "schedule.warmup_examples": (10**6, "shorten the warm-up"),
    "ghost_batch_size": (48, "does not divide the micro-batch of 64"),
    "micro_batch_size": (48, "not divisible by micro_batch_size 48; use 48 or 96"),
    "bn_cross_device": (True, "exclude each other"),
    "bn_decay": (1.0, "below 1"),
    "data.std": ((0.0,), "above 0"),
    "data.crop_area": ((0.5, 0.2), "low <= high"),
    "label_smoothing": (-0.1, "at least 0"),
}


@pytest.mark.parametrize("field", MISTAKES)
def test_a_mistake_is_named_with_its_number_and_a_fix(field):
    value, message = MISTAKES[field]
    with pytest.raises(UserError, match=message) as caught:
        resolve(recipe(**{field: value}))
    assert "\n" not in str(caught.value)


def test_an_unknown_field_suggests_the_right_one():
    with pytest.raises(UserError, match=r"no field 'optimiser'; did you mean 'optimizer'"):
        recipe(**{"optimiser.name": "sgd"})
    with pytest.raises(UserError, match=r"no field 'data.nme'; did you mean 'name'"):
        recipe(**{"data.nme": "x"})


def test_a_bad_point_is_named():
    with pytest.raises(UserError, match=r"point a \(batch_size=30\).*ghost_batch_size 8"):
        plan_sweep("s", recipe(), [Point("a", {"batch_size": 30})])


def test_arms_that_normalise_different_groups_are_warned_about():
    runs = [
        resolve(recipe(**{"batch_size": size, "ghost_batch_size": 0, "scaling.rule": "none"}))
        for size in (32, 64)
    ]
    warnings = checks.comparison_warnings(runs)
    assert len(warnings) == 1
    assert "32, 64 examples together" in warnings[0]


def test_sgd_recipes_resolve_with_the_undamped_momentum_corrected():
    config = recipe(**{"scaling.rule": "linear", "batch_size": 128, "optimizer.name": "sgd"})
    config["optimizer"]["hyperparams"] = {"learning_rate": 0.1, "momentum": 0.9}
    hyperparams = resolve(config).optimizer.hyperparams
    assert hyperparams["momentum"] == pytest.approx(0.81)
    assert hyperparams["learning_rate"] == pytest.approx(0.1 * 2 * (1 - 0.81) / (1 - 0.9))


def test_the_tiny_recipe_of_the_tests_is_valid():
    assert resolve(tiny_config()).model.name == "resnet2_patch"
