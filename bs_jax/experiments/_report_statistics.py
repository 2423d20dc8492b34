"""The statistics of a sweep with few seeds: intervals, pooled seed noise, equivalence tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
ALPHA = 0.05
_POWER = 0.8


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its spread; `sd`, `low` and `high` are NaN for a single seed."""

    n: int
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class SeedNoise:
    """How much one seed differs from the next, learnt from the groups of a sweep together.

    Attributes:
      variance: the pooled variance within groups.
      df: degrees of freedom in all groups together.
      groups: number of groups it was learnt from.
      p_equal: Bartlett's p-value for "all groups have this variance"; 1 for a single group.
    """

    variance: float
    df: int
    groups: int
    p_equal: float

    @property
    def sd(self) -> float:
        """The pooled standard deviation over seeds."""
        return math.sqrt(self.variance)

    @property
    def shared(self) -> bool:
        """Whether the groups agree well enough on their variance to pool it."""
        return self.p_equal > ALPHA


@dataclass(frozen=True)
class Estimate:
    """A weighted sum of means: its value, standard error and degrees of freedom."""

    value: float
    error: float
    df: float

    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        half = float(stats.t.ppf(0.5 + LEVEL / 2, self.df)) * self.error
        return self.value - half, self.value + half

    def p_above(self, limit: float) -> float:
        """Small says that the true value is larger than `limit` (one-sided t test)."""
        return float(stats.t.sf((self.value - limit) / self.error, self.df))

    def p_below(self, limit: float) -> float:
        """Small says that the true value is smaller than `limit`."""
        return float(stats.t.cdf((self.value - limit) / self.error, self.df))


@dataclass(frozen=True)
class Comparison:
    """A group minus the base: the difference, its intervals, and the two tests about the margin.

    Attributes:
      difference: mean of the group minus mean of the base.
      standard_error: of the difference; NaN where no seed noise is known.
      df: degrees of freedom of the t distribution used.
      low, high: the 95 % interval.
      low_90, high_90: the 90 % interval; inside the margin means equivalent at 5 %.
      p_equivalent: TOST p-value; small says that the difference is smaller than the margin.
      p_beyond: small says that the difference is larger than the margin.
    """

    difference: float
    standard_error: float
    df: float
    low: float
    high: float
    low_90: float
    high_90: float
    p_equivalent: float
    p_beyond: float


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
    half = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) * sd / math.sqrt(n)
    return Interval(n, mean, sd, mean - half, mean + half)


def estimate_noise(groups: Sequence[Sequence[float]]) -> SeedNoise | None:
    """Pools the seed variance of groups and tests whether they share one.

    s^2 = sum_g d_g s_g^2 / sum_g d_g,  Bartlett's statistic on G-1 degrees of freedom.

    Three seeds leave a group 2 degrees of freedom, with which an equivalence test has next to no
    power; what the groups have in common supplies the rest. Bartlett and not Brown-Forsythe: with
    three seeds one of a group's three deviations from its median is always zero, which leaves that
    test blind.

    Args:
      groups: the values of each group, one number a seed.

    Returns:
      The `SeedNoise`, or None if no group has two seeds or all seeds gave the same number.

    >>> noise = estimate_noise([[0.80, 0.82], [0.70, 0.72], [0.75]])
    >>> f"{noise.sd:.4f} df={noise.df} p={noise.p_equal:.2f}"
    '0.0141 df=2 p=1.00'

    Reference: Bartlett, "Properties of sufficiency and statistical tests", 1937.
    """
    usable = [np.asarray(group, float) for group in groups if len(group) >= 2]
    if not usable:
        return None
    df = np.array([len(group) - 1 for group in usable])
    variances = np.array([np.var(group, ddof=1) for group in usable])
    total = int(df.sum())
    pooled = float((df * variances).sum() / total)
    if pooled <= 1e-20 * float(np.mean([np.mean(group) ** 2 for group in usable])):
        return None
    count = len(usable)
    if count == 1:
        return SeedNoise(pooled, total, 1, 1.0)
    # Metrics that count images tie now and then; a zero must not become an infinite logarithm.
    floored = np.maximum(variances, 1e-3 * pooled)
    statistic = total * math.log(pooled) - float((df * np.log(floored)).sum())
    correction = 1 + float((1 / df).sum() - 1 / total) / (3 * (count - 1))
    p_equal = float(stats.chi2.sf(max(statistic, 0.0) / correction, count - 1))
    return SeedNoise(pooled, total, count, p_equal)


def compare(
    group: Sequence[float], base: Sequence[float], margin: float, noise: SeedNoise | None = None
) -> Comparison:
    """A group against the base, and whether the difference is smaller or larger than the margin.

    p_equivalent = P(t > (margin - |d|) / se),  p_beyond = P(t > (|d| - margin) / se)
    pooled: se^2 = s^2 (1/n_group + 1/n_base);  Welch: se^2 = s_group^2/n_group + s_base^2/n_base

    Args:
      group: values of the group, one number a seed.
      base: values of the base, one number a seed.
      margin: the difference that still counts as none, in units of the values; NaN if none is set.
      noise: seed noise pooled over the sweep; None uses the two groups' own (Welch's test).

    Returns:
      The `Comparison`; only `difference` is a number where no variance is known.

    >>> result = compare([0.82, 0.83, 0.81], [0.82, 0.81, 0.83], margin=0.05)
    >>> f"{result.difference:.2f} {result.p_equivalent:.4f} {result.p_beyond:.4f}"
    '0.00 0.0018 0.9982'

    Reference: Schuirmann, "A comparison of the two one-sided tests procedure and the power
    approach", 1987; Welch, "The generalization of Student's problem", 1947.
    """
    estimate = linear_contrast([(1.0, group), (-1.0, base)], noise)
    difference, error, df = estimate.value, estimate.error, estimate.df
    if not error > 0:
        nan = math.nan
        return Comparison(difference, nan, nan, nan, nan, nan, nan, nan, nan)
    half, half_90 = (float(error * stats.t.ppf(p, df)) for p in (0.5 + LEVEL / 2, 1 - ALPHA))
    beyond = (abs(difference) - margin) / error
    return Comparison(
        difference=difference,
        standard_error=error,
        df=df,
        low=difference - half,
        high=difference + half,
        low_90=difference - half_90,
        high_90=difference + half_90,
        p_equivalent=float(stats.t.sf(-beyond, df)),
        p_beyond=float(stats.t.sf(beyond, df)),
    )


def exceeds(values: Sequence[float], noise: SeedNoise) -> bool:
    """Whether a group outside the pool scatters more than the pooled noise explains (F test, 5 %).

    >>> noise = SeedNoise(variance=1e-4, df=20, groups=10, p_equal=0.5)
    >>> exceeds([0.80, 0.81, 0.82], noise), exceeds([0.70, 0.80, 0.90], noise)
    (False, True)
    """
    if len(values) < 2:
        return False
    ratio = float(np.var(values, ddof=1)) / noise.variance
    return float(stats.f.sf(ratio, len(values) - 1, noise.df)) <= ALPHA


def linear_contrast(
    terms: Sequence[tuple[float, Sequence[float]]], noise: SeedNoise | None = None
) -> Estimate:
    """A weighted sum of group means with its standard error.

    estimate = sum_g c_g mean_g,  se^2 = s^2 sum_g c_g^2/n_g (pooled), or sum_g c_g^2 s_g^2/n_g
    with Satterthwaite's degrees of freedom

    Args:
      terms: (c_g, values of the group, one number a seed).
      noise: seed noise pooled over the sweep; None uses the groups' own.

    Returns:
      The `Estimate`; its error is NaN where no variance is known.

    >>> estimate = linear_contrast([(0.5, [3.0, 5.0]), (0.5, [1.0, 3.0]), (-1.0, [2.0, 2.0])])
    >>> f"{estimate.value:.1f} {estimate.error:.4f} {estimate.df:.1f}"
    '1.0 0.7071 2.0'

    Reference: Satterthwaite, "An approximate distribution of estimates of variance components",
    1946.
    """
    value = sum(weight * float(np.mean(values)) for weight, values in terms)
    if noise is not None:
        squared = noise.variance * sum(weight**2 / len(values) for weight, values in terms)
        return Estimate(value, math.sqrt(squared), float(noise.df))
    if min(len(values) for _, values in terms) < 2:
        return Estimate(value, math.nan, math.nan)
    parts = [weight**2 * float(np.var(values, ddof=1)) / len(values) for weight, values in terms]
    total = sum(parts)
    if total == 0:
        return Estimate(value, math.nan, math.nan)
    freedom = [len(values) - 1 for _, values in terms]
    df = total**2 / sum(part**2 / d for part, d in zip(parts, freedom, strict=True))
    return Estimate(value, math.sqrt(total), df)


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
    z = float(stats.norm.ppf(1 - level) + stats.norm.ppf(power))
    distance = math.hypot(gap, error)
    if distance < 1e-3 * margin:
        return math.inf
    return max(2, math.ceil(2 * (sd * z / distance) ** 2))
