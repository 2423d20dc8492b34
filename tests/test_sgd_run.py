"""SGD with and without momentum trains through the whole trainer."""

import pytest
from helpers.training import PLAIN, tiny_config, trainer_of

from bs_jax.records.run_folder import RunFolder
from bs_jax.run import FixedValues
from bs_jax.sweep.points import resolve


@pytest.mark.parametrize("rule", ["linear", "noise_aware"])
@pytest.mark.parametrize(
    "hyperparams",
    [
        pytest.param({"learning_rate": 0.1}, marks=pytest.mark.long),
        {"learning_rate": 0.02, "momentum": 0.9},
    ],
)
def test_sgd_trains(tmp_path, rule, hyperparams):

    config = tiny_config(
        **PLAIN, **{"batch_size": 32, "scaling.rule": rule, "optimizer.name": "sgd"}
    )
    config["optimizer"]["hyperparams"] = hyperparams
    run = resolve(config)
    # SGD is linear in the gradient: nothing has to be measured, whatever the noise.
    assert isinstance(run.optimizer, FixedValues)
    (summary,) = trainer_of(run).train([RunFolder(tmp_path, run)])
    assert summary.status == "done"
    assert summary.final["train/loss"] < 1.2
