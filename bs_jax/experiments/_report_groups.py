"""From rows to groups: the seeds of one arm at one batch size, met with the base's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bs_jax.experiments import _report_curves as curves
from bs_jax.experiments._report_statistics import (
    Comparison,
    Interval,
    SeedNoise,
    compare,
    exceeds,
    mean_interval,
)
from bs_jax.experiments.results import DIVERGED, DONE, Row, Run, Sweep

# Groups further than this from the base train another way altogether, and their seeds scatter
# more; that scatter is no measure of the noise at the base. Choosing by means leaves the pooled
# variance unbiased, since the mean and the variance of a normal sample are independent.
_NEAR_MARGINS = 5.0


@dataclass(frozen=True)
class Group:
    """The seeds of one arm at one batch size and offset.

    Attributes:
      arm, batch_size, k, offset: which.
      planned: distinct runs planned; `diverged` and `unfinished` of them gave no final number.
      values: the final metric of each finished run; `interval` is over these.
      comparison: against the base by the accuracy metric; None if either has no values.
      loss: the loss metric over the same runs; `loss_comparison` against the base.
      curve: mean curve in the analysis's windows; None without curves.
      curve_rms: deviation of that curve from the base's, in the curve metric's units.
      curve_noise: the same in units of seed noise: 1 is what the seed alone does.
      verdict: of this point; empty for the base and for other offsets than 1.
    """

    arm: str
    batch_size: int
    k: float
    offset: float
    planned: int
    diverged: int
    unfinished: int
    values: tuple[float, ...]
    interval: Interval
    loss: Interval
    curve: np.ndarray | None
    comparison: Comparison | None = None
    loss_comparison: Comparison | None = None
    curve_rms: float = math.nan
    curve_noise: float = math.nan
    verdict: str = ""


Key = tuple[str, int, float]
BASE: Key = ("", 0, 1.0)
Collected = tuple[Group, list[float], np.ndarray]


def members_of(rows: Sequence[Row], base_batch_size: int) -> dict[Key, dict[str, Row]]:
    """Group -> its distinct runs; the base is one group whatever arms it was planned for."""
    members: dict[Key, dict[str, Row]] = {}
    for row in rows:
        at_base = row.batch_size == base_batch_size and row.offset == 1
        key = BASE if at_base else (row.arm, row.batch_size, row.offset)
        members.setdefault(key, {})[row.run_id] = row
    return members


def collect(key: Key, runs: Sequence[Run], sweep: Sweep, edges: np.ndarray) -> Collected:
    """A group's own numbers: final metrics, losses, and curves as an array (seeds, windows)."""
    arm, batch_size, offset = key
    batch_size = batch_size or sweep.base_batch_size
    done = [run for run in runs if run.status == DONE]
    finals = [run.metrics.get(sweep.accuracy_metric, math.nan) for run in done]
    values = tuple(value for value in finals if math.isfinite(value))
    losses = [run.metrics.get(sweep.loss_metric, math.nan) for run in done]
    losses = [value for value in losses if math.isfinite(value)]
    means = [
        curves.window_means(run.curves[sweep.curve_metric], edges)
        for run in done
        if len(edges) and sweep.curve_metric in run.curves
    ]
    matrix = np.array(means) if means else np.empty((0, max(len(edges) - 1, 0)))
    # A final metric that is not a finite number is a divergence that nobody stopped.
    diverged = sum(run.status == DIVERGED for run in runs) + len(done) - len(values)
    group = Group(
        arm=arm,
        batch_size=batch_size,
        k=batch_size / sweep.base_batch_size,
        offset=offset,
        planned=len(runs),
        diverged=diverged,
        unfinished=len(runs) - diverged - len(values),
        values=values,
        interval=mean_interval(values),
        loss=mean_interval(losses),
        curve=matrix.mean(axis=0) if len(matrix) else None,
    )
    return group, losses, matrix


def is_near(group: Group, base: Group, margin: float) -> bool:
    """Whether a group trains like the base, so that its seeds tell of the noise at the base."""
    distance = abs(group.interval.mean - base.interval.mean)
    return bool(group.values) and not group.diverged and distance <= _NEAR_MARGINS * margin


def compare_with_base(
    values: Sequence[float],
    base: Sequence[float],
    margin: float,
    noise: SeedNoise | None,
    near: bool,
) -> Comparison | None:
    """By the pooled noise where it is shared, and a group far away does not exceed it; else Welch.

    A single seed, or seeds that all tie, have no scatter of their own and borrow the pooled one.
    """
    if not (len(values) and len(base)):
        return None
    if noise is not None and noise.shared and (near or not exceeds(values, noise)):
        return compare(values, base, margin, noise)
    own = compare(values, base, margin)
    return own if noise is None or own.standard_error > 0 else compare(values, base, margin, noise)
