"""What a batch size costs and buys, and for how much of a run it lay inside the noise scale."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bs_jax.records.results import Curve, Run

# Of the base's training: its last loss is reached at the very end by whoever follows, and not at
# all by whoever is a hair above, so the comparison is made where both are still on their way.
LEVEL_AT = 0.75


@dataclass(frozen=True)
class Inside:
    """For how much of training the batch lay inside the gradient noise scale, B <= B_noise.

    Attributes:
      share: of the examples at which the noise scale was known, by the estimate.
      low, high: the same by the lower and the upper end of the estimate's range.
      unknown: share of all examples at which the noise scale was not known.
    """

    share: float
    low: float
    high: float
    unknown: float


@dataclass(frozen=True)
class Price:
    """What the runs of one point took; NaN where the records do not say.

    Attributes:
      updates: of the whole run (median over runs, as all here).
      seconds: of wall time, beside whatever else ran on the machine.
      examples_per_second: trained on, with all that a run does beside training.
      ramp: the batch size in use over examples seen, of the first run; None where it never changed.
    """

    updates: float
    seconds: float
    examples_per_second: float
    ramp: Curve | None = None

    def updates_at(self, share: float) -> float:
        """Updates done once a share of the run's examples has been seen."""
        if self.ramp is None:
            return self.updates * share
        ends = np.concatenate([[0], self.ramp.examples])
        updates = np.concatenate([[0], np.cumsum(np.diff(ends) / self.ramp.values)])
        return float(np.interp(share * ends[-1], ends, updates))


def price(runs: Sequence[Run]) -> Price:
    """Medians over finished runs of what their summaries say.

    A run's seconds are those of its last process, so a resumed run's are scaled up to all updates.
    Runs that were trained side by side in one program share its time.

    Args:
      runs: finished.

    Returns:
      The `Price`.
    """
    updates, seconds, speeds = [], [], []
    for summary in (run.summary for run in runs if run.summary is not None):
        trained = summary.step - summary.resumed_at_step
        if summary.step <= 0 or trained <= 0:
            continue
        updates.append(summary.step)
        seconds.append(summary.seconds * summary.step / trained)
        if seconds[-1] > 0:
            speeds.append(summary.examples / seconds[-1])
    sizes = [run.curves["batch_size"] for run in runs if "batch_size" in run.curves]
    ramps = [c for c in sizes if np.all(c.values > 0) and len(np.unique(c.values)) > 1]
    ramp = ramps[0] if ramps else None
    return Price(_median(updates), _median(seconds), _median(speeds), ramp)


def _median(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.median(finite)) if finite else math.nan


def share_inside(runs: Sequence[Run]) -> Inside | None:
    """For how much of training B <= B_noise, mean over the runs that measured the noise scale.

    Each logged row counts by the examples since the row before. A noise scale that is not a finite
    number is not known: it is never taken for a large one.

    Args:
      runs: with the curves `batch_size`, `noise_scale` and, where measured, `noise_scale_low` and
        `noise_scale_high`, all in examples.

    Returns:
      The shares; None if no run has both curves.

    >>> seen, size = np.array([10, 20, 30, 40]), np.full(4, 64.0)
    >>> curves = {
    ...     "batch_size": Curve(seen, size),
    ...     "noise_scale": Curve(seen, np.array([np.nan, 32.0, 80.0, 90.0])),
    ...     "noise_scale_low": Curve(seen, np.array([np.nan, 20.0, 60.0, 70.0])),
    ... }
    >>> found = share_inside([Run("r", "done", {}, "", {}, {}, (), curves, None)])
    >>> f"{found.share:.2f} {found.low:.2f} {found.high:.2f} {found.unknown:.2f}"
    '0.67 0.33 0.67 0.25'
    """
    found = [shares for run in runs if (shares := _inside(run.curves)) is not None]
    if not found:
        return None
    some_known = [shares for shares in found if shares.unknown < 1]

    def mean(values: Iterable[float]) -> float:
        return float(np.mean([*values])) if some_known else math.nan

    return Inside(
        share=mean(shares.share for shares in some_known),
        low=mean(shares.low for shares in some_known),
        high=mean(shares.high for shares in some_known),
        unknown=float(np.mean([shares.unknown for shares in found])),
    )


def _inside(curves: Mapping[str, Curve]) -> Inside | None:
    scale, sizes = curves.get("noise_scale"), curves.get("batch_size")
    if scale is None or sizes is None or not len(scale.examples) or not len(sizes.examples):
        return None
    weight = np.diff(scale.examples, prepend=0).astype(float)
    size = _at(sizes, scale.examples)
    known = np.isfinite(scale.values)
    if not weight.sum() > 0:
        return None
    total = weight[known].sum()

    def share(limit: Curve, unknown: float) -> float:
        """Of the examples with a known noise scale; `unknown` stands for an end that is not."""
        values = _at(limit, scale.examples)
        inside = size <= np.where(np.isfinite(values), values, unknown)
        return float(weight[known & inside].sum() / total) if total > 0 else math.nan

    return Inside(
        share=share(scale, math.nan),
        low=share(curves.get("noise_scale_low", scale), 0.0),
        high=share(curves.get("noise_scale_high", scale), math.inf),
        unknown=float(weight[~known].sum() / weight.sum()),
    )


def _at(curve: Curve, examples: np.ndarray) -> np.ndarray:
    """Values of a curve at the rows of another, the first at or after each."""
    if not len(curve.examples):
        return np.full(len(examples), math.nan)
    rows = np.searchsorted(curve.examples, examples)
    return curve.values[np.minimum(rows, len(curve.values) - 1)]


def share_to_base_loss(curve: np.ndarray, base: np.ndarray) -> float:
    """The share of training until a curve has the loss that the base has after three quarters.

    Both curves are made to fall steadily first, halfway between the lowest value so far and the
    highest still to come, so that one lucky window decides nothing.

    Args:
      curve: mean curve in windows of equal width, (windows,).
      base: the base's, in the same windows.

    Returns:
      The share; infinite if the loss is not reached; NaN if it cannot be told.

    >>> base = 2.0 - np.linspace(0, 1, 100)
    >>> share_to_base_loss(base, base)
    0.75
    >>> round(share_to_base_loss(base + 0.15, base), 2)
    0.9
    >>> share_to_base_loss(base + 0.3, base)
    inf
    """
    seen = np.isfinite(curve) & np.isfinite(base)
    if seen.sum() < 4:
        return math.nan
    age = np.arange(1, len(curve) + 1, dtype=float)[seen] / len(curve)
    ours, theirs = _steady(curve[seen]), _steady(base[seen])
    level = float(np.interp(LEVEL_AT, age, theirs))
    if not ours[0] > level:
        return math.nan
    if ours[-1] > level:
        return math.inf
    row = int(np.argmax(ours <= level))
    part = (ours[row - 1] - level) / (ours[row - 1] - ours[row])
    return float(age[row - 1] + part * (age[row] - age[row - 1]))


def _steady(curve: np.ndarray) -> np.ndarray:
    lowest = np.minimum.accumulate(curve)
    highest = np.maximum.accumulate(curve[::-1])[::-1]
    return (lowest + highest) / 2
