"""The guard on the length of steps, and a batch that follows the noise scale."""

import dataclasses
import functools
import inspect
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bs_jax
from bs_jax.errors import UserError
from bs_jax.scaling import RULES, BatchRamp, MicrobatchStats, noise, problems
from bs_jax.scaling.hyperparameters import ROLES, Noise
from bs_jax.scaling.noise import step_share
from bs_jax.scaling.optimizers import Recipe, registered
from bs_jax.scaling.rules import FAMILIES

SIZES = {"batch_size": 512, "base_batch_size": 64}
K = 8.0
PHIS = (0.0, 0.5, 2.0, 5.0, 8.0, 100.0, math.inf)


@pytest.mark.parametrize(
    ("k", "phi", "steps"),
    # min(k, max(1, phi)), and k itself for k <= 1
    [
        (8, 0, 1),
        (8, 0.5, 1),
        (8, 1, 1),
        (8, 4, 4),
        (8, 8, 8),
        (8, math.inf, 8),
        (1, 0, 1),
        (0.25, 0, 0.25),
        (0.25, 100, 0.25),
        (1.5, 1.2, 1.2),
    ],
)
def test_steps_grow_up_to_the_noise_scale(k, phi, steps):
    assert k * step_share(k, phi) == pytest.approx(steps)
    assert k * step_share(jnp.float32(k), jnp.float32(phi)) == pytest.approx(steps, rel=1e-6)
    assert k * step_share(k, jnp.float32(phi)) == pytest.approx(steps, rel=1e-6)


def test_the_noise_scale_is_averaged_over_fifty_base_updates_and_five_of_ones_own():
    # Of one update k base sizes large: 0.98^64 is 0.27, and three updates tell no spread.
    tx = bs_jax.scale_by_batch(optax.sgd, batch_size=64, base_batch_size=64)(0.1)
    params, stats = jnp.ones(3), MicrobatchStats(jnp.full(3, 2.0), 4)

    def weight(size):
        update = tx.update(params, tx.init(params), params, microbatch=stats, batch_size=size)
        return update[1].limit.weight

    traced = jax.jit(weight)
    for k, decay in ((1, 0.98), (4, 0.98**4), (64, 0.8)):
        known = jax.jit(lambda size=64 * k: weight(size))
        assert float(known()) == pytest.approx(1 - decay, rel=1e-5)
        assert float(traced(jnp.int32(64 * k))) == pytest.approx(1 - decay, rel=1e-5)


# What a step is multiplied by, of every optimizer that takes steps: of its own rate, nothing else.
ARGUMENTS = {
    name: set(inspect.signature(factory).parameters) for name, factory in registered().items()
}
STEPPING = sorted(name for name, known in ARGUMENTS.items() if "learning_rate" in known)
assert len(STEPPING) > 18, STEPPING


def all_of(scaled):
    return {name: scaled.value(name) for name in scaled.values}


@pytest.mark.parametrize("rule", ["invariant", "noise_aware"])
@pytest.mark.parametrize("name", STEPPING)
def test_of_every_optimizer_the_guard_shortens_the_steps_and_nothing_else(name, rule):
    """To phi base steps, but not below the square-root rule's; SGD's to one base step."""
    values = {"learning_rate": 0.1, "weight_decay": 0.05, "weight_decay_rate": 0.05}
    if name == "muon":
        values |= {"adam_learning_rate": 0.01}
    values |= {"momentum": 0.9}
    recipe = Recipe.of(name, kwargs={n: v for n, v in values.items() if n in ARGUMENTS[name]})
    for phi in PHIS:
        q = Noise(1.0, 3.0)  # the noise that q follows need not be the guard's
        unguarded, held = (recipe.at(RULES[rule], K, q, phi=x) for x in (None, phi))
        free, divided = all_of(unguarded), K * unguarded.denominator_factor(K)
        share = min(K, max(1.0, phi)) / K
        least = 1.0 if recipe.family.moves_by_size else math.sqrt(K)
        held_back, held_divided = (
            1.0 if held.guards_moment else max(share, min(1.0, least / factor))
            for factor in (unguarded.lr_factor(K), divided)
        )
        for argument, value in all_of(held).items():
            role, before = recipe.roles[argument].name, free[argument]
            if role == "learning_rate":
                assert value == pytest.approx(held_back * before)
            elif role == "divided_learning_rate":  # of Muon's Adam
                assert value == pytest.approx(held_divided * before)
            elif role == "weight_decay_independent" and recipe.values[argument]:
                base = recipe.values[argument]
                assert value == pytest.approx(1 - (1 - base) ** (K * held_back))
            else:  # weight decay too: the rate that it is multiplied by is shorter already
                assert value == before or value == pytest.approx(before)


def test_weight_decay_times_the_rate_is_held_back_with_it():
    """What decays per update is lr wd: k times the base's where the guard leaves the rate alone."""
    recipe = Recipe.of("adamw", kwargs={"learning_rate": 0.1, "weight_decay": 0.05})
    for rule in ("invariant", "noise_aware", "sqrt", "linear"):
        free = recipe.at(RULES[rule], K, Noise(1.0, 3.0)).value("learning_rate")
        for phi in PHIS[:-1]:
            held = all_of(recipe.at(RULES[rule], K, Noise(1.0, 3.0), phi=phi))
            product = held["learning_rate"] * held["weight_decay"]
            assert product == pytest.approx(0.1 * 0.05 * K * held["learning_rate"] / free)


@pytest.mark.parametrize(("optimizer", "least"), [("adam", K**0.5), ("sgd", 1.0)])
@pytest.mark.parametrize(("rule", "power"), [("linear", 1.0), ("sqrt", 0.5), ("power(0.75)", 0.75)])
def test_a_given_noise_scale_guards_a_power_of_k(rule, power, optimizer, least):
    """phi base steps, but no less than the square-root rule's in Adam."""

    def rate(**known):
        given = {"learning_rate": 1.0}
        return bs_jax.scale_hyperparams(optimizer, given, **SIZES, rule=rule, **known)[
            "learning_rate"
        ]

    for phi in (0.5, 2.0, 5.0):
        held = max(max(1.0, phi) ** power, min(K**power, least))
        assert rate(noise_scale=64 * phi) == pytest.approx(held)
    for free in ({"guard": False, "noise_scale": 128.0}, {}, {"noise_scale": 1e6}):
        assert rate(**free) == pytest.approx(K**power)


def test_the_guard_is_data_of_the_rule():
    rule = RULES["invariant"]
    assert rule.guard
    off = rule.replace(guard=False)
    assert (off.guard, off.name) == (False, "invariant[guard=off]")
    assert off.replace(guard=True) == rule
    assert not RULES["seed"].guard
    assert RULES["seed"].replace(guard=True).name == "seed[guard=on]"
    tx = [
        bs_jax.scale_by_batch(optax.adam, **SIZES, rule=rule, guard=guard)(1e-3)
        for rule, guard in ((off, None), ("invariant", False), (off, True), ("invariant", None))
    ]
    shown = ["guard" in bs_jax.hyperparams(x.init(jnp.ones(3))) for x in tx]
    assert shown == [False, False, True, True]
    with pytest.raises(UserError, match="guard is 1; give True, False, or None"):
        bs_jax.scale_by_batch(optax.adam, **SIZES, guard=1)


def test_every_family_that_steps_has_a_metric_of_its_own():
    assert {name: family.metric for name, family in FAMILIES.items()} == {
        "linear": "plain",
        "adam": "coordinate",
        "rmsprop": "coordinate",
        "centered": "coordinate",
        "centered_rmsprop": "coordinate",
        "amsgrad": "coordinate",
        "adamax": "coordinate",
        "normalized_adam": "coordinate",
        "sign": "coordinate",
        "muon": "layer",
        "lars": "layer",
        "adagrad": "coordinate",
        "adafactor": "coordinate",
        "novograd": "layer",
        "wrapper": None,
    }
    rule, rate = RULES["invariant"], {"learning_rate": 0.1}
    assert all(Recipe.of(name, kwargs=rate).metric(rule) is not None for name in STEPPING)
    for part in ("clip_by_global_norm", "ema", "trace"):  # they take no steps of their own
        assert Recipe.of(part).metric(rule) is None


@pytest.mark.parametrize("metric", ["plain", "coordinate", "layer"])
def test_the_metrics_weigh_coordinates_as_the_optimizer_moves_them(metric):
    """Two leaves, one loud and clean, one quiet and noisy; p as the docstring says."""
    signal = {"loud": np.full(4000, 10.0), "quiet": np.full(4000, 0.01)}
    deviation = {"loud": 5.0, "quiet": 0.04}  # of one of two micro-batches of 32
    rng = np.random.default_rng(0)
    parts = {n: signal[n] + rng.normal(size=(2, 4000)) * deviation[n] for n in signal}
    stats = MicrobatchStats(jax.tree.map(lambda x: jnp.asarray((x**2).mean(0)), parts), 2)
    grads = jax.tree.map(lambda x: jnp.asarray(x.mean(0)), parts)
    found = noise.sample(grads, stats, batch_size=64, metric=metric)
    square = {n: signal[n][0] ** 2 + deviation[n] ** 2 for n in signal}
    weight = {
        "plain": dict.fromkeys(signal, 1.0),
        # E 1/sqrt(s) over the draws of s, which has two degrees of freedom
        "coordinate": {n: np.mean((parts[n] ** 2).mean(0) ** -0.5) for n in signal},
        "layer": {n: (4000 * square[n]) ** -0.5 for n in signal},
    }[metric]
    wanted_signal = sum(4000 * weight[n] * signal[n][0] ** 2 for n in signal)
    wanted_noise = 32 * sum(4000 * weight[n] * deviation[n] ** 2 for n in signal)
    # By coordinate p hangs together with the noise that it weighs: by a tenth here, by design.
    tolerance = 0.25 if metric == "coordinate" else 0.05
    assert float(found["signal"]) == pytest.approx(wanted_signal, rel=tolerance)
    assert float(found["noise"]) == pytest.approx(wanted_noise, rel=tolerance)


def stats_of(signal, scale, parts=2, batch_size=512, dim=2000, seed=0):
    """Gradient and statistics of a batch whose noise scale is known, in every metric."""
    deviation = signal * np.sqrt(scale * parts / batch_size)
    rng = np.random.default_rng(seed)
    draws = np.float32(signal + deviation * rng.standard_normal((parts, dim)))
    mean = draws.mean(0)
    return mean, MicrobatchStats((draws**2).mean(0), parts, mean=mean)


def train_over(tx, scale, updates):
    """The state after updates of a known noise scale, and what was in force in each of them."""
    x = jnp.ones(2000)
    given = [stats_of(0.1, scale, seed=i) for i in range(updates)]
    parts = [(mean, stats.mean_square) for mean, stats in given]
    grads, squares = (np.stack(arrays) for arrays in zip(*parts, strict=True))

    def step(state, now):
        stats = MicrobatchStats(now[1], 2, mean=now[0])
        state = tx.update(now[0], state, x, microbatch=stats)[1]
        return state, bs_jax.hyperparams(state)

    state, shown = jax.jit(lambda given: jax.lax.scan(step, tx.init(x), given))((grads, squares))
    return state, [{n: float(v[i]) for n, v in shown.items()} for i in range(updates)]


def rates_over(tx, scale, updates=12):
    return train_over(tx, scale, updates)[1]


def test_until_the_noise_scale_is_known_a_step_is_the_bases():
    tx = bs_jax.scale_by_batch(optax.sgd, **SIZES)(0.1)
    first, *_, last = rates_over(tx, 256.0)
    assert (first["learning_rate"], first["guard"]) == (pytest.approx(0.1), pytest.approx(1 / 8))
    assert first["noise_scale"] == 0
    assert last["noise_scale"] == pytest.approx(256.0, rel=0.1)  # 4 base sizes
    assert last["learning_rate"] == pytest.approx(0.1 * last["noise_scale"] / 64)
    assert last["guard"] == pytest.approx(last["learning_rate"] / 0.8)


@pytest.mark.parametrize(("scale", "guard"), [(10.0, 1 / 8), (5000.0, 1.0)])
@pytest.mark.parametrize("factory", [optax.adam, optax.lion, optax.novograd])
def test_beyond_the_noise_scale_the_guard_holds_and_inside_steps_are_free(factory, scale, guard):
    # Without momentum, which novograd sums, so that its decay changes the rate as well.
    *_, last = rates_over(bs_jax.scale_by_batch(factory, **SIZES)(0.1, b1=0.0), scale, 6)
    assert last["guard"] == pytest.approx(guard, rel=1e-5)
    # Elsewhere than in Lion the second moment holds.
    held = max(guard, 8**-0.5) if factory is optax.lion else 1.0
    assert last["learning_rate"] == pytest.approx(0.1 * 8 * held, rel=1e-5)


@pytest.mark.parametrize("factory", [optax.adamw, optax.rmsprop, optax.novograd])
def test_beyond_the_noise_scale_a_coordinates_step_is_the_square_root_rules(factory):
    """Never longer than invariant's, never shorter than phi/k of it; in between sqrt's own."""
    limits = [(0.0, 0.5), (4.0, 0.5), (8.0, 0.5), (0.0, 0.25)]  # phi, the guard's power
    rules = [dataclasses.replace(RULES["invariant"], guard_power=power) for _, power in limits]
    optimizers = [
        bs_jax.scale_by_batch(factory, **SIZES, **more)(0.1)
        for more in (
            {"guard": False},
            {"rule": "sqrt"},
            *({"noise_scale": 64 * x[0], "rule": r} for x, r in zip(limits, rules, strict=True)),
        )
    ]
    x = {"loud": jnp.ones(500), "quiet": jnp.ones(500)}

    @jax.jit
    def update(grads, stats, states):
        given = [{} if i == 1 else {"microbatch": stats} for i in range(len(optimizers))]
        each = zip(optimizers, states, given, strict=True)
        done = [tx.update(grads, state, x, **more) for tx, state, more in each]
        return [step for step, _ in done], [state for _, state in done]

    states = [tx.init(x) for tx in optimizers]
    for seed in range(4):
        loud, quiet = stats_of(10.0, 20.0, dim=500, seed=seed), stats_of(1.0, 1e4, dim=500, seed=9)
        grads = {"loud": loud[0], "quiet": quiet[0]}
        square = {"loud": loud[1].mean_square, "quiet": quiet[1].mean_square}
        steps, states = update(grads, MicrobatchStats(square, 2, mean=grads), states)
    # AdamW's weight decay is the same under all.
    decay = 8e-5 * 0.1 if factory is optax.adamw else 0.0
    free, published, *guarded = (np.concatenate([s["loud"], s["quiet"]]) + decay for s in steps)
    for held, (phi, power) in zip(guarded, limits, strict=True):
        least = free * (published / free) ** (2 * (1 - power))
        wanted = np.clip(np.where(np.abs(published) < np.abs(free), least, free) / free, phi / 8, 1)
        np.testing.assert_allclose(held / free, wanted, rtol=2e-3)
        assert (phi == 8.0) == bool(np.all(held == free))


@pytest.mark.parametrize("batch_size", [16, 64])
def test_up_to_the_base_size_the_guard_does_nothing_and_asks_for_nothing(batch_size):
    grads = jnp.full(3, 0.1)
    sizes = {"batch_size": batch_size, "base_batch_size": 64}
    guarded, free = (
        bs_jax.scale_by_batch(optax.sgd, **sizes, guard=guard)(0.1, momentum=0.9)
        for guard in (True, False)
    )
    got, state = guarded.update(grads, guarded.init(grads), grads)
    np.testing.assert_array_equal(got, free.update(grads, free.init(grads), grads)[0])
    assert bs_jax.hyperparams(state, as_floats=True)["guard"] == 1
    # The static program, as without a guard: no word about the noise.
    text = jax.jit(guarded.update).lower(grads, state, grads).as_text()
    assert "sqrt" not in text


@pytest.mark.parametrize(("rule", "power"), [("linear", 1.0), ("sqrt", 0.5)])
def test_a_noise_scale_that_is_given_as_a_schedule_guards_rules_without_statistics(rule, power):
    """20 examples more at each base update: 64 + 20 (8 i + 3.5), read at the middle."""
    tx = bs_jax.scale_by_batch(
        optax.sgd, **SIZES, rule=rule, noise_scale=lambda count: 64.0 + 20.0 * count
    )(0.1)
    x = jnp.ones(3)
    state = tx.init(x)
    update = jax.jit(lambda state: tx.update(x, state, x)[1])
    for i in range(4):
        state = update(state)
        shown = bs_jax.hyperparams(state, as_floats=True)
        scale = 64 + 20 * (8 * i + 3.5)
        assert shown["noise_scale"] == pytest.approx(scale, rel=1e-5)
        steps = min(scale / 64, 8.0)
        assert shown["guard"] == pytest.approx(steps / 8, rel=1e-5)
        assert shown["learning_rate"] == pytest.approx(0.1 * steps**power, rel=1e-5)


def test_the_estimate_of_a_state_has_the_metric_of_the_optimizer_beside_the_plain_one():
    tx = bs_jax.scale_by_batch(optax.adam, **SIZES)(0.1)
    nothing = bs_jax.noise_scale_estimate(tx.init(jnp.ones(2000)))
    assert math.isnan(nothing.noise_scale)
    assert math.isnan(nothing.preconditioned.noise_scale)
    assert (nothing.preconditioned.low, nothing.preconditioned.high) == (0, math.inf)
    found = bs_jax.noise_scale_estimate(train_over(tx, 300.0, 20)[0])
    assert float(found.noise_scale) == pytest.approx(300, rel=0.05)
    finer = found.preconditioned
    assert 200 < float(finer.noise_scale) < 400  # p and the noise it weighs hang together
    assert float(finer.low) < float(finer.noise_scale) < float(finer.high)


# A problem that has a limit: the noisy quadratic has none.


def test_where_steps_have_a_limit_the_guarded_rule_holds_and_the_unguarded_one_diverges():
    base = problems.spread_quadratic("none", 1)[-1]
    assert base < problems.spread_quadratic("invariant", 8)[-1] < 2 * base
    assert problems.spread_quadratic("invariant", 0.25)[-1] == pytest.approx(base, rel=0.15)
    assert not problems.spread_quadratic("invariant", 8, guard=False)[-1] < 1.0


# A batch that follows the noise.


def ramp(**changes):
    settings = {"batch_size": 64, "largest": 512, "share": 0.5, "patience": 1}
    return BatchRamp(**(settings | changes))


@pytest.mark.parametrize(
    ("changes", "asked", "sizes"),
    [
        ({}, [255, 256, 511, 512, 1024, 9999], [64, 128, 128, 256, 512, 512]),
        ({"patience": 3}, [256] * 5, [64, 64, 128, 128, 128]),
        ({"patience": 2}, [256, 10, 256, 256], [64, 64, 64, 128]),  # in a row
        ({"share": 1.0}, [127, 128], [64, 128]),
        ({"growth": 4.0}, [511, 512], [64, 256]),
        ({"growth": 1.5, "multiple_of": 32}, [1e4] * 5, [96, 128, 192, 288, 416]),
        ({"largest": 100}, [1e4] * 2, [100, 100]),
        ({"largest": 100, "multiple_of": 16}, [1e4] * 2, [96, 96]),
        ({}, [math.nan, math.inf, -1.0, 0.0, None], [64] * 5),  # not known: never
        ({}, [1e4, 1e4, 1.0, 1.0], [128, 256, 256, 256]),
        ({"may_shrink": True}, [1e4, 1e4, 300, 200, 1, 1, 1], [128, 256, 256, 128, 64, 64, 64]),
        ({"may_shrink": True}, [1e4, math.nan, math.inf], [128] * 3),
    ],
)
def test_a_batch_that_follows_the_noise(changes, asked, sizes):
    found = ramp(**changes)
    assert [found.next_batch_size(low) for low in asked] == sizes
    assert set(sizes) <= set(found.sizes())


def test_an_estimate_is_read_at_the_lower_end_of_the_optimizers_metric():
    tx = bs_jax.scale_by_batch(optax.adam, **SIZES)(0.1)
    nothing = bs_jax.noise_scale_estimate(tx.init(jnp.ones(2000)))
    assert ramp().next_batch_size(nothing) == 64
    found = bs_jax.noise_scale_estimate(train_over(tx, 300.0, 8)[0])
    low = float(found.preconditioned.low)
    assert ramp(share=129 / low).next_batch_size(found) == 128
    assert ramp(share=127 / low).next_batch_size(found) == 64


def test_a_ramp_goes_through_json_as_it_stands():
    found = ramp(patience=3, may_shrink=True, multiple_of=16)
    for low in (1e4, 1e4, 1e4, 1e4):
        found.next_batch_size(low)
    again = BatchRamp.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert (again.batch_size, again.agreeing) == (128, 1)
    rest = [1e4, 1e4, 1.0, 1.0, 1.0]
    assert [again.next_batch_size(x) for x in rest] == [found.next_batch_size(x) for x in rest]
    with pytest.raises(UserError, match="a ramp has no speed"):
        BatchRamp.from_dict({**found.to_dict(), "speed": 2})


def test_sizes_and_micro_batches():
    assert ramp(multiple_of=32).sizes() == [64, 128, 256, 512]
    found = ramp(multiple_of=32)
    assert found.microbatches(32) == 2
    found.next_batch_size(1e6)
    assert found.microbatches(32) == 4
    with pytest.raises(UserError, match="128 holds no whole number of micro-batches of 48"):
        found.microbatches(48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 64.0}, r"batch_size 64\.0.*whole numbers"),
        ({"batch_size": True}, "batch_size True"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"largest": 32}, "largest 32"),
        ({"multiple_of": 48}, "64 is no multiple of 48; start from 96"),
        ({"share": 0.0}, "share 0"),
        ({"share": math.nan}, "share nan"),
        ({"growth": 1.0}, "growth 1"),
        ({"patience": 0}, "patience 0"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        ramp(**changes)


@functools.cache
def linear_regression():
    """SGD at base batch size 64, and an update of it on examples of 64 inputs and noise."""
    target = jnp.linspace(-0.2, 0.2, 64)
    tx = bs_jax.scale_by_batch(optax.sgd, batch_size=64, base_batch_size=64)(0.02)

    def loss(w, x):
        return jnp.mean(jnp.square((x[:, :64] @ (w - target)) + x[:, 64]))

    @jax.jit
    def update(w, state, x):
        f = bs_jax.value_grad_and_stats(loss, microbatches=x.shape[0] // 32)
        _, grads, stats = f(w, x)
        changes, state = tx.update(grads, state, w, batch_size=x.shape[0], microbatch=stats)
        return w + changes, state, bs_jax.noise_scale_estimate(state)

    return tx, update


def train_with_ramp(until, saved=None):
    """A plain optax loop whose batch follows the noise: weights, sizes and what is saved."""
    tx, update = linear_regression()
    w, growing = jnp.zeros(64), ramp(multiple_of=32, patience=2, largest=256)
    state, seen, sizes = tx.init(w), 0, []
    if saved is not None:
        seen, text, (w, state) = saved
        growing = BatchRamp.from_dict(json.loads(text))
    found = bs_jax.noise_scale_estimate(state)
    while seen < until:
        size = growing.next_batch_size(found)
        x = np.random.default_rng(seen).standard_normal((size, 65), np.float32)
        w, state, found = update(w, state, x)
        seen += size
        sizes.append(size)
    assert int(state.examples) == seen
    return w, sizes, (seen, json.dumps(growing.to_dict()), jax.device_get((w, state)))


def test_a_ramp_in_a_plain_loop_resumes_to_the_bit():
    whole, sizes, _ = train_with_ramp(12_000)
    assert sorted(set(sizes)) == [64, 128, 256]
    assert sizes == sorted(sizes)
    for cut in (3000, 7000):
        _, before, saved = train_with_ramp(cut)
        again, after, _ = train_with_ramp(12_000, saved)
        assert before + after == sizes
        np.testing.assert_array_equal(again, whole)


def test_roles_of_rates_are_all_guarded():
    """A role that scales a step and forgets the guard would be a silent hole."""
    rates = {name for name in ROLES if name.endswith("learning_rate")}
    assert rates == {"learning_rate", "divided_learning_rate"}
