"""What a user is told: roles by name, values no decay has, numbers alone, what is not known."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.scaling import PARAMS

import bs_jax
from bs_jax.errors import UserError
from bs_jax.scaling import MicrobatchStats, ScalingWarning, problems
from bs_jax.scaling.__main__ import main, plain_rule
from bs_jax.scaling.hyperparameters import ROLES, Noise
from bs_jax.scaling.optimizers import Recipe, registered, role_of_name

SIZES = {"batch_size": 512, "base_batch_size": 64}


def said(call):
    """The one warning of a call."""
    with pytest.warns(ScalingWarning) as found:
        call()
    (warning,) = found
    return str(warning.message)


def scaled(factory, rule="sqrt", **kwargs):
    return bs_jax.scale_by_batch(factory, **SIZES, rule=rule, **kwargs)


# Roles


def recipe(lr, clip, wd):
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(lr, weight_decay=wd))


def test_advice_that_is_followed_is_right():
    advice = said(lambda: scaled(recipe)(lr=1e-3, clip=1.0, wd=0.1))
    roles = {"lr": "learning_rate", "clip": "gradient_norm", "wd": "weight_decay"}
    assert f"pass roles={roles}" in advice
    tx = scaled(recipe, roles=roles)(lr=1e-3, clip=1.0, wd=0.1)
    root = 8**0.5
    assert bs_jax.hyperparams(tx.init(PARAMS), as_floats=True) == pytest.approx(
        {"lr": 1e-3 * root, "clip": 1 / root, "wd": 0.1 * root}
    )


def low_rank(learning_rate, rank=128):
    return optax.scale(-learning_rate / rank)


@pytest.mark.parametrize(
    ("factory", "args", "told", "asked"),
    [
        (optax.polyak_sgd, {}, ["eps"], ["max_learning_rate", "scaling", "f_min"]),
        (low_rank, {"learning_rate": 1e-3}, ["learning_rate"], ["rank"]),
        (optax.rprop, {"learning_rate": 1e-3}, ["learning_rate"], ["eta_minus", "eta_plus"]),
        (optax.yogi, {"learning_rate": 1e-3}, ["learning_rate", "b1", "b2", "eps"], []),
    ],
)
def test_a_role_is_proposed_only_where_the_name_tells_it(factory, args, told, asked):
    advice = said(lambda: scaled(factory)(**args))
    for name in told:
        assert f"{name!r}: {role_of_name(name)!r}" in advice
    for name in asked:
        assert f"{name!r}:" not in advice
        assert name in advice.split("in roles= what ")[1].split(":")[0]
    if asked:
        assert all(role in advice for role in ROLES)


def test_what_a_name_tells_is_what_the_table_of_optimizers_says():
    """Every name proposed has that role wherever the table takes it, or one of its kind."""
    kinds = {"eps_sum": "eps_root", "mixing_weight": "decay", "centering_decay": "decay"}
    kinds |= {"undamped_momentum": "decay", "variance_decay": "decay", "l2": "weight_decay"}
    kinds |= {"second_moment_decay": "decay", "eps_root": "eps"}
    kinds |= {"weight_decay_normalized": "weight_decay"}
    named = 0
    for optimizer in registered():
        for name, role in Recipe.of(optimizer).roles.items():
            told = role_of_name(name)
            if told is None or "unchanged" in (role.name, told):
                continue
            named += 1
            ours, theirs = kinds.get(told, told), kinds.get(role.name, role.name)
            assert kinds.get(ours, ours) == kinds.get(theirs, theirs), (optimizer, name)
    assert named > 70


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", 1e-3, "its name says roles={'lr': 'learning_rate'}"),
        ("wd", 0.1, "its name says roles={'wd': 'weight_decay'}"),
        ("knob", 0.01, "a learning rate is 'learning_rate'"),
        ("bn_momentum", 0.1, "torch calls BatchNorm's momentum is 1 - decay"),
    ],
)
@pytest.mark.parametrize("role", ["decay", "second_moment_decay", "undamped_momentum"])
def test_a_value_that_no_decay_has_is_refused(name, value, message, role):
    with pytest.raises(UserError) as error:
        bs_jax.scale_hyperparams("sgd", {name: value}, **SIZES, roles={name: role})
    assert f"{name} is {value:g}" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(("value", "warned"), [(0.3, True), (0.5, False), (0.9, False), (0, False)])
def test_a_decay_that_is_low_is_warned_of(value, warned):
    def mine(rate, forget):
        return optax.chain(optax.ema(forget), optax.scale(-rate))

    make = scaled(mine, roles={"rate": "learning_rate", "forget": "decay"})
    if warned:
        assert "forget = 0.3 as decay halves" in said(lambda: make(0.1, value))
    else:
        make(0.1, value)


def test_the_tables_own_decays_may_be_low():
    """What a rule itself gave at a large batch goes back: 0.9^32 = 0.034."""
    low = bs_jax.scale_hyperparams("adam", {"b1": 0.9}, batch_size=2048, base_batch_size=64)
    back = bs_jax.scale_hyperparams("adam", low, batch_size=64, base_batch_size=2048)
    assert back["b1"] == pytest.approx(0.9)


def test_a_missing_role_is_an_error_when_the_factory_is_called():
    def mine(rate, beta):
        return optax.chain(optax.scale_by_adam(b1=beta), optax.scale_by_learning_rate(rate))

    roles = {"rate": "learning_rate", "beta": "decay"}
    with pytest.raises(UserError, match=r"role 'second_moment_decay', found none"):
        scaled(mine, "invariant", roles=roles, family="adam")(rate=1e-3, beta=0.9)


# Wrappers that do not hand statistics on


WRAPPERS = {
    "lookahead": lambda inner: optax.lookahead(inner, 5, 0.5),
    "split_real_and_imaginary": optax.contrib.split_real_and_imaginary,
    "flatten": optax.flatten,
}


@pytest.mark.parametrize("rule", ["invariant", "noise_aware"])
@pytest.mark.parametrize("name", list(WRAPPERS))
def test_wrappers_that_hand_nothing_on_are_named(name, rule):
    tx = WRAPPERS[name](scaled(optax.adam, rule)(1e-3))
    params = optax.LookaheadParams.init_synced(PARAMS) if name == "lookahead" else PARAMS
    stats = MicrobatchStats(jax.tree.map(lambda p: p**2 + 1.0, PARAMS), 4)
    # Two take no further arguments; flatten hands on statistics that fit no more.
    with pytest.raises((TypeError, UserError), match=f"{name}.*"):
        tx.update(PARAMS, tx.init(params), params, microbatch=stats)
    with pytest.raises(UserError, match="hand it on" if name == "flatten" else name):
        tx.update(PARAMS, tx.init(params), params)


# Numbers alone


def test_the_commands_default_is_right_in_a_plain_optimizer():
    """Its numbers in plain AdamW, SGD and Lion follow the base where noise dominates."""
    checks = {
        "adamw": (optax.adamw, {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.99}),
        "sgd": (optax.sgd, {"learning_rate": 3e-5, "momentum": 0.9}),
    }
    for name, (factory, values) in checks.items():
        rule = plain_rule(name)
        found = []
        for k in (1, 8):
            numbers = bs_jax.scale_hyperparams(
                name, values, batch_size=64 * k, base_batch_size=64, rule=rule
            )
            plain = factory(**numbers)
            found.append(
                problems.run(lambda b, b0, tx=plain: tx, k=k, sigmas=[10.0], base_updates=2000)
            )
        np.testing.assert_allclose(found[1], found[0], atol=0.012)
    assert [plain_rule(x) for x in ("adam", "lamb", "lion", "adagrad", "adabelief")] == [
        "sqrt", "linear", "linear", "sqrt", "sqrt",
    ]  # fmt: skip


def printed(capsys, *flags):
    common = ["--learning_rate=1e-3", "--batch_size=512", "--base_batch_size=64"]
    assert main([*common, *flags]) == 0
    return capsys.readouterr().out


def test_the_command_says_where_numbers_alone_are_not_enough(capsys):
    assert "warning" not in printed(capsys, "--optimizer=adamw")
    assert "rule sqrt" in printed(capsys, "--optimizer=adamw")
    assert "warning" not in printed(capsys, "--optimizer=sgd")
    assert "rule linear" in printed(capsys, "--optimizer=sgd")
    out = printed(capsys, "--optimizer=adamw", "--rule=invariant")
    assert "these numbers alone do not do what rule 'invariant' promises" in out
    assert "for a plain adamw use rule 'sqrt'" in out
    assert "no guard" in out
    assert "do not do what" not in printed(capsys, "--optimizer=sgd", "--rule=invariant")
    out = printed(capsys, "--optimizer=adamw", "--rule=noise_aware", "--noise_scale=1e4")
    assert "hold at this noise scale alone" in out
    out = printed(capsys, "--optimizer=adafactor", "--rule=sqrt")
    assert "adafactor counts or sums over updates by itself" in out
    found = json.loads(printed(capsys, "--optimizer=adamw", "--rule=invariant", "--format=json"))
    assert found["warnings"]
    assert found["notes"]
    out = printed(capsys, "--optimizer=adamw", "--rule=invariant", "--format=markdown")
    assert "- **Note:** not known before training" in out


def test_in_scale_by_batch_nothing_is_alone():
    for name in ("adamw", "sgd", "adafactor", "radam"):
        table = bs_jax.explain(name, **SIZES, rule="invariant", numbers_alone=False)
        assert not [w for w in table.warnings if "alone" in w]


def test_numbers_of_an_invariant_rule_by_themselves_are_warned_of():
    values = {"learning_rate": 1e-3, "b2": 0.99}
    warned = said(lambda: bs_jax.scale_hyperparams("adam", values, **SIZES, rule="invariant"))
    assert "for a plain adam use rule='sqrt'" in warned
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bs_jax.scale_hyperparams("sgd", {"learning_rate": 1e-3}, **SIZES, rule="invariant")
        bs_jax.scale_hyperparams("adam", {"b1": 0.9}, **SIZES, rule="invariant")
        same = {"batch_size": 64, "base_batch_size": 64}
        bs_jax.scale_hyperparams("adam", values, **same, rule="invariant")


def test_explain_says_what_is_known_before_training_and_what_is_not():
    def notes(**changes):
        settings = {**SIZES, "rule": "invariant", "learning_rate": 1e-3} | changes
        return bs_jax.explain("adamw", **settings).notes

    (unknown,) = notes()
    assert "not known before training" in unknown
    assert "with noise_scale=256 to x4" in unknown
    (known,) = notes(noise_scale=205.0)
    assert "lets every step grow to x3.2 of the base's instead of x8" in known
    assert "the coordinates whose signal dominates, to x2.83 at least" in known
    (free,) = notes(noise_scale=1000.0)
    assert "leaves k = 8 free" in free
    for nothing in ({"batch_size": 16}, {"rule": "sqrt"}, {"rule": "seed"}):
        assert notes(**nothing) == []
    assert notes(rule=bs_jax.RULES["invariant"].replace(guard=False)) == []
    for optimizer, rate in (("adamw", 8.0), ("sgd", 205 / 64)):
        given = {"noise_scale": 205.0, "rule": "invariant", "learning_rate": 1.0}
        table = bs_jax.explain(optimizer, **SIZES, **given)
        assert table.rows[0]["new"] == pytest.approx(rate)


# Values that were silent


@pytest.mark.parametrize("k", [0.25, 8.0])
@pytest.mark.parametrize(
    ("signal", "noise"),
    [(0.0, 0.0), (0.0, 1e-44), (1e-44, 1e-44), (1e38, 3e38), (3e38, 0.0), (0.0, np.inf)],
)
def test_q_is_finite_and_between_its_ends_for_tiny_and_huge_gradients(signal, noise, k):
    q = float(Noise(jnp.float32(signal), jnp.float32(noise)).q(jnp.float32(k)))
    ends = sorted((1.0, k**-0.5))
    assert ends[0] * (1 - 1e-6) <= q <= ends[1] * (1 + 1e-6)


@pytest.mark.parametrize("rule", ["noise_aware", "invariant"])
def test_fifty_thousand_quiet_updates_leave_no_nan(rule):
    """Gradients that are zero for so long that every average leaves float32's range."""
    tx = bs_jax.scale_by_batch(optax.adam, batch_size=256, base_batch_size=64, rule=rule)(1e-3)
    x = jnp.ones(2)

    def step(carry, gradient):
        x, state = carry
        stats = MicrobatchStats(2 * jnp.full(2, gradient) ** 2, 4)
        updates, state = tx.update(jnp.full(2, gradient), state, x, microbatch=stats)
        return (x + updates, state), None

    loud, quiet = jnp.full(20, 0.5), jnp.zeros(50_000)
    gradients = jnp.concatenate([loud, quiet, loud])
    (x, state), _ = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), gradients))(x)
    assert np.isfinite(x).all()
    found = bs_jax.hyperparams(state, as_floats=True)
    assert all(np.isfinite(value) for value in found.values())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.inner_state))


def test_the_noise_is_averaged_over_as_many_examples_as_the_second_moment():
    """At optax's own b2 = 0.999 an average over 0.99 follows other noise than what v holds."""

    def running(**kwargs):
        make = bs_jax.scale_by_batch(optax.adam, **SIZES, rule="noise_aware", **kwargs)
        tx = make(1e-3, b2=0.999)
        state = tx.init(PARAMS)
        stats = MicrobatchStats(jax.tree.map(lambda p: p**2 + 1.0, PARAMS), 4)
        return float(tx.update(PARAMS, state, PARAMS, microbatch=stats)[1].noise.weight)

    assert running() == pytest.approx(1 - 0.999**8, rel=1e-4)
    assert running(noise_decay=0.99) == pytest.approx(1 - 0.99**8, rel=1e-4)
    sgd = scaled(optax.sgd, "noise_aware")(1e-3)
    stats = MicrobatchStats(jax.tree.map(lambda p: p**2 + 1.0, PARAMS), 4)
    state = sgd.update(PARAMS, sgd.init(PARAMS), PARAMS, microbatch=stats)[1]
    assert float(state.noise.weight) == pytest.approx(1 - 0.99**8, rel=1e-4)


def test_at_optaxs_default_decay_noise_aware_follows_the_base():
    check = problems.Check(optax.adam, {"learning_rate": 1e-3})
    assert problems.deviations(check, "noise_aware", ks=(8,))[0, 1] < 0.012
