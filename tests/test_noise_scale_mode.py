"""--mode=noise_scale: right where the answer is known, for any rule, resumed, early errors."""

import csv
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import commands
from helpers.training import PLAIN, tiny_config, tiny_data

from bs_jax import models
from bs_jax.cli import noise_scale
from bs_jax.errors import UserError
from bs_jax.records.run_folder import RunFolder
from bs_jax.report import plots
from bs_jax.run import FixedValues
from bs_jax.scaling import MicrobatchStats, noise_sample
from bs_jax.statistics import noise_curve
from bs_jax.training.train import Interrupted, Trainer

BATCH, BASE = 64, 32


@jax.jit
@jax.vmap
def sampled(grads):
    """One update's sample from its micro-batches' gradients."""
    stats = MicrobatchStats(jnp.mean(grads**2, axis=0), len(grads))
    return noise_sample(grads.mean(0), stats, batch_size=BATCH)


def synthetic_rows(trace, signals, seed=0, updates=20):
    """Windows of updates on gradients of known |g|^2 and tr(Sigma)."""
    dim, parts = 50, 2
    mean = np.sqrt(np.repeat(signals, updates) / dim)[:, None, None]
    deviation = np.sqrt(trace / dim * parts / BATCH)
    rng = np.random.default_rng(seed)
    grads = mean + deviation * rng.standard_normal((len(mean), parts, dim))
    found = sampled(grads.astype(np.float32))
    means = {n: np.asarray(v).reshape(-1, updates).mean(1) for n, v in found.items()}
    return [
        {"step": (i + 1) * updates, "examples": (i + 1) * updates * BATCH}
        | {f"noise/{name}": float(values[i]) for name, values in means.items()}
        for i in range(len(signals))
    ]


def curve_of(found):
    return noise_curve.from_metrics(found, batch_size=BATCH, base_batch_size=BASE)


def test_a_known_noise_scale_lies_within_the_stated_range():
    """tr(Sigma)/|g|^2 = 400/2 = 200 examples."""
    inside, seeds = 0, 20
    for seed in range(seeds):
        curve = curve_of(synthetic_rows(400.0, [2.0] * 10, seed))
        last = curve.rows[-1]
        assert last["noise"] == pytest.approx(400, rel=0.1)
        assert last["phi"] == pytest.approx(last["noise_scale"] / BASE)
        assert last["largest_k"] == pytest.approx(last["low"] / BASE)
        inside += last["low"] <= 200 <= last["high"]
    assert seeds - 3 <= inside


def test_the_running_estimate_follows_a_shrinking_gradient():
    signals = np.geomspace(8.0, 0.5, 40)
    curve = curve_of(synthetic_rows(400.0, signals, updates=50))
    found = np.array([row["noise_scale"] for row in curve.rows])
    np.testing.assert_allclose(found[5:], 400 / signals[5:], rtol=0.35)
    assert curve.rows[-1]["largest_k"] > 4 * curve.rows[0]["largest_k"]


def test_the_ramp_that_the_noise_allows_is_advised_with_what_it_saves():
    """Half of the lower end allows 64 after 200 examples, and 128 after 600 of 1,000."""
    lows = {100: math.nan, 200: 130.0, 400: 200.0, 600: 256.0, 800: math.inf, 1000: 1e6}
    curve = noise_curve.NoiseScaleCurve(
        BATCH, BASE, [{"examples": at, "low": low} for at, low in lows.items()]
    )
    assert curve.ramp() == [(0, 32), (200, 64), (600, 128)]
    updates = 200 / 32 + 400 / 64 + 400 / 128
    assert f"That is {updates:,.0f} updates for 31 at 32 throughout, 50 % fewer" in curve.advice()
    assert "--config.batch_size=128 --config.batch_ramp.kind=stages" in curve.advice()
    assert "stages=((0, 32), (200, 64), (600, 128))'" in curve.advice()
    low = [{"examples": at, "low": 60.0} for at in (100, 200)] + [{"examples": 300, "low": 1e9}]
    assert "no ramp is advised" in noise_curve.NoiseScaleCurve(BATCH, BASE, low).advice()


def test_no_signal_is_said_and_not_invented(tmp_path):
    curve = curve_of(synthetic_rows(400.0, [0.0] * 5))
    assert all(math.isinf(row["high"]) for row in curve.rows)
    assert "inside the noise scale in 100 %" in curve.conclusion()
    paths = noise_scale.write(curve, tmp_path)
    assert json.loads(paths[1].read_text())["rows"][0]["high"] is None
    (first, *_) = csv.DictReader(paths[0].read_text().splitlines())
    assert float(first["high"]) == math.inf


def test_the_table_and_the_figure():
    curve = curve_of(synthetic_rows(400.0, [2.0] * 50))
    lines = curve.to_text().splitlines()
    assert len(lines) <= 18
    assert lines[0].split()[:4] == ["examples", "B_noise", "from", "to"]
    assert lines[-3].split()[0] == "64,000"
    figure = plots.noise_scale_figure(curve.rows, BATCH, BASE, errors=2.0)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    texts = {text.get_text() for text in axes.texts}
    assert texts == {"batch size 64", "base 32", "noise scale"}
    level = [line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1]
    assert {BATCH, BASE} <= set(level)


def measuring(overrides, data=None):
    """Return path -> curve: a run of the tiny recipe, its programs compiled once."""
    run = noise_scale.plan(tiny_config(**overrides))
    trainer = Trainer(run, data or tiny_data(), jax.devices()[:1])

    def measure(path, **kwargs):
        trainer.train([RunFolder(path, run)], **kwargs)
        return noise_scale.read(path, run)

    return measure


@pytest.mark.long
def test_a_run_with_frozen_weights_measures_what_its_gradients_have(tmp_path):
    """Learning rate 0: mean and variance of the gradient of a ghost batch by brute force."""
    ghost, data = 4, tiny_data(train=960)
    curve = measuring(
        {"optimizer.hyperparams.learning_rate": 0.0, **PLAIN,
         "train_examples": 2560, "log_every_examples": 640, "eval_every_examples": 2560,
         "micro_batch_size": ghost, "scaling.rule": "none"},
        data,
    )(tmp_path)  # fmt: skip
    model = models.create("resnet2_patch", num_classes=3)
    key = jax.random.fold_in(jax.random.key(0), 0)
    images = (data.train.read(np.arange(960)).astype(np.float32) / 255 - 0.3) / 0.3
    labels = data.train.labels
    variables = model.init(key, jnp.asarray(images[:1]), train=False)

    def loss(params, indices):
        logits, _ = model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            jnp.asarray(images)[indices], train=True, bn_decay=0.9, mutable=["batch_stats"],
        )  # fmt: skip
        chosen = jnp.asarray(labels)[indices]
        return optax.softmax_cross_entropy_with_integer_labels(logits, chosen).mean()

    @jax.jit
    def gradients(indices):
        grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(variables["params"], indices)
        return jnp.concatenate([g.reshape(len(indices), -1) for g in jax.tree.leaves(grads)], 1)

    rng = np.random.default_rng(0)
    found = np.asarray(gradients(jnp.asarray(rng.integers(0, 960, (800, ghost)))), np.float64)
    trace = ghost * found.var(axis=0, ddof=1).sum()
    signal = np.square(found.mean(axis=0)).sum() - trace / ghost / len(found)
    last = curve.rows[-1]
    assert last["noise"] == pytest.approx(trace, rel=0.1)
    assert last["signal"] == pytest.approx(signal, rel=0.2)
    assert last["low"] <= trace / signal <= last["high"]


def test_it_measures_beside_a_rule_that_measures_and_resumes_to_the_same_numbers(tmp_path):
    measure = measuring(PLAIN | {"scaling.rule": "invariant", "batch_size": 32})
    whole = measure(tmp_path / "whole")
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        measure(tmp_path / "parts", should_stop=lambda: next(calls) >= 0)
    assert measure(tmp_path / "parts").to_csv() == whole.to_csv()  # "not known" equals itself
    assert whole.rows[-1]["examples"] == 192
    assert all(row["noise"] > 0 for row in whole.rows)


def test_another_optimizer():
    config = tiny_config(**{"optimizer.name": "sgd"})
    config["optimizer"]["hyperparams"] = {"learning_rate": 0.1, "momentum": 0.9}
    run = noise_scale.plan(config)
    assert run.micro_batch_size == 8  # half the batch
    assert isinstance(run.optimizer, FixedValues)
    assert run.run_id.endswith("-noise")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"micro_batch_size": 16}, "micro_batch_size 16; set config.micro_batch_size to 8 or less"),
        ({"batch_size": 1, "ghost_batch_size": 0}, "use a config.batch_size of at least 2"),
        ({"bn_cross_device": True, "ghost_batch_size": 0}, "bn_cross_device couples"),
        ({"micro_batch_size": 5}, "not divisible by micro_batch_size 5"),
        ({"scaling.rule": "sqr"}, "did you mean 'sqrt'"),
    ],
)
def test_mistakes_are_named_before_anything_compiles(overrides, message):
    with pytest.raises(UserError) as error:
        noise_scale.plan(tiny_config(**overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_records_without_noise_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "examples": 16, "train/loss": 1.0}\n')
    run = noise_scale.plan(tiny_config())
    with pytest.raises(UserError, match="no gradient noise"):
        noise_scale.read(tmp_path, run)


def test_the_command(tmp_path):
    flags = [
        "--mode=noise_scale", "--config.scaling.rule=none",
        "--config.train_examples=1024", "--config.eval_every_examples=1024",
        "--config.log_every_examples=256", "--config.checkpoint_every_examples=1024",
        f"--workdir={tmp_path}",
    ]  # fmt: skip
    code, out = commands.run(*flags)
    assert code == 0, out
    assert "largest k inside" in out
    written = {path.name for path in tmp_path.glob("noise_scale.*")}
    assert written == {"noise_scale.csv", "noise_scale.json", "noise_scale.png"}
