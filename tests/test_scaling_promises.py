"""What a rule promises and cannot do for an optimizer is refused or warned of, never skipped."""

import ast
import dataclasses
import functools
import itertools
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.scaling import PARAMS, assert_close, functions_run, gradients, train
from optax import contrib

from bs_jax import scaling
from bs_jax.errors import UserError
from bs_jax.scaling import (
    MicrobatchStats,
    ScalingWarning,
    explain,
    hyperparams,
    ranger,
    scale_by_batch,
    scale_hyperparams,
)

SIZES = {"batch_size": 256, "base_batch_size": 64}
ROLES = {"learning_rate": "learning_rate", "b1": "decay", "b2": "second_moment_decay"}


class OptaxNames(NamedTuple):
    mu: Any
    nu: Any
    count: Any


class OtherNames(NamedTuple):
    m: Any
    v: Any
    count: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DataClass:
    mu: Any
    nu: Any
    count: Any


def own_adam(state_class):
    """Adam written out, its state of a class of its own."""

    def adam(learning_rate, b1=0.9, b2=0.99):
        def init(params):
            zeros = jax.tree.map(jnp.zeros_like, params)
            return state_class(zeros, zeros, jnp.zeros((), jnp.int32))

        def update(grads, state, params=None):
            m, v, count = (getattr(state, f.name) for f in fields(state))
            count = count + 1
            m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, grads)
            v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, grads)

            def leaf(m, v):
                root = jnp.sqrt(v / (1 - b2**count)) + 1e-8
                return -learning_rate * (m / (1 - b1**count)) / root

            return jax.tree.map(leaf, m, v), state_class(m, v, count)

        return optax.GradientTransformation(init, update)

    return adam


class Field(NamedTuple):
    name: str


def fields(state):
    names = getattr(state, "_fields", None)
    return dataclasses.fields(state) if names is None else [Field(name) for name in names]


def scaled(factory, rule, **kwargs):
    return scale_by_batch(factory, **SIZES, rule=rule, **{"roles": ROLES, **kwargs})


def stats_of(grads):
    return MicrobatchStats(jax.tree.map(lambda g: g**2 + 1.0, grads), np.full(8, 4))


@pytest.mark.parametrize("ramp", [False, True])
def test_an_adam_of_ones_own_whose_fields_have_optaxs_names_is_served_as_optaxs_is(ramp):
    grads = gradients(8)
    extra = {"microbatch": stats_of(grads)}
    if ramp:
        extra["batch_size"] = jnp.array([64] * 4 + [512] * 4)
    theirs = scale_by_batch(optax.adam, **SIZES, rule="invariant")(1e-2, b2=0.99)
    expected = train(theirs, grads, extra=extra)
    for state_class in (OptaxNames, DataClass):
        ours = scaled(own_adam(state_class), "invariant", family="adam")(1e-2)
        got = train(ours, grads, extra=extra)
        assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
        assert_close(got[1].inner_state.nu, expected[1].inner_state[0].nu, rtol=1e-4)


def no_known_moment(rate, b2):
    """A second moment that optax keeps, but as no average of squares."""
    return optax.chain(optax.scale_by_sm3(), optax.scale(-rate))


SM3 = {"rate": "learning_rate", "b2": "second_moment_decay"}


@pytest.mark.parametrize(
    ("factory", "found", "kwargs"),
    [
        (own_adam(OtherNames), r"OtherNames\(m, v, count\); name the field 'nu'", {}),
        (functools.partial(no_known_moment, b2=0.9), r"SM3State\(mu, nu\)", {"roles": SM3}),
        (own_adam(OptaxNames), "'sum_of_squares'", {"family": "adagrad"}),
        (own_adam(lambda m, v, count: {"m": m, "v": v}), "a dict without named", {}),
    ],
)
def test_no_second_moment_to_make_invariant_is_an_error_at_init(factory, found, kwargs):
    tx = scaled(factory, "invariant", **{"family": "adam", **kwargs})(1e-2)
    with pytest.raises(UserError, match=found) as error:
        tx.init(PARAMS)
    assert "\n" not in str(error.value)


class NoCount(NamedTuple):
    nu: Any


def layerwise(learning_rate, b2=0.9):
    return optax.GradientTransformation(lambda p: NoCount(p), lambda g, s, p=None: (g, s))


def around(wrapper, rule, params=PARAMS):
    """One update, at a batch size that is given, of an optimizer wrapped in the factory."""
    tx = wrapped(wrapper, rule)(1e-2)
    return tx.update(params, tx.init(params), params, batch_size=128)


def wrapped(wrapper, rule, sizes=SIZES):
    def factory(learning_rate, b1=0.9, b2=0.99):
        return wrapper(optax.adam(learning_rate, b1, b2))

    return scale_by_batch(factory, **sizes, rule=rule, family="adam", roles=ROLES)


def two_steps(tx):
    return optax.MultiSteps(tx, 2).gradient_transformation()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        # The decay of the second moment is no argument, or there are two.
        (lambda: scaled(lambda rate: optax.adam(rate), "invariant", family="adam",
                        roles={"rate": "learning_rate"})(0.1), "'second_moment_decay', found none"),
        (lambda: scale_by_batch(optax.adam, **SIZES, roles={"b2": "unchanged"})(0.1), "found none"),
        (lambda: scaled(own_adam(OptaxNames), "invariant", family="adam",
                        roles={**ROLES, "b1": "second_moment_decay"})(0.1), r"found 2 \(b1, b2\)"),
        (lambda: explain(optax.adam, **SIZES, roles={"b2": "unchanged"}), "found none"),
        (lambda: scale_hyperparams("adam", {"learning_rate": 0.1}, **SIZES, rule="invariant",
                                   roles={"b2": "unchanged"}), "found none"),
        # What only optax's own can be served with.
        (lambda: scaled(own_adam(OptaxNames), "invariant", family="adafactor")(0.1),
         "factored second moment of optax.adafactor alone"),
        (lambda: scaled(layerwise, "invariant", family="novograd",
                        roles={k: v for k, v in ROLES.items() if k != "b1"})(0.1).init(PARAMS),
         "a field 'count'"),
        # What leaves updates out, or reshapes what is restated.
        (lambda: around(lambda tx: optax.apply_if_finite(tx, 3), "invariant"),
         "ApplyIfFiniteState inside"),
        (lambda: around(two_steps, "sqrt"),
         "MultiStepsState inside"),
        (lambda: around(lambda tx: optax.conditionally_mask(tx, lambda n: n < 3), "sqrt"),
         "ConditionallyMaskState inside"),
        (lambda: around(optax.flatten, "invariant"), "'nu' is no tree like the parameters"),
        (lambda: around(contrib.split_real_and_imaginary, "invariant", {"z": jnp.ones(2) * 1j}),
         "'nu' is no tree like the parameters"),
        # Roles whose formulas need another role.
        (lambda: scaled(lambda rate, mix: optax.sgd(rate), "sqrt",
                        roles={"rate": "learning_rate", "mix": "mixing_weight"})(0.1, 0.5),
         "one argument of role 'decay', found none"),
        (lambda: scaled(lambda rate, eps: optax.sgd(rate), "sqrt",
                        roles={"rate": "learning_rate", "eps": "eps_sum"})(0.1, 0.5),
         "one argument of role 'second_moment_decay', found none"),
    ],
)  # fmt: skip
def test_what_a_rule_cannot_do_is_an_error_before_training(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_what_leaves_updates_out_is_served_where_nothing_is_restated():
    """The rule leaves moments as they are, or the batch is the base's and its own square serves."""
    state = (tx := wrapped(two_steps, "none")(1e-2)).init(PARAMS)
    tx.update(PARAMS, state, PARAMS, batch_size=128)
    base = {"batch_size": 64, "base_batch_size": 64}
    state = (tx := wrapped(two_steps, "invariant", base)(jnp.float32(1e-2))).init(PARAMS)
    tx.update(PARAMS, state, PARAMS)
    with pytest.raises(UserError, match="MultiStepsState inside"):
        tx.update(PARAMS, state, PARAMS, microbatch=MicrobatchStats(PARAMS, 4))


def test_lookahead_in_a_factory_of_ones_own_restates_the_fast_parameters_moment():
    def around_fast(tx):
        return optax.lookahead(tx, 5, 0.5)

    both, stats = optax.LookaheadParams.init_synced(PARAMS), MicrobatchStats(PARAMS, 4)
    tx, plain = (wrapped(w, "invariant")(1e-2) for w in (around_fast, lambda tx: tx))
    updates, state = tx.update(PARAMS, tx.init(both), both, microbatch=stats)
    expected, _ = plain.update(PARAMS, plain.init(PARAMS), PARAMS, microbatch=stats)
    assert_close(updates.fast, expected, rtol=1e-6)
    assert jax.tree.structure(state.variance[0]) == jax.tree.structure(PARAMS)


class Velocity(NamedTuple):
    velocity: Any


def own_momentum(rate, momentum):
    def update(grads, state, params=None):
        velocity = jax.tree.map(lambda v, g: momentum * v + g, state.velocity, grads)
        return jax.tree.map(lambda v: -rate * v, velocity), Velocity(velocity)

    return optax.GradientTransformation(lambda p: Velocity(p), update)


MOMENTUM = {"rate": "learning_rate", "momentum": "undamped_momentum"}


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (scaled(own_adam(OtherNames), "sqrt", family="adam")(1e-2), "second moment of adam has"),
        (scaled(own_momentum, "linear", family="linear", roles=MOMENTUM)(0.1, 0.9),
         r"momentum of own_momentum has.*Velocity\(velocity\)"),
        (scaled(own_adam(OptaxNames), "sqrt")(1e-2), "pass family="),
    ],
)  # fmt: skip
def test_moments_that_cannot_follow_a_changing_batch_size_are_an_error(tx, message):
    state = tx.init(PARAMS)
    tx.update(PARAMS, state, PARAMS)  # at a constant one nothing has to follow
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScalingWarning)  # of the same state
        with pytest.raises(UserError, match=message) as error:
            tx.update(PARAMS, state, PARAMS, batch_size=jnp.int32(512))
    assert "\n" not in str(error.value)


def test_arrays_that_nothing_is_known_of_are_warned_of_when_the_batch_size_changes():
    class Average(NamedTuple):
        average: Any

    def mine(rate):
        def update(grads, state, params=None):
            return jax.tree.map(lambda g: -rate * g, grads), state

        return optax.GradientTransformation(lambda p: Average(p), update)

    tx = scaled(mine, "linear", family="linear", roles={"rate": "learning_rate"})(0.1)
    state = tx.init(PARAMS)
    tx.update(PARAMS, state, PARAMS)
    with pytest.warns(ScalingWarning, match=r"nothing is known of its state Average\(average\)"):
        tx.update(PARAMS, state, PARAMS, batch_size=jnp.int32(512))


class Encoder(NamedTuple):
    """Parameters, not a state."""

    mu: Any
    nu: Any


@pytest.mark.parametrize("factory", [ranger, contrib.schedule_free_adamw])
def test_parameters_whose_fields_are_called_like_moments_are_no_moments(factory):
    """Both optimizers keep a copy of the parameters in their state."""
    tx = scale_by_batch(factory, **SIZES, rule="invariant")(1e-2)

    def run(params):
        state = tx.init(params)
        stats = MicrobatchStats(jax.tree.map(lambda p: p**2 + 1.0, params), 4)
        for size in (256, 64):
            updates, state = tx.update(
                params, state, params, microbatch=stats, batch_size=jnp.int32(size)
            )
        return updates, jax.tree.leaves(state)

    named, plain = run(Encoder(PARAMS["w"], PARAMS["b"])), run((PARAMS["w"], PARAMS["b"]))
    assert_close(jax.tree.leaves(named), jax.tree.leaves(plain), rtol=1e-6)


class OtherCount(NamedTuple):
    mu: Any
    nu: Any
    step: Any


def test_a_count_that_is_not_called_so_is_warned_of_when_the_batch_size_changes():
    tx = scaled(own_adam(OtherCount), "sqrt", family="adam")(1e-2)
    state = tx.init(PARAMS)
    tx.update(PARAMS, state, PARAMS)
    with pytest.warns(ScalingWarning, match=r"OtherCount\(mu, nu, step\) has no field 'count'"):
        tx.update(PARAMS, state, PARAMS, batch_size=jnp.int32(512))


def test_momentum_that_is_switched_off_has_nothing_to_follow():
    def mine(rate, momentum=0.0):
        return optax.sgd(rate, momentum or None)

    tx = scaled(mine, "linear", family="linear", roles=MOMENTUM)(0.1)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch_size=128)
    assert_close(updates, jax.tree.map(lambda p: -0.2 * p, PARAMS), rtol=1e-6)


def test_a_rate_fixed_by_position_in_a_partial_is_scaled():
    tx = scale_by_batch(functools.partial(optax.sgd, 0.1), **SIZES, rule="linear")()
    assert float(hyperparams(tx.init(PARAMS))["learning_rate"]) == pytest.approx(0.4)


def test_a_rate_that_is_no_argument_is_warned_of():
    def mine(b1=0.9):
        return optax.chain(optax.ema(b1), optax.scale(-0.1))

    make = scaled(mine, "linear", family="linear", roles={"b1": "decay"})
    with pytest.warns(ScalingWarning, match="no argument has the role 'learning_rate'"):
        make()


def test_the_library_imports_jax_optax_numpy_and_nothing_else():
    """Every module, in a fresh process: what is there afterwards that jax and optax did not bring.

    The picture of invariance_check imports matplotlib when it is asked for.
    """
    program = """
import pkgutil, sys
import jax, numpy, optax, optax.contrib
before = set(sys.modules)
import bs_jax, bs_jax.scaling
for module in pkgutil.walk_packages(bs_jax.scaling.__path__, "bs_jax.scaling."):
    __import__(module.name)
for name in bs_jax.__all__:
    getattr(bs_jax, name)
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
ours = {n for n in sys.modules if n.startswith("bs_jax.") and not n.startswith("bs_jax.scaling")}
brought = {name.partition(".")[0] for name in before}
print(sorted(roots - {"bs_jax"} - set(sys.stdlib_module_names) - brought), sorted(ours))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] ['bs_jax.errors']"


def test_every_room_imports_only_from_those_that_the_docstring_lists_above_it():
    folder = Path(scaling.__file__).parent
    listed = [line.split()[0] for line in scaling.__doc__.splitlines() if line.startswith("    ")]
    assert sorted(listed) == sorted(p.stem for p in folder.glob("*.py") if p.stem[0] != "_")
    for place, room in enumerate(listed):
        tree = ast.parse((folder / f"{room}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("bs_jax.scaling"):
                inside = node.module.split(".")[2:] or [alias.name for alias in node.names]
                assert all(listed.index(name) < place for name in inside), (room, inside)


def test_one_update_is_a_short_walk_through_few_files():
    """What a reader goes through for one AdamW update with the invariant second moment."""
    tx = scale_by_batch(optax.adamw, **SIZES, rule="invariant")(1e-3)
    state = tx.init(PARAMS)
    stats = MicrobatchStats(jax.tree.map(lambda p: p**2 + 1.0, PARAMS), 4)
    walk = functions_run(lambda: tx.update(PARAMS, state, PARAMS, microbatch=stats))
    files = [file for file, _ in walk]
    assert len(set(files)) <= 5, sorted(set(files))
    assert len(set(walk)) <= 35, sorted(set(walk))
    assert sum(a != b for a, b in itertools.pairwise(files)) <= 20


def test_numbers_given_as_schedules_of_one_value_are_served_as_numbers_are():
    """Of every role that optax takes as an array: rates, decays, eps, weight decay."""
    stats = MicrobatchStats(jax.tree.map(lambda p: p**2 + 1.0, PARAMS), 4)
    recipe = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.99, "eps": 1e-3, "weight_decay": 0.1}
    schedules = {n: lambda _, value=value: jnp.float32(value) for n, value in recipe.items()}

    def update(values):
        tx = scale_by_batch(optax.adamw, **SIZES, rule="invariant")(**values)
        return tx.update(PARAMS, tx.init(PARAMS), PARAMS, microbatch=stats)[0]

    assert_close(update(schedules), update(recipe), rtol=1e-4)


def test_a_moment_about_an_average_of_decay_zero_is_eps_alone():
    """The average is then the gradient, and nothing is left to divide by: not even 0/0."""
    stats = MicrobatchStats(jax.tree.map(lambda p: p**2 + 1.0, PARAMS), 4)
    for zero in (0.0, jnp.float32(0)):
        tx = scale_by_batch(optax.adabelief, **SIZES)(1e-2, b1=zero, b2=0.9, eps_root=1.0)
        updates, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS, microbatch=stats)
        # What eps adds to at each update settles at eps/(1 - b2), as at the base.
        expected = jax.tree.map(lambda p: -4 * 1e-2 * p / 10**0.5, PARAMS)
        assert_close(updates, expected, rtol=1e-3)


@pytest.mark.parametrize(
    "known", [{}, {"noise_scale": 64.0}, {"noise_scale": 64.0, "guard": False}]
)
@pytest.mark.parametrize("family", [None, "linear"])
def test_numbers_known_before_training_are_those_of_an_update_that_is_told_the_batch_size(
    family, known
):
    def mine(rate):
        return optax.sgd(rate)

    tx = scaled(mine, "linear", family=family, roles={"rate": "learning_rate"}, **known)(0.1)
    state = tx.init(PARAMS)
    before = tx.update(PARAMS, state, PARAMS)
    after = tx.update(PARAMS, state, PARAMS, batch_size=SIZES["batch_size"])
    assert_close(before[0], after[0], rtol=1e-6)
    assert_close(hyperparams(before[1]), hyperparams(after[1]), rtol=1e-6)
    plain = scale_hyperparams(
        mine, {"rate": 0.1}, **SIZES, rule="linear", family=family,
        roles={"rate": "learning_rate"}, **known,
    )  # fmt: skip
    assert float(hyperparams(before[1])["rate"]) == pytest.approx(plain["rate"])
