"""Schedules read by examples: exact at any length, on every kind of update, at any batch size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bs_jax
from bs_jax.scaling.clock import ExampleClock, rescaled

BASE = 2**21  # batches counted in tokens
X = jnp.ones(3)


def at(examples, base=BASE):
    return ExampleClock.at(examples, base)


advance_traced = jax.jit(lambda clock, size: clock.advance(size, BASE))


@pytest.mark.parametrize("size", [1, BASE // 8, BASE - 1, BASE, BASE + 1, 3 * BASE // 2, 8 * BASE])
@pytest.mark.parametrize("start", [0, 2**31 - 1, 2**31, 2**40 - 3, 2**50 + 7])
def test_every_example_counts_at_any_length(start, size):
    """Integers of any size, counted by Python, are what the two words must add up to."""
    static = traced = at(start)
    for _ in range(3):
        static, traced = static.advance(size, BASE), advance_traced(traced, jnp.int32(size))
    for clock in (static, traced):
        assert int(clock.examples) == start + 3 * size
        assert clock.examples.dtype == np.int64
        assert 0 <= int(clock.remainder) < BASE
        assert {word.dtype for word in clock} == {jnp.dtype(jnp.int32)}


def test_sizes_that_change_lose_no_example():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9 * 10**6, 500)
    clock = at(2**40, 10**6)
    seen, _ = jax.lax.scan(
        lambda clock, size: (clock.advance(size, 10**6), ()), clock, jnp.asarray(sizes, jnp.int32)
    )
    assert int(seen.examples) == 2**40 + sizes.sum()


def test_the_largest_batch_and_the_end_of_the_count():
    largest = 2**30
    assert int(at(largest - 1, largest).advance(largest, largest).examples) == 2 * largest - 1
    full = at(2**31 * BASE)
    assert int(full.base_updates) == 2**31 - 1
    assert int(full.advance(BASE, BASE).base_updates) == 2**31 - 1
    assert int(full.advance(jnp.int32(BASE), BASE).base_updates) == 2**31 - 1


def transform(size, given, schedule, rule="sqrt", base=BASE):
    """One transformation and the arguments of its update: static, traced, or with a given size."""
    kwargs = {"batch_size": size, "base_batch_size": base, "rule": rule}
    make = bs_jax.scale_by_batch(optax.sgd, **kwargs)
    if given == "static":
        return make(schedule), {}
    if given == "traced":  # a value that is an array makes the update traced
        return make(schedule, momentum=jnp.float32(0.0)), {}
    return make(schedule), {"batch_size": jnp.int32(size)}


@pytest.mark.parametrize("given", ["static", "traced", "ramped"])
@pytest.mark.parametrize("size", [BASE // 8, BASE, 3 * BASE // 2, 8 * BASE])
def test_a_schedule_goes_on_after_a_million_million_tokens(size, given):
    tx, extra = transform(size, given, lambda count: 1e-6 * count)
    state = tx.init(X)
    state = state._replace(clock=at(2**40 + 3 * size))
    if given == "static":
        # Plain optax's own schedule counts the optimizer's own updates.
        state = optax.tree.set(state, count=jnp.int32((2**40 + 3 * size) // size))
    step = jax.jit(lambda s, kw: tx.update(X, s, X, **kw))
    for i in range(3):
        updates, state = step(state, extra)
        middle = (2**40 + (3 + i) * size + (size - BASE) / 2) / BASE
        wanted = 1e-6 * middle * (size / BASE) ** 0.5
        rate = bs_jax.hyperparams(state, as_floats=True)["learning_rate"]
        assert rate == pytest.approx(wanted, rel=3e-6)
        if size >= BASE or given != "static":
            np.testing.assert_allclose(updates, -wanted, rtol=3e-6)
    assert int(state.examples) == 2**40 + 6 * size


@pytest.mark.parametrize("given", ["static", "traced", "ramped"])
@pytest.mark.parametrize(
    "size",
    # Below, at and above the base size; the two in the long form are of these kinds too.
    [
        16,
        pytest.param(48, marks=pytest.mark.long),
        64,
        96,
        pytest.param(128, marks=pytest.mark.long),
        224,
    ],
)
def test_a_table_is_asked_by_whole_counts_at_any_size(size, given):
    """`table[step]` serves in plain optax, whose counts are int32; between entries is a line."""
    table = jnp.cos(jnp.linspace(0.0, 3.0, 200)) ** 2
    asked = []

    def schedule(step):
        asked.append(jnp.asarray(step).dtype)
        return table[step]

    tx, extra = transform(size, given, schedule, base=64)
    state = tx.init(X)
    step = jax.jit(lambda s, kw: tx.update(X, s, X, **kw)[1])
    for i in range(4):
        state = step(state, extra)
        middle = max(0.0, (i * size + (size - 64) / 2) / 64)
        wanted = np.interp(middle, np.arange(200), table) * (size / 64) ** 0.5
        rate = bs_jax.hyperparams(state, as_floats=True)["learning_rate"]
        assert rate == pytest.approx(wanted, rel=1e-5)
    assert set(asked) == {jnp.dtype(jnp.int32)}


@pytest.mark.parametrize("k", [0.25, 0.75, 1, 65 / 64, 1.5, 2, 3, 8])
def test_a_rescaled_schedule_reads_what_the_clock_reads(k):
    """What plain optax is given, in updates of the new size, is what the traced update reads."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 100)
    size = round(64 * k)
    for middle in (True, False):
        other, clock = rescaled(schedule, k, middle=middle), at(0, 64)
        for step in range(12):
            ours = clock.read(schedule, size, 64, middle=middle)
            np.testing.assert_allclose(other(jnp.int32(step)), ours, rtol=1e-5, atol=1e-7)
            clock = clock.advance(size, 64)


@pytest.mark.parametrize("given", ["static", "traced", "ramped"])
def test_at_the_base_size_a_schedule_is_plain_optaxs_to_the_bit(given):
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 20)
    tx, extra = transform(64, given, schedule, base=64)
    plain = optax.sgd(schedule, momentum=jnp.float32(0.0) if given == "traced" else None)
    state, theirs = tx.init(X), plain.init(X)
    step, their_step = (jax.jit(x.update) for x in (tx, plain))
    for _ in range(25):
        updates, state = step(X, state, X, **extra)
        expected, theirs = their_step(X, theirs, X)
        np.testing.assert_array_equal(updates, expected)


def follows(k, middle, rule="linear"):
    """Distance from the base of decay that 80 base updates end at 0: h x with h = 0.05."""

    def end(k, middle):
        schedule, x = optax.linear_schedule(1.0, 0.0, 80), 1.0
        for step in range(round(80 / k)):
            x = x * (1 - 0.05 * float(rescaled(schedule, k, middle=middle)(step))) ** k
        return x

    return abs(end(k, middle) - end(1, True))


@pytest.mark.parametrize("k", [4, 8])
def test_the_middle_of_a_large_step_is_read_and_not_its_start(k):
    """80 base updates to a rate of 0: what is left at the end is the base's, or far below."""
    assert follows(k, True) < 0.003
    assert follows(k, False) > 10 * follows(k, True)


def test_warm_up_from_zero_starts_above_zero_at_a_larger_batch_only():
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    assert [float(rescaled(schedule, k)(0)) for k in (0.25, 1, 4)] == pytest.approx([0, 0, 0.15])


def test_rules_that_change_plain_numbers_alone_leave_schedules_where_they_were():
    for rule in ("none", "seed", "seed_sqrt"):
        assert not bs_jax.RULES[rule].reads_middle
    for rule in ("linear", "sqrt", "noise_aware", "invariant"):
        assert bs_jax.RULES[rule].reads_middle


@pytest.mark.parametrize("size", [BASE // 8, 3 * BASE // 2, 8 * BASE])
def test_in_sixty_four_bits_nothing_changes(size):
    """With jax_enable_x64 the same words, rates and updates."""
    sizes = {"batch_size": size, "base_batch_size": BASE}
    with jax.enable_x64(True):
        x = jnp.ones(3, jnp.float32)
        make = bs_jax.scale_by_batch(optax.adamw, **sizes, rule="sqrt")
        tx = make(lambda count: 1e-6 * count)
        start = tx.init(x)._replace(clock=at(2**40))

        def types(state):
            return jax.tree.map(lambda a: (a.shape, a.dtype), state)

        for extra in ({}, {"batch_size": size}):
            state = jax.jit(lambda s, extra=extra: tx.update(x, s, x, **extra)[1])(start)
            assert types(state) == types(start)
            assert int(state.examples) == 2**40 + size
            rate = bs_jax.hyperparams(state, as_floats=True)["learning_rate"]
            wanted = 1e-6 * (2**40 + (size - BASE) / 2) / BASE * (size / BASE) ** 0.5
            assert rate == pytest.approx(wanted, rel=3e-6)
