"""As optax behaves: every optimizer of the table under every rule, held against optax's own.

The default run takes a sample of each table; ``pytest -m long`` runs the rest.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.scaling import PARAMS, assert_close, assert_equal, gradients, train
from optax import contrib

from bs_jax.errors import UserError
from bs_jax.scaling import (
    RULES,
    MicrobatchStats,
    hyperparams,
    problems,
    ranger,
    scale_by_batch,
    scale_hyperparams,
)
from bs_jax.scaling.optimizers import Recipe

BASE = 64
OPTIMIZERS = {name: (check.factory, check.recipe) for name, check in problems.checks().items()}
OPTIMIZERS["adafactor"] = (optax.adafactor, {"learning_rate": 1e-3, "min_dim_size_to_factor": 2})
PARTS = {
    "ema": (optax.ema, {"decay": 0.9}),
    "trace": (optax.trace, {"decay": 0.9}),
    "clip_by_global_norm": (optax.clip_by_global_norm, {"max_norm": 0.5}),
    "clip": (optax.clip, {"max_delta": 0.5}),
    "clip_by_block_rms": (optax.clip_by_block_rms, {"threshold": 0.5}),
    "adaptive_grad_clip": (optax.adaptive_grad_clip, {"clipping": 0.5}),
}
TABLE = OPTIMIZERS | PARTS
EVERY_RULE = [*RULES, "power(0.7)"]
UNMEASURED = [name for name in EVERY_RULE if name not in ("noise_aware", "invariant")]
# They count their own updates, so at another batch size no plain optax does the same.
REBUILT = (optax.radam, optax.adafactor, optax.trace, ranger)


def each(columns, *, one_in=1):
    """Every row with every column: of every ``one_in``-th row one by default, the rest if long."""
    columns = list(columns)
    return pytest.mark.parametrize(
        ("name", "column"),
        [
            pytest.param(name, column, marks=() if default else pytest.mark.long)
            for row, name in enumerate(TABLE)
            for at, column in enumerate(columns)
            for default in [row % one_in == 0 and row // one_in % len(columns) == at]
        ],
    )


def scaled(factory, rule, k=4):
    return scale_by_batch(factory, batch_size=int(BASE * k), base_batch_size=BASE, rule=rule)


def statistics(grads, count=4):
    square = jax.tree.map(lambda g: 1.5 * jnp.square(g) + 0.1, grads)
    return MicrobatchStats(square, count, mean=grads)


@each(EVERY_RULE)
def test_at_the_base_size_it_is_optaxs_own_program(name, column, request):
    """To the letter, so to the bit; what counts examples and measures noise stands beside it."""
    factory, recipe = TABLE[name]

    def lowered(tx, pick, **extra):
        def update(grads, state, params):
            return pick(tx.update(grads, state, params, **extra))

        return jax.jit(update).lower(PARAMS, jax.eval_shape(tx.init, PARAMS), PARAMS).as_text()

    tx, plain = scaled(factory, column, 1)(**recipe), factory(**recipe)
    expected = lowered(plain, lambda out: out)
    assert "stablehlo." in expected
    calls = [{"microbatch": statistics(PARAMS)}, {}]
    if request.node.get_closest_marker("long") is None:  # the one or the other
        calls = [calls[list(TABLE).index(name) % 2]]
    for extra in calls:
        assert lowered(tx, lambda out: (out[0], out[1].inner_state), **extra) == expected


# Of parameters and gradients.
WIDTHS = [
    (jnp.bfloat16, jnp.float32),
    (jnp.float32, jnp.bfloat16),
    (jnp.bfloat16, jnp.bfloat16),
    (jnp.float16, jnp.float16),
]


def types(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


@pytest.mark.filterwarnings("ignore::bs_jax.scaling.ScalingWarning")  # of float16's small range
@each(EVERY_RULE)
def test_state_and_updates_keep_optaxs_types(name, column, request):
    """Whatever the call, and with arguments that the optimizer does not know."""
    factory, recipe = TABLE[name]
    tx, plain = scaled(factory, column)(**recipe), factory(**recipe)
    whole = request.node.get_closest_marker("long") is not None
    calls = [{"batch_size": jnp.int32(2 * BASE)}, *([{}, {"batch_size": 2 * BASE}] * whole)]
    at = list(TABLE).index(name) % len(WIDTHS)
    for dtypes in WIDTHS if whole else [WIDTHS[at]]:
        if name == "novograd" and dtypes[0] != dtypes[1]:
            continue  # optax's own does not trace then: the branches of its first update differ
        params, grads = (jax.tree.map(lambda p, d=d: p.astype(d), PARAMS) for d in dtypes)
        own = jax.eval_shape(plain.init, params)
        expected, after = jax.eval_shape(plain.update, grads, own, params)
        state = jax.eval_shape(tx.init, params)
        assert types(state.inner_state) == types(own)
        for call in calls:
            extra = {"microbatch": statistics(PARAMS), "value": jnp.float32(1.0), **call}
            update = functools.partial(tx.update, **extra)
            got, new = jax.eval_shape(update, grads, state, params)
            assert types(got) == types(expected)
            # Without a batch size it may be optax's own program, which widens what it keeps of
            # gradients wider than the parameters.
            as_optax = not call and types(new.inner_state) == types(after)
            # RAdam's with a clock of its own keeps its second moment as optax.adam does.
            as_optax = as_optax or (not call and name in ("radam", "ranger"))
            assert types(new) == types(state) or as_optax


# What optax's own inject_hyperparams must not hand on as an array.
FIXED = {"min_dim_size_to_factor", "ns_steps", "warmup_steps", "weight_lr_power", "dtype_momentum"}


@each(UNMEASURED, one_in=2)
def test_any_value_set_through_inject_hyperparams_is_in_force_scaled(name, column):
    factory, recipe = TABLE[name]
    arguments = Recipe.of(factory, kwargs=recipe).arguments
    inject = functools.partial(
        optax.inject_hyperparams,
        static_args=tuple(FIXED & set(arguments)),
        hyperparam_dtype=jnp.float32,
    )
    tx = inject(scaled(factory, column))(**recipe)
    state, own = tx.init(PARAMS), jax.eval_shape(inject(factory)(**recipe).init, PARAMS)
    values = Recipe.of(factory, kwargs=recipe).values
    new = {n: 0.9 * v for n, v in values.items() if n in state.hyperparams}
    assert new
    for n in new:
        found, expected = (len(optax.tree.get_all_with_path(s, n)) for s in (state, own))
        assert found == expected, n
    state = optax.tree.set(state, **{n: jnp.float32(v) for n, v in new.items()})
    after = jax.jit(lambda s: hyperparams(tx.update(PARAMS, s, PARAMS)[1]))(state)
    expected = scale_hyperparams(
        factory, {**recipe, **new}, batch_size=4 * BASE, base_batch_size=BASE, rule=column
    )
    for n in new:
        assert float(after[n]) == pytest.approx(expected[n], rel=2e-5), n


AROUND = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "multi_transform": lambda tx: optax.multi_transform(
        {"a": tx, "z": optax.set_to_zero()}, {"w": "a", "b": "z"}
    ),
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(0.5), tx),
}


@each(AROUND, one_in=7)
def test_inside_other_transformations_it_is_the_hand_scaled_one(name, column):
    """At batch sizes and under rules that change from row to row.

    Up to the last digits: in a program of its own XLA may fuse the same operations otherwise.
    """
    (factory, recipe), around, row = TABLE[name], AROUND[column], list(TABLE).index(name)
    k = 1 if factory in REBUILT else (4, 0.25, 1.5)[row % 3]
    rule = UNMEASURED[row % len(UNMEASURED)]
    by_hand = scale_hyperparams(
        factory,
        Recipe.of(factory, kwargs=recipe).values,
        batch_size=int(BASE * k),
        base_batch_size=BASE,
        rule=rule,
    )
    grads = gradients(4)
    got, state, updates = train(around(scaled(factory, rule, k)(**recipe)), grads)
    expected, _, expected_updates = train(around(factory(**recipe | by_hand)), grads)
    assert_close((got, updates), (expected, expected_updates), rtol=5e-6, atol=1e-9)
    shown = hyperparams(state, as_floats=True)
    assert shown == pytest.approx({n: v for n, v in by_hand.items() if n in shown}, rel=1e-6)


@pytest.mark.long
@each(["sqrt", "noise_aware", "invariant"])
def test_under_vmap_each_is_what_it_is_alone(name, column):
    factory, recipe = TABLE[name]
    tx = scaled(factory, column)(**recipe)

    def run(grads):
        params, state, _ = train(tx, grads, extra={"microbatch": statistics(grads, np.full(3, 4))})
        return params, hyperparams(state)

    alone = [run(gradients(3, seed)) for seed in (0, 1)]
    both = jax.tree.map(lambda *x: jnp.stack(x), *(gradients(3, seed) for seed in (0, 1)))
    together = jax.vmap(run)(both)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    assert_close(together, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.long
@each(["sqrt", "noise_aware", "invariant"])
def test_a_batch_size_that_is_given_at_the_base_size_changes_nothing(name, column):
    """Up to float32: hyperparameters and counts are traced then."""
    factory, recipe = TABLE[name]
    tx, grads = scaled(factory, column, 1)(**recipe), gradients(5)
    size = jnp.int32(BASE) if column == "sqrt" else BASE
    given = optax.GradientTransformation(tx.init, functools.partial(tx.update, batch_size=size))
    assert_close(train(given, grads)[0], train(factory(**recipe), grads)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("given", [False, True])
def test_extra_arguments_reach_the_optimizer(given):
    make = scale_by_batch(
        optax.polyak_sgd,
        batch_size=BASE,
        base_batch_size=BASE,
        rule="sqrt",
        roles={"max_learning_rate": "learning_rate"}
        | dict.fromkeys(["scaling", "f_min", "eps"], "unchanged"),
        family="linear",
    )
    size = {"batch_size": jnp.int32(BASE)} if given else {}
    tx, plain = make(), optax.polyak_sgd()
    got, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=0.1, **size)
    expected, _ = plain.update(PARAMS, plain.init(PARAMS), PARAMS, value=0.1)
    assert_close(got, expected, rtol=1e-6)


@pytest.mark.parametrize("factory", [contrib.schedule_free_sgd, contrib.schedule_free_adamw])
def test_an_optimizers_own_state_is_the_inner_one(factory):
    """What reads optax's state reads ours one level down, and the error says so."""
    tx, plain = scaled(factory, "sqrt", 1)(1e-2), factory(1e-2)
    grads = gradients(4)
    params, state, _ = train(tx, grads)
    own_params, own, _ = train(plain, grads)
    assert_equal(
        contrib.schedule_free_eval_params(state.inner_state, params),
        contrib.schedule_free_eval_params(own, own_params),
    )
    assert_equal(optax.tree.get(optax.chain(tx).init(PARAMS), "z"), PARAMS)
    with pytest.raises(AttributeError, match=r"use state\.inner_state\.b1"):
        contrib.schedule_free_eval_params(state, params)
    assert not hasattr(state, "z")


# Values put into a state


def test_a_value_in_force_is_read_only():
    state = scaled(optax.adam, "sqrt")(1e-2).init(PARAMS)
    with pytest.raises(UserError, match=r"learning_rate in force.*inject_hyperparams"):
        state.hyperparams["learning_rate"] = 0.0
    assert not {"update", "pop", "setdefault"} & set(dir(state.hyperparams))
    assert float(jax.jit(lambda s: s.hyperparams)(state)["learning_rate"]) == pytest.approx(2e-2)


def test_a_rate_put_into_the_state_is_refused_in_optaxs_own_words():
    tx = scaled(optax.adam, "sqrt")(1e-2)
    with pytest.raises(KeyError, match="no values matching 'learning_rate'"):
        optax.tree.set(tx.init(PARAMS), learning_rate=jnp.float32(0.0))


def test_a_rate_set_through_inject_hyperparams_takes_effect():
    injected = optax.inject_hyperparams(scaled(optax.adam, "sqrt"), hyperparam_dtype=jnp.float32)
    tx = injected(1e-2)
    state = optax.tree.set(tx.init(PARAMS), learning_rate=jnp.float32(0.0))
    updates, state = tx.update(PARAMS, state, PARAMS)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    assert hyperparams(state, as_floats=True)["learning_rate"] == 0


def test_trap_inject_hyperparams_inside_would_keep_the_first_values():
    roles = {"learning_rate": "learning_rate", "b1": "decay", "b2": "second_moment_decay"}
    roles |= {"eps": "eps", "eps_root": "eps_root"}
    make = scale_by_batch(
        optax.inject_hyperparams(optax.adam),
        batch_size=4 * BASE,
        base_batch_size=BASE,
        rule="sqrt",
        roles=roles,
        family="adam",
    )
    tx, by_hand = make(1e-2), scaled(optax.adam, "sqrt")(1e-2)
    state = tx.init(PARAMS)
    static = tx.update(PARAMS, state, PARAMS)[0]
    assert_close(static, by_hand.update(PARAMS, by_hand.init(PARAMS), PARAMS)[0], rtol=1e-5)
    with pytest.raises(UserError, match="put it outside"):
        tx.update(PARAMS, state, PARAMS, batch_size=BASE * 2)
