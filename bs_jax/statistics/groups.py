"""From rows to groups: the seeds of one arm at one batch size, met with the base's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bs_jax.records.results import DIVERGED, DONE, Curve, Row, Run, Sweep
from bs_jax.statistics import curves
from bs_jax.statistics.contrasts import Comparison, Interval, Verdict, compare, mean_interval
from bs_jax.statistics.price import Inside, Price, price, share_inside
from bs_jax.statistics.seed_noise import BySeed, SeedNoise, exceeds

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
      by_seed: seed -> that metric, the mean where a seed was trained more than once.
      comparison: against the base by the accuracy metric; None if either has no values.
      loss: the loss metric over the same runs; `loss_comparison` against the base.
      curve: mean curve in the analysis's windows; None without curves.
      evaluations: the accuracy metric on the way, mean over seeds; None without any.
      runs: every planned run, by seed.
      price: what the finished runs took.
      inside: for how much of training the batch lay inside the noise scale; None if not measured.
      deviation: how far that curve lies from the base's; None if either has no curve.
      share_to_base_loss: of training, until the base's loss after three quarters of its own.
      verdict: of this point; None for the base and for other offsets than 1.
    """

    arm: str
    batch_size: int
    k: float
    offset: float
    planned: int
    diverged: int
    unfinished: int
    values: tuple[float, ...]
    by_seed: BySeed
    interval: Interval
    loss: Interval
    curve: np.ndarray | None
    evaluations: Curve | None
    runs: tuple[tuple[int, Run], ...]
    price: Price
    inside: Inside | None
    comparison: Comparison | None = None
    loss_comparison: Comparison | None = None
    deviation: curves.Deviation | None = None
    share_to_base_loss: float = math.nan
    verdict: Verdict | None = None


Key = tuple[str, int, float]
BASE: Key = ("", 0, 1.0)
Collected = tuple[Group, BySeed, curves.Curves]


def members_of(rows: Sequence[Row], base_batch_size: int) -> dict[Key, dict[str, Row]]:
    """Group -> its distinct runs; the base is one group whatever arms it was planned for."""
    members: dict[Key, dict[str, Row]] = {}
    for row in rows:
        at_base = row.batch_size == base_batch_size and row.offset == 1
        key = BASE if at_base else (row.arm, row.batch_size, row.offset)
        members.setdefault(key, {})[row.run_id] = row
    return members


def collect(
    key: Key, members: Sequence[tuple[int, Run]], sweep: Sweep, edges: np.ndarray
) -> Collected:
    """A group's own numbers, of its (seed, run): final metrics, losses, curves (windows,)."""
    arm, batch_size, offset = key
    batch_size = batch_size or sweep.base_batch_size
    runs = [run for _, run in members]
    done = [run for run in runs if run.status == DONE]
    finals = _finite(members, sweep.accuracy_metric)
    values = tuple(value for _, value in finals)
    losses = _finite(members, sweep.loss_metric)
    rows = {
        seed: curves.window_means(aged_curve(run, sweep.curve_metric, batch_size), edges)
        for seed, run in members
        if run.status == DONE and len(edges) and sweep.curve_metric in run.curves
    }
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
        by_seed=_means(finals),
        interval=mean_interval(values),
        loss=mean_interval([value for _, value in losses]),
        curve=np.mean([*rows.values()], axis=0) if rows else None,
        evaluations=_mean_where_all_are(
            [
                run.curves[sweep.accuracy_metric]
                for run in done
                if sweep.accuracy_metric in run.curves
            ]
        ),
        runs=tuple(sorted(members, key=lambda member: (member[0], member[1].run_id))),
        price=price(done),
        inside=share_inside(done),
    )
    return group, _means(losses), rows


def aged_curve(run: Run, metric: str, batch_size: int) -> curves.Aged:
    """A metric of a run over the age of the weights, by the batch size recorded at each row."""
    curve = run.curves[metric]
    sizes = np.full(len(curve.examples), float(batch_size))
    if (recorded := run.curves.get("batch_size")) is not None and len(recorded.examples):
        rows = np.searchsorted(recorded.examples, curve.examples)
        found = recorded.values[np.minimum(rows, len(recorded.values) - 1)]
        sizes = np.where(np.isfinite(found) & (found > 0), found, sizes)
    # Only what is measured while a batch trains lags behind the weights.
    return curves.at_age(curve, sizes if metric.startswith("train/") else 0)


def _mean_where_all_are(found: Sequence[Curve]) -> Curve | None:
    """Mean of curves at the examples that all of them have."""
    if not found:
        return None
    shared = set.intersection(*(set(curve.examples.tolist()) for curve in found))
    if not shared:
        return None
    rows = [curve.values[np.isin(curve.examples, [*shared])] for curve in found]
    return Curve(np.array(sorted(shared), np.int64), np.mean(rows, axis=0))


def _finite(members: Sequence[tuple[int, Run]], metric: str) -> list[tuple[int, float]]:
    values = [(s, run.metrics.get(metric, math.nan)) for s, run in members if run.status == DONE]
    return [(seed, value) for seed, value in values if math.isfinite(value)]


def _means(values: Sequence[tuple[int, float]]) -> BySeed:
    found: dict[int, list[float]] = {}
    for seed, value in values:
        found.setdefault(seed, []).append(value)
    return {seed: float(np.mean(several)) for seed, several in found.items()}


def is_near(group: Group, base: Group, margin: float) -> bool:
    """Whether a group trains like the base, so that its seeds tell of the noise at the base."""
    distance = abs(group.interval.mean - base.interval.mean)
    return bool(group.values) and not group.diverged and distance <= _NEAR_MARGINS * margin


def compare_with_base(
    values: BySeed, base: BySeed, margin: float, noise: SeedNoise | None, near: bool
) -> Comparison | None:
    """By the pooled noise where it is shared, and a group far away does not exceed it; else by own.

    A single seed, or seeds that all tie, have no scatter of their own and borrow the pooled one.
    """
    if not (len(values) and len(base)):
        return None
    if noise is not None and noise.shared and (near or not exceeds(values, base, noise)):
        return compare(values, base, margin, noise)
    own = compare(values, base, margin)
    return own if noise is None or own.standard_error > 0 else compare(values, base, margin, noise)
