"""scale_by_batch inside and around other optax transformations, under jit, vmap, pmap and scan."""

import functools
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.scaling import PARAMS, RECIPE, assert_close, assert_equal, gradients, scan, train

from bs_jax.errors import UserError
from bs_jax.scaling import (
    MicrobatchStats,
    ScalingWarning,
    hyperparams,
    noise_by_group,
    scale_by_batch,
    value_grad_and_stats,
)

SIZES = {"batch_size": 256, "base_batch_size": 64}
two_devices = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
STATIC_AT_4 = {
    "learning_rate": 2e-2,
    "b1": 0.9**4,
    "b2": 0.99**4,
    "weight_decay": 0.2,
    "eps": 1e-8 / 2,
}


PARTIAL = {
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "multi_transform": lambda tx: optax.multi_transform(
        {"a": tx, "z": optax.set_to_zero()}, {"w": "a", "b": "z"}
    ),
}


@pytest.mark.parametrize(
    ("name", "with_mean", "rule"),
    [
        ("masked", False, "invariant"),
        pytest.param("masked", True, "noise_aware", marks=pytest.mark.long),
        ("multi_transform", True, "noise_aware"),
        pytest.param("multi_transform", False, "invariant", marks=pytest.mark.long),
    ],
)
def test_micro_batches_reach_an_optimizer_that_sees_part_of_the_tree(name, with_mean, rule):
    tx = scale_by_batch(optax.adamw, batch_size=256, base_batch_size=64, rule=rule)(**RECIPE)
    grads = gradients(6)
    squares = jax.tree.map(lambda g: g**2 + 1.0, grads)
    stats = MicrobatchStats(squares, np.full(6, 4), mean=grads if with_mean else None)
    got = train(PARTIAL[name](tx), grads, extra={"microbatch": stats})[0]
    only_w = {"w": PARAMS["w"]}
    alone = MicrobatchStats({"w": stats.mean_square["w"]}, stats.count)
    expected = train(tx, {"w": grads["w"]}, only_w, extra={"microbatch": alone})[0]
    assert_close(got["w"], expected["w"], rtol=1e-6)


def test_inject_hyperparams_composes():
    make = scale_by_batch(optax.adamw, batch_size=256, base_batch_size=64, rule="sqrt")
    injected = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(**RECIPE)
    grads = gradients(20)
    got, state, _ = train(injected, grads)
    assert_close(got, train(optax.adamw(**STATIC_AT_4), grads)[0], rtol=1e-5, atol=1e-6)
    assert float(hyperparams(state)["learning_rate"]) == pytest.approx(2e-2)


def test_trap_inject_hyperparams_reads_schedules_by_its_own_count():
    make = scale_by_batch(optax.adamw, batch_size=256, base_batch_size=64, rule="sqrt")
    schedule = optax.linear_schedule(1e-2, 0.0, 100)
    injected = optax.inject_hyperparams(make, static_args="learning_rate")(schedule)
    grads = gradients(20)
    got, state, _ = train(injected, grads)
    assert_close(got, train(make(schedule), grads)[0], rtol=1e-5, atol=1e-6)
    assert float(hyperparams(state)["learning_rate"]) == pytest.approx(2e-2 * (1 - 77.5 / 100))


def test_trap_inject_hyperparams_gives_decays_the_dtype_of_the_parameters():
    make = scale_by_batch(optax.adamw, batch_size=256, base_batch_size=64, rule="sqrt")
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    with pytest.warns(ScalingWarning, match=r"b2 is bfloat16.*hyperparam_dtype"):
        optax.inject_hyperparams(make)(1e-2).init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(1e-2).init(params)


@pytest.mark.parametrize("rule", ["noise_aware", "invariant"])
def test_wrappers_hand_the_statistics_on(rule):
    make = scale_by_batch(optax.adamw, batch_size=256, base_batch_size=64, rule=rule)
    grads = gradients(6)
    squares = jax.tree.map(lambda g: g**2 + 1.0, grads)
    extra = {"microbatch": MicrobatchStats(squares, np.full(6, 4), mean=grads)}
    expected = train(make(**RECIPE), grads, extra=extra)[0]
    for wrapped in (
        optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(**RECIPE),
        optax.apply_if_finite(make(**RECIPE), 3),
        optax.chain(optax.identity(), make(**RECIPE)),
    ):
        got, state, _ = train(wrapped, grads, extra=extra)
        assert_close(got, expected, rtol=1e-5, atol=1e-6)
        assert set(RECIPE) <= set(hyperparams(state))


@pytest.mark.parametrize("rule", ["noise_aware", "invariant"])
def test_an_update_that_is_not_finite_leaves_no_trace(rule):
    make = scale_by_batch(optax.adamw, batch_size=256, base_batch_size=64, rule=rule)
    tx = optax.apply_if_finite(make(**RECIPE), 3)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
    update = jax.jit(functools.partial(tx.update, microbatch=MicrobatchStats(bad, 2)))
    start = jax.jit(tx.init)(PARAMS)
    assert_equal(update(bad, start, PARAMS)[1].inner_state, start.inner_state)


@two_devices
@pytest.mark.parametrize("rule", ["noise_aware", "invariant"])
def test_a_sample_that_is_not_finite_does_not_stay_in_the_noise_scale(rule):
    """Behind ``optax.zero_nans``, say, training goes on; the guard must not be lost for good."""
    tx = optax.chain(optax.zero_nans(), scale_by_batch(optax.sgd, **SIZES, rule=rule)(1e-2))
    stats = MicrobatchStats(jax.tree.map(lambda p: 2 * p**2, PARAMS), 4)
    state = tx.init(PARAMS)
    shares = []

    @jax.jit
    def update(factor, state):
        grads, squares = (jax.tree.map(lambda x: factor * x, t) for t in (PARAMS, stats[0]))
        given = stats._replace(mean_square=squares, mean=grads)
        return tx.update(grads, state, PARAMS, microbatch=given)[1]

    for factor in (1.0, 1.0, np.nan, np.inf, 1e25, 1.0):
        state = update(factor, state)
        shares.append(hyperparams(state, as_floats=True)["guard"])
    assert 0.25 < shares[1] < 1
    assert_close(shares[2:5], [shares[1]] * 3, rtol=1e-6)
    assert_close(shares[5], shares[1], rtol=0.05)


def test_a_state_is_written_and_read_by_flax_and_pickle():
    serialization = pytest.importorskip("flax.serialization")
    scaled = functools.partial(scale_by_batch, **SIZES)
    tx = optax.chain(
        noise_by_group({"w": "all", "b": "all"}, batch_size=256),
        scaled(optax.clip_by_global_norm)(1.0),
        scaled(optax.adamw)(1e-3),
    )
    stats = MicrobatchStats(jax.tree.map(lambda p: 2 * p**2, PARAMS), 4, mean=PARAMS)
    start, update = jax.jit(tx.init)(PARAMS), functools.partial(tx.update, microbatch=stats)
    _, state = jax.jit(update)(PARAMS, start, PARAMS)
    for back in (
        serialization.from_bytes(start, serialization.to_bytes(state)),
        pickle.loads(pickle.dumps(state)),
    ):
        assert jax.tree.structure(back) == jax.tree.structure(state)
        assert_equal(back, state)
        assert hyperparams(back) == hyperparams(state)


@pytest.mark.parametrize(
    "rule", ["sqrt", pytest.param("noise_aware", marks=pytest.mark.long), "invariant"]
)
def test_under_pmap_two_devices_do_what_two_micro_batches_do(rule):
    def loss(params, batch):
        return jnp.mean(jnp.square(batch @ params["w"] + params["b"][None]))

    tx = scale_by_batch(optax.adamw, batch_size=16, base_batch_size=4, rule=rule)(**RECIPE)
    batches = jax.random.normal(jax.random.key(0), (4, 16, 2))

    def trained(axis_name, microbatches):
        gradient = value_grad_and_stats(loss, microbatches=microbatches, axis_name=axis_name)

        def step(carry, batch):
            params, state = carry
            _, grads, stats = gradient(params, batch)
            updates, state = tx.update(grads, state, params, microbatch=stats)
            return (optax.apply_updates(params, updates), state), None

        return lambda batches: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), batches)[0]

    one = jax.jit(trained(None, 2))(batches)
    spread = batches.reshape(4, 2, 8, 2).swapaxes(0, 1)
    two = jax.pmap(trained("d", 1), axis_name="d", out_axes=None)(spread)
    assert_close(two, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "rule", ["sqrt", pytest.param("noise_aware", marks=pytest.mark.long), "invariant"]
)
def test_jit_with_a_donated_state_does_what_plain_calls_do(rule):
    tx = scale_by_batch(optax.adamw, batch_size=256, base_batch_size=64, rule=rule)(**RECIPE)
    stats = MicrobatchStats(jax.tree.map(lambda p: p**2 + 1.0, PARAMS), 4)

    def step(params, state):
        updates, state = tx.update(params, state, params, microbatch=stats)
        return optax.apply_updates(params, updates), state

    donated = jax.jit(step, donate_argnums=(0, 1))
    plain = (PARAMS, tx.init(PARAMS))
    ours = (jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS))  # fresh, as a user donates it
    for _ in range(3):
        plain, ours = step(*plain), donated(*ours)
    assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_two_scaled_optimizers_in_one_state_are_told_apart():
    make = scale_by_batch(optax.sgd, batch_size=128, base_batch_size=64, rule="linear")
    tx = optax.multi_transform({"a": make(0.1), "z": make(0.2)}, {"w": "a", "b": "z"})
    values = hyperparams(tx.init(PARAMS))
    assert {n: float(v) for n, v in values.items()} == {
        "0/learning_rate": pytest.approx(0.2),
        "1/learning_rate": pytest.approx(0.4),
    }
    with pytest.raises(UserError, match="no scale_by_batch state"):
        hyperparams(optax.adam(1e-3).init(PARAMS))


def clip_and_adamw(batch_size, rule="invariant", around=None):
    """A recipe as users write it: a clip, a schedule, a mask of what decays; sizes given once."""
    scale = around or functools.partial(
        scale_by_batch, batch_size=batch_size, base_batch_size=64, rule=rule
    )
    return optax.chain(
        scale(optax.clip_by_global_norm)(2.0),
        scale(optax.adamw)(
            optax.cosine_decay_schedule(1e-2, 50),
            b2=0.99,
            weight_decay=0.1,
            mask={"w": True, "b": False},
        ),
    )


@pytest.mark.parametrize("rule", ["sqrt", "invariant"])
def test_a_chain_that_takes_its_sizes_once_is_optaxs_at_the_base_size(rule):
    got, state, updates = train(clip_and_adamw(64, rule), gradients(8))
    expected = train(clip_and_adamw(64, around=lambda factory: factory), gradients(8))
    assert_equal(got, expected[0])
    assert_equal(updates, expected[2])
    own = {"max_norm", "learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay"}
    assert own <= set(hyperparams(state))


def with_statistics(grads):
    squares = jax.tree.map(lambda g: g**2 + 1.0, grads)
    return MicrobatchStats(squares, 4, mean=grads)


def test_one_batch_size_serves_a_whole_chain_that_grows_and_resumes():
    """The clip sees the raw gradient, the optimizer the clipped one and the same statistics."""
    chained, parts = clip_and_adamw(64), []
    scale = functools.partial(scale_by_batch, batch_size=64, base_batch_size=64)
    clip_and_adamw(
        64, around=lambda f: lambda *a, **kw: parts.append(scale(f)(*a, **kw)) or parts[-1]
    )
    clip, adamw = parts
    grads, sizes = gradients(6), [64, 64, 128, 128, 256, 256]
    update = jax.jit(
        lambda g, s, size: chained.update(
            g, s, PARAMS, microbatch=with_statistics(g), batch_size=size
        )
    )

    @jax.jit
    def update_apart(grad, states, size):
        extra = {"microbatch": with_statistics(grad), "batch_size": size}
        clipped, first = clip.update(grad, states[0], PARAMS, **extra)
        updates, second = adamw.update(clipped, states[1], PARAMS, **extra)
        return updates, (first, second)

    state, apart = chained.init(PARAMS), (clip.init(PARAMS), adamw.init(PARAMS))
    for i, size in enumerate(sizes):
        grad = jax.tree.map(lambda g, i=i: g[i], grads)
        if i == 3:  # a checkpoint
            leaves, treedef = jax.tree.flatten(state)
            state = treedef.unflatten([jnp.asarray(np.asarray(leaf)) for leaf in leaves])
        got, state = update(grad, state, jnp.int32(size))
        expected, apart = update_apart(grad, apart, jnp.int32(size))
        assert_close(got, expected, rtol=1e-5, atol=1e-9)
    values = hyperparams(state, as_floats=True)
    assert values["max_norm"] < 2.0
    assert values["b1"] == pytest.approx(0.9**4)


def test_a_chain_measures_its_noise_once():
    """What a clip and its optimizer both sum up, the compiled program shares."""
    params = {"w": jnp.ones((64, 32))}

    def sums(tx):
        run = jax.jit(lambda g, s: tx.update(g, s, params, microbatch=with_statistics(g)))
        return run.lower(params, tx.init(params)).compile().as_text().count(" reduce(")

    scale = functools.partial(scale_by_batch, batch_size=256, base_batch_size=64)
    clip, adam = scale(optax.clip_by_global_norm)(1.0), scale(optax.adam)(1e-3)
    own = sums(optax.with_extra_args_support(optax.clip_by_global_norm(1.0)))
    assert sums(clip) > own
    # How many sums XLA then makes of one differs between versions.
    assert sums(optax.chain(clip, adam)) < sums(adam) + sums(clip)


@pytest.mark.parametrize("rule", ["noise_aware", "invariant"])
def test_a_clip_warns_of_statistics_that_the_optimizer_behind_it_would_misread(rule):
    tx, grads = clip_and_adamw(256, rule), jax.tree.map(jnp.ones_like, PARAMS)
    stats = with_statistics(grads)
    with pytest.warns(ScalingWarning, match=r"microbatch\._replace\(mean=grads\)"):
        tx.update(grads, tx.init(PARAMS), PARAMS, microbatch=stats._replace(mean=None))
    tx.update(grads, tx.init(PARAMS), PARAMS, microbatch=stats)


def test_unknown_extra_arguments_are_ignored_or_reach_the_optimizer():
    tx = scale_by_batch(optax.adamw, batch_size=128, base_batch_size=64, rule="sqrt")(**RECIPE)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    state = tx.init(PARAMS)
    assert_equal(
        tx.update(grads, state, PARAMS, value=1.0, other="x"), tx.update(grads, state, PARAMS)
    )


def test_under_vmap_over_runs():
    make = scale_by_batch(optax.adamw, batch_size=256, base_batch_size=64, rule="sqrt")
    grads = gradients(10)
    rates = jnp.array([1e-3, 1e-2])
    both = jax.jit(jax.vmap(lambda lr: scan(make(learning_rate=lr, b2=0.99), grads)))(rates)
    for i, rate in enumerate(rates):
        one = train(make(learning_rate=float(rate), b2=0.99), grads)[0]
        assert_close(jax.tree.map(lambda x, i=i: x[i], both), one, rtol=1e-5, atol=1e-6)
