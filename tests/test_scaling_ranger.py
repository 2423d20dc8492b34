"""Ranger against its update equations, written out in float64; at other batch sizes too."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training import tiny_config, train

from bs_jax.run import FixedValues
from bs_jax.scaling import explain, ranger, scale_by_batch
from bs_jax.sweep.points import resolve
from bs_jax.training import optimizers

STEPS = 200
SHAPES = {"kernel": (3, 4), "bias": (4,), "scale": (4,), "gamma": ()}
DECAYED = ("kernel", "gamma")  # everything but biases and BatchNorm's parameters
RECIPE = {"learning_rate": 8e-3, "b1": 0.95, "b2": 0.99, "eps": 1e-6, "weight_decay": 1e-2}


def start():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def noise(steps):
    rng = np.random.default_rng(1)
    return {name: 0.3 * rng.standard_normal((steps, *shape)) for name, shape in SHAPES.items()}


def gradient(w, noise, xp):
    """Depends on the weights, so that an error at any step shows in all that follow."""
    return xp.sin(w) + 0.1 * w + noise


def transcription(
    steps,
    learning_rate,
    *,
    b1,
    b2,
    eps,
    weight_decay,
    sync_period=6,
    slow_step_size=0.5,
    clock=1.0,
    clock_b2=None,
    unrectified=1.0,
    decayed=DECAYED,
):
    """The published equations, one after the other.

    ``learning_rate(t)`` of step t; the rectification at time ``clock t`` of ``clock_b2``.
    """
    fast, all_noise = start(), noise(steps)
    slow = {name: w.copy() for name, w in fast.items()}
    m = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    v = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    c = b2 if clock_b2 is None else clock_b2
    rho_inf = 2 / (1 - c) - 1
    for t in range(1, steps + 1):
        lr, time = learning_rate(t - 1), clock * t
        rho = rho_inf - 2 * time * c**time / (1 - c**time)
        for name, p in fast.items():
            g = gradient(p, all_noise[name][t - 1], np)
            if name in decayed:
                p = p * (1 - lr * weight_decay)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            m_hat, v_hat = m[name] / (1 - b1**t), v[name] / (1 - b2**t)
            if rho > 5:
                r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
                p = p - lr * math.sqrt(r) * m_hat / (np.sqrt(v_hat) + eps)
            else:
                p = p - lr * unrectified * m_hat
            if t % sync_period == 0:
                slow[name] = slow[name] + slow_step_size * (p - slow[name])
                p = slow[name].copy()
            fast[name] = p
    return fast


def run(tx, steps, dtype):
    params = {name: jnp.asarray(w, dtype) for name, w in start().items()}
    all_noise = {name: jnp.asarray(n, dtype) for name, n in noise(steps).items()}

    def step(carry, noise):
        params, state = carry
        grads = jax.tree.map(lambda w, n: gradient(w, n, jnp), params, noise)
        updates, state = tx.update(grads, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), None

    init = (params, tx.init(params))
    return jax.jit(lambda: jax.lax.scan(step, init, all_noise)[0][0])()


def assert_equal(got, want, rtol):
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=rtol, atol=rtol, err_msg=name)


def test_200_steps_are_the_update_equations_in_float64():
    want = transcription(STEPS, lambda t: RECIPE["learning_rate"], **rest(RECIPE))
    with jax.enable_x64(True):
        tx = ranger(**RECIPE, mask={name: name in DECAYED for name in SHAPES})
        assert_equal(run(tx, STEPS, jnp.float64), want, rtol=1e-10)


def rest(recipe):
    return {name: value for name, value in recipe.items() if name != "learning_rate"}


def config_of(**overrides):
    hyperparams = RECIPE | {"sync_period": 5, "slow_step_size": 0.4}
    config = tiny_config(**{"optimizer.name": "ranger", "optimizer.decay_mask": "kernels"})
    config["optimizer"]["hyperparams"] = hyperparams
    config["batch_size"] = config["base_batch_size"] = 64
    config["ghost_batch_size"] = 0
    config["train_examples"] = 64 * STEPS
    config["schedule"] |= {"flat_fraction": 0.75, "final_fraction": 1e-5}
    return resolve(config, overrides)


def test_a_config_sets_every_part_of_it():
    assert "ranger" in optimizers.names()
    config = config_of()

    def learning_rate(t):
        """Flat to 75 % of the steps, then the half cosine to 1e-5 of it."""
        progress = max(t / STEPS - 0.75, 0) / 0.25
        return 8e-3 * (1e-5 + (1 - 1e-5) * 0.5 * (1 + math.cos(math.pi * progress)))

    want = transcription(STEPS, learning_rate, **rest(RECIPE), sync_period=5, slow_step_size=0.4)
    hyperparams = {
        name: jnp.float32(value) for name, value in optimizers.traced_values(config).items()
    }
    got = run(optimizers.make_optimizer(config, hyperparams), STEPS, jnp.float32)
    assert_equal(got, want, rtol=2e-4)


def test_a_run_of_the_published_rule_is_plain_ranger_with_other_numbers():
    config = config_of(batch_size=256, **{"scaling.rule": "seed"})
    scaled = config.optimizer.hyperparams
    assert isinstance(config.optimizer, FixedValues)
    assert scaled["learning_rate"] == pytest.approx(4 * 8e-3)
    assert scaled["weight_decay"] == pytest.approx(4 * 1e-2)
    assert scaled["b2"] == pytest.approx(0.99**4)
    assert scaled["eps"] == 1e-6


@pytest.mark.parametrize(
    ("rule", "batch_size", "period"),
    [
        ("linear", 256, 2),
        pytest.param("sqrt", 256, 2, marks=pytest.mark.long),
        pytest.param("linear", 16, 24, marks=pytest.mark.long),
        ("sqrt", 16, 24),
        ("linear", 64 * 64, 1),
        ("sqrt", 64 * 64, 1),
    ],
)
def test_at_another_batch_size_periods_and_rectification_keep_the_base_clock(
    rule, batch_size, period
):
    """At k = 64, b2^k is .53: RAdam's own clock would never rectify, so never normalise."""
    k = batch_size / 64
    factor = k if rule == "linear" else math.sqrt(k)
    want = transcription(
        60,
        lambda t: RECIPE["learning_rate"] * factor,
        b1=0.95**k,
        b2=0.99**k,
        eps=1e-6 * (1 if rule == "linear" else 1 / factor),
        weight_decay=1e-2 * k / factor,
        sync_period=period,
        clock=k,
        clock_b2=0.99,
        unrectified=k / factor,
    )
    mask = {name: name in DECAYED for name in SHAPES}
    tx = scale_by_batch(ranger, batch_size=batch_size, base_batch_size=64, rule=rule)(
        **RECIPE, mask=mask
    )
    assert_equal(run(tx, 60, jnp.float32), want, rtol=2e-4)


def test_evaluation_sees_the_fast_weights(tmp_path):
    """Never joined, they are those of joins that change nothing; the slow ones have not moved."""

    def last(sync_period, slow_step_size):
        joins = {"sync_period": sync_period, "slow_step_size": slow_step_size}
        overrides = {
            "optimizer.name": "ranger",
            "optimizer.hyperparams": RECIPE | {"learning_rate": 0.02} | joins,
            "train_examples": 64,
            "eval_every_examples": 64,
        }
        return train(tmp_path / str(sync_period), overrides)[-1]

    never, always = last(100, 0.5), last(1, 1.0)
    assert never["eval/loss"] == pytest.approx(always["eval/loss"], rel=1e-5)


def test_numbers_that_would_never_rectify_are_warned_of():
    found = explain(ranger, batch_size=4096, base_batch_size=64, rule="linear", **rest(RECIPE))
    assert any("b2 becomes 0.526: below 0.6 ranger never" in line for line in found.warnings)
