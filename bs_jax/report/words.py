"""What the report says in sentences: the outcome, the verdicts, the caveats."""

import math

import numpy as np

from bs_jax.records.results import DIVERGED, DONE, Results
from bs_jax.report.numbers import Units, count, fraction, hyperparameter, in_words, listed
from bs_jax.statistics.analysis import Analysis, widest_pass
from bs_jax.statistics.contrasts import Verdict
from bs_jax.statistics.curves import Deviation
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


# What each rule of the library does, k being the batch size over the base's.
_RULES = {
    "none": "Changes nothing, whatever the batch size: the control.",
    "linear": "Learning rate × k, decays to the power k (Goyal et al. 2017).",
    "sqrt": "Learning rate and weight decay × √k, eps / √k, decays to the power k "
    "(Malladi et al. 2022).",
    "noise_aware": "Measures the gradient noise while training, scales the learning rate by it, "
    "and keeps decays per example.",
    "invariant": "Learning rate × k, decays to the power k, and the second moment is estimated as "
    "the base batch size would have shown it.",
    "seed": "The rule named “seed”, of the published study: learning rate and weight decay × k, "
    "decays to the power k. It has nothing to do with the seeds of the runs.",
    "seed_sqrt": "The rule named “seed_sqrt”, of the published study: as “seed”, with √k for k. It "
    "has nothing to do with the seeds of the runs.",
}


def explanation(arm: str, results: Results) -> str:
    """What an arm does, in a sentence: the rule's own, or read off the runs' hyperparameters."""
    runs = [
        (row.batch_size, results.runs[row.run_id])
        for row in results.rows
        if row.arm == arm and row.offset == 1 and row.batch_size != results.sweep.base_batch_size
    ]
    if arm in _RULES and all(run.rule in ("", arm) for _, run in runs):
        return _RULES[arm]
    known = [(size, run) for size, run in runs if run.base and run.scaled]
    if not known:
        return _RULES.get(arm, "")
    size, run = max(known, key=lambda entry: entry[0])
    changed, kept = [], []
    for name, value in run.scaled.items():
        before = run.base.get(name)
        if value is None:
            changed.append(f"{name} (measured while training)")
        elif before is not None and not math.isclose(before, value, rel_tol=1e-9):
            changed.append(f"{name} {hyperparameter(before)} → {hyperparameter(value)}")
        elif before is not None:
            kept.append(name)
    if not changed:
        return "Changes nothing, whatever the batch size."
    rest = f"; leaves {listed(kept)} alone" if kept else ""
    return f"At batch size {size}: {listed(changed)}{rest}."


def advice(analysis: Analysis) -> str:
    """What to do, in one sentence; empty where nothing can be said yet."""
    base = analysis.base
    judged = [arm for arm in analysis.arms if any(g.comparison for g in arm.groups)]
    if base is None or not base.values or not judged:
        return ""
    units = Units(analysis.sweep.accuracy_metric)
    equivalent = [arm for arm in judged if arm.verdict == Verdict.EQUIVALENT]
    if equivalent:
        best = min(equivalent, key=_farthest)
        return f"Use “{best.arm}” from batch size {best.low} to {best.high}{_departure(best)}."
    reaching = [arm for arm in judged if arm.low != arm.high]
    if reaching:
        best = max(reaching, key=lambda arm: (arm.high / arm.low, -_farthest(arm)))
        beyond = [
            str(g.batch_size) for g in best.groups if not best.low <= g.batch_size <= best.high
        ]
        return (
            f"Use “{best.arm}” from batch size {best.low} to {best.high} only: at "
            f"{listed(beyond)} it is not shown to end where the base ends."
        )
    nearest = min(judged, key=lambda arm: (any(g.diverged for g in arm.groups), _farthest(arm)))
    return (
        f"No rule is shown to hold at any batch size; “{nearest.arm}” comes nearest, at most "
        f"{units.spread(_farthest_end(nearest))} from the base."
    )


def _farthest(arm: ArmVerdict) -> float:
    """How far the arm's curves stray at most, in seed noise; by its ends where that is unknown."""
    strayed = [group.deviation.in_noise for group in arm.groups if group.deviation is not None]
    known = [value for value in strayed if math.isfinite(value)]
    return max(known) if known else _farthest_end(arm)


def _farthest_end(arm: ArmVerdict) -> float:
    return max(abs(g.comparison.difference) for g in arm.groups if g.comparison is not None)


def _departure(arm: ArmVerdict) -> str:
    if not arm.departures:
        return ""
    worst = _worst(arm)
    size = next(group.batch_size for group in arm.departures if group.deviation is worst)
    when, how = where_it_departs(worst)
    return f"; at {size} its training curve {how}{f' {when}' if when else ''}"


def _worst(arm: ArmVerdict) -> Deviation:
    found = [group.deviation for group in arm.departures if group.deviation is not None]
    return max(found, key=lambda deviation: deviation.rms)


def where_it_departs(deviation: Deviation) -> tuple[str, str]:
    """When a curve departs from the base's ("early", "late" or ""), and to which side."""
    gap = np.nan_to_num(deviation.gap)
    squares = gap**2
    third = max(len(gap) // 3, 1)
    when = ""
    if squares[:third].sum() >= 2 / 3 * squares.sum():
        when = "early"
    elif squares[-third:].sum() >= 2 / 3 * squares.sum():
        when = "late"
    # Of a loss: higher is behind.
    return when, "lags" if float((gap * np.abs(gap)).sum()) > 0 else "runs ahead"


def curve_sentence(arm: ArmVerdict, analysis: Analysis) -> str:
    """The training curve's verdict beside the final metric's, in one sentence."""
    if not any(group.deviation is not None for group in arm.groups):
        return ""
    curve = in_words(analysis.sweep.curve_metric)
    final = f"final {Units(analysis.sweep.accuracy_metric).name}"
    if not any(
        group.deviation is not None and math.isfinite(group.deviation.p_chance)
        for group in arm.groups
    ):
        return f"Whether its {curve} follows cannot be told without seeds to know the noise by."
    if not arm.departures:
        return {
            Verdict.EQUIVALENT: f"Its {curve} cannot be told from the base's at any time either.",
            Verdict.UNDECIDED: f"Its {curve} cannot be told from the base's.",
            Verdict.DIFFERENT: f"Its {curve} cannot be told from the base's, so the difference "
            "arises between training and evaluation.",
        }[arm.verdict]
    ways: dict[str, list[str]] = {}
    for group in arm.departures:
        assert group.deviation is not None
        when, how = where_it_departs(group.deviation)
        ways.setdefault(f"{how}{f' {when}' if when else ''}", []).append(str(group.batch_size))
    ways_ = listed([f"{way} at {listed(sizes)}" for way, sizes in ways.items()])
    worst = _worst(arm)
    distance = f"by {worst.rms:.3f} rms at most"
    fallen = fall(analysis)
    if fallen > 0:
        distance += f", {100 * worst.rms / fallen:.1f} % of its whole fall"
    shown = f"its {curve} {ways_} ({distance})"
    return {
        Verdict.EQUIVALENT: f"On the way there {shown}; of that no more than the margin is left in "
        f"the {final}.",
        Verdict.UNDECIDED: f"The curve is the sharper witness: {shown}.",
        Verdict.DIFFERENT: f"The curve says the same: {shown}.",
    }[arm.verdict]


def limit_sentence(arm: ArmVerdict) -> str:
    """Where the batch lay beyond the measured noise scale for a part of training."""
    beyond = []
    for group in arm.groups:
        if group.inside is None or not group.inside.share < 0.995:
            continue
        known, part = 100 * (1 - group.inside.unknown), f"{100 * group.inside.share:.0f} % of "
        part += "the training" if known > 99.5 else f"the {known:.0f} % where that is known"
        beyond.append(f"{part} at {group.batch_size}")
    if not beyond:
        return ""
    return f"Its batch lay inside the measured noise scale for only {listed(beyond)}."


def fall(analysis: Analysis) -> float:
    """How far the base's curve falls from its first window to its last."""
    if analysis.base is None or analysis.base.curve is None:
        return math.nan
    finite = analysis.base.curve[np.isfinite(analysis.base.curve)]
    return float(finite[0] - finite[-1]) if len(finite) else math.nan


def progress(results: Results, analysis: Analysis) -> str:
    """What a study that is not finished has decided, and what is open; empty for a finished one."""
    waiting = {i for i, run in results.runs.items() if run.status not in (DONE, DIVERGED)}
    if not waiting or len(waiting) == len(results.runs):
        return ""
    decided, still = [], []
    for arm in analysis.arms:
        missing = {
            row.run_id: row.batch_size
            for row in results.rows
            if row.arm == arm.arm and row.offset == 1 and row.run_id in waiting  # what it is about
        }
        # What differs at one point stays different; to be equivalent takes every point.
        closed = bool(arm.groups) and not missing and arm.verdict == Verdict.EQUIVALENT
        if arm.verdict == Verdict.DIFFERENT or closed:
            decided.append(f"{arm.arm} ({arm.verdict})")
            continue
        sizes = listed([str(size) for size in sorted(set(missing.values()))])
        if missing:
            still.append(f"{arm.arm} (waits for {count(len(missing), 'run')} at {sizes})")
        else:
            still.append(f"{arm.arm} (all runs finished, too few seeds)")
    return (
        "This study is not finished. "
        f"Decided: {listed(decided) or 'nothing yet'}. Open: {listed(still) or 'nothing'}."
    )


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
