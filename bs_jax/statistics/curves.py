"""Training curves over examples seen, and how far a group's mean curve lies from the base's."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bs_jax.records.results import Curve

Curves = Mapping[int, np.ndarray]  # seed -> window means, (windows,)

_MAX_WINDOWS = 40


def window_edges(curves: Sequence[Curve]) -> np.ndarray:
    """Edges, in examples seen, of windows of one width that suit every curve.

    At most 40, and no more than the shortest curve has rows: finer ones would show its steps. They
    end where most curves end; a curve that stops well before (a damaged file) has no say.

    Returns:
      An array one longer than the number of windows; empty if no curve has rows.

    >>> coarse, fine = np.array([10, 20]), np.arange(1, 21)
    >>> window_edges([Curve(coarse, np.zeros(2)), Curve(fine, np.zeros(20))])
    array([ 0., 10., 20.])
    """
    filled = [curve for curve in curves if len(curve.examples) and curve.examples[-1] > 0]
    if not filled:
        return np.empty(0)
    end = float(np.median([curve.examples[-1] for curve in filled]))
    whole = [curve for curve in filled if curve.examples[-1] >= 0.9 * end]
    count = min(_MAX_WINDOWS, *(int((curve.examples <= end).sum()) for curve in whole))
    return np.linspace(0, end, max(count, 1) + 1)


def window_means(curve: Curve, edges: np.ndarray) -> np.ndarray:
    """Mean of a curve in each window (low, high]; NaN in one that no finite row reaches into.

    A row is the mean over the examples since the row before, so it counts in every window that
    these lie in, by their number there: rows need not end where windows do.

    >>> window_means(Curve(np.array([5, 15, 20]), np.array([1.0, 3.0, 7.0])), np.array([0, 10, 20]))
    array([2., 5.])
    """
    ends = curve.examples.astype(np.float64)
    starts = np.concatenate([[0.0], ends[:-1]])
    low, high = edges[:-1, None], edges[1:, None]
    shared = np.clip(np.minimum(high, ends) - np.maximum(low, starts), 0, None)
    shared[:, ~np.isfinite(curve.values)] = 0
    sums, sizes = shared @ np.nan_to_num(curve.values), shared.sum(axis=1)
    return np.divide(sums, sizes, out=np.full(len(low), math.nan), where=sizes > 0)


def noise_variance(groups: Sequence[Curves], *, paired: bool = False) -> np.ndarray | None:
    """Variance over seeds in each window, pooled over groups.

    Args:
      groups: each group's curves; the first is the base.
      paired: take half the variance of the differences from the base, seed by seed, instead.

    Returns:
      An array (windows,), or None if no group has two seeds or the seeds do not differ.

    >>> groups = [{0: np.array([1.0, 2.0]), 1: np.array([3.0, 2.0])}, {0: np.array([5.0, 0.0])}]
    >>> noise_variance(groups)
    array([2., 0.])
    """
    if paired:
        matched = [_matched(group, groups[0], paired=True) for group in groups[1:]]
        usable = [(group - base) / math.sqrt(2) for group, base in matched if len(group) >= 2]
    else:
        usable = [np.array([*group.values()]) for group in groups if len(group) >= 2]
    if not usable:
        return None
    df = sum(len(group) - 1 for group in usable)
    squares = sum(((group - group.mean(axis=0)) ** 2).sum(axis=0) for group in usable)
    pooled = np.asarray(squares) / df
    return pooled if np.nansum(pooled) > 0 else None


def curve_deviation(
    group: Curves, base: Curves, variance: np.ndarray | None, *, paired: bool = False
) -> tuple[float, float]:
    """How far the mean curve of a group lies from the base's, in loss and in seed noise.

    rms = sqrt(mean_w (mean_group - mean_base)^2)
    unit = sqrt(mean_w variance_w (1/n_group + 1/n_base)): what the rms of two groups of these
    sizes comes to (root mean square) when nothing but the seed differs.

    Args:
      group: the group's curves.
      base: the base's.
      variance: of `noise_variance`, in each window, (windows,), or None if unknown.
      paired: compare the seeds that both have; else all.

    Returns:
      The rms, and the rms in units of seed noise (1 = nothing but seed noise); NaN if unknown.

    >>> zeros, ones = ({seed: np.full(4, value) for seed in (0, 1)} for value in (0.0, 1.0))
    >>> curve_deviation(ones, zeros, np.full(4, 0.25))
    (1.0, 2.0)
    """
    ours, theirs = _matched(group, base, paired=paired)
    if not (len(ours) and len(theirs)):
        return math.nan, math.nan
    gap = ours.mean(axis=0) - theirs.mean(axis=0)
    seen = np.isfinite(gap)
    if not seen.any():
        return math.nan, math.nan
    rms = math.sqrt(float((gap[seen] ** 2).mean()))
    if variance is None or not np.isfinite(variance[seen]).any():
        return rms, math.nan
    unit = math.sqrt(float(np.nanmean(variance[seen])) * (1 / len(ours) + 1 / len(theirs)))
    return rms, rms / unit if unit > 0 else math.nan


def _matched(group: Curves, base: Curves, *, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both, (seeds, windows): of the seeds that both have, in one order, or all."""
    both = [seed for seed in group if seed in base]
    first, second = (both, both) if paired else (list(group), list(base))
    return np.array([group[seed] for seed in first]), np.array([base[seed] for seed in second])
