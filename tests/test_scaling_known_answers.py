"""The noisy quadratic: what every batch size should give is known, and Adam is held against it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bs_jax.scaling import RULES, MicrobatchStats, problems, scale_by_batch

SIGMAS = (10.0, 1.0, 0.3)  # phi about 100, 1 and growing, 0.1
# Mean of x after each quarter of 4,000 base updates' worth of examples, Adam 1e-3, b .9/.99.
BASE = [[0.906, 0.821, 0.743, 0.673], [0.447, 0.172, 0.063, 0.024], [0.218, 0.009, 0.0, 0.0]]
TABLE = {
    (8, "sqrt"): [[0.911, 0.829, 0.754, 0.686], [0.683, 0.401, 0.190, 0.076],
                  [0.660, 0.335, 0.070, 0.003]],
    (8, "linear"): [[0.767, 0.588, 0.448, 0.341], [0.241, 0.017, 0.001, 0.0],
                    [0.156, 0.0, 0.0, 0.0]],
    (8, "noise_aware"): [[0.908, 0.825, 0.749, 0.680], [0.446, 0.174, 0.066, 0.025],
                         [0.218, 0.009, 0.0, 0.0]],
    (8, "invariant"): [[0.903, 0.816, 0.737, 0.666], [0.442, 0.167, 0.061, 0.022],
                       [0.217, 0.008, 0.0, 0.0]],
    (0.25, "sqrt"): [[0.905, 0.819, 0.741, 0.670], [0.387, 0.143, 0.053, 0.019],
                     [0.070, 0.002, 0.0, 0.0]],
    (0.25, "linear"): [[0.951, 0.905, 0.861, 0.820], [0.630, 0.388, 0.237, 0.144],
                       [0.326, 0.066, 0.012, 0.002]],
    (0.25, "noise_aware"): [[0.905, 0.819, 0.742, 0.671], [0.446, 0.172, 0.064, 0.022],
                            [0.218, 0.009, 0.0, 0.0]],
    (0.25, "invariant"): [[0.901, 0.814, 0.736, 0.664], [0.440, 0.166, 0.060, 0.021],
                          [0.217, 0.009, 0.0, 0.0]],
}  # fmt: skip
# The table was made with 4,000 coordinates and no opposite noise: this is its sampling noise.
NOISE = 0.003


def adam(rule, **kwargs):
    def make(batch_size, base_batch_size):
        scaled = scale_by_batch(
            optax.adam,
            batch_size=batch_size,
            base_batch_size=base_batch_size,
            rule=rule,
            guard=False,
            **kwargs,
        )
        return scaled(1e-3, b1=0.9, b2=0.99)

    return make


def run(make_optimizer, k, quarters=None, **kwargs):
    """The way of the table; at a quarter of the batch, where it takes longest, a quarter of it."""
    quarters = quarters or (4 if k >= 1 else 1)
    way = {"base_updates": 1000 * quarters, "quarters": quarters}
    return problems.run(make_optimizer, k=k, sigmas=SIGMAS, **way, **kwargs)


@pytest.fixture(scope="module")
def base():
    return run(adam("none"), k=1)


def test_the_base_run(base):
    np.testing.assert_allclose(base, BASE, atol=NOISE)


@pytest.mark.parametrize(("k", "rule"), TABLE)
def test_the_table(k, rule, base):
    measured = rule in ("noise_aware", "invariant")
    # The table's invariant rows were made with a floor of .05 under the second moment.
    # A quarter of the way is too short for the linear rule to go wrong.
    quarters = 2 if (k, rule) == (0.25, "linear") else None
    got = run(adam(rule, variance_floor=0.05), k, quarters, microbatches=2 if measured else 1)
    shown = got.shape[1]
    np.testing.assert_allclose(got, np.array(TABLE[k, rule])[:, :shown], atol=NOISE)
    base = base[:, :shown]
    if measured:
        assert np.abs(got - base).max() < 0.01
    else:
        # Each published rule is right at its own end of the noise and wrong at the other.
        wrong, right = (
            (got - base)[2 if rule == "sqrt" else 0],
            (got - base)[0 if rule == "sqrt" else 1],
        )
        assert np.abs(wrong).max() > 0.05
        if rule == "sqrt":
            assert np.abs(right).max() < 0.016


def test_the_default_floor_comes_closer_than_the_tables(base):
    got = run(adam("invariant"), k=0.25, microbatches=2)
    np.testing.assert_allclose(got, base[:, : got.shape[1]], atol=0.006)


@pytest.mark.parametrize("microbatches", [pytest.param(4, marks=pytest.mark.long), 8])
def test_more_micro_batches_come_closer(microbatches, base):
    got = run(adam("invariant"), k=8, microbatches=microbatches)
    np.testing.assert_allclose(got, base, atol=0.006)


def test_a_noise_scale_frozen_at_its_first_value_is_wrong_later():
    """phi starts at 1 (64 examples) and grows as the gradient shrinks: the reason to measure."""
    rule = adam("noise_aware", noise_scale=64.0)
    got = problems.run(rule, k=8, sigmas=[1.0])
    np.testing.assert_allclose(got, [[0.383, 0.066, 0.009, 0.001]], atol=NOISE)


@pytest.mark.parametrize("k", [8, 4, 0.25])
@pytest.mark.parametrize(
    ("factory", "recipe", "expected"),
    [
        # Behind a gradient that moves by 1 an update the average lags by 1/(1 - b) updates.
        (optax.adabelief, {"b1": 0.9, "b2": 0.95, "eps_root": 0.0}, (0.9 / 0.1) ** 2),
        (optax.adabelief, {"b1": 0.9, "b2": 0.95, "eps_root": 2.0}, 81.0 + 2.0 / 0.05),
        (optax.adabelief, {"b1": 0.0, "b2": 0.95, "eps_root": 2.0}, 2.0 / 0.05),
    ],
)
def test_the_lag_of_a_centering_average_is_the_base_s(k, factory, recipe, expected):
    """Without noise, behind a gradient that grows by a constant amount an example."""
    tx = scale_by_batch(factory, batch_size=round(64 * k), base_batch_size=64, guard=False)
    tx = tx(1e-3, **recipe)
    params = {"x": jnp.zeros(2)}

    def follow(state, gradient):
        grads = {"x": jnp.full(2, gradient)}
        stats = MicrobatchStats({"x": jnp.square(grads["x"])}, 2)
        return tx.update(grads, state, params, microbatch=stats)[1], None

    gradients = np.float32(k * np.arange(1, round(200 / k)))
    state = jax.jit(lambda g: jax.lax.scan(follow, tx.init(params), g)[0])(gradients)
    np.testing.assert_allclose(state.inner_state[0].nu["x"], expected, rtol=1e-3)


@pytest.mark.parametrize("k", [8, 0.25])
@pytest.mark.parametrize("factory", [optax.adabelief, optax.rmsprop])
def test_pure_noise_shows_in_a_centered_moment_as_in_the_base_s(k, factory):
    """The mean over many coordinates of what the step is divided by, after it has settled."""
    recipe = {"b1": 0.9, "b2": 0.9} if factory is optax.adabelief else {"decay": 0.9}
    settings = recipe if factory is optax.adabelief else {**recipe, "centered": True}
    tx = scale_by_batch(factory, batch_size=round(64 * k), base_batch_size=64, guard=False)
    tx = tx(1e-3, **settings)
    rng = np.random.default_rng(0)
    params = {"x": jnp.zeros(4_000)}

    def follow(state, parts):
        grads, square = parts
        stats = MicrobatchStats({"x": square}, 4)
        _, state = tx.update({"x": grads}, state, params, microbatch=stats)
        inner = state.inner_state[0]
        spread = inner.nu["x"]
        if factory is optax.rmsprop:
            spread = spread - jnp.square(inner.mu["x"])
        return state, jnp.mean(spread)

    parts = np.sqrt(4 / k) * rng.standard_normal((round(60 / k) + 6, 4, 4_000), np.float32)
    run = jax.jit(lambda parts: jax.lax.scan(follow, tx.init(params), parts)[1])
    found = run((parts.mean(1), np.square(parts).mean(1)))
    shown = {optax.adabelief: 2 * 0.81 / 1.9, optax.rmsprop: 2 * 0.9 / 1.9}[factory]
    assert np.mean(found[-6:]) == pytest.approx(shown, rel=0.04)


@pytest.mark.parametrize(
    ("rule", "share"),
    [
        (RULES["invariant"], 1 / 2),
        (RULES["invariant"].replace(clipping_threshold=4.0), 1 / 4),  # as at k = 16
        (RULES["invariant"].replace(clipping_threshold=None), 1),
    ],
)
def test_a_clip_of_updates_goes_by_the_noise_of_each_leaf(rule, share):
    """Adafactor clips each leaf's normalised update: at the base's threshold in the base's terms.

    Four times the batch, in four parts. Where all is noise the mean gradient is half of a base
    batch's, and so is the update that may pass; where all is signal it is the base's.
    """
    tx = scale_by_batch(
        optax.adafactor, batch_size=256, base_batch_size=64, guard=False, rule=rule
    )(0.1, multiply_by_parameter_scale=False, clipping_threshold=0.5)
    params = {"noise": jnp.zeros(8), "signal": jnp.zeros(8)}
    grads = {"noise": jnp.full(8, 1.0), "signal": jnp.full(8, 2.0)}
    stats = MicrobatchStats({"noise": jnp.full(8, 4.0), "signal": jnp.full(8, 4.0)}, 4)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(grads, state, params, microbatch=stats)
        np.testing.assert_allclose(updates["signal"], -0.1 * 4 * 0.5, rtol=1e-5)
        np.testing.assert_allclose(updates["noise"], -0.1 * 4 * 0.5 * share, rtol=1e-5)
