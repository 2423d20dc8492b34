"""scale_by_batch in careless hands: odd types and shapes, clear errors, nothing silently wrong."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.scaling import PARAMS

from bs_jax.errors import UserError
from bs_jax.scaling import (
    RULES,
    MicrobatchStats,
    ScalingWarning,
    explain,
    hyperparams,
    power,
    problems,
    scale_by_batch,
    scale_hyperparams,
    value_grad_and_stats,
)

SIZES = {"batch_size": 256, "base_batch_size": 64}
HUGE = {"batch_size": 2**30, "base_batch_size": 2**30}
MEASURED = ["noise_aware", "invariant"]


def stats_of(params, count=4):
    return MicrobatchStats(jax.tree.map(lambda p: jnp.abs(p) ** 2 + 1.0, params), count)


def update(rule="sqrt", params=PARAMS, factory=optax.adamw, sizes=SIZES, **extra):
    tx = scale_by_batch(factory, **sizes, rule=rule)(1e-3)
    return tx.update(params, tx.init(params), params, **extra)[0]


def adam(learning_rate=1e-3, **kwargs):
    return scale_by_batch(optax.adam, **SIZES, rule="sqrt")(learning_rate, **kwargs)


def adam_of_sizes(factory):
    return scale_by_batch(factory, **SIZES, rule="sqrt")


def loss(params, batch):
    return jnp.sum(params * batch)


W = jnp.ones(3)


def of_another_base(params):
    sizes = SIZES | {"base_batch_size": 32}
    return scale_by_batch(optax.adam, **sizes, rule="sqrt")(1e-3).init(params)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adam(learning_rate=jnp.ones(3)), "an array of shape (3,)"),
        (lambda: adam(1e-3).update(W, optax.adam(1e-3).init(W), W), "state given to update is a"),
        (
            lambda: adam(1e-3).update(W, of_another_base(W), W),
            "counts updates of base_batch_size=32",
        ),
        (lambda: adam(learning_rate="1e-3"), "learning_rate is '1e-3'"),
        (lambda: adam(learning_rate=None), "learning_rate is None"),
        (lambda: adam(learning_rate=True), "learning_rate is True"),
        (lambda: adam(b1=1j), "b1 is 1j"),
        (lambda: adam(b2=[0.9]), "b2 is [0.9]"),
        (lambda: scale_by_batch(optax.adam(1e-3), **SIZES), "give its factory"),
        (lambda: scale_by_batch(None, **SIZES), "give its factory"),
        (lambda: scale_by_batch(optax.adam, **SIZES, roles=["b1"])(1e-3), "give a mapping"),
        (lambda: scale_by_batch(optax.adam, batch_size=2**40, base_batch_size=8), "at most 1,073"),
        (
            lambda: scale_by_batch(optax.adam, batch_size=1, base_batch_size=2**30)(1e-3),
            "which float32 rounds to 1",
        ),
        (lambda: scale_by_batch(optax.sgd, **SIZES)(0.1, 0.9, False, None, 7), "it takes learning"),
        (lambda: power("a"), "exponent must be finite"),
        (lambda: RULES["sqrt"].replace(b2="off"), "'off'"),
        (lambda: update(batch_size="256"), "got '256'"),
        (lambda: update(batch_size=0), "batch_size is 0"),
        (lambda: update(batch_size=256.0), "must be an integer"),
        (lambda: update(batch_size=jnp.array([1, 2])), "must be an integer"),
        (lambda: update(batch_size=jnp.float32(256)), "must be an integer"),
        (lambda: update(batch_size=jnp.bool_(True)), "must be an integer"),
        (lambda: update(batch_size=jax.random.key(0)), "must be an integer"),
        (lambda: update(batch_size=jnp.int32(-5)), "batch_size is -5"),
        (lambda: jax.jit(lambda x: update(batch_size=x))(256.0), "must be an integer"),
        (lambda: update(sizes=HUGE, batch_size=1), "which float32 rounds to 1"),
        (lambda: explain("adam", **SIZES, learning_rate="1"), "learning_rate is '1'"),
        (
            lambda: explain("adam", **SIZES, learning_rate=1.0, train_examples="x"),
            "train_examples is 'x'",
        ),
        (lambda: scale_hyperparams("adam", {"learning_rate": "a"}, **SIZES), "is 'a'"),
        (
            lambda: value_grad_and_stats(loss, microbatches=2)(
                jnp.ones(()), {"a": jnp.ones(4), "b": jnp.ones(2)}
            ),
            "2 and 4 examples",
        ),
        (
            lambda: value_grad_and_stats(loss, microbatches=2)(jnp.ones(()), [1.0, 2.0]),
            "a batch of no examples",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rule", MEASURED)
@pytest.mark.parametrize(
    ("stats", "message"),
    [
        (PARAMS, "microbatch is a dict"),
        (MicrobatchStats(PARAMS, np.int64(1)), "count is 1"),
        (MicrobatchStats(PARAMS, 0), "count is 0"),
        (MicrobatchStats(PARAMS, math.nan), "count is nan"),
        (MicrobatchStats(PARAMS, "4"), "count is '4'"),
        (MicrobatchStats(PARAMS, None), "count is None"),
        (MicrobatchStats(PARAMS, jnp.ones(4)), "count is "),
        (MicrobatchStats(None, 4), "no tree of the shapes"),
        (MicrobatchStats({"w": PARAMS["w"]}, 4), "no tree of the shapes"),
        (MicrobatchStats({"w": jnp.ones(2), "b": jnp.ones(3)}, 4), "no tree of the shapes"),
        (MicrobatchStats(PARAMS, 4, mean={"w": jnp.ones(2)}), "microbatch.mean is no tree"),
    ],
)
def test_statistics_that_are_none(stats, message, rule):
    with pytest.raises(UserError, match=message):
        update(rule, microbatch=stats)


TREES = [
    {},
    {"a": jnp.ones(3), "none": None},
    jnp.float32(1.0),
    {"empty": jnp.ones((0, 3)), "b": jnp.ones(2)},
    {"numpy": np.ones(3, np.float32)},
    {"python": 1.0},
    {"half": jnp.ones(3, jnp.float16)},
]


@pytest.mark.parametrize("rule", ["sqrt", *MEASURED])
@pytest.mark.filterwarnings("ignore:eps = .* rounds to 0 in float16")
def test_any_tree_of_parameters_will_do(rule):
    def updates():
        return [update(rule, p, factory=optax.rmsprop, microbatch=stats_of(p)) for p in TREES]

    # One program of a rule that measures: as many as it has operations would take seconds.
    found = updates() if rule == "sqrt" else jax.jit(updates)()
    for updated, params in zip(found, TREES, strict=True):
        assert jax.tree.structure(updated) == jax.tree.structure(params)
        for new, old in zip(jax.tree.leaves(updated), jax.tree.leaves(params), strict=True):
            assert (new.shape, new.dtype) == (jnp.shape(old), jnp.result_type(old))
            assert np.all(np.asarray(new) < 0)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int16, jnp.uint32, np.int64])
def test_a_batch_size_of_any_integer_type_is_that_number(dtype):
    schedule = optax.linear_schedule(1e-3, 0.0, 10)
    tx = scale_by_batch(optax.adam, batch_size=64, base_batch_size=256, rule="sqrt")(schedule)
    rates = []
    for size in (64, dtype(64)):
        state = tx.init(PARAMS)
        for _ in range(3):
            _, state = tx.update(PARAMS, state, PARAMS, batch_size=size)
        rates.append(float(hyperparams(state)["learning_rate"]))
        assert state.examples == 192
    assert rates[0] == pytest.approx(rates[1], rel=1e-6)


@pytest.mark.parametrize("rule", MEASURED)
def test_a_complex_parameter_is_two_real_ones_with_a_shared_magnitude(rule):
    """|z|^2 is the sum of the squares of its parts: the noise scale is that of the parts."""
    z = jnp.array([3.0 + 4.0j, 1.0 - 1.0j])
    stats = MicrobatchStats(jnp.abs(z) ** 2 + 1.0, 4, mean=z)
    unguarded = RULES[rule].replace(guard=False)
    got = update(unguarded, z, microbatch=stats)
    one_sided = jnp.abs(z)
    expected = update(unguarded, one_sided, microbatch=MicrobatchStats(one_sided**2 + 1.0, 4))
    no_decay = -expected - 4e-3 * 1e-4 * one_sided  # weight decay turns with the parameter
    np.testing.assert_allclose(jnp.abs(got), jnp.abs(no_decay), rtol=2e-3)
    assert got.dtype == jnp.complex64


def test_numpy_scalars_are_numbers():
    tx = scale_by_batch(
        optax.adam, batch_size=np.int64(256), base_batch_size=np.int32(64), rule="sqrt"
    )(np.float32(1e-3), b1=np.float64(0.9), b2=np.array(0.99))
    values = hyperparams(tx.init(PARAMS))
    assert float(values["learning_rate"]) == pytest.approx(2e-3)
    assert float(values["b2"]) == pytest.approx(0.99**4)
    f = value_grad_and_stats(loss, microbatches=np.int64(2))
    assert f(jnp.ones(()), np.ones(4))[2].count == 2


def test_a_schedule_may_return_a_python_float():
    tx = scale_by_batch(optax.adamw, **SIZES, rule="linear")(
        lambda step: 0.1, b1=lambda step: 0.9, weight_decay=lambda step: 0.01
    )
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    values = {n: float(v) for n, v in hyperparams(state).items()}
    assert values["learning_rate"] == pytest.approx(0.4)
    assert values["b1"] == pytest.approx(0.9**4)


def test_a_known_noise_scale_may_be_an_argument_and_does_not_retrace():
    traces = 0

    @jax.jit
    def step(noise_scale):
        nonlocal traces
        traces += 1
        make = scale_by_batch(optax.adam, **SIZES, rule="noise_aware", noise_scale=noise_scale)
        tx = make(1e-3)
        _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        return hyperparams(state)["learning_rate"]

    for noise_scale in (64.0, 6400.0):
        plain = scale_hyperparams(
            "adam", {"learning_rate": 1e-3}, **SIZES, rule="noise_aware", noise_scale=noise_scale
        )
        assert float(step(noise_scale)) == pytest.approx(plain["learning_rate"], rel=1e-5)
    assert traces == 1


@pytest.mark.parametrize("around", [optax.inject_hyperparams, adam_of_sizes])
def test_a_function_around_the_factory_is_to_go_outside(around):
    with pytest.warns(ScalingWarning, match="nothing is scaled; put that function outside"):
        scale_by_batch(around(optax.adam), **SIZES, rule="sqrt")(1e-3)


def test_a_misspelt_switch_is_warned_of_and_one_for_something_else_is_not(recwarn):
    rule = RULES["sqrt"].replace(bn_decay=None)
    scale_by_batch(optax.adam, **SIZES, rule=rule)(1e-3)
    assert not recwarn.list
    with pytest.warns(ScalingWarning, match="did you mean 'b2'"):
        scale_by_batch(optax.adam, **SIZES, rule=RULES["sqrt"].replace(bb2=None))(1e-3)


def test_trap_a_decay_that_the_moments_dtype_rounds_to_one_is_warned_of():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    make = scale_by_batch(optax.adam, **SIZES, rule="sqrt")
    with pytest.warns(ScalingWarning, match=r"b2 = 0\.9996\d* rounds to 1 in bfloat16"):
        make(1e-3, b2=0.9999).init(params)
    make(1e-3, b2=0.99).init(params)
    make(1e-3, b2=jnp.float32(0.9999)).init(params)  # traced values are kept in float32


def test_a_huge_batch_stays_finite():
    for rule in MEASURED:
        tx = scale_by_batch(optax.adamw, batch_size=2**30, base_batch_size=1, rule=rule)(1e-9)
        updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, microbatch=stats_of(PARAMS))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(updates))
        _, state = tx.update(PARAMS, state, PARAMS, microbatch=stats_of(PARAMS))
        assert int(state.examples) == 2**31 - 1
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.inner_state))


RESTATED = [
    *("rmsprop", "adam", "adabelief", "adagrad", "adafactor", "adafactor, unfactored", "novograd"),
    *("amsgrad", "radam", "lamb", "schedule_free_adamw"),
]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.long if i else ()) for i, n in enumerate(RESTATED)],
)
def test_gradients_whose_squares_overflow_do_what_they_do_to_plain_optax(name):
    """The coordinate stands still where optax's does; behind a clip in front all go on."""
    check, parts = problems.checks()[name], np.random.default_rng(0).standard_normal((4, 4, 2, 3))

    def train(tx, parts, limit, kept, extra):
        def step(carry, part):
            params, state = carry
            mean = jnp.mean(part, 0)
            stats = MicrobatchStats(jnp.mean(part**2, 0), 4, mean=mean if kept else None)
            grads = jnp.clip(mean, -limit, limit)
            updates, state = tx.update(grads, state, params, microbatch=stats, **extra)
            return (optax.apply_updates(params, updates), state), updates

        params = jnp.ones(parts.shape[2:])
        return jax.lax.scan(step, (params, tx.init(params)), parts)[1]

    make = scale_by_batch(check.factory, **SIZES, rule="invariant")
    extras = {True: {}, False: {"batch_size": jnp.int32(512)}}  # known before, and while training
    run = jax.jit(train, static_argnums=(0, 3))
    plain_tx = optax.with_extra_args_support(check.factory(**check.recipe))
    tx = make(**check.recipe)
    for huge in (2e19, 1e20, 1e25):
        parts[1, :, 0, 0] = huge * np.array([3, 1, 1, -1])
        given = jnp.asarray(parts, jnp.float32)
        plain = np.asarray(run(plain_tx, given, jnp.inf, True, {}))
        for kept, extra in extras.items():
            raw, clipped = (run(tx, given, limit, kept, extra) for limit in (jnp.inf, 1.0))
            assert np.isfinite(raw)[np.isfinite(plain)].all()
            assert np.all(raw[plain == 0] == 0)
            assert np.isfinite(clipped).all()
            assert np.all(clipped != 0)
