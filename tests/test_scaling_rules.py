"""Rules as arithmetic: known values, properties, switches, bad input."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_jax.errors import UserError
from bs_jax.scaling import FAMILIES, RULES, power, resolve_rule, scale_hyperparams
from bs_jax.scaling.hyperparameters import Noise
from bs_jax.scaling.optimizers import Recipe, registered

# Arithmetic here: that an invariant rule's numbers alone are not enough is test_scaling_advice's.
pytestmark = pytest.mark.filterwarnings("ignore:these numbers alone")
RECIPE = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
SCALES = st.sampled_from([1 / 16, 1 / 4, 1 / 2, 1, 2, 3, 4, 8, 16])
RULE_NAMES = st.sampled_from([*RULES, "power(0.75)"])


def scale(hyperparams, k, rule, factory=optax.adamw, base=1024, noise_scale=3000.0, **kwargs):
    return scale_hyperparams(
        factory,
        hyperparams,
        batch_size=round(base * k),
        base_batch_size=base,
        rule=rule,
        noise_scale=noise_scale,
        guard=False,
        **kwargs,
    )


@pytest.mark.parametrize(
    ("rule", "lr", "wd", "eps", "decays"),
    [
        ("none", 1, 1, 1, False),
        ("linear", 8, 1, 1, True),
        ("sqrt", 8**0.5, 8**0.5, 8**-0.5, True),
        ("seed", 8, 8, 1, True),
        ("seed_sqrt", 8**0.5, 8**0.5, 1, True),
        ("power(0.9)", 8**0.9, 8**0.1, 8**-0.1, True),
        ("invariant", 8, 1, 1, True),
        # phi = 1: q = sqrt((8 + 1)/(8 (1 + 1))) = 0.75.
        ("noise_aware", 6, 1 / 0.75, 0.75, True),
    ],
)
def test_each_rule_at_k_8(rule, lr, wd, eps, decays):
    new = scale(RECIPE, 8, rule, base=64, noise_scale=64.0)
    assert new["learning_rate"] == pytest.approx(1e-3 * lr)
    assert new["weight_decay"] == pytest.approx(0.1 * wd)
    assert new["eps"] == pytest.approx(1e-8 * eps)
    scale_of_decays = (8**0.5 if rule == "seed_sqrt" else 8) if decays else 1
    assert new["b1"] == pytest.approx(0.9**scale_of_decays)
    assert new["b2"] == pytest.approx(0.99**scale_of_decays)


def test_first_order_form_of_a_decay_would_be_negative_and_the_power_is_not():
    assert 1 - 12 * (1 - 0.9) < 0
    assert scale(RECIPE, 12, "sqrt")["b1"] == pytest.approx(0.9**12)


@pytest.mark.parametrize("rule", ["linear", "sqrt", "noise_aware", "seed", "invariant"])
def test_trap_undamped_momentum_changes_the_learning_rate(rule):
    plain = scale({"learning_rate": 0.1}, 8, rule, optax.sgd)["learning_rate"]
    heavy = scale({"learning_rate": 0.1, "momentum": 0.9}, 8, rule, optax.sgd)
    assert heavy["momentum"] == pytest.approx(0.9**8)
    # lr/(1 - d), the learning rate that an example feels, is what the rule's factor is for.
    assert heavy["learning_rate"] / (1 - 0.9**8) == pytest.approx(plain / (1 - 0.9))


def test_momentum_switched_off_leaves_the_learning_rate_uncorrected():
    rule = RULES["linear"].replace(momentum=None)
    new = scale({"learning_rate": 0.1, "momentum": 0.9}, 8, rule, optax.sgd)
    assert new == {"learning_rate": pytest.approx(0.8), "momentum": 0.9}


@given(k=SCALES, rule=RULE_NAMES)
def test_trap_weight_decay_is_not_scaled_twice(k, rule):
    """lr x wd per example stays, except under the rules that say otherwise."""
    new = scale(RECIPE, k, rule)
    per_example = new["learning_rate"] * new["weight_decay"] / k
    expected = {"seed": 1e-4 * k, "none": 1e-4 / k}.get(rule, 1e-4)
    assert per_example == pytest.approx(expected)


def test_weight_decay_that_is_not_multiplied_by_the_learning_rate():
    new = scale({"weight_decay_rate": 0.01}, 8, "sqrt", optax.adafactor)
    assert new["weight_decay_rate"] == pytest.approx(1 - 0.99**8)


@given(rule=RULE_NAMES)
def test_k_of_one_is_the_identity_to_the_bit(rule):
    assert scale(RECIPE, 1, rule) == RECIPE


@given(k1=SCALES, k2=SCALES, rule=RULE_NAMES)
def test_two_steps_are_one(k1, k2, rule):
    """From B0 to k1 B0 to k1 k2 B0 is the same as from B0 to k1 k2 B0 at once."""
    first = scale_hyperparams(
        optax.adamw,
        RECIPE,
        batch_size=round(1024 * k1),
        base_batch_size=1024,
        rule=rule,
        noise_scale=3000.0,
        guard=False,
    )
    second = scale_hyperparams(
        optax.adamw,
        first,
        batch_size=round(1024 * k1 * k2),
        base_batch_size=round(1024 * k1),
        rule=rule,
        noise_scale=3000.0,
        guard=False,
    )
    at_once = scale(RECIPE, k1 * k2, rule)
    assert second == {name: pytest.approx(value, rel=1e-9) for name, value in at_once.items()}


@given(k=SCALES, rule=RULE_NAMES)
def test_there_and_back_again(k, rule):
    there = scale(RECIPE, k, rule)
    back = scale_hyperparams(
        optax.adamw,
        there,
        batch_size=1024,
        base_batch_size=round(1024 * k),
        rule=rule,
        noise_scale=3000.0,
    )
    assert back == {name: pytest.approx(value, rel=1e-9) for name, value in RECIPE.items()}


@given(k=SCALES, decay=st.floats(0.01, 0.9999), rule=st.sampled_from(["linear", "sqrt", "seed"]))
def test_half_life_in_examples_is_kept(k, decay, rule):
    new = scale({"b1": decay}, k, rule)["b1"]
    assert k * 1024 * math.log(0.5) / math.log(new) == pytest.approx(
        1024 * math.log(0.5) / math.log(decay), rel=1e-9
    )


@given(k=SCALES, phi=st.floats(0.0, 1e6))
def test_q_lies_between_the_linear_and_the_square_root_rule(k, phi):
    factor = scale({"learning_rate": 1.0}, k, "noise_aware", noise_scale=1024 * phi)
    low, high = sorted((k, k**0.5))
    assert low * (1 - 1e-9) <= factor["learning_rate"] <= high * (1 + 1e-9)


def test_tracers_and_floats_agree():
    cases = [(k, rule) for k in (0.25, 2, 8) for rule in (*RULES, "power(0.75)")]

    @jax.jit
    def traced(values):
        return [scale(values, k, rule) for k, rule in cases]

    found = traced({name: jnp.float32(value) for name, value in RECIPE.items()})
    for (k, rule), got in zip(cases, found, strict=True):
        for name, value in scale(RECIPE, k, rule).items():
            np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=f"{name} {k} {rule}")


@pytest.mark.parametrize("k", [4.0, 0.25])
def test_decays_of_zero_stay_zero_as_numbers_and_as_arrays(k):
    """Nothing is averaged, at any batch size: of every optimizer, and of what follows from them."""
    decays = {"b1", "b2", "beta", "decay", "momentum", "adam_b1", "adam_b2"}
    noise = Noise(1.0, 2.0)
    for name, factory in registered().items():
        taken = set(inspect.signature(factory).parameters)
        if "learning_rate" not in taken or not decays & taken:
            continue
        given = {"learning_rate": 0.1} | ({"centered": True} if "centered" in taken else {})
        recipe = Recipe.of(factory, kwargs=given)
        found = []
        for zero in (0.0, jnp.float32(0)):
            values = recipe.values | dict.fromkeys(decays & recipe.roles.keys(), zero)
            scaled = recipe.at(RULES["noise_aware"], k, noise, values)
            found.append({n: float(scaled.value(n)) for n in values})
        assert all(found[0][n] == 0 for n in decays & recipe.roles.keys()), name
        assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-25), name


def test_switches_and_offsets():
    rule = RULES["sqrt"].replace(b2=None, eps=2.0)
    new, plain = scale(RECIPE, 8, rule), scale(RECIPE, 8, "sqrt")
    assert new["b2"] == RECIPE["b2"]
    assert new["eps"] == pytest.approx(1e-8 * 16**-0.5)
    assert {n: new[n] for n in ("learning_rate", "b1", "weight_decay")} == {
        n: plain[n] for n in ("learning_rate", "b1", "weight_decay")
    }
    everything = scale(RECIPE, 4, RULES["linear"].replace(offset=2.0))
    assert everything == {n: pytest.approx(v) for n, v in scale(RECIPE, 8, "linear").items()}
    assert rule.replace(b2=1.0, eps=1.0) == RULES["sqrt"]
    assert RULES["sqrt"].replace(offset=2.0).name == "sqrt[k=x2]"


def test_one_scale_multiplies_all_that_a_rule_scales_and_its_power_comes_last():
    """Offsets multiply the batch size's share first: sqrt(2 x 8), not 2 sqrt(8)."""
    new = scale(RECIPE, 8, RULES["seed_sqrt"].replace(offset=2.0, weight_decay=None))
    assert new == {
        "learning_rate": pytest.approx(1e-3 * 4),
        "b1": pytest.approx(0.9**4),
        "b2": pytest.approx(0.99**4),
        "eps": 1e-8,
        "weight_decay": 0.1,
    }


def test_other_hyperparameters_follow_the_same_rule():
    roles = {"bn_decay": "decay", "ema_decay": "decay", "warmup_examples": "unchanged"}
    values = {"bn_decay": 0.9, "ema_decay": 0.999, "warmup_examples": 5000}
    new = scale(values, 8, RULES["sqrt"].replace(ema_decay=None), roles=roles)
    assert new == {"bn_decay": pytest.approx(0.9**8), "ema_decay": 0.999, "warmup_examples": 5000}
    assert scale(values, 8, "none", roles=roles) == values


def test_a_schedule_is_read_in_base_size_updates():
    schedule = scale({"learning_rate": lambda step: step}, 8, "linear")["learning_rate"]
    assert schedule(3) == pytest.approx((3 * 8 + 3.5) * 8)  # the middle of eight


def test_trap_lookahead_period_stays_at_least_one():
    values = {"sync_period": 6, "slow_step_size": 0.5}
    new = scale(values, 8, "linear", optax.lookahead)
    assert new["sync_period"] == 1
    # The fast weights restart from the slow ones, so these go a of their way at any period.
    assert new["slow_step_size"] == 0.5
    smaller = scale(values, 0.25, "linear", optax.lookahead)
    assert smaller == {"sync_period": 24, "slow_step_size": pytest.approx(0.5)}


def test_clipping_follows_the_norm_of_the_gradient():
    assert scale({"max_norm": 1.0}, 4, "sqrt", optax.clip_by_global_norm)["max_norm"] == 0.5
    assert scale({"max_norm": 1.0}, 4, "linear", optax.clip_by_global_norm)["max_norm"] == 1.0
    measured = scale({"max_norm": 1.0}, 4, "noise_aware", optax.clip_by_global_norm)["max_norm"]
    phi = 3000 / 1024
    assert measured == pytest.approx(math.sqrt((4 + phi) / (4 * (1 + phi))))


def test_every_registered_hyperparameter_has_a_role():
    for name, factory in registered().items():
        required = {"learning_rate": 1.0, "decay": 0.9, "max_norm": 1.0, "max_delta": 1.0}
        required |= {"threshold": 1.0, "clipping": 1.0, "sync_period": 6, "slow_step_size": 0.5}
        required["fast_optimizer"] = None
        needed = {
            p.name: required[p.name]
            for p in inspect.signature(factory).parameters.values()
            if p.default is p.empty
        }
        recipe = Recipe.of(factory, kwargs=needed, whole_call=True)
        numeric = {
            n
            for n, v in recipe.arguments.items()
            if isinstance(v, (int, float)) and type(v) is not bool
        }
        assert numeric <= set(recipe.roles), (name, numeric - set(recipe.roles))
        assert recipe.family in FAMILIES.values()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resolve_rule("sqr"), "did you mean 'sqrt'"),
        (lambda: resolve_rule("power(a)"), "choose from"),
        (lambda: power(math.inf), "finite"),
        (lambda: RULES["sqrt"].replace(b2=-1.0), "-1.0"),
        (lambda: RULES["sqrt"].replace(offset=0.0), "positive"),
        (lambda: scale({"learning_rate": -1.0}, 2, "sqrt"), "learning_rate is -1.0"),
        (lambda: scale({"learning_rate": math.nan}, 2, "sqrt"), "learning_rate is nan"),
        (lambda: scale({"b1": 1.0}, 2, "sqrt"), "b1 is 1.0"),
        (lambda: scale({"b3": 0.9}, 2, "sqrt"), "b3"),
        (lambda: scale({"bn": 0.9}, 2, "sqrt", roles={"bn": "decai"}), "did you mean 'decay'"),
        (lambda: scale({}, 2, "sqrt", "adamww"), "did you mean 'adamw'"),
        (lambda: scale(RECIPE, 2, "noise_aware", noise_scale=None), "noise_scale="),
        (lambda: scale(RECIPE, 2, "noise_aware", noise_scale=-5.0), "-5.0"),
        (lambda: scale(RECIPE, 2, "sqrt", base=0), "batch_size is 0"),
    ],
)
def test_mistakes_are_named_with_a_fix(call, message):
    with pytest.raises(UserError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
