"""scale_by_batch: the static path to the bit, the traced path, dtypes, bad input."""

import functools

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
    invariant_adamw,
    scale_by_batch,
)

STATIC = {
    "adamw": (
        optax.adamw,
        RECIPE,
        {
            "learning_rate": 1e-2 * 8**0.5,
            "b1": 0.9**8,
            "b2": 0.99**8,
            "weight_decay": 0.1 * 8**0.5,
            "eps": 1e-8 * 8**-0.5,
        },
    ),
    "sgd": (optax.sgd, {"learning_rate": 0.1}, {"learning_rate": 0.1 * 8**0.5}),
    "sgd_momentum": (
        optax.sgd,
        {"learning_rate": 0.1, "momentum": 0.9},
        {"learning_rate": 0.1 * (8**0.5 * ((1 - 0.9**8) / (1 - 0.9))), "momentum": 0.9**8},
    ),
    "lion": (
        optax.lion,
        {"learning_rate": 1e-2, "b1": 0.0},
        {"learning_rate": 1e-2 * 8**0.5, "b1": 0.0, "b2": 0.99**8, "weight_decay": 1e-3 * 8**0.5},
    ),
}


@pytest.mark.parametrize("name", STATIC)
def test_static_path_equals_hand_scaled_optax_to_the_bit(name):
    factory, recipe, by_hand = STATIC[name]
    tx = scale_by_batch(factory, batch_size=512, base_batch_size=64, rule="sqrt")(**recipe)
    grads = gradients(50)
    got, state, _ = train(tx, grads)
    expected, inner, _ = train(factory(**by_hand), grads)
    assert_equal(got, expected)
    assert_equal(state.inner_state, inner)
    assert {n: float(v) for n, v in hyperparams(state).items() if n in by_hand} == {
        n: pytest.approx(v, rel=1e-6) for n, v in by_hand.items()
    }
    assert int(state.examples) == 50 * 512


@pytest.mark.parametrize("name", STATIC)
def test_static_path_lowers_to_the_same_program_as_plain_optax(name):
    """To the letter, the example clock apart, which is an addition on a scalar."""
    factory, recipe, by_hand = STATIC[name]
    tx = scale_by_batch(factory, batch_size=512, base_batch_size=64, rule="sqrt")(**recipe)

    def lowered(tx, pick):
        def update(grads, state, params):
            return pick(tx.update(grads, state, params))

        return jax.jit(update).lower(PARAMS, tx.init(PARAMS), PARAMS).as_text()

    ours = lowered(tx, lambda out: (out[0], out[1].inner_state))
    assert "stablehlo.multiply" in ours
    assert ours == lowered(factory(**by_hand), lambda out: out)
    whole = jax.jit(tx.update).lower(PARAMS, tx.init(PARAMS), PARAMS).as_text()
    assert whole.count("stablehlo.add ") <= ours.count("stablehlo.add ") + 1


def test_rule_none_at_any_size_is_plain_optax():
    grads = gradients(20)
    tx = scale_by_batch(optax.adamw, batch_size=512, base_batch_size=64, rule="none")(**RECIPE)
    assert_equal(train(tx, grads)[0], train(optax.adamw(**RECIPE), grads)[0])


@pytest.mark.parametrize("batch_size", [16, 64, 96, 512])
def test_a_schedule_written_for_the_base_size_serves_unchanged(batch_size):
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 100, 1000)
    make = scale_by_batch(optax.sgd, batch_size=batch_size, base_batch_size=64, rule="linear")
    k = batch_size / 64
    _, _, updates = train(
        make(learning_rate=schedule), jax.tree.map(lambda p: jnp.ones((40, *p.shape)), PARAMS)
    )
    # An update stands for k base-size ones and reads the middle of them, between two by a line.
    middles = [max(k * t + (k - 1) / 2, 0.0) for t in range(40)]
    ends = [[float(schedule(int(m) + i)) for i in (0, 1)] for m in middles]
    expected = [-k * (a + (b - a) * (m % 1)) for m, (a, b) in zip(middles, ends, strict=True)]
    np.testing.assert_allclose(updates["b"][:, 0], expected, rtol=1e-5, atol=1e-7)


def test_schedule_on_the_traced_path_and_what_hyperparams_shows():
    def schedule(step):
        return 0.1 / (1 + step)

    make = scale_by_batch(optax.sgd, batch_size=128, base_batch_size=64, rule="linear")
    grads = gradients(10)
    static, static_state, _ = train(make(learning_rate=schedule), grads)
    traced, traced_state, _ = train(
        make(learning_rate=schedule), grads, extra={"batch_size": np.full(10, 128)}
    )
    assert_close(static, traced, rtol=1e-6)
    for state in (static_state, traced_state):
        assert float(hyperparams(state)["learning_rate"]) == pytest.approx(
            0.1 / (1 + 18) + 0.1 / (1 + 19)
        )


TRACED_RULES = ["none", "linear", "sqrt", "seed", "power(0.7)"]
# SGD's momentum alone: what a rule does with its rate, it does with AdamW's.
WITH_MOMENTUM = [
    pytest.param(optax.sgd, rule, marks=() if rule == "sqrt" else pytest.mark.long)
    for rule in TRACED_RULES
]


@pytest.mark.parametrize(
    ("factory", "rule"), [*((optax.adamw, rule) for rule in TRACED_RULES), *WITH_MOMENTUM]
)
def test_traced_hyperparameters_agree_with_the_static_path(factory, rule):
    """To 1e-4 of the parameters over 300 updates: float32 against double hyperparameters."""
    recipe = RECIPE if factory is optax.adamw else {"learning_rate": 0.01, "momentum": 0.9}
    make = scale_by_batch(factory, batch_size=256, base_batch_size=64, rule=rule)
    grads = gradients(300)
    static = train(make(**recipe), grads)[0]

    @jax.jit
    def run(values):
        return scan(make(**values), grads)

    traced = run({name: jnp.float32(value) for name, value in recipe.items()})
    assert_close(static, traced, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["sqrt", "noise_aware", "invariant"])
def test_batch_size_as_an_argument_agrees_and_does_not_retrace(rule):
    tx = scale_by_batch(optax.adamw, batch_size=256, base_batch_size=64, rule=rule)(**RECIPE)
    grads = gradients(200)
    squares = jax.tree.map(lambda g: 1.5 * g**2 + 0.1, grads)
    stats = MicrobatchStats(squares, np.full(200, 4))
    expected = train(tx, grads, extra={"microbatch": stats})[0]
    traces = 0

    @jax.jit
    def update(grads, state, params, batch_size, squares):
        nonlocal traces
        traces += 1
        extra = {"batch_size": batch_size, "microbatch": MicrobatchStats(squares, 4)}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    grads, squares = jax.device_get((grads, squares))
    for i in range(200):
        grad, square = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in (grads, squares))
        params, state = update(grad, state, params, np.int32(256), square)
    assert_close(params, expected, rtol=2e-4, atol=1e-5)
    assert int(state.examples) == 200 * 256
    update(grad, state, params, np.int32(512), square)
    assert traces == 1


def test_positional_arguments_names_partials_and_strings():
    grads = gradients(5)
    kwargs = {"batch_size": 128, "base_batch_size": 64, "rule": "sqrt"}
    expected = train(scale_by_batch(optax.adamw, **kwargs)(**RECIPE), grads)[0]
    partial = functools.partial(optax.adamw, weight_decay=0.1)
    for factory, args, more in (
        (optax.adamw, (1e-2, 0.9, 0.99), {"weight_decay": 0.1}),
        ("adamw", (1e-2,), {"b2": 0.99, "weight_decay": 0.1}),
        (partial, (1e-2, 0.9, 0.99), {}),
    ):
        tx = scale_by_batch(factory, **kwargs)(*args, **more)
        assert_equal(train(tx, grads)[0], expected)


def test_arguments_that_are_no_numbers_pass_through():
    def mask(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    make = scale_by_batch(optax.adamw, batch_size=64, base_batch_size=32, rule="linear")
    grads = gradients(5)
    tx = make(**RECIPE, mask=mask, mu_dtype=jnp.bfloat16, nesterov=True)
    by_hand = {**RECIPE, "learning_rate": 2e-2, "b1": 0.9**2, "b2": 0.99**2}
    got, state, _ = train(tx, grads)
    expected = train(optax.adamw(**by_hand, mask=mask, mu_dtype=jnp.bfloat16, nesterov=True), grads)
    assert_equal(got, expected[0])
    assert state.inner_state[0].mu["b"].dtype == jnp.bfloat16


def test_trap_bfloat16_parameters_do_not_round_the_decays():
    """With b2 rounded to 1 in bfloat16 the second moment would never move."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    grads = gradients(1, dtype=jnp.bfloat16)
    make = scale_by_batch(optax.adam, batch_size=64, base_batch_size=64, rule="sqrt")
    tx = make(learning_rate=jnp.float32(1e-2), b2=jnp.float32(0.999))
    out, state, updates = train(tx, grads, params)
    assert float(hyperparams(state)["b2"]) == pytest.approx(0.999)
    nu = state.inner_state[0].nu["w"].astype(jnp.float32)
    expected = 1e-3 * jnp.square(grads["w"][0].astype(jnp.float32))
    np.testing.assert_allclose(nu, expected, rtol=0.01)
    dtypes = {x.dtype for x in jax.tree.leaves((out, updates, state.inner_state[0].mu))}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}


def test_own_factory_with_roles():
    def mine(rate, forget, knob=3.0):
        return optax.chain(optax.ema(forget), optax.scale(knob), optax.scale(-rate))

    roles = {"rate": "learning_rate", "forget": "decay"}
    make = scale_by_batch(mine, batch_size=128, base_batch_size=64, rule="linear", roles=roles)
    with pytest.warns(ScalingWarning, match="no role is known for knob"):
        tx = make(0.1, 0.9)
    grads = gradients(5)
    assert_equal(train(tx, grads)[0], train(mine(0.2, 0.9**2), grads)[0])
    quiet = scale_by_batch(
        mine,
        batch_size=128,
        base_batch_size=64,
        rule="noise_aware",
        guard=False,
        family="linear",
        roles={**roles, "knob": "unchanged"},
    )(0.1, 0.9)
    assert_equal(train(quiet, grads)[0], train(mine(0.2, 0.9**2), grads)[0])


def test_a_factory_that_is_not_known_is_named_with_what_to_pass():
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    make = scale_by_batch(optax.yogi, batch_size=128, base_batch_size=64, rule="sqrt")
    with pytest.warns(ScalingWarning, match="the same at every batch size.*'learning_rate': 'lear"):
        make(schedule)
    inside = optax.inject_hyperparams(optax.sgd)
    with pytest.warns(ScalingWarning, match="sgd inside another function.*nothing is scaled"):
        scale_by_batch(inside, batch_size=128, base_batch_size=64, rule="sqrt")(schedule)


def test_own_factory_whose_family_is_needed():
    make = scale_by_batch(
        lambda rate: optax.sgd(rate),
        batch_size=128,
        base_batch_size=64,
        rule="noise_aware",
        roles={"rate": "learning_rate"},
    )
    with pytest.raises(UserError, match="family="):
        make(0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scale_by_batch(optax.adam, batch_size=0, base_batch_size=64), "batch_size is 0"),
        (lambda: scale_by_batch(optax.adam, batch_size=6.5, base_batch_size=64), "6.5"),
        (lambda: scale_by_batch(optax.adam, batch_size=64, base_batch_size=True), "True"),
        (lambda: scale_by_batch(optax.adam, batch_size=1, base_batch_size=1, rule="x"), "unknown"),
        (
            lambda: scale_by_batch(optax.adam, batch_size=1, base_batch_size=1, noise_decay=1.0),
            "noise_decay",
        ),
        (
            lambda: scale_by_batch(optax.adam, batch_size=1, base_batch_size=1, variance_floor=0.0),
            "variance_floor",
        ),
        (lambda: scale_by_batch(optax.adam, batch_size=8, base_batch_size=4)(-1.0), "-1.0"),
        (lambda: scale_by_batch(optax.adam, batch_size=8, base_batch_size=4)(1.0, b4=0.1), "b4"),
    ],
)
def test_mistakes_are_named_with_a_fix(call, message):
    with pytest.raises(UserError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rule", ["noise_aware", "invariant"])
def test_rules_that_need_micro_batches_say_so(rule):
    tx = scale_by_batch(optax.adam, batch_size=128, base_batch_size=64, rule=rule)(1e-3)
    state = tx.init(PARAMS)
    with pytest.raises(UserError, match="microbatch="):
        tx.update(PARAMS, state, PARAMS)
    with pytest.raises(UserError, match=r"count is 1"):
        tx.update(PARAMS, state, PARAMS, microbatch=MicrobatchStats(PARAMS, 1))


def test_a_noise_scale_does_not_serve_where_each_coordinate_needs_its_own():
    make = scale_by_batch(optax.adam, batch_size=128, base_batch_size=64, noise_scale=1000.0)
    tx = make(1e-3)
    with pytest.raises(UserError, match=r"noise: give update\(..., microbatch="):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_a_role_for_what_the_factory_does_not_take_is_warned_of():
    make = scale_by_batch(
        optax.adam, batch_size=128, base_batch_size=64, roles={"beta1": "unchanged"}
    )
    with pytest.warns(ScalingWarning, match="names beta1, which adam does not take"):
        make(1e-3)


def test_noise_aware_needs_no_micro_batches_where_neither_q_nor_the_guard_plays_a_part():
    sizes = {"batch_size": 128, "base_batch_size": 64}
    make = scale_by_batch(optax.sgd, **sizes, rule="noise_aware", guard=False)
    grads = gradients(5)
    got = train(make(0.1, momentum=0.9), grads)[0]
    by_hand = optax.sgd(0.1 * (2 * ((1 - 0.9**2) / (1 - 0.9))), momentum=0.9**2)
    assert_equal(got, train(by_hand, grads)[0])


def test_invariant_adamw_is_scale_by_batch():
    grads = gradients(5)
    stats = MicrobatchStats(jax.tree.map(lambda g: g**2 + 1.0, grads), np.full(5, 2))
    alias = invariant_adamw(1e-2, 0.9, 0.99, weight_decay=0.1, batch_size=128, base_batch_size=64)
    make = scale_by_batch(optax.adamw, batch_size=128, base_batch_size=64, rule="invariant")
    extra = {"microbatch": stats}
    assert_equal(train(alias, grads, extra=extra)[0], train(make(**RECIPE), grads, extra=extra)[0])


def test_the_count_of_base_updates_stops_instead_of_turning_negative():
    tx = scale_by_batch(optax.sgd, batch_size=128, base_batch_size=64, rule="linear")(0.1)
    state = tx.init(PARAMS)
    late = state.clock._replace(base_updates=jnp.int32(2**31 - 2))
    _, state = tx.update(PARAMS, state._replace(clock=late), PARAMS)
    assert int(state.clock.base_updates) == 2**31 - 1
