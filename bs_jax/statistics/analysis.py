"""From rows to verdicts: per arm and batch size the mean, the difference from base, and the test.

The base is every run at the base batch size with offset 1, whatever arms name it. An arm is judged
at its points with offset 1; other offsets are compared with the base but carry no verdict of the
arm. A diverged run is a result: it makes its point differ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from bs_jax.records.results import DONE, Results, Sweep
from bs_jax.statistics import curves
from bs_jax.statistics.groups import (
    BASE,
    Group,
    aged_curve,
    collect,
    compare_with_base,
    is_near,
    members_of,
)
from bs_jax.statistics.price import share_to_base_loss
from bs_jax.statistics.seed_noise import ALPHA, SeedNoise, estimate_noise
from bs_jax.statistics.verdicts import ArmVerdict, arm_verdict, judge


@dataclass(frozen=True)
class Analysis:
    """Everything the figures, the page and the terminal show.

    Attributes:
      sweep: what was compared.
      base: the base group; None if the sweep has no point there.
      groups: every other group, by arm (in the sweep's order), batch size, offset.
      arms: a verdict an arm, in the sweep's order.
      noise, loss_noise: seed noise of the accuracy and the loss metric; None if unknown.
      edges: of the windows that the curves are averaged over, in examples that the weights have
        seen.
    """

    sweep: Sweep
    base: Group | None
    groups: tuple[Group, ...]
    arms: tuple[ArmVerdict, ...]
    noise: SeedNoise | None
    loss_noise: SeedNoise | None
    edges: np.ndarray


def analyse(results: Results) -> Analysis:
    """Compares every arm at every batch size with the base, and gives each arm a verdict.

    A point is `equivalent` if TOST rejects "differs by the margin or more" at 5 %, `different`
    if a run diverged or the difference exceeds the margin at 5 % (Bonferroni over the arm's
    points), else `undecided`. An arm is `equivalent` only if all its points are, which needs no
    correction: it can be wrong only where a point is.

    Args:
      results: as `load_results` returns them.

    Returns:
      The `Analysis`; a sweep without base, seeds or finished runs is undecided.

    Reference: Schuirmann 1987 (TOST); Berger 1982 (all-points test).
    """
    sweep = results.sweep
    members = members_of(results.rows, sweep.base_batch_size)
    sizes = {row.run_id: row.batch_size for row in results.rows}
    edges = curves.window_edges(
        [
            aged_curve(run, sweep.curve_metric, sizes[run_id])
            for run_id, run in results.runs.items()
            if run.status == DONE and sweep.curve_metric in run.curves
        ]
    )
    collected = {
        key: collect(key, [(row.seed, results.runs[i]) for i, row in rows.items()], sweep, edges)
        for key, rows in members.items()
    }
    base_entry = collected.pop(BASE, None)
    groups = [group for group, _, _ in collected.values()]
    base = base_entry[0] if base_entry else None
    noise = loss_noise = None
    if base_entry is not None and base is not None and base.values:
        near = [base_entry, *(e for e in collected.values() if is_near(e[0], base, sweep.margin))]
        noise = estimate_noise([group.by_seed for group, _, _ in near])
        loss_noise = estimate_noise([losses for _, losses, _ in near])
        paired = noise is not None and noise.paired
        scatter = curves.curve_noise([rows for _, _, rows in near if rows], paired=paired)
        groups = []
        for group, losses, rows in collected.values():
            pooled = is_near(group, base, sweep.margin)
            comparison = compare_with_base(group.by_seed, base.by_seed, sweep.margin, noise, pooled)
            loss_comparison = compare_with_base(losses, base_entry[1], math.nan, loss_noise, pooled)
            deviation = curves.curve_deviation(rows, base_entry[2], scatter, paired=paired)
            groups.append(
                replace(
                    group,
                    share_to_base_loss=_share_to_base_loss(group, base),
                    comparison=comparison,
                    loss_comparison=loss_comparison,
                    deviation=deviation,
                )
            )
        base = replace(base, share_to_base_loss=_share_to_base_loss(base, base))
    arms = list(dict.fromkeys(row.arm for row in results.rows))
    judged = {arm: judge([group for group in groups if group.arm == arm], base) for arm in arms}
    return Analysis(
        sweep=sweep,
        base=base,
        groups=tuple(group for arm in arms for group in judged[arm]),
        arms=tuple(
            arm_verdict(arm, judged[arm], base, sweep.base_batch_size, sweep.margin) for arm in arms
        ),
        noise=noise,
        loss_noise=loss_noise,
        edges=edges,
    )


def _share_to_base_loss(group: Group, base: Group) -> float:
    if group.curve is None or base.curve is None:
        return math.nan
    return share_to_base_loss(group.curve, base.curve)


def widest_pass(groups: Sequence[Group], noise: SeedNoise | None, margin: float) -> float:
    """The largest difference seen that still passes as invariant at a point of usual size.

    margin - t(.95) s sqrt(share), share the median of the points' (2/n for n pairs of seeds);
    0 or less if none can pass, NaN if unknown.

    Args:
      groups: those compared with the base.
      noise: pooled seed noise.
      margin: in units of the metric.

    Returns:
      The difference, in units of the metric.
    """
    shares = [group.comparison.share for group in groups if group.comparison is not None]
    if noise is None or not shares:
        return math.nan
    share = float(np.median(shares))
    return margin - float(special.stdtrit(noise.df, 1 - ALPHA)) * noise.sd * math.sqrt(share)
