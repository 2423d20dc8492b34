"""One change of the batch size in a config moves the optimizer and the model together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training import tiny_config

from bs_jax.run import ScaledWhileTraining
from bs_jax.scaling import MicrobatchStats, hyperparams
from bs_jax.sweep.points import resolve
from bs_jax.training import optimizers, step


def recipe(batch_size, **overrides):
    return tiny_config(
        **{
            "batch_size": batch_size,
            "base_batch_size": 16,
            "train_examples": 4096,
            "ema_decay": 0.99,
            "ghost_batch_size": 2,
            "schedule.warmup_examples": 512,
            **overrides,
        }
    )


def rates_after(run, examples):
    """The learning rates of the updates that follow so many examples."""
    optimizer = optimizers.make_optimizer(run, step.run_inputs(run).hyperparams)
    params = jnp.ones(2)
    stats = MicrobatchStats(2 * params, 2)

    def update(state, _):
        updates, state = optimizer.update(params, state, params, microbatch=stats)
        if isinstance(run.optimizer, ScaledWhileTraining):
            return state, hyperparams(state)["learning_rate"]
        return state, -updates[0]  # of SGD on a gradient of 1

    after = [count // run.batch_size for count in examples]
    _, rates = jax.lax.scan(update, optimizer.init(params), length=max(after) + 1)
    return rates[jnp.array(after)]


@pytest.mark.parametrize(
    ("rule", "optimizer"), [("linear", "sgd"), ("invariant", "adamw"), ("none", "sgd")]
)
@pytest.mark.parametrize("batch_size", [8, 64])
def test_ema_batch_norm_schedule_and_warm_up_follow(rule, optimizer, batch_size):
    sgd = {"optimizer.name": optimizer, "optimizer.hyperparams": {"learning_rate": 0.1}}
    changes = {"scaling.rule": rule, "scaling.guard": False} | (sgd if optimizer == "sgd" else {})
    base = resolve(recipe(16, **changes))
    new = resolve(recipe(batch_size, **changes))
    k = batch_size / 16
    scale = 1.0 if rule == "none" else k
    assert new.bn_decay == pytest.approx(base.bn_decay**scale)
    assert new.ema_decay == pytest.approx(0.99**scale)
    # What no hyperparameter can replace stays as it is.
    assert new.ghost_batch_size == base.ghost_batch_size
    assert new.label_smoothing == base.label_smoothing
    # Warm-up and decay are read at the same examples, whatever the number of updates: in the
    # middle of the base-size updates that one stands for.
    ahead = 0.0 if rule == "none" else (batch_size - 16) / 2
    shape = optimizers.schedule_shape(base.schedule, base.train_examples)
    peak = base.optimizer.hyperparams["learning_rate"]
    seen = (0, 256, 512, 1024)
    expected = [scale * peak * float(shape(max(examples + ahead, 0.0))) for examples in seen]
    # A cosine between two base-size updates is not quite the line between them.
    np.testing.assert_allclose(rates_after(new, seen), expected, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["ema_decay", "bn_decay"])
def test_each_can_be_switched_off_and_offset(name):
    off = resolve(recipe(64, **{"scaling.rule": "sqrt", "scaling.off": (name,)}))
    assert getattr(off, name) == {"ema_decay": 0.99, "bn_decay": 0.9}[name]
    offsets = {"scaling.offsets": ((name, 2.0),)}
    moved = resolve(recipe(64, **{"scaling.rule": "sqrt", **offsets}))
    assert getattr(moved, name) == pytest.approx({"ema_decay": 0.99, "bn_decay": 0.9}[name] ** 8)
