"""Micro-batch statistics, the noise scale, and the invariant second moment, on known problems."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bs_jax.errors import UserError
from bs_jax.scaling import (
    MicrobatchStats,
    hyperparams,
    noise_by_group,
    noise_sample,
    noise_scale_by_group,
    noise_scale_estimate,
    optimizers,
    scale_by_batch,
    value_grad_and_stats,
)
from bs_jax.scaling import noise as lib

PARAMS = {"w": jnp.array([[0.5, -1.0], [2.0, 0.1], [0.3, 0.3]]), "b": jnp.array([0.1, -0.2])}


def loss_fn(params, batch):
    prediction = batch["x"] @ params["w"] + params["b"][None]
    return jnp.mean(jnp.square(prediction - batch["y"]))


def data(examples, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(examples, 3)).astype(np.float32),
        "y": rng.normal(size=(examples, 2)).astype(np.float32),
    }


gradient = jax.jit(jax.grad(loss_fn))


def by_hand(batch, parts):
    size = len(batch["x"]) // parts
    grads = [
        gradient(PARAMS, jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], batch))
        for i in range(parts)
    ]
    stack = jax.tree.map(lambda *g: np.stack(g), *grads)
    return (jax.tree.map(lambda g: g.mean(0), stack), jax.tree.map(lambda g: (g**2).mean(0), stack))


def assert_close(a, b, **kwargs):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), a, b)


@pytest.mark.parametrize("method", ["scan", "vmap"])
def test_statistics_are_those_of_the_parts(method):
    batch = data(12)
    f = jax.jit(value_grad_and_stats(loss_fn, microbatches=4, method=method))
    value, grads, stats = f(PARAMS, batch)
    mean, mean_square = by_hand(batch, 4)
    np.testing.assert_allclose(value, loss_fn(PARAMS, batch), rtol=1e-6)
    assert_close(grads, mean, rtol=1e-5, atol=1e-7)
    assert_close(stats.mean_square, mean_square, rtol=1e-5, atol=1e-7)
    assert stats.count == 4


def test_interleaved_parts_of_a_sharded_batch_are_not_gathered():
    batch = data(16)
    shuffled = jax.tree.map(lambda x: jnp.concatenate([x[i::4] for i in range(4)]), batch)
    expected = value_grad_and_stats(loss_fn, microbatches=4)(PARAMS, shuffled)
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("devices")))
    params = jax.device_put(PARAMS, jax.NamedSharding(mesh, jax.P()))
    gathers = []
    for interleave in (False, True):
        f = jax.jit(value_grad_and_stats(loss_fn, microbatches=4, interleave=interleave))
        compiled = f.lower(params, sharded).compile()
        gathers.append("all-gather" in compiled.as_text())
    assert gathers == [True, False]
    value, grads, stats = compiled(params, sharded)
    assert_close((value, grads), expected[:2], rtol=1e-5, atol=1e-7)
    assert_close(stats.mean_square, expected[2].mean_square, rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_trap_shard_map_sums_the_gradient_of_replicated_parameters(parts):
    batch = data(16)
    f = value_grad_and_stats(loss_fn, microbatches=parts, axis_name="devices")

    def step(params, batch):
        value, grads, stats = f(params, batch)
        return value, grads, stats.mean_square, stats.mean

    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = jax.P(), jax.P("devices")
    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=jax.P()))
    value, grads, mean_square, mean = run(PARAMS, batch)
    expected = value_grad_and_stats(loss_fn, microbatches=2 * parts)(PARAMS, batch)
    assert_close((value, grads, mean), (*expected[:2], expected[2].mean), rtol=1e-5, atol=1e-7)
    assert_close(mean_square, expected[2].mean_square, rtol=1e-5)


def test_devices_count_as_micro_batches():
    batch = data(16)
    f = value_grad_and_stats(loss_fn, microbatches=2, axis_name="devices")

    def step(params, batch):
        value, grads, stats = f(params, batch)
        return value, grads, stats.mean_square, jnp.asarray(stats.count)

    split = jax.tree.map(lambda x: x.reshape(2, 8, -1), batch)
    run = jax.pmap(step, axis_name="devices", in_axes=(None, 0), out_axes=None)
    value, grads, mean_square, count = run(PARAMS, split)
    expected = value_grad_and_stats(loss_fn, microbatches=4)(PARAMS, batch)
    assert int(count) == 4
    assert_close((value, grads, mean_square), (*expected[:2], expected[2].mean_square), rtol=1e-5)


def test_auxiliary_output_is_averaged_and_arguments_pass_through():
    def with_aux(params, batch, factor):
        loss = factor * loss_fn(params, batch)
        return loss, {"first": batch["x"][0, 0], "examples": jnp.int32(batch["x"].shape[0])}

    batch = data(8)
    f = value_grad_and_stats(with_aux, microbatches=2, has_aux=True)
    (value, aux), _, _ = f(PARAMS, batch, 3.0)
    np.testing.assert_allclose(value, 3 * loss_fn(PARAMS, batch), rtol=1e-6)
    np.testing.assert_allclose(aux["first"], (batch["x"][0, 0] + batch["x"][4, 0]) / 2, rtol=1e-6)
    assert float(aux["examples"]) == 4


def test_every_part_gets_its_own_random_key():
    def noisy(params, batch, rng):
        return params * jnp.mean(batch) + jax.random.normal(rng)

    f = value_grad_and_stats(noisy, microbatches=3)
    key = jax.random.key(0)
    value, _, _ = f(jnp.float32(0.0), jnp.ones(6), rng=key)
    draws = [jax.random.normal(jax.random.fold_in(key, i)) for i in range(3)]
    np.testing.assert_allclose(value, np.mean(draws), rtol=1e-6)


def test_one_part_has_no_statistics():
    batch = data(6)
    value, grads, stats = value_grad_and_stats(loss_fn, microbatches=1)(PARAMS, batch)
    assert stats is None
    assert_close((value, grads), jax.value_and_grad(loss_fn)(PARAMS, batch), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: value_grad_and_stats(loss_fn, microbatches=0), "microbatches is 0"),
        (lambda: value_grad_and_stats(loss_fn, microbatches=2, method="map"), "'scan' or 'vmap'"),
        (lambda: value_grad_and_stats(loss_fn, microbatches=5)(PARAMS, data(12)), "12 examples"),
        (lambda: value_grad_and_stats(loss_fn, microbatches=5)(PARAMS, jnp.float32(1)), "no ex"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_signal_and_noise_are_unbiased():
    """Over many draws, c averages to g^2 and w to the variance of one part."""
    mean, deviation, n = 0.3, 2.0, 3
    rng = np.random.default_rng(1)
    draws = np.float32(mean + deviation * rng.standard_normal((200_000, n)))
    c, w = lib.signal_and_noise(draws.mean(1) ** 2, (draws**2).mean(1), n)
    assert float(c.mean()) == pytest.approx(mean**2, abs=0.02)
    assert float(w.mean()) == pytest.approx(deviation**2, rel=0.01)
    assert float(w.min()) >= 0


base_square = jax.jit(lib.base_square)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("n", "k"), [(2, 1 / 8), (2, 8.0), (3, 0.5), (16, 2.0), (64, 8.0)])
def test_v0_is_what_a_batch_of_the_base_size_would_show(n, k, seed):
    """E v0 = g^2 + Sigma/B0 for any number of micro-batches at any batch size."""
    g, sigma = 0.5, 1.0  # of a base batch
    part_deviation = sigma * np.sqrt(n / k)
    rng = np.random.default_rng(seed)
    draws = np.float32(g + part_deviation * rng.standard_normal((n, 10_000)))
    v0, noise = base_square(draws.mean(0), MicrobatchStats((draws**2).mean(0), n), k)
    expected = g**2 + sigma**2
    error = 6 * (expected + part_deviation**2 / np.sqrt(n - 1)) / np.sqrt(10_000)
    assert float(v0.mean()) == pytest.approx(expected, abs=error)
    assert float(noise.mean()) == pytest.approx(sigma**2, rel=0.1)


def test_with_micro_batches_of_the_base_size_v0_is_their_mean_square_exactly():
    """Batch-size-invariant Adam (Wang & Aitchison 2024) is the case b = B0."""
    draws = np.random.default_rng(0).standard_normal((4, 100), np.float32) + 0.2
    stats = MicrobatchStats((draws**2).mean(0), 4)
    v0, _ = lib.base_square(draws.mean(0), stats, 4.0)
    np.testing.assert_array_equal(v0, stats.mean_square)


def reference_invariant_adam(parts, lr, b1, b2, eps):
    """Batch-size-invariant Adam written out: the mean over micro-batches of squares feeds v."""
    x, m, v = np.zeros(parts.shape[-1]), 0.0, 0.0
    k = parts.shape[1]
    for t, step in enumerate(np.asarray(parts, np.float64), start=1):
        m = b1**k * m + (1 - b1**k) * step.mean(0)
        v = b2**k * v + (1 - b2**k) * (step**2).mean(0)
        update = (m / (1 - b1 ** (k * t))) / (np.sqrt(v / (1 - b2 ** (k * t))) + eps)
        x = x - k * lr * update
    return x


def test_it_equals_batch_size_invariant_adam_at_b_equal_b0():
    parts = np.random.default_rng(0).standard_normal((200, 4, 50), np.float32) + 0.3
    tx = scale_by_batch(
        optax.adam, batch_size=256, base_batch_size=64, rule="invariant", guard=False
    )(1e-2, b1=0.9, b2=0.99)

    def step(carry, part):
        x, state = carry
        stats = MicrobatchStats((part**2).mean(0), 4)
        updates, state = tx.update(part.mean(0), state, x, microbatch=stats)
        return (x + updates, state), None

    x = jnp.zeros(50)
    (x, state), _ = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), parts))(x)
    expected = reference_invariant_adam(parts, 1e-2, 0.9, 0.99, 1e-8)
    np.testing.assert_allclose(x, expected, rtol=1e-3, atol=1e-4)
    assert float(jnp.min(state.inner_state[0].nu)) > 0


def test_eps_stays_out_of_the_state():
    """A second moment that took eps in at every update would settle far above its gradient."""
    tx = scale_by_batch(optax.adam, batch_size=128, base_batch_size=64, rule="invariant")(
        1e-3, b2=0.9, eps=0.1
    )
    grads = jnp.full(3, 1e-3)
    stats = MicrobatchStats(jnp.full(3, 1e-6), 2)
    state = tx.init(grads)
    update = jax.jit(lambda s: tx.update(grads, s, grads, microbatch=stats)[1])
    for _ in range(60):
        state = update(state)
    np.testing.assert_allclose(state.inner_state[0].nu, 1e-6, rtol=1e-3)


@functools.cache
def four_parts():
    """Gradient and statistics of a batch in four parts."""
    f = jax.jit(value_grad_and_stats(loss_fn, microbatches=4))
    return f(PARAMS, data(32))[1:]


def first_update(tx, grads, stats):
    return jax.jit(lambda g, s: tx.update(g, tx.init(PARAMS), PARAMS, microbatch=s))(grads, stats)


def test_clipping_in_front_rescales_the_statistics_too():
    """A clipped gradient with unclipped statistics would read as pure noise."""
    grads, stats = four_parts()
    scale = 0.5 / float(optax.tree.norm(grads))
    assert scale < 1
    make = scale_by_batch(optax.adam, batch_size=32, base_batch_size=8, rule="invariant")
    clipped = optax.chain(optax.clip_by_global_norm(0.5), make(1e-2))
    _, state = first_update(clipped, grads, stats)
    _, raw = first_update(make(1e-2), grads, stats)
    assert_close(
        state[1].inner_state[0].nu,
        jax.tree.map(lambda v: v * scale**2, raw.inner_state[0].nu),
        rtol=1e-4,
    )


@pytest.mark.parametrize("in_the_table", [False, True])
def test_clipping_inside_ones_own_factory_rescales_the_statistics_too(in_the_table, monkeypatch):
    def mine(learning_rate, b2, max_norm):
        return optax.chain(optax.clip_by_global_norm(max_norm), optax.adam(learning_rate, b2=b2))

    roles = {"learning_rate": "learning_rate", "b2": "second_moment_decay", "max_norm": "unchanged"}
    kwargs = {"batch_size": 32, "base_batch_size": 8, "rule": "invariant"}
    grads, stats = four_parts()
    meaning = {"roles": roles, "family": "adam"}
    if in_the_table:
        monkeypatch.setattr(optimizers, "_TABLE", dict(optimizers._TABLE))
        optimizers.register(mine, **meaning)
        meaning = {}
    inside = scale_by_batch(mine, **kwargs, **meaning)(1e-2, 0.99, 0.5)
    outside = optax.chain(
        optax.clip_by_global_norm(0.5), scale_by_batch(optax.adam, **kwargs)(1e-2, b1=0.0, b2=0.99)
    )
    got, inner = first_update(inside, grads, stats)
    expected, outer = first_update(outside, grads, stats)
    assert_close(inner.inner_state[1][0].nu, outer[1].inner_state[0].nu, rtol=1e-4)
    assert_close(got, expected, rtol=1e-3)


@pytest.mark.parametrize("n", [2, 8])
def test_the_noise_scale_is_right_within_its_stated_spread(n):
    """g of known length, noise of known trace: B_noise = tr(Sigma)/|g|^2 = 200 examples."""
    dim, batch_size, signal, trace = 100, 64, 2.0, 400.0
    grad = np.full(dim, np.sqrt(signal / dim), np.float32)
    deviation = np.sqrt(trace / dim * n / batch_size)
    noise = np.random.default_rng(n).standard_normal((200, 60, n, dim), np.float32)

    def update(state, noise):
        parts = grad[None] + deviation * noise
        stats = MicrobatchStats((parts**2).mean(0), n)
        found = lib.sample(parts.mean(0), stats, batch_size=batch_size)
        new = lib.average(state, found, decay=0.98)
        return new, lib.estimate(new)

    @jax.jit
    def run(noise):
        runs = jax.tree.map(lambda x: jnp.broadcast_to(x, (60,)), lib.init_noise_scale())
        return jax.lax.scan(jax.vmap(update), runs, noise)[1]

    out = jax.device_get(run(noise))
    first, out = (jax.tree.map(lambda x, at=at: x[at], out) for at in (0, -1))
    assert out.signal.mean() == pytest.approx(signal, rel=0.05)
    assert out.noise.mean() == pytest.approx(trace, rel=0.02)
    assert np.median(out.noise_scale) == pytest.approx(200, rel=0.05)
    inside = np.mean(np.abs(out.noise_scale - 200) < 2 * out.standard_error)
    assert 0.85 <= inside <= 1.0
    covered = np.mean((out.low <= 200) & (out.high >= 200))
    assert 0.85 <= covered <= 1.0
    # Nothing is known of the spread after one update.
    np.testing.assert_array_equal(first.low, 0)
    assert np.isinf(first.high).all()
    assert np.isinf(first.standard_error).all()
    # The stated spread is the true one, neither timid nor boastful.
    assert np.median(out.standard_error) == pytest.approx(np.std(out.noise_scale), rel=0.35)


@pytest.mark.parametrize("metric", ["plain", "coordinate"])
@pytest.mark.parametrize("as_function", [False, True])
def test_groups_have_noise_scales_of_their_own(as_function, metric):
    """An embedding is ten times as noisy as the rest, and nobody sees it in the whole."""
    params = {"embedding": jnp.ones((5, 2)), "body": {"w": jnp.ones(3), "b": jnp.ones(2)}}
    labels = {"embedding": "embedding", "body": "rest"}
    tx = optax.chain(
        noise_by_group((lambda _: labels) if as_function else labels, batch_size=64, metric=metric),
        optax.clip_by_global_norm(1e-3),
        optax.sgd(0.1),
    )
    # For g = 1 and n = 4 parts of b = 16: c = (4 - s)/3, w = 4 (s - 1)/3, B_noise = b w/c.
    squares = jax.tree.map(lambda p: 1.5 * p, params) | {"embedding": jnp.full((5, 2), 3.0)}
    stats, state = MicrobatchStats(squares, 4, mean=params), tx.init(params)
    assert np.isnan(noise_scale_by_group(state)["rest"].noise_scale)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(params, state, params, microbatch=stats)
    found = noise_scale_by_group(state)
    assert float(found["embedding"].noise_scale) == pytest.approx(16 * 4 * 2 / 1)
    assert float(found["rest"].noise_scale) == pytest.approx(16 * 4 * 0.5 / 2.5)
    plain = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(0.1))
    assert_close(updates, plain.update(params, plain.init(params))[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tx: tx.update(jnp.ones(3), tx.init(jnp.ones(3))), "measures micro-batches"),
        (lambda tx: noise_by_group({"w": "a"}, batch_size=8).init({"b": 1.0}), "no prefix"),
        (lambda tx: noise_by_group({"w": 1}, batch_size=8).init({"w": 1.0}), "1 is no label"),
        (lambda tx: noise_scale_by_group(optax.adam(1.0).init(1.0)), "measures no groups"),
        (lambda tx: noise_by_group("a", batch_size=8, decay=1.0), "decay is 1.0"),
    ],
)
def test_mistakes_with_groups_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call(noise_by_group("all", batch_size=64))


def test_trap_parts_of_a_sorted_batch_show_more_than_noise_and_interleaved_ones_less():
    """Two classes that pull apart: the noise is 1 an example, whatever the order says."""
    label = jnp.array([-1.0, 1.0]).repeat(32)
    label = {"sorted": label, "shuffled": jax.random.permutation(jax.random.key(0), label)}

    def found(order, **kwargs):
        f = value_grad_and_stats(lambda w, y: jnp.mean(w * (0.5 + y)), microbatches=8, **kwargs)
        _, grad, stats = f(jnp.ones(()), label[order])
        return noise_sample(grad, stats, batch_size=64)["noise"]

    assert 0.3 < float(found("shuffled")) < 3
    assert float(found("sorted")) == pytest.approx(8 * 8 / 7)
    assert float(found("sorted", interleave=True)) == pytest.approx(0.0, abs=1e-6)


def test_statistics_keep_the_mean_that_narrow_gradients_round():
    batch = data(12)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    _, grads, stats = value_grad_and_stats(loss_fn, microbatches=4)(narrow, batch)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
    assert {m.dtype for m in jax.tree.leaves(stats.mean)} == {jnp.dtype(jnp.float32)}
    _, grads, stats = value_grad_and_stats(loss_fn, microbatches=4)(PARAMS, batch)
    # The same arrays: nothing tells the optimizer that somebody rescaled them.
    assert all(m is g for m, g in zip(*map(jax.tree.leaves, (stats.mean, grads)), strict=True))


def test_no_signal_reads_as_an_infinite_noise_scale():
    stats = MicrobatchStats(jnp.ones(4), 2)
    found = lib.sample(jnp.zeros(4), stats, batch_size=64)
    state = lib.average(lib.init_noise_scale(), found, decay=0.9)
    assert not lib.estimate(state).is_known  # one update tells no spread
    state = lib.average(state, found, decay=0.9)
    assert np.isinf(lib.estimate(state).noise_scale)
    for nothing in (lib.init_noise_scale(), lib.init_noise_scale()._replace(weight=jnp.ones(()))):
        found = lib.estimate(nothing)
        assert np.isnan(found.noise_scale)
        assert not found.is_known
        assert (found.low, found.high) == (0, np.inf)


def test_zero_gradients_give_finite_hyperparameters():
    tx = scale_by_batch(
        optax.adam, batch_size=128, base_batch_size=64, rule="noise_aware", guard=False
    )(1e-3)
    zeros = jnp.zeros(3)
    stats = MicrobatchStats(zeros, 2)
    updates, state = tx.update(zeros, tx.init(zeros), zeros, microbatch=stats)
    assert float(hyperparams(state)["learning_rate"]) == pytest.approx(1e-3 * 2**0.5)
    np.testing.assert_array_equal(updates, zeros)


def test_the_noise_scale_is_found_in_an_optimizer_state():
    tx = optax.chain(
        optax.clip(1e9),
        scale_by_batch(optax.adam, batch_size=128, base_batch_size=64, rule="noise_aware")(1e-3),
    )
    params = jnp.ones(3)
    # Parts 1 +- 1: |g|^2 = 1 - 1 = 0 by the unbiased estimate from one update; so shift the mean.
    stats = MicrobatchStats(jnp.full(3, 5.0), 2)
    state = tx.init(params)
    for known in (False, True):
        _, state = tx.update(2 * params, state, params, microbatch=stats)
        found = noise_scale_estimate(state)
        assert bool(found.is_known) == known
    # c = (2 * 4 - 5)/1 = 3, w = 2 (5 - 4)/1 = 2, b = 64.
    assert float(found.noise_scale) == pytest.approx(64 * 2 / 3)
    assert noise_scale_estimate(optax.adam(1e-3).init(params)) is None
