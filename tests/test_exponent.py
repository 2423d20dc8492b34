"""The exponent of the best learning rate, recovered from sweeps made with a known one."""

import math
from pathlib import Path

import numpy as np
import pytest

from bs_jax.records.results import Results, Row, Run, Sweep
from bs_jax.statistics import analysis
from bs_jax.statistics.exponent import learning_rate_exponent
from configs import imagenette

SWEEP = Sweep("s", "c", "t", "", 64, "acc", "loss", "train/loss", 0.01, (), "", "", None)


def sweep_of(exponent, *, curvature=0.006, sd=0.003, seeds=3, offsets=imagenette.OFFSETS, seed=0):
    """The learning-rate arm and the control; the top lies at k**exponent times 1.5."""
    rng = np.random.default_rng(seed)
    rows, runs = [], {}
    for size, factors in offsets.items():
        k = size / 64
        points = [("lr_lin", offset, math.log2(k * offset)) for offset in factors]
        for arm, offset, rate in [*points, ("no", 1.0, 0.0)]:
            if size == 64 and offset == 1 and arm == "lr_lin":
                continue
            top = math.log2(1.5) + exponent * math.log2(k)
            mean = 0.8 - 0.01 * abs(math.log2(k)) - curvature * (rate - top) ** 2
            for number in range(seeds):
                run_id = f"{arm}-{size}-{offset}-{number}"
                metrics = {"acc": mean + sd * rng.standard_normal(), "loss": 1.0}
                runs[run_id] = Run(run_id, "done", metrics, "", {}, {}, (), {}, None)
                rows.append(Row(arm, size, k, offset, number, run_id, "done", metrics, {}))
    return analysis.analyse(Results(Path(), SWEEP, tuple(rows), runs, (), ()))


def exponent_of(analysed):
    return learning_rate_exponent(analysed, arm="lr_lin", control="no")


@pytest.mark.parametrize("exponent", [0.5, 0.8, 1.0])
def test_without_noise_to_speak_of_the_exponent_is_exact(exponent):
    found = exponent_of(sweep_of(exponent, sd=1e-6))
    assert found is not None
    assert found.value == pytest.approx(exponent, abs=1e-3)
    assert found.high - found.low < 1e-3
    assert (found.points, found.batch_sizes) == (30, 6)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    found = [exponent_of(sweep_of(0.8, seed=seed)) for seed in range(40)]
    assert all(f is not None for f in found)
    held = sum(f.low <= 0.8 <= f.high for f in found if f is not None)
    assert held >= 35  # P(fewer of 40 at 95 %) is 1 %
    assert all(f.low < f.value < f.high for f in found if f is not None)


def test_two_batch_sizes_with_three_learning_rates_are_enough():
    found = exponent_of(sweep_of(0.8, offsets={16: (1.0, 2.0), 64: (), 256: (0.5, 1.0)}))
    assert found is not None
    assert found.low < 0.8 < found.high
    assert found.points == 7


@pytest.mark.parametrize(
    "changes",
    [
        {"offsets": {16: (1.0,), 64: (), 256: (1.0,)}},  # two learning rates make no parabola
        {"curvature": 0.0},  # no top
        {"curvature": -0.006},  # the wrong way round
        {"offsets": {64: ()}},
    ],
)
def test_where_there_is_no_top_there_is_no_exponent(changes):
    assert exponent_of(sweep_of(0.8, **changes)) is None


def test_without_seed_noise_the_residuals_serve():
    found = exponent_of(sweep_of(0.8, seeds=1))
    assert found is not None
    assert found.low < 0.8 < found.high
