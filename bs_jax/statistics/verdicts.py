"""Verdicts: of a point from its two tests, of an arm from its points, and both in plain words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bs_jax.records.results import Sweep
from bs_jax.report.numbers import Units, fraction, listed
from bs_jax.statistics.contrasts import seeds_to_settle
from bs_jax.statistics.groups import Group
from bs_jax.statistics.seed_noise import ALPHA

INVARIANT = "invariant"
NOT_INVARIANT = "not invariant"
UNDECIDED = "undecided"


@dataclass(frozen=True)
class ArmVerdict:
    """What can be said of one arm.

    Attributes:
      arm: its name.
      verdict: `invariant`, `not invariant` or `undecided`.
      low, high: the batch sizes that end the unbroken range around the base in which the arm was
        shown to be invariant; both the base's where it was shown nowhere else.
      seeds_needed: seeds a point (base included) that would settle an undecided arm, if the
        differences stay as they are; NaN where not applicable or unknown.
      sentence: the same in plain words.
    """

    arm: str
    verdict: str
    low: int
    high: int
    seeds_needed: float
    sentence: str


def judge(groups: Sequence[Group], base: Group | None) -> list[Group]:
    """The groups of one arm by batch size, with a verdict each where offset is 1."""
    ordered = sorted(groups, key=lambda group: (group.batch_size, group.offset))
    tested = sum(group.offset == 1 for group in ordered)
    return [
        replace(group, verdict=_point_verdict(group, tested, base)) if group.offset == 1 else group
        for group in ordered
    ]


def _point_verdict(group: Group, comparisons: int, base: Group | None) -> str:
    if base is None or not base.values:
        return UNDECIDED
    if group.diverged:
        return NOT_INVARIANT
    if group.comparison is None:
        return UNDECIDED
    if group.comparison.p_equivalent <= ALPHA:
        return INVARIANT
    return NOT_INVARIANT if group.comparison.p_beyond * comparisons <= ALPHA else UNDECIDED


def arm_verdict(arm: str, groups: Sequence[Group], base: Group | None, sweep: Sweep) -> ArmVerdict:
    """The verdict on one arm from those on its points (of `judge`)."""
    tested = [group for group in groups if group.offset == 1]
    low, high = _range(tested, sweep.base_batch_size)
    found = {group.verdict for group in tested}
    verdict = UNDECIDED
    if NOT_INVARIANT in found:
        verdict = NOT_INVARIANT
    elif found == {INVARIANT}:
        verdict = INVARIANT
    needed = _seeds_needed(tested, base, sweep.margin) if verdict == UNDECIDED else math.nan
    sentence = _sentence(verdict, tested, (low, high), needed, base, sweep)
    return ArmVerdict(arm, verdict, low, high, needed, sentence)


def _range(tested: Sequence[Group], base_batch_size: int) -> tuple[int, int]:
    ends = []
    for side in (
        [group for group in reversed(tested) if group.k < 1],
        [group for group in tested if group.k > 1],
    ):
        end = base_batch_size
        for group in side:
            if group.verdict != INVARIANT:
                break
            end = group.batch_size
        ends.append(end)
    return ends[0], ends[1]


def _seeds_needed(tested: Sequence[Group], base: Group | None, margin: float) -> float:
    """Seeds a point until every open point is closed, or one is shown to be beyond the margin."""
    inside, beyond = [], []
    for group in tested:
        comparison = group.comparison
        if group.verdict != UNDECIDED:
            continue
        if base is None or comparison is None or not comparison.standard_error > 0:
            return math.nan
        # One seed's sd, back from the standard error of a difference of two means.
        sd = comparison.standard_error / math.sqrt(comparison.share)
        needed = seeds_to_settle(
            comparison.difference, margin, sd, comparison.standard_error, len(tested)
        )
        (beyond if abs(comparison.difference) > margin else inside).append(needed)
    return min(beyond) if beyond else max(inside, default=math.nan)


def _sentence(
    verdict: str,
    tested: Sequence[Group],
    shown: tuple[int, int],
    seeds_needed: float,
    base: Group | None,
    sweep: Sweep,
) -> str:
    units = Units(sweep.accuracy_metric)
    if not tested:
        return "Has no point away from the base batch size, so there is nothing to compare."
    if base is None or not base.values:
        return f"No finished run at the base batch size {sweep.base_batch_size} to compare with."
    if verdict == INVARIANT:
        margin = units.spread(sweep.margin)
        return f"Final {units.name} stays within ±{margin} of the base {_span(shown, sweep)}."
    reach = ""
    if shown[0] != shown[1]:
        reach = f" Shown to stay within the margin {_span(shown, sweep)}."
    if verdict == NOT_INVARIANT:
        failed = [_failure(group, units) for group in tested if group.verdict == NOT_INVARIANT]
        return f"Differs from the base at batch size {listed(failed)}.{reach}"
    open_points = [str(group.batch_size) for group in tested if group.verdict == UNDECIDED]
    if math.isnan(seeds_needed):
        help_ = "it needs finished runs of at least 2 seeds a point, the base included."
    elif seeds_needed > 100:
        help_ = "more than 100 seeds a point may be needed: the seeds scatter too much."
    else:
        help_ = f"about {int(seeds_needed)} seeds a point, base included, would likely settle it."
    return f"Open at batch size {listed(open_points)}; {help_}{reach}"


def _failure(group: Group, units: Units) -> str:
    if group.diverged:
        return f"{group.batch_size} ({group.diverged} of {group.planned} diverged)"
    assert group.comparison is not None
    unit = " points" if units.percent else ""
    return f"{group.batch_size} ({units.signed(group.comparison.difference)}{unit})"


def _span(shown: tuple[int, int], sweep: Sweep) -> str:
    ends = [fraction(size / sweep.base_batch_size) for size in shown]
    return f"from batch size {shown[0]} to {shown[1]} (k = {ends[0]} to {ends[1]})"
