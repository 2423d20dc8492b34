"""A batch size that changes while training: moments, bias correction, clocks, checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bs_jax.scaling import MicrobatchStats, ScalingRule, hyperparams, problems, scale_by_batch

SIGMAS = (10.0, 1.0, 0.3)
RAMP = (64, 512)  # a size each half of the way


def make(factory, rule, **recipe):
    def factory_for(batch_size, base_batch_size):
        scaled = scale_by_batch(
            factory, batch_size=batch_size, base_batch_size=base_batch_size, rule=rule, guard=False
        )
        return scaled(**recipe)

    return factory_for


ADAM = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.99}
RAMPED = {
    "adam noise_aware": (optax.adam, "noise_aware", ADAM),
    "adam invariant": (optax.adam, "invariant", ADAM),
    "sgd momentum": (optax.sgd, "linear", {"learning_rate": 3e-5, "momentum": 0.9}),
    "rmsprop momentum": (
        optax.rmsprop, "noise_aware", {"learning_rate": 1e-4, "decay": 0.99, "momentum": 0.9},
    ),
    "lars": (
        optax.lars, "noise_aware",
        {"learning_rate": 1.0, "momentum": 0.9, "trust_coefficient": 3e-4},
    ),
    "adagrad": (optax.adagrad, "noise_aware", {"learning_rate": 0.05}),
}  # fmt: skip


def run(make_optimizer, **kwargs):
    return problems.run(make_optimizer, sigmas=SIGMAS, base_updates=2000, quarters=2, **kwargs)


@functools.cache
def constant_run(factory):
    """The base of every ramp of this optimizer, whatever the rule."""
    recipe = next(recipe for known, _, recipe in RAMPED.values() if known is factory)
    return run(make(factory, "none", **recipe), k=1)


@pytest.mark.parametrize("name", RAMPED)
def test_a_ramp_tracks_the_constant_run(name):
    factory, rule, recipe = RAMPED[name]
    ramped = run(make(factory, rule, **recipe), k=1, microbatches=2, batch_sizes=RAMP)
    np.testing.assert_allclose(ramped, constant_run(factory), atol=0.012)


def test_a_ramp_down_tracks_too():
    make_optimizer = make(optax.adam, "noise_aware", **ADAM)
    down = run(make_optimizer, k=8, microbatches=2, batch_sizes=RAMP[::-1])
    np.testing.assert_allclose(down, constant_run(optax.adam), atol=0.012)


ONLY_DECAYS = ScalingRule("decays", lr_power=0.0, weight_decay_power=0.0, q_power=0.0)


@pytest.fixture(scope="module")
def adam_of_a_constant_gradient():
    """Its first state, and one update at a batch size."""
    scaled = scale_by_batch(optax.adam, batch_size=64, base_batch_size=64, rule=ONLY_DECAYS)
    tx, grads = scaled(1.0, b1=0.9, b2=0.999, eps=0.0), jnp.full(3, 0.7)
    return tx.init(grads), jax.jit(lambda s, b: tx.update(grads, s, grads, batch_size=b))


@pytest.mark.parametrize("before", [1, 3, 40])
@pytest.mark.parametrize("batch_size", [32, 100, 512])
def test_bias_correction_survives_a_change(before, batch_size, adam_of_a_constant_gradient):
    """On a constant gradient Adam's normalised update is 1 at any time and any decay.

    A count of updates and the decay in force give 0.12 in its place after b2 .9 -> .999.
    """
    state, update = adam_of_a_constant_gradient
    for size in [64] * before + [batch_size] * 3:
        updates, state = update(state, jnp.int32(size))
        np.testing.assert_allclose(updates, -1.0, rtol=2e-3)
    assert int(state.inner_state[0].count) == before + 3
    assert int(state.examples) == 64 * before + 3 * batch_size


def test_second_moment_is_restated_for_the_new_size():
    tx = scale_by_batch(optax.adam, batch_size=64, base_batch_size=64, rule="sqrt")(1e-3, b2=0.99)
    grads = jnp.ones(3)
    state = tx.init(grads)
    for _ in range(5):
        _, state = tx.update(grads, state, grads, batch_size=64)
    nu = state.inner_state[0].nu
    _, after = tx.update(0 * grads, state, grads, batch_size=256)
    # Under the square-root rule all of v is noise, so four times the batch shows a quarter of it.
    np.testing.assert_allclose(after.inner_state[0].nu, 0.99**4 * nu / 4, rtol=1e-5)
    _, none = tx.update(0 * grads, state, grads, batch_size=64)
    np.testing.assert_allclose(none.inner_state[0].nu, 0.99 * nu, rtol=1e-5)


def test_trap_an_undamped_trace_is_restated_for_its_new_decay():
    scaled = scale_by_batch(optax.sgd, batch_size=64, base_batch_size=64, rule="linear")
    tx = scaled(0.1, momentum=0.9)
    grads = jnp.ones(3)
    state = tx.init(grads)
    update = jax.jit(lambda s, b: tx.update(grads, s, grads, batch_size=b))
    for _ in range(300):
        updates, state = update(state, jnp.int32(64))
    steady = float(updates[0])  # -lr g/(1 - d)
    assert steady == pytest.approx(-1.0, rel=1e-4)
    for _ in range(3):
        updates, state = update(state, jnp.int32(512))
        np.testing.assert_allclose(updates, 8 * steady, rtol=1e-4)


def test_centered_rmsprops_spread_and_its_momentum_both_follow_a_change():
    scaled = scale_by_batch(optax.rmsprop, batch_size=64, base_batch_size=64, rule="sqrt")
    tx = scaled(0.1, 0.9, centered=True, momentum=0.9)
    grads = jnp.linspace(0.5, 1.0, 3)
    state = tx.init(grads)
    for _ in range(3):
        _, state = tx.update(grads, state, grads, batch_size=64)
    _, after = tx.update(0 * grads, state, grads, batch_size=256)
    (old, _, trace), (new, _, new_trace) = state.inner_state, after.inner_state
    # Four times the batch shows a quarter of the spread, and takes steps four times as long.
    spread = old.mu**2 + (old.nu - old.mu**2) / 4
    np.testing.assert_allclose(new.nu, 0.9**4 * spread, rtol=1e-5)
    np.testing.assert_allclose(new.mu, 0.9**4 * old.mu, rtol=1e-5)
    np.testing.assert_allclose(new_trace.trace, 0.9**4 * 4 * trace.trace, rtol=1e-5)


def test_a_state_from_another_batch_size_shows_what_is_in_force_now():
    scaled = functools.partial(scale_by_batch, optax.adamw, base_batch_size=64, rule="sqrt")
    state = scaled(batch_size=64)(1e-3).init(jnp.ones(1))
    _, state = scaled(batch_size=256)(1e-3).update(jnp.ones(1), state, jnp.ones(1))
    assert float(hyperparams(state)["learning_rate"]) == pytest.approx(2e-3)


def test_rule_none_carries_nothing():
    tx = scale_by_batch(optax.adam, batch_size=64, base_batch_size=64, rule="none")(1e-3, b2=0.99)
    plain = optax.adam(1e-3, b2=0.99)
    grads = jnp.ones(3)
    state, expected = tx.init(grads), plain.init(grads)
    for size in (64, 512, 16):
        got, state = tx.update(grads, state, grads, batch_size=size)
        want, expected = plain.update(grads, expected, grads)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_schedule_follows_the_examples():
    scaled = scale_by_batch(optax.sgd, batch_size=64, base_batch_size=64, rule="linear")
    tx = scaled(lambda step: 1.0 + step)
    state = tx.init(jnp.ones(1))
    seen = []
    for size in (64, 128, 32, 64):
        _, state = tx.update(jnp.ones(1), state, batch_size=size)
        seen.append(float(hyperparams(state)["learning_rate"]))
    # Base-size updates before each: 0, 1, 3, 3.5; each reads the middle of what it stands for.
    assert seen == pytest.approx([1.0, 2 * 2.5, 0.5 * 3.75, 4.5])


@pytest.mark.parametrize("rule", ["sqrt", "noise_aware", "invariant"])
def test_a_checkpoint_in_the_middle_of_a_ramp_changes_nothing(rule, tmp_path):
    scaled = scale_by_batch(optax.adamw, batch_size=64, base_batch_size=64, rule=rule)
    params = {"w": jnp.linspace(0.1, 1.0, 4)}
    sizes = [64, 64, 128, 256, 512, 512]

    def program(tx):
        return jax.jit(lambda p, s, b, m: tx.update(p, s, p, batch_size=b, microbatch=m))

    def run(step, params, state, sizes):
        for size in sizes:
            stats = MicrobatchStats(jax.tree.map(lambda p: 3 * p**2, params), 2)
            updates, state = step(params, state, jnp.int32(size), stats)
            params = optax.apply_updates(params, updates)
        return params, state

    tx = scaled(1e-2)
    step = program(tx)
    through = run(step, params, tx.init(params), sizes)
    half = run(step, params, tx.init(params), sizes[:3])
    leaves, treedef = jax.tree.flatten(half)
    np.savez(tmp_path / "checkpoint", *leaves)
    with np.load(tmp_path / "checkpoint.npz") as loaded:
        restored = jax.tree.unflatten(treedef, [jnp.asarray(loaded[n]) for n in loaded.files])
    resumed = run(program(scaled(1e-2)), *restored, sizes[3:])
    jax.tree.map(np.testing.assert_array_equal, through, resumed)
