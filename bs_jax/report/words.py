"""What the report says in sentences: the outcome, the verdicts, the caveats."""

import math

from bs_jax.records.results import DIVERGED, DONE, Results
from bs_jax.report.numbers import Units, count, fraction, listed
from bs_jax.statistics.analysis import Analysis, widest_pass
from bs_jax.statistics.contrasts import Verdict
from bs_jax.statistics.groups import Group
from bs_jax.statistics.verdicts import ArmVerdict


def headline(analysis: Analysis) -> str:
    """The outcome in one sentence."""
    if not any(group.values for group in analysis.groups):
        return "No run away from the base batch size has finished yet."
    if analysis.base is None or not analysis.base.values:
        return "Without a finished run at the base batch size there is nothing to compare with."
    parts = []
    for verdict, meaning in (
        (Verdict.EQUIVALENT, "the batch size does not matter"),
        (Verdict.UNDECIDED, "too few seeds to say"),
        (Verdict.DIFFERENT, "it matters"),
    ):
        arms = [arm.arm for arm in analysis.arms if arm.verdict == verdict]
        if arms:
            parts.append(f"{listed(arms)}: {meaning}")
    margin = Units(analysis.sweep.accuracy_metric).spread(analysis.sweep.margin)
    return f"{'; '.join(parts)} (margin ±{margin})."


def verdict_sentence(arm: ArmVerdict, analysis: Analysis) -> str:
    """The verdict on an arm: where it holds, where it fails, what would settle it."""
    sweep, base = analysis.sweep, analysis.base
    units = Units(sweep.accuracy_metric)
    if not arm.groups:
        return "Has no point away from the base batch size, so there is nothing to compare."
    if base is None or not base.values:
        return f"No finished run at the base batch size {sweep.base_batch_size} to compare with."
    ends = [fraction(size / sweep.base_batch_size) for size in (arm.low, arm.high)]
    span = f"from batch size {arm.low} to {arm.high} (k = {ends[0]} to {ends[1]})"
    if arm.verdict == Verdict.EQUIVALENT:
        margin = units.spread(sweep.margin)
        return f"Final {units.name} stays within ±{margin} of the base {span}."
    reach = f" Shown to stay within the margin {span}." if arm.low != arm.high else ""
    if arm.verdict == Verdict.DIFFERENT:
        failed = [_failure(g, units) for g in arm.groups if g.verdict == Verdict.DIFFERENT]
        return f"Differs from the base at batch size {listed(failed)}.{reach}"
    open_points = [str(g.batch_size) for g in arm.groups if g.verdict == Verdict.UNDECIDED]
    if math.isnan(arm.seeds_needed):
        help_ = "it needs finished runs of at least 2 seeds a point, the base included."
    elif arm.seeds_needed > 100:
        help_ = "more than 100 seeds a point may be needed: the seeds scatter too much."
    else:
        help_ = (
            f"about {int(arm.seeds_needed)} seeds a point, base included, would likely settle it."
        )
    return f"Open at batch size {listed(open_points)}; {help_}{reach}"


def _failure(group: Group, units: Units) -> str:
    if group.diverged:
        return f"{group.batch_size} ({group.diverged} of {group.planned} diverged)"
    assert group.comparison is not None
    unit = " points" if units.percent else ""
    return f"{group.batch_size} ({units.signed(group.comparison.difference)}{unit})"


def caveats(results: Results, analysis: Analysis) -> list[str]:
    """What a reader must know before believing a verdict, a sentence each."""
    sweep, base, noise = analysis.sweep, analysis.base, analysis.noise
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
    base_runs = {
        row.run_id: row.seed
        for row in results.rows
        if row.batch_size == sweep.base_batch_size and row.offset == 1
    }
    if len(set(base_runs.values())) < len(base_runs):
        found.append(
            "The rules do not share their runs at the base batch size; the base is all "
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
    passing = widest_pass(analysis.groups, noise, sweep.margin)
    if noise is not None and noise.shared and passing <= 0:
        found.append(
            "With these few seeds no difference, not even none, could pass the equivalence test: "
            "the seeds scatter too much for the margin. Train more seeds."
        )
    if noise is not None and any(len(group.values) == 1 for group in analysis.groups):
        found.append("Some points have a single finished seed; their noise is taken from others.")
    return found
