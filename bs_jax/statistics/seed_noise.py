"""Seed noise: what one seed differs from the next, after what a seed does everywhere alike.

A seed decides the initial weights, the order of the examples and their augmentation, whatever the
batch size: a lucky start is lucky at every point of a sweep. So runs of one seed are compared with
each other wherever the points of a sweep have the same seeds, and what the seed does to all of them
drops out (a randomised block design; Fisher 1935). It is the larger part of the scatter in short
trainings.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

ALPHA = 0.05

BySeed = Mapping[int, float]


@dataclass(frozen=True)
class SeedNoise:
    """How much one seed differs from the next, learnt from the groups of a sweep together.

    Attributes:
      variance: the pooled variance within groups; if paired, of what is left there beside the
        seeds' common part.
      df: degrees of freedom in all groups together.
      groups: number of groups it was learnt from.
      p_equal: Bartlett's p-value for "all groups have this variance"; 1 for a single group.
      paired: whether the groups have the same seeds, so that those are compared with each other.
      seed_sd: the standard deviation over seeds within a group, their common part included.
    """

    variance: float
    df: int
    groups: int
    p_equal: float
    paired: bool = False
    seed_sd: float = math.nan

    @property
    def sd(self) -> float:
        """The pooled standard deviation."""
        return math.sqrt(self.variance)

    @property
    def shared(self) -> bool:
        """Whether the groups agree well enough on their variance to pool it."""
        return self.p_equal > ALPHA


def in_common(groups: Sequence[BySeed]) -> list[int]:
    """The seeds that all groups have, ascending.

    >>> in_common([{0: 0.8, 1: 0.9}, {1: 0.7, 2: 0.8}])
    [1]
    """
    return sorted(set.intersection(*(set(group) for group in groups))) if groups else []


def have_same_seeds(groups: Sequence[BySeed]) -> bool:
    """Whether the groups share two seeds at least, and at least half of the smallest group's.

    >>> have_same_seeds([{0: 0.8, 1: 0.9, 2: 0.7}, {1: 0.7, 2: 0.8}])
    True
    """
    shared = len(in_common(groups))
    return shared >= 2 and 2 * shared >= min(map(len, groups))


def estimate_noise(groups: Sequence[BySeed]) -> SeedNoise | None:
    """Pools the seed variance of groups and tests whether they share one.

    Least squares of y_gs = level_g + effect_s + noise_gs (without effect_s if some group does not
    have the first one's seeds, or nothing were left of the noise);
    s^2 = residual sum of squares / (number of values - rank of the design).
    A group's own variance is its residual sum of squares over its share d_g of the degrees of
    freedom, the sum of 1 - leverage; Bartlett's statistic is on G-1 degrees of freedom.

    Three seeds leave a group 2 degrees of freedom, with which an equivalence test has next to no
    power; what the groups have in common supplies the rest. Bartlett and not Brown-Forsythe: with
    three seeds one of a group's three deviations from its median is always zero, which leaves that
    test blind.

    Args:
      groups: seed -> value of each group; the first is what the others are compared with.

    Returns:
      The `SeedNoise`, or None if no group has two seeds or all seeds gave the same number.

    >>> noise = estimate_noise([{0: 0.80, 1: 0.82}, {5: 0.70, 6: 0.72}, {9: 0.75}])
    >>> f"{noise.sd:.4f} df={noise.df} p={noise.p_equal:.2f} paired={noise.paired}"
    '0.0141 df=2 p=1.00 paired=False'
    >>> noise = estimate_noise([{0: 0.80, 1: 0.90}, {0: 0.70, 1: 0.82}])
    >>> f"{noise.sd:.4f} df={noise.df} paired={noise.paired}, over seeds {noise.seed_sd:.4f}"
    '0.0100 df=1 paired=True, over seeds 0.0781'

    Reference: Bartlett, "Properties of sufficiency and statistical tests", 1937.
    """
    usable = [group for group in groups if len(group) >= 2]
    if len(usable) > 1 and all(have_same_seeds([usable[0], group]) for group in usable[1:]):
        paired = _pool(usable, paired=True)
        if paired is not None:
            return paired
    return _pool(usable, paired=False) if usable else None


def _pool(groups: Sequence[BySeed], *, paired: bool) -> SeedNoise | None:
    values = np.array([value for group in groups for value in group.values()])
    member = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    design = (member[:, None] == np.arange(len(groups))).astype(float)
    residuals, freedom = _residuals(design, values)
    seed_sd = math.sqrt(float(residuals @ residuals) / float(freedom.sum()))
    if paired:
        seeds = np.array([seed for group in groups for seed in group])
        design = np.column_stack([design, seeds[:, None] == np.unique(seeds)])
        residuals, freedom = _residuals(design, values)
    df = np.bincount(member, freedom)
    squares = np.bincount(member, residuals**2)
    total = round(float(df.sum()))
    if total < 1 or squares.sum() <= 1e-20 * float(values @ values):
        return None
    pooled = float(squares.sum()) / total
    telling = df > 1e-6  # not a group whose seeds nobody else has
    df, squares, count = df[telling], squares[telling], int(telling.sum())
    p_equal = 1.0
    if count > 1:
        # Metrics that count images tie now and then; a zero must not become an infinite logarithm.
        floored = np.maximum(squares / df, 1e-3 * pooled)
        statistic = total * math.log(pooled) - float((df * np.log(floored)).sum())
        correction = 1 + float((1 / df).sum() - 1 / total) / (3 * (count - 1))
        p_equal = float(special.chdtrc(count - 1, max(statistic, 0.0) / correction))
    return SeedNoise(pooled, total, count, p_equal, paired, seed_sd)


def _residuals(design: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares residuals, and each value's share of their degrees of freedom."""
    left, sizes, _ = np.linalg.svd(design, full_matrices=False)
    basis = left[:, sizes > 1e-9 * sizes[0]]
    return values - basis @ (basis.T @ values), 1 - (basis**2).sum(axis=1)


def exceeds(group: BySeed, base: BySeed, noise: SeedNoise) -> bool:
    """Whether a group outside the pool scatters more than the pooled noise explains (F test, 5 %).

    If paired, its differences from the base do, whose variance is twice the noise's.

    >>> noise = SeedNoise(variance=1e-4, df=20, groups=10, p_equal=0.5)
    >>> [exceeds(g, {}, noise) for g in ({0: 0.80, 1: 0.81, 2: 0.82}, {0: 0.7, 1: 0.8, 2: 0.9})]
    [False, True]
    """
    values, expected = [*group.values()], noise.variance
    if noise.paired:
        values = [group[seed] - base[seed] for seed in in_common([group, base])]
        expected *= 2
    if len(values) < 2:
        return False
    ratio = float(np.var(values, ddof=1)) / expected
    return float(special.fdtrc(len(values) - 1, noise.df, ratio)) <= ALPHA
