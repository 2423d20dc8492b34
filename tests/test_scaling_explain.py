"""explain and its command line: rows, warnings with their limits, formats, bad input."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from bs_jax.errors import UserError
from bs_jax.scaling import RULES, explain, scale_by_batch, scale_hyperparams
from bs_jax.scaling.__main__ import main
from bs_jax.scaling.explain import COLUMNS
from bs_jax.scaling.hyperparameters import Noise
from bs_jax.scaling.optimizers import Recipe, registered

RECIPE = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.99, "weight_decay": 0.1}


def rows(table):
    return {row["hyperparameter"]: row for row in table.rows}


@pytest.mark.filterwarnings("ignore:these numbers alone")
def test_rows_agree_with_what_is_computed():
    sizes = {"batch_size": 512, "base_batch_size": 64}
    for rule in [r for r in RULES if r != "noise_aware"]:
        table = rows(explain(optax.adamw, **sizes, rule=rule, **RECIPE))
        values = scale_hyperparams(optax.adamw, RECIPE, **sizes, rule=rule)
        assert {name: table[name]["new"] for name in RECIPE} == values
        assert next(iter(table)) == "learning_rate"
        assert all(set(row) == set(COLUMNS) for row in table.values())


def test_what_is_kept_is_said_in_examples():
    table = rows(explain("adamw", batch_size=512, base_batch_size=64, rule="sqrt", **RECIPE))
    assert table["b2"]["kept"] == "half-life 4,414 examples"
    assert table["b2"]["formula"] == "decay^k"
    assert table["weight_decay"]["kept"] == "decay 1.56e-06 per example"
    assert table["weight_decay"]["formula"] == "x k^0.5"
    assert table["learning_rate"]["formula"] == "x k^0.5"
    assert "Malladi" in table["learning_rate"]["source"]
    seed = rows(explain("adamw", batch_size=512, base_batch_size=64, rule="seed", **RECIPE))
    assert "grows with k" in seed["weight_decay"]["kept"]


def test_measured_values_are_left_open():
    table = rows(explain("adamw", batch_size=512, base_batch_size=64, rule="noise_aware", **RECIPE))
    assert table["learning_rate"]["new"] is None
    assert table["b1"]["new"] == pytest.approx(0.9**8)
    # q = 3/4; under the guard k = 8 counts as 1, the noise scale over the base batch size.
    for guard, new in ((False, 6e-3), (True, 1e-3 * 8**0.5)):
        known = explain(
            "adamw", batch_size=512, base_batch_size=64, noise_scale=64.0,
            rule="noise_aware", guard=guard, **RECIPE,
        )  # fmt: skip
        assert rows(known)["learning_rate"]["new"] == pytest.approx(new)


def test_schedules_switches_and_other_hyperparameters():
    table = rows(
        explain(
            "sgd", batch_size=128, base_batch_size=64,
            rule=RULES["linear"].replace(ema_decay=None), learning_rate=lambda step: 1.0,
            momentum=0.9, bn_decay=0.9, ema_decay=0.99,
            roles={"bn_decay": "decay", "ema_decay": "decay"},
        )
    )  # fmt: skip
    assert table["learning_rate"]["base"] == "schedule"
    assert table["learning_rate"]["new"] == "schedule x 3.8"
    assert "(1 - d^k)/(1 - d)" in table["learning_rate"]["formula"]
    assert table["bn_decay"]["new"] == pytest.approx(0.81)
    assert (table["ema_decay"]["new"], table["ema_decay"]["formula"]) == (0.99, "switched off")


def test_formats():
    table = explain("adamw", batch_size=512, base_batch_size=64, rule="sqrt", **RECIPE)
    data = json.loads(table.to_json())
    assert data["rows"] == table.rows
    markdown = table.to_markdown().splitlines()
    assert markdown[2].startswith("| hyperparameter | role |")
    assert markdown[2].count("|") == markdown[3].count("|") == markdown[4].count("|")
    assert "learning_rate" in table.to_text()


@pytest.mark.parametrize(
    ("changes", "message", "limit"),
    [
        ({"batch_size": 64 * 16}, "b1: its half-life of 421 examples is 0.41 updates", "842"),
        ({"train_examples": 6400}, "100 no rule follows", "at most 64"),
        ({"noise_scale": 200.0}, "past the noise scale of 200", "batch size 200"),
        ({"b1": jnp.bfloat16(0.9)}, "b1 is bfloat16", "float32"),
        ({"batch_size": 2, "b2": 0.99999}, "1 - b2 becomes", "keep k at or above"),
    ],
)
def test_warnings_give_the_reason_and_the_limit(changes, message, limit):
    settings = {"batch_size": 512, "base_batch_size": 64, "rule": "sqrt", **RECIPE}
    assert not explain("adamw", **settings).warnings
    (warning,) = explain("adamw", **(settings | changes)).warnings
    assert message in warning
    assert limit in warning


def test_trap_radam_never_rectifies_by_numbers_alone():
    (warning,) = explain(
        "radam", batch_size=64 * 8, base_batch_size=64, rule="sqrt", learning_rate=1e-3, b2=0.9
    ).warnings
    assert "never rectifies" in warning
    assert "k = 4.85" in warning
    # In numbers: optax.radam with b2^8 takes un-normalised steps for ever.
    plain = optax.radam(1.0, b1=0.0, b2=0.9**8)
    scaled = scale_by_batch(optax.radam, batch_size=512, base_batch_size=64, rule="linear")(
        1.0, b1=0.0, b2=0.9
    )
    grads = jnp.full(1, 1e-3)

    def last_update(tx):
        def step(state, _):
            return tx.update(grads, state)[::-1]

        return jax.lax.scan(step, tx.init(grads), length=20)[1][-1]

    by_hand, ours = last_update(plain), last_update(scaled)
    assert float(by_hand[0]) == pytest.approx(-1e-3, rel=1e-3)
    assert float(ours[0]) == pytest.approx(-8.0, rel=0.1)


@pytest.mark.parametrize(
    ("optimizer", "rule", "right"),
    [
        ("sgd", "sqrt", "k^1 whatever"),
        ("lion", "sqrt", "k^1 whatever"),
        ("adagrad", "linear", "k^0 to k^0.5"),
        ("adabelief", "linear", "k^0.5 whatever"),
        ("sgd", "linear", None),
        ("adam", "linear", None),
        ("sgd", "none", None),
    ],
)
def test_a_power_of_k_that_no_noise_makes_right_is_warned_of(optimizer, rule, right):
    table = explain(optimizer, batch_size=256, base_batch_size=64, rule=rule, learning_rate=0.1)
    found = [warning for warning in table.warnings if "learning rate x k^" in warning]
    assert len(found) == (right is not None)
    assert all(right in warning for warning in found)
    assert table.rows[0]["kept"].startswith("nothing") == (right is not None)


@pytest.mark.parametrize("name", ["sgd", "adam", "adagrad", "lion", "lamb", "lars"])
def test_the_powers_of_a_family_are_its_formula_at_both_ends(name):
    recipe = Recipe.of(name)
    for power, phi in zip(recipe.family.lr_powers, (1e12, 0.0), strict=True):
        scaled = recipe.at(RULES["noise_aware"], 4.0, Noise(1.0, phi))
        assert scaled.lr_factor(4.0) == pytest.approx(4.0**power, rel=1e-6)


def test_approximate_families_say_so():
    (warning,) = explain(
        "adamax", batch_size=128, base_batch_size=64, rule="sqrt", learning_rate=1e-3
    ).warnings
    assert "approximately" in warning
    assert (
        "approximate"
        in explain(
            "adamax", batch_size=128, base_batch_size=64, rule="sqrt", learning_rate=1e-3
        ).title
    )


@pytest.mark.parametrize(("rule", "exact"), [("sqrt", False), ("invariant", True)])
def test_exact_is_said_of_rules_that_measure(rule, exact):
    title = explain("adam", batch_size=128, base_batch_size=64, rule=rule, learning_rate=0.1).title
    assert ("exact" in title) == exact


def test_every_registered_optimizer_can_be_explained():
    for name, factory in registered().items():
        if name == "lookahead":
            continue
        table = explain(factory, batch_size=256, base_batch_size=64, rule="sqrt")
        assert table.title.startswith(name)
        table.to_text()


def test_command_line(capsys):
    common = ["--batch_size=256", "--base_batch_size=64", "--rule=sqrt"]
    flags = ["--optimizer=adamw", "--learning_rate=1e-3", "--bn=0.9", "--roles=bn=decay"]
    assert main([*flags, *common, "--format=json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert {r["hyperparameter"]: r["new"] for r in table["rows"]}["bn"] == pytest.approx(0.9**4)
    assert main([*flags, *common, "--format=markdown"]) == 0
    assert "| learning_rate |" in capsys.readouterr().out
    for bad, message in (
        (["--optimizer=adamww", *common], "did you mean 'adamw'"),
        (["--optimizer=AdamW", *common], "did you mean 'adamw'"),
        (["--optimizer=adamw", "--lr=1", *common], "optax's name for it is --learning_rate"),
        (["--optimizer=adamw", "--betas", "0.9", *common], "--b1=... --b2=..."),
        (["--optimizer=adamw", "--b1=x", *common], "--b1=x"),
        (["--optimizer=adamw", "b1", *common], "--name=value"),
        (["--optimizer=adamw", "--b1=2", *common], "b1 is 2.0"),
        (["--optimizer=adamw", "--roles=bn", *common], "write name=role"),
        (["--optimizer=adamw", "--learning_rate=None", *common], "learning_rate is None"),
    ):
        assert main(bad) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_command_line_as_a_program():
    command = [sys.executable, "-W", "error", "-m", "bs_jax.scaling", "--optimizer=sgd",
               "--learning_rate=0.1", "--batch_size=128", "--base_batch_size=64"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "learning_rate" in done.stdout
    assert done.stderr == ""


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"b1 is 1\.5"):
        explain("adamw", batch_size=2, base_batch_size=1, b1=1.5)
