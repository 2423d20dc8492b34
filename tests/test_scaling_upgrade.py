"""Optimizer states that version 0.1.0 saved go on in today's transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.scaling import PARAMS, assert_equal, gradients

import bs_jax
from bs_jax.errors import UserError
from bs_jax.scaling.noise import init_noise_scale
from bs_jax.scaling.upgrade import FirstState, first_structure, upgrade_state

SIZES = {"batch_size": 256, "base_batch_size": 64}


def trained(tx, updates=3):
    state = tx.init(PARAMS)
    for i in range(updates):
        grads = jax.tree.map(lambda g, i=i: g[i], gradients(updates))
        stats = bs_jax.MicrobatchStats(jax.tree.map(lambda g: 2 * g**2, grads), 4)
        _, state = tx.update(grads, state, PARAMS, microbatch=stats)
    return state


def first(state, noise):
    """The state as version 0.1.0 would have saved it."""
    return first_structure(state, noise=noise)._replace(examples=np.int32(int(state.examples)))


def as_dicts(tree):
    """The tree as Orbax gives it back without a template."""
    if hasattr(tree, "_asdict"):
        return {name: as_dicts(x) for name, x in tree._asdict().items()}
    if isinstance(tree, dict):
        return {name: as_dicts(x) for name, x in tree.items()}
    if isinstance(tree, tuple) and tree:
        return [as_dicts(x) for x in tree]
    return tree


@pytest.mark.parametrize("form", [lambda x: x, as_dicts], ids=["tuples", "dicts"])
@pytest.mark.parametrize(
    ("rule", "noise"), [("invariant", False), ("noise_aware", True), ("sqrt", False)]
)
def test_a_state_of_the_first_version_goes_on(rule, noise, form):
    tx = bs_jax.scale_by_batch(optax.adamw, rule=rule, **SIZES)(1e-3)
    state = trained(tx)
    found = upgrade_state(form(first(state, noise)), tx.init(PARAMS))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for name in ("clock", "batch_size", "variance", "inner_state"):
        assert_equal(getattr(found, name), getattr(state, name))
    wanted = state.noise if noise else init_noise_scale()
    assert_equal(found.noise, wanted)
    assert_equal(found.limit, init_noise_scale())  # it was not kept: it begins anew
    shown = bs_jax.hyperparams(found, as_floats=True)
    assert shown["b1"] == pytest.approx(0.9**4)
    # It steps as the state does, the guard apart, which knows nothing yet.
    grads = jax.tree.map(lambda p: 0.1 * p, PARAMS)
    stats = bs_jax.MicrobatchStats(jax.tree.map(lambda g: 2 * g**2, grads), 4)
    ours = tx.update(grads, found, PARAMS, microbatch=stats)[1]
    wanted = tx.update(grads, state, PARAMS, microbatch=stats)[1]
    assert_equal(ours.inner_state, wanted.inner_state)
    assert int(ours.examples) == 4 * 256


def test_inside_a_chain_and_a_state_of_today_alike():
    tx = optax.chain(
        bs_jax.scale_by_batch(optax.clip_by_global_norm, rule="sqrt", **SIZES)(1.0),
        bs_jax.scale_by_batch(optax.adamw, rule="sqrt", **SIZES)(lambda count: 1e-3),
        optax.trace(0.0),
    )
    state = tx.init(PARAMS)
    assert_equal(upgrade_state(state, state), state)
    saved = tuple(first(x, False) if hasattr(x, "clock") else x for x in state)
    assert any(isinstance(x, FirstState) for x in saved)
    assert_equal(upgrade_state(as_dicts(saved), state), state)


def test_a_count_that_stopped_needs_the_examples_really_seen():
    tx = bs_jax.scale_by_batch(optax.sgd, rule="sqrt", **SIZES)(1e-3)
    state = tx.init(PARAMS)
    saved = first(state, False)._replace(examples=np.int32(2**31 - 1))
    with pytest.raises(UserError, match=r"2,147,483,647.*examples=updates"):
        upgrade_state(saved, state)
    assert int(upgrade_state(saved, state, examples=2**36 + 7).examples) == 2**36 + 7


@pytest.mark.parametrize(
    ("other", "params"),
    [(optax.sgd, PARAMS), (optax.adam, {"w": jnp.ones((3, 3)), "b": jnp.ones(3)})],
)
def test_another_optimizers_state_is_refused_by_name(other, params):
    tx = bs_jax.scale_by_batch(optax.adam, rule="sqrt", **SIZES)(1e-3)
    theirs = bs_jax.scale_by_batch(other, rule="sqrt", **SIZES)(1e-3).init(params)
    with pytest.raises(UserError, match=r"inner_state.*another optimizer or other parameters"):
        upgrade_state(first(theirs, False), tx.init(PARAMS))
