"""The critical batch size, measured by branches: analytic answers, open verdicts, clear errors."""

import math

import numpy as np
import pytest
import scipy

from bs_jax.errors import UserError
from bs_jax.scaling.critical_batch import critical_batch_size, from_losses

CURVATURES = np.repeat([1.0, 0.1], 400)
START, NOISE, RATE, BASE, EXAMPLES = 1.0, 1.0, 0.12, 8, 768
SIZES = (8, 16, 32, 64, 128, 256)


def rate_of(size):
    """The linear rule of SGD."""
    return RATE * size / BASE


def expected_loss(size):
    """The mean loss of SGD on the noisy quadratic after all examples, in closed form."""
    kept = (1 - rate_of(size) * CURVATURES) ** 2
    updates = EXAMPLES // size
    fed = rate_of(size) ** 2 * NOISE**2 / size
    moments = kept**updates * START**2 + fed * (1 - kept**updates) / (1 - kept)
    return float(np.mean(CURVATURES * moments) / 2)


def train_branch(state, size, seed):
    """The same on drawn noise: an example's noise is the same at every batch size."""
    noise = np.random.default_rng(seed).normal(scale=NOISE, size=(EXAMPLES, CURVATURES.size))
    weights = state
    for batch in noise.reshape(EXAMPLES // size, size, -1):
        weights = weights - rate_of(size) * (CURVATURES * weights + batch.mean(axis=0))
    return np.mean(CURVATURES * weights**2) / 2


@pytest.mark.parametrize("tolerance", [0.0003, 0.003, 0.5])
def test_the_critical_batch_of_a_quadratic_is_found(tolerance):
    found = critical_batch_size(
        train_branch, np.full(CURVATURES.size, START), SIZES, tolerance=tolerance, seeds=4
    )
    above = {size: expected_loss(size) - expected_loss(BASE) for size in SIZES}
    for branch in found.branches[1:]:
        # The closed form has the mean over infinitely many seeds: a little beyond the interval.
        width = 2 * (branch.high - branch.low)
        assert abs(branch.difference - above[branch.batch_size]) < width
    follow = [size for size in SIZES if above[size] < tolerance]
    assert found.low == max(follow)
    assert found.high == min(size for size in SIZES if above[size] > tolerance)
    inner, outer = found.low, found.high
    share = (tolerance - above[inner]) / (above[outer] - above[inner])
    assert found.estimate == pytest.approx(inner * (outer / inner) ** share, rel=0.1)


def test_a_branch_that_diverges_lags():
    assert rate_of(1024) * CURVATURES.max() > 2
    losses = {8: [1.0, 1.1], 16: [1.0, 1.1], 1024: [math.nan, math.inf]}
    found = from_losses(losses, tolerance=0.01)
    assert (found.low, found.high) == (16, 1024)
    assert found.estimate == 16.0
    assert "at least 16 and below 1024" in found.to_text()


def test_few_and_noisy_seeds_leave_it_open():
    losses = {8: [1.0, 1.0, 1.0], 16: [1.2, 0.9, 1.0], 32: [2.0, 2.1, 1.9]}
    found = from_losses(losses, tolerance=0.05, noise_scale=100.0)
    assert [branch.verdict for branch in found.branches] == ["follows", "undecided", "lags"]
    assert (found.low, found.high) == (8, 32)
    assert "The gradient noise scale is 100" in found.conclusion()


def test_a_difference_is_told_from_chance_as_often_as_the_level_says():
    """Exactly at the tolerance each one-sided test errs in 5 % of the cases."""
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(2000):
        base = rng.normal(size=4)
        losses = {8: base, 16: base + 0.1 + 0.02 * rng.normal(size=4)}
        verdicts.append(from_losses(losses, tolerance=0.1).branches[1].verdict)
    for verdict in ("follows", "lags"):
        assert scipy.stats.binomtest(verdicts.count(verdict), 2000, 0.05).pvalue > 0.01


def test_the_interval_is_that_of_a_paired_t_test():
    losses = {8: np.array([1.0, 1.2, 0.9, 1.1]), 32: np.array([1.3, 1.4, 1.25, 1.32])}
    branch = from_losses(losses, tolerance=0.1).branches[1]
    wanted = scipy.stats.ttest_rel(losses[32], losses[8]).confidence_interval(0.90)
    assert (branch.low, branch.high) == pytest.approx(tuple(wanted), abs=1e-5)


def test_nothing_beyond_the_largest_is_claimed():
    found = from_losses({8: [1.0, 1.1], 16: [1.0, 1.1]}, tolerance=0.01, noise_scale=50.0)
    assert (found.low, found.high, found.estimate) == (16, math.inf, math.inf)
    assert "up to 16, the largest batch size tried" in found.conclusion()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": [8]}, "give two or more different ones"),
        ({"batch_sizes": [8, 8]}, "give two or more different ones"),
        ({"batch_sizes": [8, 0]}, "batch size 0; give positive whole numbers"),
        ({"batch_sizes": [8, 16.0]}, "batch size 16.0; give positive"),
        ({"tolerance": 0}, "tolerance is 0; give a positive number"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"seeds": 1}, "seeds is 1; give two or more"),
        ({"train_branch": lambda *_: math.nan}, "the loss at batch size 8 is .*must train well"),
        ({"train_branch": lambda *_: np.ones(3)}, "returned ndarray; it must return the loss"),
        ({"train_branch": lambda *_: None}, "returned NoneType; it must return the loss"),
    ],
)
def test_impossible_arguments_are_named(changes, message):
    given = {"train_branch": lambda *_: 1.0, "batch_sizes": [8, 16], "tolerance": 0.1, "seeds": 2}
    given |= changes
    with pytest.raises(UserError, match=message):
        critical_batch_size(given.pop("train_branch"), None, given.pop("batch_sizes"), **given)


def test_losses_of_another_number_of_seeds_are_refused():
    with pytest.raises(UserError, match="batch size 16 has 3 losses and batch size 8 has 2"):
        from_losses({8: [1.0, 1.1], 16: [1.0, 1.1, 1.2]}, tolerance=0.1)
