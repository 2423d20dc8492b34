"""The verdict on a rule, as data, from the verdicts on its points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bs_jax.statistics.contrasts import Verdict, seeds_to_settle
from bs_jax.statistics.groups import Group
from bs_jax.statistics.seed_noise import ALPHA


@dataclass(frozen=True)
class ArmVerdict:
    """What can be said of one arm (a rule, in most sweeps).

    Attributes:
      arm: its name.
      verdict: `EQUIVALENT` if all its points are, `DIFFERENT` if one is, else `UNDECIDED`.
      low, high: the batch sizes that end the unbroken range around the base in which the arm was
        shown to be equivalent; both the base's where it was shown nowhere else.
      seeds_needed: seeds a point (base included) that would settle an undecided arm, if the
        differences stay as they are; NaN where not applicable or unknown.
      groups: its points away from the base with offset 1, by batch size.
      departures: those whose training curve is shown to depart from the base's, at 5 % over the
        arm's points (Bonferroni): a sharper witness than the end alone, with no say in the verdict.
    """

    arm: str
    verdict: Verdict
    low: int
    high: int
    seeds_needed: float
    groups: tuple[Group, ...]
    departures: tuple[Group, ...]


def judge(groups: Sequence[Group], base: Group | None) -> list[Group]:
    """The groups of one arm by batch size, with a verdict each where the offset is 1."""
    ordered = sorted(groups, key=lambda group: (group.batch_size, group.offset))
    tests = sum(group.offset == 1 for group in ordered)
    return [
        replace(group, verdict=_point_verdict(group, tests, base)) if group.offset == 1 else group
        for group in ordered
    ]


def _point_verdict(group: Group, tests: int, base: Group | None) -> Verdict:
    if base is None or not base.values:
        return Verdict.UNDECIDED
    if group.diverged:
        return Verdict.DIFFERENT
    return group.comparison.verdict(tests) if group.comparison else Verdict.UNDECIDED


def arm_verdict(
    arm: str, groups: Sequence[Group], base: Group | None, base_batch_size: int, margin: float
) -> ArmVerdict:
    """The verdict on one arm from those on its points.

    Args:
      arm: its name.
      groups: of `judge`.
      base: the base group.
      base_batch_size: examples per update that the recipe was tuned at.
      margin: the difference that still counts as none, in units of the metric.

    Returns:
      The `ArmVerdict`.
    """
    tested = [group for group in groups if group.offset == 1]
    found = {group.verdict for group in tested}
    verdict = Verdict.UNDECIDED
    if Verdict.DIFFERENT in found:
        verdict = Verdict.DIFFERENT
    elif found == {Verdict.EQUIVALENT}:
        verdict = Verdict.EQUIVALENT
    needed = _seeds_needed(tested, base, margin) if verdict == Verdict.UNDECIDED else math.nan
    below = [group for group in reversed(tested) if group.k < 1]
    above = [group for group in tested if group.k > 1]
    low, high = (_reach(side, base_batch_size) for side in (below, above))
    departures = tuple(
        group
        for group in tested
        if group.deviation is not None and group.deviation.p_chance * len(tested) <= ALPHA
    )
    return ArmVerdict(arm, verdict, low, high, needed, tuple(tested), departures)


def _reach(side: Sequence[Group], base_batch_size: int) -> int:
    """The last batch size, going away from the base, before one that is not equivalent."""
    end = base_batch_size
    for group in side:
        if group.verdict != Verdict.EQUIVALENT:
            break
        end = group.batch_size
    return end


def _seeds_needed(tested: Sequence[Group], base: Group | None, margin: float) -> float:
    """Seeds a point until every open point is closed, or one is shown to be beyond the margin."""
    inside, beyond = [], []
    for group in tested:
        comparison = group.comparison
        if group.verdict != Verdict.UNDECIDED:
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
