"""invariance_check tells a right wiring from a wrong one."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bs_jax.errors import UserError
from bs_jax.scaling import InvarianceCheck, invariance_check, scale_by_batch

WIDTH = 16


def problem():
    rng = np.random.default_rng(0)
    x, true, noise = (rng.standard_normal(s, np.float32) for s in ((4096, 8), (8, 1), (4096, 1)))
    y = np.tanh(x @ true) + noise
    params = {
        "in": jnp.asarray(rng.normal(size=(8, WIDTH)) / 3, jnp.float32),
        "out": jnp.asarray(rng.normal(size=(WIDTH, 1)) / 4, jnp.float32),
    }
    return params, {"x": x, "y": y}


def loss_fn(params, batch):
    prediction = jnp.tanh(batch["x"] @ params["in"]) @ params["out"]
    return jnp.mean(jnp.square(prediction - batch["y"]))


def check(rule, factory=optax.adam, **recipe):
    def make_optimizer(batch_size, base_batch_size):
        scaled = scale_by_batch(
            factory, batch_size=batch_size, base_batch_size=base_batch_size, rule=rule, guard=False
        )
        return scaled(**recipe)

    params, data = problem()
    return invariance_check(
        loss_fn, params, data, make_optimizer, batch_sizes=[8, 128], base_batch_size=32,
        train_examples=16_384, seeds=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def right():
    return check("invariant", learning_rate=1e-3, b2=0.99)


def test_right_wiring_passes(right):
    assert right.ok, right.to_text()
    assert "batch size 128" in right.to_text()
    assert "follows the base" in right.to_text()


def test_wrong_wiring_fails_and_says_which_way():
    wrong = check("none", learning_rate=1e-3, b2=0.99)
    assert not wrong.ok
    assert wrong.deviations[128] > 2
    large = next(line for line in wrong.to_text().splitlines() if line.startswith("batch size 128"))
    assert "slower per example" in large
    assert "grows too little" in large
    small = next(line for line in wrong.to_text().splitlines() if line.startswith("batch size 8:"))
    assert "faster per example" in small


def test_picture(right, tmp_path):
    pytest.importorskip("matplotlib")
    figure = right.plot(tmp_path / "check.png")
    assert (tmp_path / "check.png").stat().st_size > 10_000
    assert figure.axes[0].get_title() == "Follows the base"
    assert len(figure.axes[0].lines) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_examples": 100}, "100 examples"),
        ({"seeds": 1}, "at least 2 seeds"),
        ({"batch_sizes": [32]}, "0 batch sizes"),
        ({"batch_sizes": [0]}, "batch_size is 0"),
    ],
)
def test_mistakes_are_named(changes, message):
    params, data = problem()
    settings = {"batch_sizes": [64], "base_batch_size": 32, "train_examples": 4096} | changes
    with pytest.raises(UserError, match=message):
        invariance_check(loss_fn, params, data, lambda b, b0: optax.sgd(0.1), **settings)


def test_arrays_of_different_lengths_are_named():
    params, data = problem()
    with pytest.raises(UserError, match=r"hold \[10, 4096\] examples"):
        invariance_check(
            loss_fn, params, {**data, "y": data["y"][:10]}, lambda b, b0: optax.sgd(0.1),
            batch_sizes=[64], base_batch_size=32, train_examples=4096,
        )  # fmt: skip


def test_a_loss_that_is_not_finite_is_not_called_fast():
    curves = {32: np.ones((2, 1)), 64: np.full((2, 1), np.nan)}
    lines = InvarianceCheck(
        32, np.array([64]), curves, 0.1, {64: np.nan}, {64: np.nan}, 2.0
    ).to_text()
    assert "not finite" in lines
    assert "faster" not in lines


def simple_check(loss, params, make, sizes=(128,), noise=1.0, **kwargs):
    data = np.float32(noise * np.random.default_rng(3).standard_normal((4096, 2)))
    settings = {"batch_sizes": sizes, "base_batch_size": 16, "train_examples": 2048, "seeds": 3}
    return invariance_check(loss, params, data, make, **(settings | kwargs))


def test_curves_are_compared_at_equal_age_of_the_weights():
    """A loss that falls by 1e-3 an example whatever the batch: only the noise is left."""

    def loss(w, x):
        return w + 1e-3 * jnp.mean(x)

    found = simple_check(loss, 5.0, lambda b, b0: optax.sgd(1e-3 * b), sizes=(4, 64, 128))
    assert found.ok, found.to_text()
    assert found.examples[-1] == 2048 - 128  # the age of the largest batch's last weights
    ages = (np.arange(8) + 0.5) * found.examples[-1] / 8
    for curve in found.curves.values():
        np.testing.assert_allclose(curve.mean(axis=0), 5 - 1e-3 * ages, atol=2e-3)
    # Over examples seen, 128 would lag 56 examples behind, hundreds of times the seed noise.
    assert max(abs(drift) for drift in found.drifts.values()) < 1e-3 * 56 / 20


def steep(w, x):
    return jnp.mean(jnp.square(w[None] + x)) / 2


def test_a_step_too_long_is_told_from_one_too_short():
    start = jnp.full(2, 3.0)
    long = simple_check(steep, start, lambda b, b0: optax.sgd(0.7 * b / b0), noise=0.1)
    assert not long.ok
    assert "its loss jumps from" in long.to_text()
    assert "steps are too long" in long.to_text()
    assert long.jumps[128].after > 2 * long.jumps[128].before
    short = simple_check(steep, start, lambda b, b0: optax.sgd(0.01), noise=0.1)
    assert not short.jumps
    assert "grows too little" in short.to_text()
    assert "never jumps" in short.to_text()


def test_a_loss_that_breaks_says_when():
    far = simple_check(
        steep, jnp.full(2, 3.0), lambda b, b0: optax.sgd(0.3 * (b / b0) ** 4), noise=0.1
    )
    assert "to inf after" in far.to_text() or "to nan after" in far.to_text()
    assert "too long" in far.to_text()


def test_it_says_how_often_the_guard_held_steps_back():
    def make(b, b0):
        return scale_by_batch(optax.sgd, batch_size=b, base_batch_size=b0)(0.1)

    found = simple_check(steep, jnp.full(2, 30.0), make, sizes=(4, 128), noise=0.1)
    assert found.held_back[4] == 0
    assert found.held_back[128] == 1
    (large,) = (line for line in found.to_text().splitlines() if "size 128" in line)
    assert "the guard held 100% of its steps back" in large
    assert "past the noise scale, where no batch size follows" in large
