"""The published findings as data, and what a sweep says of each: effect, interval, verdict.

A finding is one or more contrasts between arms, each a direction that must hold. A contrast is the
mean over its batch sizes and its pairs of arms of `first arm - second arm`. Every pair changes one
thing alone, beside other settings of the rest, so a sweep with more arms answers the same question
with more runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bs_jax.statistics.analysis import Analysis
from bs_jax.statistics.contrasts import Estimate, holm, linear_contrast
from bs_jax.statistics.groups import Group, is_near
from bs_jax.statistics.seed_noise import ALPHA, SeedNoise, exceeds

SUPPORTED = "supported"
CONTRADICTED = "contradicted"
UNDECIDED = "undecided"
SLIGHT_MARGINS = 2.0  # what "slightly" ends at, in margins

# What a contrast's difference d must be, m being the margin.
HIGHER = "higher"  # d > 0; the opposite is d < 0
NOT_HIGHER = "not higher"  # d < m; the opposite is d > m
SLIGHTLY_LOWER = "slightly lower"  # -2 m < d < 0; the opposite is d > 0 or d < -2 m
SAME = "same"  # |d| < m; the opposite is |d| > m
LARGER_EFFECT = "larger effect"  # |first effect| > |second effect|; the opposite is <

_BELOW, _ABOVE = "smaller batches", "larger batches"

Term = tuple[str, float]  # arm and offset
Pair = tuple[Term, Term]


def _pairs(*names: tuple[str, str]) -> tuple[Pair, ...]:
    return tuple(((first, 1.0), (second, 1.0)) for first, second in names)


@dataclass(frozen=True)
class Contrast:
    """One direction that a finding claims.

    Attributes:
      side: "smaller batches" or "larger batches" than the base's.
      pairs: (arm, offset) and (arm, offset) to subtract from it; those that the sweep has count.
      expected: what their difference must be, `HIGHER` and so on.
      rival: what it is called, and the pairs whose effect must be the smaller (`LARGER_EFFECT`).
    """

    side: str
    pairs: tuple[Pair, ...]
    expected: str
    rival: tuple[str, tuple[Pair, ...]] = ("", ())


@dataclass(frozen=True)
class Finding:
    """A published finding: it holds if all its contrasts do."""

    name: str
    claim: str
    contrasts: tuple[Contrast, ...]


# One hyperparameter (or one pair of momenta) scaled or not, beside each setting of the others.
LR = _pairs(
    ("lr_lin", "no"),
    ("not_moms_lin", "wd_lin"),
    ("not_wd_lin", "moms_lin"),
    ("all_lin", "not_lr_lin"),
)
WD = _pairs(
    ("wd_lin", "no"),
    ("not_moms_lin", "lr_lin"),
    ("not_lr_lin", "moms_lin"),
    ("all_lin", "not_wd_lin"),
)
MOMS = _pairs(
    ("moms_lin", "no"),
    ("not_wd_lin", "lr_lin"),
    ("not_lr_lin", "wd_lin"),
    ("all_lin", "not_moms_lin"),
)
MOM = _pairs(("mom_lin", "no"), ("moms_lin", "sqmom_lin"))
SQMOM = _pairs(("sqmom_lin", "no"), ("moms_lin", "mom_lin"))
BN = _pairs(("bn_lin", "no"))

SLOWER = "1b learning rate: slower than linear"

PUBLISHED = (
    Finding(
        "1a learning rate: matters most",
        "Of all that can be scaled, the learning rate changes the accuracy most.",
        tuple(
            Contrast(side, LR, LARGER_EFFECT, rival)
            for side in (_BELOW, _ABOVE)
            for rival in (("weight decay", WD), ("momenta", MOMS), ("BatchNorm momentum", BN))
        ),
    ),
    Finding(
        SLOWER,
        "A learning rate half way back to the base's is better than one in proportion to the batch "
        "size.",
        (
            Contrast(_BELOW, ((("lr_lin", 2.0), ("lr_lin", 1.0)),), HIGHER),
            Contrast(_ABOVE, ((("lr_lin", 0.5), ("lr_lin", 1.0)),), HIGHER),
        ),
    ),
    Finding(
        "2 weight decay",
        "Raising it helps at large batch sizes; lowering it at small ones does not.",
        (Contrast(_ABOVE, WD, HIGHER), Contrast(_BELOW, WD, NOT_HIGHER)),
    ),
    Finding(
        "3 squared momentum",
        "Scaling it has no visible effect.",
        (Contrast(_BELOW, SQMOM, SAME), Contrast(_ABOVE, SQMOM, SAME)),
    ),
    Finding(
        "4 momentum",
        "Scaling it is slightly worse.",
        (Contrast(_BELOW, MOM, SLIGHTLY_LOWER), Contrast(_ABOVE, MOM, SLIGHTLY_LOWER)),
    ),
    Finding(
        "5 BatchNorm momentum",
        "Scaling it is slightly worse.",
        (Contrast(_BELOW, BN, SLIGHTLY_LOWER), Contrast(_ABOVE, BN, SLIGHTLY_LOWER)),
    ),
)


@dataclass(frozen=True)
class Effect:
    """A contrast and what the runs say of it.

    Attributes:
      contrast: which.
      estimate: the difference; None without finished runs of a pair.
      rival: the other effect, for `LARGER_EFFECT`.
      low, high: its 95 % interval; NaN where no seed noise is known.
      batch_sizes, pairs: how many of each it is the mean of.
      seeds: fewest finished seeds of a point in it.
      groups: the points that it is made of, the rival's included.
      diverged: runs in it that diverged.
      p_supported: small says that the direction is as claimed; NaN if it could not be tested.
      p_contradicted: small says that it is the opposite.
    """

    contrast: Contrast
    estimate: Estimate | None
    rival: Estimate | None
    low: float
    high: float
    batch_sizes: tuple[int, ...]
    pairs: int
    seeds: int
    groups: tuple[Group, ...]
    diverged: int
    p_supported: float
    p_contradicted: float


@dataclass(frozen=True)
class Answer:
    """A finding's verdict.

    Attributes:
      finding: which.
      effects: one a contrast.
      p_supported: all contrasts hold (their largest p), adjusted over all findings (Holm).
      p_contradicted: the opposite of one is shown (Bonferroni over them), adjusted likewise.
      verdict: `SUPPORTED`, `CONTRADICTED` or `UNDECIDED`.
    """

    finding: Finding
    effects: tuple[Effect, ...]
    p_supported: float
    p_contradicted: float
    verdict: str

    @property
    def waits_for(self) -> int:
        """Runs of its points that are neither finished nor diverged."""
        groups = {
            (group.arm, group.batch_size, group.offset): group
            for effect in self.effects
            for group in effect.groups
        }
        return sum(group.unfinished for group in groups.values())


def answer(analysis: Analysis, findings: Sequence[Finding] = PUBLISHED) -> tuple[Answer, ...]:
    """What a sweep says of each finding that it has any pair of arms for.

    Each contrast is tested by one-sided t tests (two for "same": TOST), seed by seed where the arms
    have the same seeds, with the noise pooled over the sweep, or by the groups' own where it is not
    shared. Where runs diverged there is no
    mean to test: who diverged more is tested by Fisher's exact test. A finding is supported if all
    its contrasts are (the largest p counts: an intersection-union test), contradicted if the
    opposite of one is shown (Bonferroni). Both families of p-values are adjusted together over all
    findings (Holm), so that the chance of any wrong verdict in the table is at most 5 %.

    Args:
      analysis: of `analyse`, which decides metric and margin.
      findings: the claims.

    Returns:
      The answers, in the order of the findings; none for a sweep about something else.

    Reference: Berger 1982 (intersection-union tests); Schuirmann 1987 (TOST); Holm 1979.
    """
    sides = _sides(analysis)
    found = []
    for finding in findings:
        effects = tuple(_effect(contrast, sides, analysis) for contrast in finding.contrasts)
        if any(effect.pairs for effect in effects):
            found.append((finding, effects))
    raw = []
    for _, effects in found:
        supported = [effect.p_supported for effect in effects]
        against = [e.p_contradicted for e in effects if not math.isnan(e.p_contradicted)]
        raw.append(math.nan if any(map(math.isnan, supported)) else max(supported))
        raw.append(min(1.0, len(against) * min(against)) if against else math.nan)
    adjusted = holm(raw)
    return tuple(
        Answer(finding, effects, p, q, _verdict(p, q))
        for (finding, effects), p, q in zip(found, adjusted[::2], adjusted[1::2], strict=True)
    )


def _verdict(p_supported: float, p_contradicted: float) -> str:
    if p_supported <= ALPHA:
        return SUPPORTED
    return CONTRADICTED if p_contradicted <= ALPHA else UNDECIDED


Groups = Mapping[tuple[str, int, float], Group]


def _sides(analysis: Analysis) -> dict[str, Groups]:
    groups = {(g.arm, g.batch_size, g.offset): g for g in analysis.groups}
    return {
        _BELOW: {key: group for key, group in groups.items() if group.k < 1},
        _ABOVE: {key: group for key, group in groups.items() if group.k > 1},
    }


Matched = list[tuple[int, Group, Group]]


def _match(pairs: Sequence[Pair], groups: Groups) -> Matched:
    """The pairs of groups that the sweep has, batch size by batch size."""
    sizes = sorted({size for _, size, _ in groups})
    return [
        (size, groups[first[0], size, first[1]], groups[second[0], size, second[1]])
        for size in sizes
        for first, second in pairs
        if (first[0], size, first[1]) in groups and (second[0], size, second[1]) in groups
    ]


def _effect(contrast: Contrast, sides: Mapping[str, Groups], analysis: Analysis) -> Effect:
    matched = _match(contrast.pairs, sides[contrast.side])
    rivals = _match(contrast.rival[1], sides[contrast.side])
    # Two effects are compared over the same batch sizes.
    if contrast.expected == LARGER_EFFECT:
        shared = {size for size, _, _ in matched} & {size for size, _, _ in rivals}
        matched = [entry for entry in matched if entry[0] in shared]
        rivals = [entry for entry in rivals if entry[0] in shared]
    both_sides = [group for _, *both in (*matched, *rivals) for group in both]
    everyone = tuple({(g.arm, g.batch_size, g.offset): g for g in both_sides}.values())
    diverged = sum(group.diverged for group in everyone)
    ours, theirs = _weights(matched), _weights(rivals)
    estimate = _estimate(ours, analysis)
    p_supported = p_contradicted = low = high = math.nan
    if diverged:
        p_supported, p_contradicted = _p_of_divergence(contrast.expected, matched)
    elif estimate is not None and estimate.error > 0:
        low, high = estimate.interval()
        if contrast.expected == LARGER_EFFECT:
            p_supported, p_contradicted = _p_of_sizes(ours, theirs, analysis)
        else:
            p_supported, p_contradicted = _TESTS[contrast.expected](estimate, analysis.sweep.margin)
    return Effect(
        contrast=contrast,
        estimate=estimate,
        rival=_estimate(theirs, analysis),
        low=low,
        high=high,
        batch_sizes=tuple(dict.fromkeys(size for size, _, _ in matched)),
        pairs=len({(first.arm, second.arm) for _, first, second in matched}),
        seeds=min((len(group.values) for group in everyone), default=0),
        groups=everyone,
        diverged=diverged,
        p_supported=p_supported,
        p_contradicted=p_contradicted,
    )


Weights = list[tuple[float, Group]]


def _weights(matched: Matched) -> Weights:
    """Each group with its share in the mean difference; what is added and subtracted cancels."""
    shares: dict[int, tuple[float, Group]] = {}
    for _, first, second in matched:
        for sign, group in ((1.0, first), (-1.0, second)):
            share = shares.get(id(group), (0.0, group))[0] + sign / len(matched)
            shares[id(group)] = (share, group)
    return [(share, group) for share, group in shares.values() if abs(share) > 1e-12]


def _estimate(weights: Weights, analysis: Analysis) -> Estimate | None:
    if not weights or any(not group.values for _, group in weights):
        return None
    terms = [(share, group.by_seed) for share, group in weights]
    return linear_contrast(terms, _noise_of(weights, analysis))


def _noise_of(weights: Weights, analysis: Analysis) -> SeedNoise | None:
    """The pooled noise, unless the groups do not share it or one far away exceeds it."""
    noise, base = analysis.noise, analysis.base
    if noise is None or base is None or not noise.shared:
        return None
    near = (
        is_near(g, base, analysis.sweep.margin) or not exceeds(g.by_seed, base.by_seed, noise)
        for _, g in weights
    )
    return noise if all(near) else None


def _p_of_sizes(ours: Weights, theirs: Weights, analysis: Analysis) -> tuple[float, float]:
    """|a| > |b| is a - b and a + b both above 0, or both below: the better of the two, doubled."""
    if not theirs or any(not group.values for _, group in theirs):
        return math.nan, math.nan
    less = _estimate(_combined(ours, theirs, -1.0), analysis)
    more = _estimate(_combined(ours, theirs, 1.0), analysis)
    if less is None or more is None or not (less.error > 0 and more.error > 0):
        return math.nan, math.nan
    ours_above = max(less.p_above(0), more.p_above(0))
    ours_below = max(less.p_below(0), more.p_below(0))
    theirs_above = max(less.p_below(0), more.p_above(0))
    theirs_below = max(less.p_above(0), more.p_below(0))
    return (
        min(1.0, 2 * min(ours_above, ours_below)),
        min(1.0, 2 * min(theirs_above, theirs_below)),
    )


def _combined(ours: Weights, theirs: Weights, sign: float) -> Weights:
    shares = {id(group): (share, group) for share, group in ours}
    for share, group in theirs:
        shares[id(group)] = (shares.get(id(group), (0.0, group))[0] + sign * share, group)
    return [(share, group) for share, group in shares.values() if abs(share) > 1e-12]


def _same(estimate: Estimate, margin: float) -> tuple[float, float]:
    outside = 2 * min(estimate.p_above(margin), estimate.p_below(-margin))
    return max(estimate.p_below(margin), estimate.p_above(-margin)), min(1.0, outside)


def _slightly_lower(estimate: Estimate, margin: float) -> tuple[float, float]:
    limit = -SLIGHT_MARGINS * margin
    against = 2 * min(estimate.p_above(0), estimate.p_below(limit))
    return max(estimate.p_below(0), estimate.p_above(limit)), min(1.0, against)


_TESTS: dict[str, Callable[[Estimate, float], tuple[float, float]]] = {
    HIGHER: lambda estimate, margin: (estimate.p_above(0), estimate.p_below(0)),
    NOT_HIGHER: lambda estimate, margin: (estimate.p_below(margin), estimate.p_above(margin)),
    SAME: _same,
    SLIGHTLY_LOWER: _slightly_lower,
}


def _p_of_divergence(expected: str, matched: Matched) -> tuple[float, float]:
    """By who diverged more, where there is no mean to compare (Fisher's exact test, one-sided)."""
    from scipy import stats  # half a second to import, for what few sweeps need

    firsts = {id(group): group for _, group, _ in matched}.values()
    seconds = {id(group): group for _, _, group in matched}.values()
    lost, size = (
        [sum(group.diverged for group in side) for side in (firsts, seconds)],
        [sum(group.diverged + len(group.values) for group in side) for side in (firsts, seconds)],
    )
    # So many of the diverged runs, or more, on one side if they fell there by chance.
    first_worse, second_worse = (
        float(stats.hypergeom.sf(own - 1, sum(size), sum(lost), runs))
        for own, runs in zip(lost, size, strict=True)
    )
    either = min(1.0, 2 * min(first_worse, second_worse))
    return {
        HIGHER: (second_worse, first_worse),
        NOT_HIGHER: (first_worse, second_worse),
        SAME: (math.nan, either),
        # A run that diverges is no slight loss.
        SLIGHTLY_LOWER: (math.nan, either),
        LARGER_EFFECT: (math.nan, math.nan),
    }[expected]
