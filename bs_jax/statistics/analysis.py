"""From rows to verdicts: per arm and batch size the mean, the difference from base, and the test.

The base is every run at the base batch size with offset 1, whatever arms name it. An arm is judged
at its points with offset 1; other offsets are compared with the base but carry no verdict of the
arm. A diverged run is a result: it makes its point not invariant.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from bs_jax.records.results import DIVERGED, DONE, Results, Row, Sweep
from bs_jax.report.numbers import count
from bs_jax.statistics import curves
from bs_jax.statistics.groups import (
    BASE,
    Group,
    Key,
    collect,
    compare_with_base,
    is_near,
    members_of,
)
from bs_jax.statistics.seed_noise import ALPHA, SeedNoise, estimate_noise
from bs_jax.statistics.verdicts import (
    INVARIANT,
    NOT_INVARIANT,
    UNDECIDED,
    ArmVerdict,
    arm_verdict,
    judge,
)

__all__ = [
    "INVARIANT",
    "NOT_INVARIANT",
    "UNDECIDED",
    "Analysis",
    "ArmVerdict",
    "Group",
    "analyse",
    "widest_pass",
]


@dataclass(frozen=True)
class Analysis:
    """Everything the figures, the page and the terminal show.

    Attributes:
      sweep: what was compared.
      base: the base group; None if the sweep has no point there.
      groups: every other group, by arm (in the sweep's order), batch size, offset.
      arms: a verdict an arm, in the sweep's order.
      noise, loss_noise: seed noise of the accuracy and the loss metric; None if unknown.
      edges: of the windows of examples seen that the curves are averaged over.
      warnings: what a reader must know before believing a verdict.
    """

    sweep: Sweep
    base: Group | None
    groups: tuple[Group, ...]
    arms: tuple[ArmVerdict, ...]
    noise: SeedNoise | None
    loss_noise: SeedNoise | None
    edges: np.ndarray
    warnings: tuple[str, ...]


def analyse(results: Results) -> Analysis:
    """Compares every arm at every batch size with the base, and gives each arm a verdict.

    A point is `invariant` if TOST rejects "differs by the margin or more" at 5 %, `not invariant`
    if a run diverged or the difference exceeds the margin at 5 % (Bonferroni over the arm's
    points), else `undecided`. An arm is `invariant` only if all its points are, which needs no
    correction: it can be wrong only where a point is.

    Args:
      results: as `load_results` returns them.

    Returns:
      The `Analysis`; a sweep without base, seeds or finished runs is undecided, and says why.

    Reference: Schuirmann 1987 (TOST); Berger 1982 (all-points test).
    """
    sweep = results.sweep
    members = members_of(results.rows, sweep.base_batch_size)
    edges = curves.window_edges(
        [
            run.curves[sweep.curve_metric]
            for run in results.runs.values()
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
        variance = curves.noise_variance([rows for _, _, rows in near if rows], paired=paired)
        groups = []
        for group, losses, rows in collected.values():
            pooled = is_near(group, base, sweep.margin)
            comparison = compare_with_base(group.by_seed, base.by_seed, sweep.margin, noise, pooled)
            loss_comparison = compare_with_base(losses, base_entry[1], math.nan, loss_noise, pooled)
            rms, in_noise = curves.curve_deviation(rows, base_entry[2], variance, paired=paired)
            groups.append(
                replace(
                    group,
                    comparison=comparison,
                    loss_comparison=loss_comparison,
                    curve_rms=rms,
                    curve_noise=in_noise,
                )
            )
    arms = list(dict.fromkeys(row.arm for row in results.rows))
    judged = [
        judged
        for arm in arms
        for judged in judge([group for group in groups if group.arm == arm], base)
    ]
    verdicts = [
        arm_verdict(arm, [group for group in judged if group.arm == arm], base, sweep)
        for arm in arms
    ]
    return Analysis(
        sweep=sweep,
        base=base,
        groups=tuple(judged),
        arms=tuple(verdicts),
        noise=noise,
        loss_noise=loss_noise,
        edges=edges,
        warnings=tuple(_warnings(results, members, base, judged, noise)),
    )


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
    return margin - float(stats.t.ppf(1 - ALPHA, noise.df)) * noise.sd * math.sqrt(share)


def _warnings(
    results: Results,
    members: Mapping[Key, Mapping[str, Row]],
    base: Group | None,
    groups: Sequence[Group],
    noise: SeedNoise | None,
) -> list[str]:
    sweep = results.sweep
    found = list(sweep.warnings)
    unfinished = [run for run in results.runs.values() if run.status not in (DONE, DIVERGED)]
    if unfinished:
        found.append(
            f"{len(unfinished)} of {count(len(results.runs), 'run')} have no usable result yet: "
            "the same command trains them, and the report can be made again."
        )
    if base is None:
        return [*found, f"The sweep has no point at the base batch size {sweep.base_batch_size}."]
    if base.diverged:
        found.append(f"{base.diverged} of {count(base.planned, 'base run')} diverged.")
    base_seeds = [row.seed for row in members[BASE].values()]
    if len(set(base_seeds)) < len(base_seeds):
        found.append(
            "The arms do not share their runs at the base batch size; the base is all "
            f"{base.planned} of them together."
        )
    if base.values and noise is None:
        found.append(
            "No seed noise could be measured: no point has two finished seeds that differ. "
            "Differences are shown without intervals or verdicts."
        )
    if noise is not None and not noise.shared:
        found.append(
            "Seeds scatter more at some points than at others (Bartlett p = "
            f"{noise.p_equal:.3f}), so each point is compared by its own scatter, which takes more "
            "seeds to decide."
        )
    passing = widest_pass(groups, noise, sweep.margin)
    if noise is not None and noise.shared and passing <= 0:
        found.append(
            "With these few seeds no difference, not even none, could pass the equivalence test: "
            "the seeds scatter too much for the margin. Train more seeds."
        )
    if noise is not None and any(len(group.values) == 1 for group in groups):
        found.append("Some points have a single finished seed; their noise is taken from others.")
    return found
