"""Training curves over examples seen, and how far a group's mean curve lies from the base's."""

import math
from collections.abc import Sequence

import numpy as np

from bs_jax.experiments.results import Curve

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


def noise_variance(groups: Sequence[np.ndarray]) -> np.ndarray | None:
    """Variance over seeds in each window, pooled over groups of one shape (seeds, windows).

    Returns:
      An array (windows,), or None if no group has two seeds or the seeds do not differ.

    >>> noise_variance([np.array([[1.0, 2.0], [3.0, 2.0]]), np.array([[5.0, 0.0]])])
    array([2., 0.])
    """
    usable = [group for group in groups if len(group) >= 2]
    if not usable:
        return None
    df = sum(len(group) - 1 for group in usable)
    squares = sum(((group - group.mean(axis=0)) ** 2).sum(axis=0) for group in usable)
    pooled = np.asarray(squares) / df
    return pooled if np.nansum(pooled) > 0 else None


def curve_deviation(
    group: np.ndarray, base: np.ndarray, variance: np.ndarray | None
) -> tuple[float, float]:
    """How far the mean curve of a group lies from the base's, in loss and in seed noise.

    rms = sqrt(mean_w (mean_group - mean_base)^2)
    unit = sqrt(mean_w variance_w (1/n_group + 1/n_base)): what the rms of two groups of these
    sizes comes to (root mean square) when nothing but the seed differs.

    Args:
      group: window means, (seeds, windows), of the group.
      base: the same for the base.
      variance: seed variance in each window, (windows,), or None if unknown.

    Returns:
      The rms, and the rms in units of seed noise (1 = nothing but seed noise); NaN if unknown.

    >>> zero, one = np.zeros((2, 4)), np.ones((2, 4))
    >>> curve_deviation(one, zero, np.full(4, 0.25))
    (1.0, 2.0)
    """
    gap = group.mean(axis=0) - base.mean(axis=0)
    seen = np.isfinite(gap)
    if not seen.any():
        return math.nan, math.nan
    rms = math.sqrt(float((gap[seen] ** 2).mean()))
    if variance is None or not np.isfinite(variance[seen]).any():
        return rms, math.nan
    unit = math.sqrt(float(np.nanmean(variance[seen])) * (1 / len(group) + 1 / len(base)))
    return rms, rms / unit if unit > 0 else math.nan
