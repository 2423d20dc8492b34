"""Gradients of a batch in parts: weights, loaders, flax nnx, meshes; and what the parts tell."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bs_jax
from bs_jax.errors import UserError
from bs_jax.scaling import GradientAccumulator, ScalingWarning, noise, value_grad_and_stats

W = jnp.array([0.5, -1.0, 2.0, 0.1])
LENGTHS = (6, 6, 5, 6, 1, 1, 0, 0)  # the last quarter holds nothing but padding


def sentences(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    shape = (len(lengths), 6)
    return {
        "x": rng.normal(size=(*shape, 4)).astype(np.float32),
        "y": rng.normal(size=shape).astype(np.float32),
        "mask": (np.arange(6) < np.asarray(lengths)[:, None]).astype(np.float32),
    }


def total(w, batch):
    error = jnp.square(batch["x"] @ w - batch["y"])
    return jnp.sum(batch["mask"] * error), jnp.sum(batch["mask"])


def mean_over_tokens(w, batch):
    loss, weight = total(w, batch)
    return loss / weight


whole_value_and_grad = jax.jit(jax.value_and_grad(mean_over_tokens))


def assert_close(a, b, rtol=2e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def expected_statistics(batch, groups):
    """mean_square = sum n_i g_i^2 / sum n_i over the parts, in which those of weight 0 are not."""
    parts = [jax.tree.map(lambda x, i=i: x[np.asarray(i)], batch) for i in groups]
    weights = np.array([part["mask"].sum() for part in parts])
    square = sum(
        n * np.square(whole_value_and_grad(W, part)[1])
        for n, part in zip(weights, parts, strict=True)
        if n
    )
    return square / weights.sum(), int((weights > 0).sum())


@pytest.mark.parametrize("method", ["scan", "vmap"])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_weighted_gradient_is_the_whole_batchs(parts, interleave, method):
    batch = sentences()
    f = value_grad_and_stats(
        total, microbatches=parts, weighted=True, interleave=interleave, method=method
    )
    value, grads, stats = jax.jit(f)(W, batch)
    assert_close((value, grads), whole_value_and_grad(W, batch))
    if parts == 1:
        assert stats is None
        return
    order = np.arange(8).reshape(-1, parts).T if interleave else np.arange(8).reshape(parts, -1)
    square, count = expected_statistics(batch, order)
    assert_close(stats.mean_square, square)
    assert float(stats.count) == count
    assert_close(stats.mean, grads)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_the_weighted_gradient_of_two_devices_is_the_whole_batchs():
    batch = sentences()
    f = value_grad_and_stats(total, microbatches=2, weighted=True, axis_name="devices")

    def step(w, batch):
        value, grads, stats = f(w, batch)
        return value, grads, stats.mean_square, stats.count

    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = jax.P(), jax.P("devices")
    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=jax.P()))
    value, grads, mean_square, count = run(W, batch)
    assert_close((value, grads), whole_value_and_grad(W, batch))
    square, wanted = expected_statistics(batch, np.arange(8).reshape(4, 2))
    assert_close(mean_square, square)
    assert float(count) == wanted == 3


def test_one_part_with_weight_tells_no_noise_and_so_lengthens_no_step():
    batch = sentences((6, 6, 0, 0))
    _, _, stats = value_grad_and_stats(total, microbatches=2, weighted=True)(W, batch)
    assert float(stats.count) == 2  # at least, so that nothing is divided by 0
    found = noise.sample(stats.mean, stats, batch_size=4)
    assert float(found["noise"]) < 1e-5 * float(found["signal"])


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 2, 3, 10), (5, 5, 1, 0)])
def test_signal_and_noise_are_unbiased_for_parts_of_unequal_weight(weights):
    """g_i = g + sigma/sqrt(n_i) z: E c = g^2 and E w b = sigma^2, b = (tokens of the batch)/n."""
    weights, g, sigma = np.asarray(weights, np.float32), 0.7, 3.0
    used = weights[weights > 0]
    z = np.random.default_rng(0).normal(size=(200_000, len(used)))
    parts = jnp.asarray(g + sigma / np.sqrt(used) * z, jnp.float32)
    gathered = GradientAccumulator.zeros_like(jnp.zeros(200_000))
    for i, weight in enumerate(weights):
        # A part of padding alone, whose mean is undefined, is passed over.
        gathered = gathered.add(parts[:, i] if weight else jnp.full(200_000, jnp.nan), weight)
    mean, stats = gathered.result()
    assert float(stats.count) == len(used)
    c, w = noise.signal_and_noise(mean**2, stats.mean_square, stats.count)
    per_token = w * (weights.sum() / len(used))
    error = 5 * sigma**2 / np.sqrt(200_000)
    assert float(c.mean()) == pytest.approx(g**2, abs=error)
    assert float(per_token.mean()) == pytest.approx(sigma**2, abs=4 * error)


def test_micro_batches_from_a_loader_do_what_the_whole_batch_does():
    batch = sentences()
    f = value_grad_and_stats(total, microbatches=4, weighted=True)
    _, grads, stats = jax.jit(f)(W, batch)
    part_of = jax.jit(jax.value_and_grad(lambda w, b: total(w, b)[0]))
    add = jax.jit(GradientAccumulator.add)
    gathered = GradientAccumulator.zeros_like(W)
    for i in range(4):
        part = jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch)
        weight = jnp.sum(part["mask"])
        gathered = add(gathered, part_of(W, part)[1] / jnp.maximum(weight, 1.0), weight)
    ours, our_stats = gathered.result(W)
    assert_close((ours, our_stats), (grads, stats))
    # As good to an optimizer: its update is the same.
    tx = bs_jax.scale_by_batch(optax.adamw, batch_size=8, base_batch_size=2)(1e-2)
    ours, _ = tx.update(ours, tx.init(W), W, microbatch=our_stats)
    assert_close(ours, tx.update(grads, tx.init(W), W, microbatch=stats)[0])


def test_a_loader_of_equal_parts_needs_no_weights_and_keeps_narrow_dtypes():
    w = W.astype(jnp.bfloat16)
    gathered = GradientAccumulator.zeros_like(w)
    for i in range(4):
        gathered = gathered.add(jnp.full(4, 1.0 + 2.0**-7 * i, jnp.bfloat16))
    grads, stats = gathered.result(w)
    assert grads.dtype == jnp.bfloat16
    assert stats.mean.dtype == jnp.float32
    np.testing.assert_array_equal(stats.mean, 1 + 1.5 * 2.0**-7)
    assert float(stats.count) == 4


def test_one_micro_batch_from_a_loader_is_refused():
    gathered = GradientAccumulator.zeros_like(W).add(W).add(W, 0.0)
    with pytest.raises(UserError, match=r"1 micro-batches were added.*add 2 or more"):
        gathered.result()


@pytest.mark.parametrize(
    ("grads", "weight", "message"),
    [
        (jnp.ones(()), 1.0, "other shapes"),
        (jnp.ones((1, 4)), 1.0, "other shapes"),
        ({"w": W}, 1.0, "another structure"),
        (W, -1.0, "weight of a micro-batch is -1"),
        (W, jnp.nan, "weight of a micro-batch is nan"),
        (W, jnp.ones(4), "give one number"),
    ],
)
def test_what_cannot_be_added_is_refused(grads, weight, message):
    with pytest.raises(UserError, match=message):
        GradientAccumulator.zeros_like(W).add(grads, weight)


def test_a_weight_that_is_not_a_number_shows_where_nobody_can_look():
    gathered = GradientAccumulator.zeros_like(W).add(W)
    grads, _ = jax.jit(lambda weight: gathered.add(W, weight).result())(jnp.nan)
    assert bool(jnp.isnan(grads).all())


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (mean_over_tokens, {"weighted": True}, "weighted=True.*return the pair"),
        (total, {}, "has_aux=True.*weighted=True"),
        (lambda w, b: (mean_over_tokens(w, b), {}), {}, "has_aux=True"),
        (mean_over_tokens, {"has_aux": True}, "has_aux=True, but.*return the pair"),
        (lambda w, b: (mean_over_tokens(w, b), 1, 2), {"has_aux": True}, "return the pair"),
    ],
)
def test_a_loss_that_returns_something_else_is_named(loss, settings, message):
    with pytest.raises(UserError, match=message):
        value_grad_and_stats(loss, microbatches=2, **settings)(W, sentences())


def test_aux_beside_sum_and_weight_is_averaged_over_the_parts():
    def loss(w, batch):
        return total(w, batch), {"tokens": jnp.sum(batch["mask"])}

    f = value_grad_and_stats(loss, microbatches=4, weighted=True, has_aux=True)
    (value, aux), grads, _ = f(W, sentences())
    assert_close((value, grads), whole_value_and_grad(W, sentences()))
    assert float(aux["tokens"]) == sum(LENGTHS) / 4


# flax nnx


@pytest.fixture(scope="module")
def nnx():
    return pytest.importorskip("flax.nnx")


def network(nnx, dropout=0.5):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
            self.drop = nnx.Dropout(dropout, rngs=rngs)
            self.last = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(self.norm(x)))[:, 0]

    return Net(nnx.Rngs(0))


def rows(examples=8):
    return jax.random.normal(jax.random.key(1), (examples, 4)) + jnp.arange(4.0)[None]


def test_a_module_is_trained_with_its_own_state(nnx):
    model, x = network(nnx, dropout=0.0), rows()

    def loss(model, x):
        return jnp.mean(jnp.square(model(x)))

    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def by_hand(params, piece):
        net = nnx.merge(graph, params, rest, copy=True)
        value, grads = jax.value_and_grad(
            lambda p: jnp.mean(jnp.square(nnx.merge(graph, p, rest, copy=True)(piece)))
        )(params)
        net(piece)
        return value, grads, net.norm.mean[...], net.norm.var[...]

    first, second = by_hand(params, x[:4]), by_hand(params, x[4:])
    wanted = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    f = nnx.jit(value_grad_and_stats(loss, microbatches=2))
    value, grads, stats = f(model, x)
    assert_close((value, nnx.to_pure_dict(grads)), (wanted[0], nnx.to_pure_dict(wanted[1])))
    # Each part moves the running mean from where it was; the module keeps their mean.
    assert_close((model.norm.mean[...], model.norm.var[...]), wanted[2:])
    assert stats.count == 2
    optimizer = nnx.Optimizer(
        model,
        bs_jax.scale_by_batch(optax.adamw, batch_size=8, base_batch_size=4)(1e-2),
        wrt=nnx.Param,
    )
    nnx.jit(lambda m, o, g, s: o.update(m, g, microbatch=s))(model, optimizer, grads, stats)
    assert bs_jax.hyperparams(optimizer, as_floats=True)["b1"] == pytest.approx(0.81)


@pytest.mark.parametrize("method", ["scan", "vmap"])
@pytest.mark.parametrize("form", ["module", "argument"])
def test_a_state_keeps_its_types(nnx, form, method):
    """Counts and flags have no mean; a bfloat16 statistic has one, and stays bfloat16."""

    class Counting(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(4))
            self.calls = nnx.Variable(jnp.int32(0))
            self.seen = nnx.Variable(jnp.bool_(False))
            self.mean = nnx.BatchStat(jnp.zeros((), jnp.bfloat16))

        def __call__(self, x):
            self.calls[...], self.seen[...] = self.calls[...] + 1, jnp.bool_(True)
            self.mean[...] = jnp.mean(x).astype(jnp.bfloat16)
            return jnp.mean(x @ self.scale[...])

    model, x = Counting(), jnp.arange(16.0).reshape(4, 4)
    if form == "module":
        value_grad_and_stats(lambda m, x: m(x), microbatches=2, method=method)(model, x)
    else:
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, x, rest):
            net = nnx.merge(graph, params, rest, copy=True)
            return net(x), {"state": nnx.split(net, nnx.Param, ...)[2], "count": jnp.int32(3)}

        f = value_grad_and_stats(loss, microbatches=2, has_aux=True, method=method)
        aux = f(params, x, rest)[0][1]
        assert aux["count"].dtype == jnp.float32  # a metric is averaged
        nnx.update(model, aux["state"])
    state = [model.calls[...], model.seen[...], model.mean[...]]
    assert [float(v) for v in state] == [1, 1, 7.5]
    assert [v.dtype for v in state] == [jnp.int32, jnp.bool_, jnp.bfloat16]


@pytest.mark.parametrize("method", ["scan", "vmap"])
@pytest.mark.parametrize("form", ["module", "argument"])
def test_every_part_and_every_step_draws_its_own_mask(nnx, form, method):
    """Of a mean over a mask of 4,096 ones: equal means are equal masks."""

    class Masked(nnx.Module):
        def __init__(self, rngs):
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.scale = nnx.Param(jnp.ones(4096))

        def __call__(self, x):
            return self.drop(jnp.ones((4096,)) * self.scale[...]) @ x[0]

    model, x = Masked(nnx.Rngs(0)), jnp.ones((4, 4096)) * jnp.arange(1.0, 4097.0)[None]
    if form == "module":
        f = nnx.jit(value_grad_and_stats(lambda model, x: model(x), microbatches=4, method=method))
        seen = [f(model, x)[1:] for _ in range(3)]
    else:
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, x, rest):
            net = nnx.merge(graph, params, rest, copy=True)
            return net(x), nnx.split(net, nnx.Param, ...)[2]

        f = jax.jit(value_grad_and_stats(loss, microbatches=4, has_aux=True, method=method))
        seen = []
        for _ in range(3):
            (_, rest), grads, stats = f(params, x, rest)
            seen.append((grads, stats))
    for grads, stats in seen:
        (mean,), (square,) = jax.tree.leaves(grads), jax.tree.leaves(stats.mean_square)
        unit = np.asarray(mean) / np.arange(1.0, 4097.0) * 2  # how many of four masks, of ones
        assert set(np.round(np.unique(unit), 4)) == {0.0, 1.0, 2.0, 3.0, 4.0}
        assert np.all(square >= mean**2 - 1e-2 * square)
    assert not np.array_equal(*(jax.tree.leaves(seen[i][0])[0] for i in (0, 1)))
    assert not np.array_equal(*(jax.tree.leaves(seen[i][0])[0] for i in (1, 2)))


def test_a_key_among_the_arguments_is_folded_as_rng_is():
    def loss(w, batch, rng):
        return jnp.mean(jax.random.normal(rng, (8,))) * jnp.sum(w) * jnp.mean(batch)

    key, batch = jax.random.key(3), jnp.ones((4, 2))
    f = value_grad_and_stats(loss, microbatches=4)
    by_position, by_name = f(W, batch, key), f(W, batch, rng=key)
    assert_close(by_position[:2], by_name[:2])
    stats = by_position[2]
    assert float(jnp.sum(stats.mean_square - stats.mean**2)) > 0.01
    with pytest.warns(ScalingWarning, match="every micro-batch gets the same one"):
        f(W, batch, jax.random.PRNGKey(3))
    with pytest.warns(ScalingWarning, match="reads 'key'.*pass it as rng="):
        value_grad_and_stats(lambda w, b: loss(w, b, key), microbatches=4)(W, batch)


def test_random_streams_from_outside_the_arguments_are_warned_of(nnx):
    graph, params, rest = nnx.split(network(nnx), nnx.Param, ...)

    def loss(params, x):
        return jnp.mean(nnx.merge(graph, params, rest, copy=True)(x))

    f = value_grad_and_stats(loss, microbatches=2)
    with pytest.warns(ScalingWarning, match="reads 'rest'.*every step draws the same mask"):
        f(params, rows())
    quiet = nnx.split(network(nnx), nnx.Param, nnx.BatchStat, ...)[2]  # no streams in it

    def without(params, x):
        return jnp.mean(x) * sum(jnp.sum(p) for p in jax.tree.leaves(params)) + 0 * len(quiet)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value_grad_and_stats(without, microbatches=2)(params, rows())


# Batches that jit shards


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("spec", [jax.P("data", None), jax.P(None, None)])
def test_over_an_explicit_mesh(spec):
    """Parameters and batch sharded by type: as on one device, or refused in one line."""
    rng = np.random.default_rng(0)
    w, x, y = (rng.normal(size=s).astype(np.float32) for s in ((8, 4), (32, 8), (32, 4)))

    def loss(p, batch):
        return jnp.mean((batch["x"] @ p["w"] - batch["y"]) ** 2)

    f = value_grad_and_stats(loss, microbatches=4, interleave=True)
    alone = jax.jit(f)({"w": w}, {"x": x, "y": y})
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(w, spec)}
        batch = jax.device_put({"x": x, "y": y}, jax.P("data"))
        for method in ("scan", "vmap"):
            f = value_grad_and_stats(loss, microbatches=4, interleave=True, method=method)
            value, grads, stats = jax.jit(f)(params, batch)
            assert grads["w"].sharding.spec == spec, grads["w"].sharding
            np.testing.assert_allclose(value, alone[0], rtol=1e-5)
            np.testing.assert_allclose(grads["w"], alone[1]["w"], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(stats.mean_square["w"], alone[2].mean_square["w"], rtol=1e-4)
            f = value_grad_and_stats(loss, microbatches=4, method=method)
            with pytest.raises(UserError, match="pass interleave=True") as error:
                jax.jit(f)(params, batch)
            assert "\n" not in str(error.value)
        tx = bs_jax.scale_by_batch(optax.adamw, batch_size=32, base_batch_size=8)(1e-2)
        state = jax.jit(tx.init)(params)
        assert state.inner_state[0].mu["w"].sharding.spec == spec
        updates, state = jax.jit(lambda g, s, p, m: tx.update(g, s, p, microbatch=m))(
            grads, state, params, stats
        )
        assert updates["w"].sharding.spec == spec


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_weighted_parts_of_a_batch_that_jit_shards():
    batch = sentences()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
    f = value_grad_and_stats(total, microbatches=2, weighted=True, interleave=True)
    value, grads, stats = jax.jit(f)(W, sharded)
    assert_close((value, grads), whole_value_and_grad(W, batch))
    square, _ = expected_statistics(batch, np.arange(8).reshape(4, 2).T)
    assert_close(stats.mean_square, square)
