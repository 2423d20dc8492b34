"""A rule means in the trainer what `scale_by_batch` makes of it, whatever the optimizer."""

import jax
import pytest
from helpers.scaling import assert_close, gradients
from helpers.scaling import train as train_by
from helpers.training import tiny_config

from bs_jax import scale_by_batch
from bs_jax.run import FixedValues
from bs_jax.scaling import explain
from bs_jax.scaling.optimizers import Recipe, resolve_factory
from bs_jax.sweep.points import resolve
from bs_jax.training import optimizers, step

BASE = 64
STEPS = 24
HYPERPARAMS = {  # what is not named has the factory's default, and follows the rule all the same
    "radam": {"learning_rate": 1e-2, "b2": 0.95},
    "ranger": {
        "learning_rate": 1e-2,
        "b1": 0.95,
        "b2": 0.95,
        "eps": 1e-6,
        "weight_decay": 0.1,
        "sync_period": 8,
    },
    "adafactor": {"learning_rate": 1e-2, "momentum": 0.9, "weight_decay_rate": 1e-3},
    "muon": {"learning_rate": 1e-2, "weight_decay": 0.1},
    "rmsprop": {"learning_rate": 1e-2, "momentum": 0.9},
    "lion": {"learning_rate": 1e-3, "weight_decay": 0.1},
    "adamw": {"learning_rate": 1e-2},
}


def with_a_clock_of_their_own():
    """Of those that a config may name: what counts updates inside is not a hyperparameter."""
    recipes = {name: Recipe.of(name) for name in optimizers.names()}
    return [name for name, recipe in recipes.items() if recipe.optimizer.clocked is not None]


def config_of(optimizer, rule, batch_size, **overrides):
    return tiny_config(
        **{
            "optimizer.name": optimizer,
            "optimizer.hyperparams": HYPERPARAMS[optimizer],
            "scaling.rule": rule,
            "batch_size": batch_size,
            "base_batch_size": BASE,
            "train_examples": BASE * 4 * STEPS,
            "ghost_batch_size": 0,
            **overrides,
        }
    )


def shape_of(config):
    run = resolve(config)
    return optimizers.schedule_shape(run.schedule, run.train_examples)


def trainers_updates(config, grads):
    trained = resolve(config)

    def updates(hyperparams):
        return train_by(optimizers.make_optimizer(trained, hyperparams), grads)[2]

    return jax.jit(updates)(step.run_inputs(trained).hyperparams)


def test_all_of_them_are_tried():
    assert set(with_a_clock_of_their_own()) == {"adafactor", "radam", "ranger"}
    assert set(with_a_clock_of_their_own()) <= HYPERPARAMS.keys()


def points():
    for optimizer in HYPERPARAMS:
        yield optimizer, "sqrt", 4 * BASE
        if optimizer in with_a_clock_of_their_own():
            yield optimizer, "linear", BASE // 4
            # Each rule and each side of the base has been: the same code by other numbers.
            yield pytest.param(optimizer, "sqrt", BASE // 4, marks=pytest.mark.long)
            yield pytest.param(optimizer, "linear", 4 * BASE, marks=pytest.mark.long)


@pytest.mark.parametrize(("optimizer", "rule", "batch_size"), list(points()))
def test_the_trainer_updates_as_scale_by_batch_does(optimizer, rule, batch_size):
    config, grads = config_of(optimizer, rule, batch_size), gradients(STEPS)
    shape = shape_of(config)
    arguments = dict(HYPERPARAMS[optimizer])
    peak = arguments.pop("learning_rate")
    by_hand = scale_by_batch(optimizer, batch_size=batch_size, base_batch_size=BASE, rule=rule)(
        learning_rate=lambda count: peak * shape(count * BASE), **arguments
    )
    want = train_by(by_hand, grads)[2]
    # Float32 numbers in place of constants in double precision; and between two base-size updates
    # the library interpolates the schedule, which the trainer reads at the examples themselves.
    assert_close(trainers_updates(config, grads), want, rtol=2e-3, atol=3e-6)


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [
        ("radam", "seed_sqrt"),
        ("ranger", "seed"),
        pytest.param("radam", "seed", marks=pytest.mark.long),
        pytest.param("ranger", "seed_sqrt", marks=pytest.mark.long),
    ],
)
def test_a_published_arm_is_the_plain_optimizer_with_other_numbers(optimizer, rule):
    """And so it is in `scale_by_batch`."""
    config, grads = config_of(optimizer, rule, 4 * BASE), gradients(STEPS)
    shape, s = shape_of(config), 4.0 if rule == "seed" else 2.0
    given = HYPERPARAMS[optimizer]
    arguments = {"b1": {"radam": 0.9, "ranger": 0.95}[optimizer] ** s, "b2": 0.95**s}
    if optimizer == "ranger":
        period = round(8 / s)
        arguments |= {"weight_decay": 0.1 * s, "sync_period": period}
    rates = {"learning_rate": lambda count: s * 1e-2 * shape(count * 4 * BASE)}
    plain = resolve_factory(optimizer)(**rates, **arguments)
    want = train_by(plain, grads)[2]
    assert not resolve(config).optimizer.clock
    assert_close(trainers_updates(config, grads), want, rtol=1e-3, atol=1e-7)
    scaled = scale_by_batch(optimizer, batch_size=4 * BASE, base_batch_size=BASE, rule=rule)(
        **{**given, "learning_rate": lambda count: 1e-2 * shape(count * BASE)}
    )
    assert_close(train_by(scaled, grads)[2], want, rtol=1e-5, atol=1e-8)


def test_rules_share_a_program_and_points_with_the_same_numbers_a_run():
    def run(rule, batch_size=4 * BASE):
        return resolve(config_of("ranger", rule, batch_size))

    assert run("sqrt").run_id == run("power(0.5)").run_id != run("linear").run_id
    key = optimizers.cohort_key
    assert key(run("sqrt")) == key(run("linear")) != key(run("seed"))
    assert len({run(rule, BASE).run_id for rule in ("none", "sqrt", "linear", "seed")}) == 1
    # An offset that undoes k leaves nothing to scale, nor does b2 switched off its own clock.
    undone = resolve(config_of("ranger", "linear", BASE // 4, **{"scaling.offset": 4.0}))
    assert undone.optimizer.hyperparams == run("none", BASE // 4).optimizer.hyperparams
    off = resolve(config_of("ranger", "linear", 4 * BASE, **{"scaling.off": ("b2",)}))
    assert isinstance(off.optimizer, FixedValues)
    assert not off.optimizer.clock


def test_a_rule_that_measures_nothing_needs_no_micro_batches():
    run = resolve(config_of("ranger", "sqrt", 4 * BASE, micro_batch_size=4 * BASE))
    assert run.micro_batch_size == 4 * BASE
    assert run.optimizer.clock == {"k": 4.0, "base_b2": 0.95, "unrectified": 2.0}


@pytest.mark.parametrize("phi", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("rule", ["sqrt", "power(0.75)"])
def test_a_guard_by_a_given_noise_scale_holds_the_first_steps_back_too(rule, phi):
    """RAdam's first updates are not normalised: they make up for phi base-size ones."""
    run = resolve(config_of("radam", rule, 4 * BASE, **{"scaling.noise_scale": BASE * phi}))
    rate = run.optimizer.hyperparams["learning_rate"] * run.optimizer.clock["unrectified"]
    assert rate == pytest.approx(1e-2 * max(1.0, phi))


@pytest.mark.parametrize(("rule", "warned"), [("linear", False), ("seed", True)])
def test_only_what_never_rectifies_in_the_trainer_is_warned_of_there(rule, warned):
    config = config_of("radam", rule, 16 * BASE, train_examples=2**20)
    config["optimizer"]["hyperparams"] = {"learning_rate": 1e-2, "b2": 0.9}
    found = [line for line in resolve(config).scaled.warnings if "rectif" in line]
    assert bool(found) == warned
    alone = explain("radam", batch_size=16 * BASE, base_batch_size=BASE, rule=rule, b2=0.9)
    assert any("never rectifies" in line for line in alone.warnings)
