"""How fast the best learning rate grows with the batch size, from an arm that scales it alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from bs_jax.statistics.analysis import Analysis
from bs_jax.statistics.contrasts import LEVEL
from bs_jax.statistics.groups import Group
from bs_jax.statistics.seed_noise import in_common

_MIN_FREEDOM = 3  # of residuals, to be trusted over the seed noise


@dataclass(frozen=True)
class Exponent:
    """The best learning rate as k**value, with a 95 % interval; infinite ends where it is open.

    `points` groups at `batch_sizes` sizes went into it.
    """

    value: float
    low: float
    high: float
    points: int
    batch_sizes: int


def learning_rate_exponent(analysis: Analysis, arm: str, control: str) -> Exponent | None:
    """Fit a parabola over log2 of the learning rate whose top moves with log2 k.

    accuracy = alpha_B - c (m - m0 - a log2 k)^2 = alpha'_B + p m + q m^2 + r m log2 k,
    a = -r / (2 q), with m = log2(learning rate over the base's)

    Each batch size has a level of its own, so only how the accuracy depends on the learning rate at
    a batch size counts. The interval of the ratio is Fieller's. Its variance is the pooled seed
    noise, or the residuals' where they show more (the curve is no parabola) and are enough.

    Args:
      analysis: of `analyse`.
      arm: scales the learning rate alone: m = log2(k x offset).
      control: scales nothing: m = 0.

    Returns:
      The exponent; None where the sweep has too few learning rates, no noise is known, or the
      accuracy shows no top.

    Reference: Fieller, "Some problems in interval estimation", 1954.
    """
    groups = [
        group
        for group in analysis.groups
        if group.values and (group.arm == arm or (group.arm == control and group.offset == 1))
    ]
    if analysis.base is not None and analysis.base.values:
        groups.append(analysis.base)
    sizes = sorted({group.batch_size for group in groups})
    rate = np.array([math.log2(g.k * g.offset) if g.arm == arm else 0.0 for g in groups])
    log_k = np.array([math.log2(group.k) for group in groups])
    level = np.array([[float(group.batch_size == size) for size in sizes] for group in groups])
    if not groups:
        return None
    values = _values(groups, analysis)
    accuracy = np.array([np.mean(found) for found in values])
    weight = np.sqrt([float(len(found)) for found in values])
    design = np.column_stack([rate, rate**2, rate * log_k, level]) * weight[:, None]
    freedom = len(groups) - design.shape[1]
    if freedom < 0 or np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    solution = np.linalg.lstsq(design, accuracy * weight, rcond=None)[0]
    variance, df = _variance(design @ solution - accuracy * weight, freedom, analysis)
    if not variance > 0:
        return None
    covariance = variance * np.linalg.inv(design.T @ design)
    ends = _fieller(
        solution[1:3], covariance[1:3, 1:3], float(special.stdtrit(df, 0.5 + LEVEL / 2))
    )
    if ends is None:
        return None
    value = float(-solution[2] / (2 * solution[1]))
    return Exponent(value, *ends, points=len(groups), batch_sizes=len(sizes))


def _values(groups: Sequence[Group], analysis: Analysis) -> list[list[float]]:
    """The accuracies of each group; only of the seeds that all have, where those are paired."""
    seeds = in_common([group.by_seed for group in groups])
    if analysis.noise is None or not analysis.noise.paired or not seeds:
        return [list(group.values) for group in groups]
    return [[group.by_seed[seed] for seed in seeds] for group in groups]


def _variance(residuals: np.ndarray, freedom: int, analysis: Analysis) -> tuple[float, float]:
    noise = analysis.noise
    seen = float(residuals @ residuals) / freedom if freedom >= _MIN_FREEDOM else math.nan
    if noise is None or seen > noise.variance:
        return seen, freedom
    return noise.variance, noise.df


def _fieller(terms: np.ndarray, covariance: np.ndarray, t: float) -> tuple[float, float] | None:
    """All a for which r + 2 q a does not differ from 0; None where q is not shown below 0."""
    (q, r), (qq, qr, rr) = terms, (covariance[0, 0], covariance[0, 1], covariance[1, 1])
    if q > 0 or q**2 <= t**2 * qq:
        return None
    # (r + 2 a q)^2 <= t^2 (rr + 4 a qr + 4 a^2 qq), a quadratic in a that opens upwards.
    square, linear, constant = (
        4 * (q**2 - t**2 * qq),
        4 * (q * r - t**2 * qr),
        r**2 - t**2 * rr,
    )
    root = math.sqrt(max(linear**2 - 4 * square * constant, 0.0))
    return (-linear - root) / (2 * square), (-linear + root) / (2 * square)
