"""The statistics of a sweep with few seeds: intervals, contrasts, equivalence tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy import special

from bs_jax.statistics.seed_noise import (
    ALPHA,
    BySeed,
    SeedNoise,
    have_same_seeds,
    in_common,
)

# Distributions are taken from scipy.special: the numbers of scipy.stats at a fortieth of the time.
LEVEL = 0.95
_POWER = 0.8


class Verdict(StrEnum):
    """What two tests about a margin say, each at 5 %.

    EQUIVALENT: the difference is shown to be smaller than the margin. DIFFERENT: it is shown to be
    larger, or a run diverged. UNDECIDED: neither; more seeds are needed.
    """

    EQUIVALENT = "equivalent"
    DIFFERENT = "different"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its spread; `sd`, `low` and `high` are NaN for a single seed."""

    n: int
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A weighted sum of means: its value, standard error and degrees of freedom.

    `share` is the squared error that noise of variance 1 would leave.
    """

    value: float
    error: float
    df: float
    share: float

    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        half = float(special.stdtrit(self.df, 0.5 + LEVEL / 2)) * self.error
        return self.value - half, self.value + half

    def p_above(self, limit: float) -> float:
        """Small says that the true value is larger than `limit` (one-sided t test)."""
        return float(special.stdtr(self.df, (limit - self.value) / self.error))

    def p_below(self, limit: float) -> float:
        """Small says that the true value is smaller than `limit`."""
        return float(special.stdtr(self.df, (self.value - limit) / self.error))


@dataclass(frozen=True)
class Comparison:
    """A group minus the base: the difference, its intervals, and the two tests about the margin.

    Attributes:
      difference: mean of the group minus mean of the base, over the seeds of both where paired.
      standard_error: of the difference; NaN where no seed noise is known.
      share: the squared error that noise of variance 1 would leave.
      df: degrees of freedom of the t distribution used.
      low, high: the 95 % interval.
      low_90, high_90: the 90 % interval; inside the margin means equivalent at 5 %.
      p_equivalent: TOST p-value; small says that the difference is smaller than the margin.
      p_beyond: small says that the difference is larger than the margin.
    """

    difference: float
    standard_error: float
    share: float
    df: float
    low: float
    high: float
    low_90: float
    high_90: float
    p_equivalent: float
    p_beyond: float

    def verdict(self, tests: int = 1) -> Verdict:
        """The verdict at 5 %; `DIFFERENT` must hold for the best of `tests` points (Bonferroni)."""
        if self.p_equivalent <= ALPHA:
            return Verdict.EQUIVALENT
        return Verdict.DIFFERENT if self.p_beyond * tests <= ALPHA else Verdict.UNDECIDED


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of one group of seeds with its 95 % t interval.

    mean +/- t(.975, n-1) sd / sqrt(n)

    Args:
      values: one number a seed; finite.

    Returns:
      The `Interval`; all NaN for no seed, NaN spread for one.

    >>> interval = mean_interval([0.80, 0.82, 0.84])
    >>> f"{interval.mean:.2f} {interval.sd:.2f} {interval.low:.4f} {interval.high:.4f}"
    '0.82 0.02 0.7703 0.8697'
    """
    n = len(values)
    if n == 0:
        return Interval(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(np.mean(values))
    if n == 1:
        return Interval(1, mean, math.nan, math.nan, math.nan)
    sd = float(np.std(values, ddof=1))
    half = float(special.stdtrit(n - 1, 0.5 + LEVEL / 2)) * sd / math.sqrt(n)
    return Interval(n, mean, sd, mean - half, mean + half)


def compare(
    group: BySeed, base: BySeed, margin: float, noise: SeedNoise | None = None
) -> Comparison:
    """A group against the base, and whether the difference is smaller or larger than the margin.

    p_equivalent = P(t > (margin - |d|) / se),  p_beyond = P(t > (|d| - margin) / se),
    d and se as `linear_contrast` says of group minus base.

    Args:
      group: seed -> value of the group.
      base: seed -> value of the base.
      margin: the difference that still counts as none, in units of the values; NaN if none is set.
      noise: seed noise pooled over the sweep; None uses the two groups' own.

    Returns:
      The `Comparison`; only `difference` is a number where no variance is known.

    >>> base = {0: 0.80, 1: 0.82, 2: 0.84}
    >>> result = compare({0: 0.81, 1: 0.82, 2: 0.84}, base, margin=0.05)
    >>> f"{result.difference:.4f} {result.p_equivalent:.4f} {result.p_beyond:.4f}"
    '0.0033 0.0025 0.9975'

    Reference: Schuirmann, "A comparison of the two one-sided tests procedure and the power
    approach", 1987.
    """
    estimate = linear_contrast([(1.0, group), (-1.0, base)], noise)
    difference, error, df = estimate.value, estimate.error, estimate.df
    if not error > 0:
        nan = math.nan
        return Comparison(difference, nan, estimate.share, nan, nan, nan, nan, nan, nan, nan)
    half, half_90 = (float(error * special.stdtrit(df, p)) for p in (0.5 + LEVEL / 2, 1 - ALPHA))
    beyond = (abs(difference) - margin) / error
    return Comparison(
        difference=difference,
        standard_error=error,
        share=estimate.share,
        df=df,
        low=difference - half,
        high=difference + half,
        low_90=difference - half_90,
        high_90=difference + half_90,
        p_equivalent=float(special.stdtr(df, beyond)),
        p_beyond=float(special.stdtr(df, -beyond)),
    )


def linear_contrast(
    terms: Sequence[tuple[float, BySeed]], noise: SeedNoise | None = None
) -> Estimate:
    """A weighted sum of group means with its standard error.

    Groups with the same seeds are paired: estimate = mean_s x_s of x_s = sum_g c_g y_gs over the n
    seeds that all have; se^2 = s^2 sum_g c_g^2 / n (pooled), or var(x) / n with n - 1 degrees of
    freedom. Else estimate = sum_g c_g mean_g; se^2 = s^2 sum_g c_g^2/n_g (pooled), or
    sum_g c_g^2 s_g^2/n_g with Satterthwaite's degrees of freedom (Welch).

    Args:
      terms: (c_g, seed -> value of the group); the c_g of paired groups must add up to 0.
      noise: seed noise pooled over the sweep, which says whether to pair; None uses the groups'
        own, and pairs them if they have the same seeds.

    Returns:
      The `Estimate`; its error is NaN where no variance is known.

    >>> one, two, three = {0: 3.0, 1: 5.0}, {0: 1.0, 1: 3.0}, {7: 2.0, 8: 2.0}
    >>> estimate = linear_contrast([(0.5, one), (0.5, two), (-1.0, three)])
    >>> f"{estimate.value:.1f} {estimate.error:.4f} {estimate.df:.1f}"
    '1.0 0.7071 2.0'
    >>> linear_contrast([(1.0, one), (-1.0, {0: 2.0, 1: 4.2})]).df  # 1.0 and 0.8
    1

    Reference: Satterthwaite, "An approximate distribution of estimates of variance components",
    1946; Welch, "The generalization of Student's problem", 1947.
    """
    groups = [group for _, group in terms]
    seeds = in_common(groups)
    paired = have_same_seeds(groups) if noise is None else noise.paired
    if paired and seeds:
        sums = [sum(weight * group[seed] for weight, group in terms) for seed in seeds]
        value, n = float(np.mean(sums)), len(seeds)
        share = sum(weight**2 for weight, _ in terms) / n
        if noise is not None:
            return Estimate(value, math.sqrt(noise.variance * share), float(noise.df), share)
        scatter = float(np.std(sums, ddof=1))
        # Where the pairs tie, what is left are rounding errors: the means tell more.
        if scatter > 1e-10 * max(abs(value) for group in groups for value in group.values()):
            return Estimate(value, scatter / math.sqrt(n), n - 1, share)
        paired = False
    value = sum(weight * float(np.mean([*group.values()])) for weight, group in terms)
    share = sum(weight**2 / len(group) for weight, group in terms)
    if noise is not None and not paired:
        return Estimate(value, math.sqrt(noise.variance * share), float(noise.df), share)
    if paired or min(map(len, groups)) < 2:
        return Estimate(value, math.nan, math.nan, share)
    parts = [
        weight**2 * float(np.var([*group.values()], ddof=1)) / len(group) for weight, group in terms
    ]
    total = sum(parts)
    if total == 0:
        return Estimate(value, math.nan, math.nan, share)
    df = total**2 / sum(part**2 / (len(g) - 1) for part, g in zip(parts, groups, strict=True))
    return Estimate(value, math.sqrt(total), df, share)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted so that the chance of any false finding among them stays at the level.

    Args:
      p_values: of the family; NaN marks a test that could not be made and does not count.

    Returns:
      The adjusted values in the same order, NaN where there was no test.

    >>> holm([0.01, math.nan, 0.04, 0.03])
    [0.03, nan, 0.06, 0.06]

    Reference: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    adjusted = [math.nan] * len(p_values)
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    running = 0.0
    for rank, (p, index) in enumerate(order):
        running = max(running, min(1.0, p * (len(order) - rank)))
        adjusted[index] = running
    return adjusted


def seeds_to_settle(
    difference: float, margin: float, sd: float, error: float = 0.0, comparisons: int = 1
) -> float:
    """Seeds a point needs, the base included, to place a difference inside or outside the margin.

    n = 2 (sd (z(level) + z(.8)))^2 / ((margin - |difference|)^2 + error^2)

    80 % power where the difference is known; where it is not, its squared distance from the margin
    is the one to expect, so a difference seen on the margin by accident asks for no absurd number.

    Args:
      difference: as seen so far, in the metric's units.
      margin: the difference that still counts as none.
      sd: standard deviation over seeds.
      error: standard error of the difference as seen so far.
      comparisons: how many a difference beyond the margin must stand up to (Bonferroni).

    Returns:
      The number of seeds, at least 2; infinite for a difference that sits on the margin.

    >>> seeds_to_settle(0.0, margin=0.01, sd=0.005)
    5
    >>> seeds_to_settle(0.02, margin=0.01, sd=0.005, comparisons=4)
    5
    """
    gap = margin - abs(difference)
    level = ALPHA if gap > 0 else ALPHA / comparisons
    # At no difference both one-sided tests can fail, so each must fail half as often.
    power = 1 - (1 - _POWER) / 2 if abs(difference) < 0.1 * margin else _POWER
    z = float(special.ndtri(1 - level) + special.ndtri(power))
    distance = math.hypot(gap, error)
    if distance < 1e-3 * margin:
        return math.inf
    return max(2, math.ceil(2 * (sd * z / distance) ** 2))
