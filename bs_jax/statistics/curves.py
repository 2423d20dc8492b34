"""Training curves at equal age of the weights, and how far a group lies from the base.

The training loss of a batch is that of the weights before their update. An update of B examples
that ends at e examples seen tells of weights that have seen e - B, and stands for ages from B/2
below to B/2 above. So a curve over examples seen lags behind the weights by half a batch, and two
batch sizes are compared over the age of the weights, not over the examples seen.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from bs_jax.records.results import Curve

Curves = Mapping[int, np.ndarray]  # seed -> window means, (windows,)

_MAX_WINDOWS = 40


@dataclass(frozen=True)
class Aged:
    """A curve over the age of the weights, in examples: row i is the mean over (starts, ends]."""

    starts: np.ndarray
    ends: np.ndarray
    values: np.ndarray


def at_age(curve: Curve, batch_size: "float | np.ndarray") -> Aged:
    """Places the rows of a curve at the age of the weights that they tell of.

    age = examples seen - B/2

    Args:
      curve: each row the mean over the updates since the row before.
      batch_size: examples per update, one number or one a row; 0 for what is measured on the
        weights as they are, such as an evaluation.

    Returns:
      The rows with the ages that they cover.

    >>> at_age(Curve(np.array([8, 16]), np.array([2.0, 1.0])), batch_size=4).ends
    array([ 6., 14.])
    """
    ends = curve.examples.astype(np.float64)
    starts = np.concatenate([[0.0], ends[:-1]])
    half = np.asarray(batch_size, np.float64) / 2
    return Aged(starts - half, ends - half, curve.values)


def window_edges(curves: Sequence[Aged]) -> np.ndarray:
    """Edges, in examples of age, of windows of one width that suit every curve.

    At most 40, and no more than the shortest curve has rows: finer ones would show its steps. They
    end where the first curve ends; a curve that stops well before (a damaged file) has no say.

    Returns:
      An array one longer than the number of windows; empty if no curve has rows.

    >>> coarse, fine = np.array([10, 20]), np.arange(1, 21)
    >>> window_edges([at_age(Curve(x, np.zeros(x.size)), 0) for x in (coarse, fine)])
    array([ 0., 10., 20.])
    """
    filled = [curve for curve in curves if len(curve.ends) and curve.ends[-1] > 0]
    if not filled:
        return np.empty(0)
    usual = float(np.median([curve.ends[-1] for curve in filled]))
    whole = [curve for curve in filled if curve.ends[-1] >= 0.9 * usual]
    end = min(float(curve.ends[-1]) for curve in whole)
    count = min(_MAX_WINDOWS, *(int((curve.starts < end).sum()) for curve in whole))
    return np.linspace(0, end, max(count, 1) + 1)


def window_means(curve: Aged, edges: np.ndarray) -> np.ndarray:
    """Mean of a curve in each window (low, high]; NaN in one that no finite row reaches into.

    A row counts in every window that its ages lie in, by how many lie there: rows need not end
    where windows do.

    >>> curve = at_age(Curve(np.array([5, 15, 20]), np.array([1.0, 3.0, 7.0])), 0)
    >>> window_means(curve, np.array([0, 10, 20]))
    array([2., 5.])
    """
    low, high = edges[:-1, None], edges[1:, None]
    shared = np.clip(np.minimum(high, curve.ends) - np.maximum(low, curve.starts), 0, None)
    shared[:, ~np.isfinite(curve.values)] = 0
    sums, sizes = shared @ np.nan_to_num(curve.values), shared.sum(axis=1)
    return np.divide(sums, sizes, out=np.full(len(low), math.nan), where=sizes > 0)


@dataclass(frozen=True)
class CurveNoise:
    """How curves of one point scatter over seeds.

    Attributes:
      variance: over seeds in each window, (windows,).
      df: degrees of freedom of each window's variance.
      modes: how many independent windows the curves are worth, tr(S)^2 / tr(S^2) of the covariance
        S between windows: 1 if a seed moves the whole curve, their number if windows are
        independent.
    """

    variance: np.ndarray
    df: int
    modes: float


def curve_noise(groups: Sequence[Curves], *, paired: bool = False) -> CurveNoise | None:
    """Scatter over seeds in each window, pooled over groups.

    Args:
      groups: each group's curves; the first is the base.
      paired: take half the variance of the differences from the base, seed by seed, instead.

    Returns:
      The `CurveNoise`, or None if no group has two seeds or the seeds do not differ.

    >>> groups = [{0: np.array([1.0, 2.0]), 1: np.array([3.0, 2.0])}, {0: np.array([5.0, 0.0])}]
    >>> curve_noise(groups).variance
    array([2., 0.])

    Reference: Bai and Saranadasa, "Effect of high dimension", 1996 (tr(S^2) from few seeds).
    """
    if paired:
        matched = [_matched(group, groups[0], paired=True) for group in groups[1:]]
        usable = [(group - base) / math.sqrt(2) for group, base in matched if len(group) >= 2]
    else:
        usable = [np.array([*group.values()]) for group in groups if len(group) >= 2]
    if not usable:
        return None
    df = sum(len(group) - 1 for group in usable)
    residuals = np.concatenate([group - group.mean(axis=0) for group in usable])
    variance = (residuals**2).sum(axis=0) / df
    if not np.nansum(variance) > 0:
        return None
    return CurveNoise(variance, df, _modes(residuals[:, np.isfinite(variance)], df))


def _modes(residuals: np.ndarray, df: int) -> float:
    if df < 2:
        return 1.0  # nothing is known of how windows go together: the most cautious
    trace = float((residuals**2).sum()) / df
    squared = float(((residuals @ residuals.T) ** 2).sum()) / df**2
    squared = (squared - trace**2 / df) * df**2 / ((df - 1) * (df + 2))
    most = residuals.shape[1]
    return min(max(trace**2 / squared, 1.0), most) if squared > 0 else float(most)


@dataclass(frozen=True)
class Deviation:
    """How far the mean curve of a group lies from the base's, at equal age of the weights.

    Attributes:
      gap: the group's mean minus the base's in each window, (windows,).
      rms: root mean square of the gap over the windows, in the curve metric's units.
      in_noise: rms in units of seed noise: 1 is what two groups of these sizes show when nothing
        but the seed differs; NaN if no seed noise is known.
      p_chance: how probable so large a rms is if nothing but the seed differs; NaN if unknown.
    """

    gap: np.ndarray
    rms: float
    in_noise: float = math.nan
    p_chance: float = math.nan


def curve_deviation(
    group: Curves, base: Curves, noise: CurveNoise | None, *, paired: bool = False
) -> Deviation | None:
    """How far the mean curve of a group lies from the base's, in loss and in seed noise.

    rms = sqrt(mean_w (mean_group - mean_base)^2)
    unit = sqrt(mean_w variance_w (1/n_group + 1/n_base))
    p_chance = P(F(modes, modes df) > (rms / unit)^2)

    Args:
      group: the group's curves.
      base: the base's.
      noise: of `curve_noise`, or None if unknown.
      paired: compare the seeds that both have; else all.

    Returns:
      The `Deviation`; None if either has no curve, or they share no window.

    >>> zeros, ones = ({seed: np.full(4, value) for seed in (0, 1)} for value in (0.0, 1.0))
    >>> found = curve_deviation(ones, zeros, CurveNoise(np.full(4, 0.25), df=2, modes=1.0))
    >>> found.rms, found.in_noise, round(found.p_chance, 3)
    (1.0, 2.0, 0.184)

    Reference: Box, "Some theorems on quadratic forms", 1954 (the sum of dependent squares).
    """
    ours, theirs = _matched(group, base, paired=paired)
    if not (len(ours) and len(theirs)):
        return None
    gap = ours.mean(axis=0) - theirs.mean(axis=0)
    seen = np.isfinite(gap)
    if not seen.any():
        return None
    rms = math.sqrt(float((gap[seen] ** 2).mean()))
    if noise is None or not np.isfinite(noise.variance[seen]).any():
        return Deviation(gap, rms)
    unit = math.sqrt(float(np.nanmean(noise.variance[seen])) * (1 / len(ours) + 1 / len(theirs)))
    if not unit > 0:
        return Deviation(gap, rms)
    ratio = rms / unit
    p_chance = float(special.fdtrc(noise.modes, noise.modes * noise.df, ratio**2))
    return Deviation(gap, rms, ratio, p_chance)


def _matched(group: Curves, base: Curves, *, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both, (seeds, windows): of the seeds that both have, in one order, or all."""
    both = [seed for seed in group if seed in base]
    first, second = (both, both) if paired else (list(group), list(base))
    return np.array([group[seed] for seed in first]), np.array([base[seed] for seed in second])
