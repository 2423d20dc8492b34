"""Statistics against hand computation, scipy and simulation."""

import math

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

from bs_jax.statistics import contrasts as statistics
from bs_jax.statistics import seed_noise as noises

MARGIN = 0.01


def test_t_interval_by_hand():
    interval = statistics.mean_interval([1.0, 2.0, 3.0, 4.0])
    # t(.975, 3) = 3.18245 and sd = sqrt(5/3), from the tables.
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert interval.low == pytest.approx(2.5 - half, rel=1e-6)
    assert interval.high == pytest.approx(2.5 + half, rel=1e-6)
    assert math.isnan(statistics.mean_interval([1.0]).sd)
    assert statistics.mean_interval([]).n == 0


def apart(*groups):
    """Groups by seed, no seed in two of them."""
    return [
        {100 * index + seed: value for seed, value in enumerate(group)}
        for index, group in enumerate(groups)
    ]


def together(*groups):
    """Groups by seed, the same seeds in all."""
    return [dict(enumerate(group)) for group in groups]


@pytest.mark.parametrize("pooled", [True, False])
def test_both_tests_equal_scipy(pooled):
    group, base = [0.812, 0.823, 0.819, 0.826], [0.815, 0.811, 0.824]
    noise = noises.estimate_noise(apart(group, base)) if pooled else None
    found = statistics.compare(*apart(group, base), MARGIN, noise)

    def one_sided(shift, alternative):
        moved = [value + shift for value in group]
        return scipy.stats.ttest_ind(moved, base, equal_var=pooled, alternative=alternative).pvalue

    expected = max(one_sided(MARGIN, "greater"), one_sided(-MARGIN, "less"))
    assert found.p_equivalent == pytest.approx(expected, rel=1e-9)
    assert found.p_beyond == pytest.approx(one_sided(-MARGIN, "greater"), rel=1e-9)
    reference = scipy.stats.ttest_ind(group, base, equal_var=pooled).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(reference), rel=1e-9)
    assert found.p_equivalent <= 0.05 or not (found.low_90 > -MARGIN and found.high_90 < MARGIN)


def test_bartlett_equals_scipy():
    generator = np.random.default_rng(1)
    groups = [generator.normal(size=n) * s for n, s in ((3, 1), (4, 2), (5, 1), (3, 0.5))]
    noise = noises.estimate_noise(apart(*groups))
    assert noise is not None
    assert noise.p_equal == pytest.approx(scipy.stats.bartlett(*groups).pvalue, rel=1e-9)
    assert noise.df == 11
    assert not noise.paired
    assert noise.seed_sd == pytest.approx(noise.sd)


@pytest.mark.parametrize("seeds", [apart, together])
def test_no_noise_is_known_from_single_seeds_or_ties(seeds):
    assert noises.estimate_noise(seeds([0.8], [0.9])) is None
    assert noises.estimate_noise(seeds([0.8, 0.8], [0.9, 0.9])) is None
    found = statistics.compare(*seeds([0.8, 0.8], [0.7, 0.7]), MARGIN)
    assert found.difference == pytest.approx(0.1)
    assert math.isnan(found.p_equivalent)


@pytest.mark.parametrize("seeds", [apart, together])
def test_a_tie_among_others_is_no_infinite_logarithm(seeds):
    groups = seeds([0.8, 0.8, 0.8], [0.7, 0.71, 0.72], [0.75, 0.76, 0.74])
    noise = noises.estimate_noise(groups)
    assert noise is not None
    assert 0 < noise.p_equal < 1


def simulate(spread, truth, repeats, *, seeds=apart, common=0.0, groups=9, count=3):
    """Coverage, share judged equal and share judged beyond, with the choice of test included."""
    generator = np.random.default_rng(7)
    covered = equal = beyond = 0
    for _ in range(repeats):
        sds = 0.005 * np.exp(spread * generator.standard_normal(groups))
        values = sds[:, None] * generator.standard_normal((groups, count))
        values += common * generator.standard_normal(count)
        values[1] += truth
        named = seeds(*values)
        noise = noises.estimate_noise(named)
        found = statistics.compare(
            named[1], named[0], MARGIN, noise if noise and noise.shared else None
        )
        covered += found.low <= truth <= found.high
        equal += found.p_equivalent <= 0.05
        beyond += found.p_beyond <= 0.05
    return covered / repeats, equal / repeats, beyond / repeats


# What seeds have in common changes nothing, as a test below shows exactly; a spread between the two
# ends is between them.
COMMON = pytest.param(together, 0.02, marks=pytest.mark.long)
BETWEEN = pytest.param(0.3, marks=pytest.mark.long)


@pytest.mark.parametrize(("seeds", "common"), [(apart, 0.0), (together, 0.0), COMMON])
@pytest.mark.parametrize("spread", [0.0, BETWEEN, 0.6])
def test_intervals_cover_and_neither_test_claims_too_much_at_the_margin(spread, seeds, common):
    covered, equal, beyond = simulate(spread, MARGIN, 1500, seeds=seeds, common=common)
    # 3.5 standard errors of a share of 5 % of 1,500 are 2 %.
    assert covered >= 0.93
    assert equal <= 0.07
    assert beyond <= 0.07


def test_pooling_gives_power_that_three_seeds_lack_on_their_own():
    _, equal, beyond = simulate(0.0, 0.0, 1000)
    assert equal > 0.45
    assert beyond == 0
    alone = [
        statistics.compare(*apart(*values), MARGIN).p_equivalent <= 0.05
        for values in 0.005 * np.random.default_rng(3).standard_normal((1000, 2, 3))
    ]
    assert np.mean(alone) < equal - 0.1


def test_pairing_gives_power_where_seeds_have_much_in_common():
    _, blind, _ = simulate(0.0, 0.0, 500, common=0.02)
    _, paired, _ = simulate(0.0, 0.0, 500, common=0.02, seeds=together)
    assert blind < 0.05
    assert paired > 0.4


def test_own_differences_of_a_pair_equal_scipys_paired_test():
    group, base = [0.812, 0.823, 0.819, 0.826], [0.801, 0.811, 0.814, 0.812]
    found = statistics.compare(*together(group, base), MARGIN)
    reference = scipy.stats.ttest_rel(group, base).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(reference), rel=1e-9)
    moved = [value - MARGIN for value in group]
    beyond = scipy.stats.ttest_rel(moved, base, alternative="greater").pvalue
    assert found.p_beyond == pytest.approx(beyond, rel=1e-9)
    assert found.share == 2 / 4


def test_paired_noise_is_that_of_the_two_way_table():
    table = np.random.default_rng(2).normal(size=(5, 4)) + 3 * np.arange(4)
    rows, columns = table.mean(axis=1, keepdims=True), table.mean(axis=0, keepdims=True)
    residuals = table - rows - columns + table.mean()
    noise = noises.estimate_noise(together(*table))
    assert noise is not None
    assert noise.paired
    assert (noise.df, noise.groups) == (12, 5)
    assert noise.variance == pytest.approx((residuals**2).sum() / 12)
    assert noise.seed_sd == pytest.approx(math.sqrt(table.var(axis=1, ddof=1).mean()))


@given(
    effects=st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    lost=st.sets(st.integers(0, 3), max_size=1),
    extra=st.floats(-1, 1),
)
def test_what_a_seed_does_everywhere_changes_nothing(effects, lost, extra):
    """Nor does a seed that the base has alone."""
    table = np.random.default_rng(4).normal(size=(4, 4))
    plain, moved = (together(*(table + shift)) for shift in (np.zeros(4), np.array(effects)))
    moved[0][9] = extra
    for groups in (plain, moved):
        for seed in lost:
            del groups[2][seed]
    found = [noises.estimate_noise(groups) for groups in (plain, moved)]
    for index in (1, 2):
        for pooled in (True, False):
            first, second = (
                statistics.compare(groups[index], groups[0], 1.0, noise if pooled else None)
                for groups, noise in zip((plain, moved), found, strict=True)
            )
            assert second.difference == pytest.approx(first.difference, abs=1e-9)
            assert second.standard_error == pytest.approx(first.standard_error, rel=1e-6)
            assert second.df == first.df
    assert found[0].p_equal == pytest.approx(found[1].p_equal, abs=1e-6)


def test_equal_noise_in_pairs_is_seldom_taken_for_unequal():
    generator = np.random.default_rng(6)
    rejected = 0
    for _ in range(500):
        noise = noises.estimate_noise(together(*generator.standard_normal((6, 4))))
        assert noise is not None
        rejected += not noise.shared
    assert rejected / 500 <= 0.085  # 3.5 standard errors above 5 %


@pytest.mark.parametrize(
    ("group", "paired"),
    [
        ({0: 0.80, 1: 0.83, 2: 0.81}, True),
        ({1: 0.80, 2: 0.83, 3: 0.81}, True),  # two of three
        ({2: 0.80, 3: 0.83, 4: 0.81}, False),  # one seed alone
        ({1: 0.80, 2: 0.83, 5: 0.8, 6: 0.8, 7: 0.8, 8: 0.8, 9: 0.8}, True),
    ],
)
def test_groups_are_paired_by_the_seeds_they_share(group, paired):
    base = {0: 0.82, 1: 0.85, 2: 0.81}
    assert noises.estimate_noise([base, group]).paired is paired
    found = statistics.compare(group, base, MARGIN)
    shared = sorted({*base} & {*group})
    means = [np.mean([g[s] for s in shared] if paired else [*g.values()]) for g in (group, base)]
    assert found.difference == pytest.approx(means[0] - means[1])


@pytest.mark.parametrize("difference", [0.0, 0.004, 0.02])
def test_the_promised_number_of_seeds_settles_it_four_times_out_of_five(difference):
    sd = 0.006
    seeds = statistics.seeds_to_settle(difference, MARGIN, sd)
    generator = np.random.default_rng(5)
    settled = 0
    for _ in range(600):
        group, base = sd * generator.standard_normal((2, int(seeds)))
        found = statistics.compare(
            *apart(group + difference, base), MARGIN, noises.SeedNoise(sd**2, 60, 20, 1.0)
        )
        settled += min(found.p_equivalent, found.p_beyond) <= 0.05
    assert 0.74 <= settled / 600 <= 0.97
    assert statistics.seeds_to_settle(MARGIN, MARGIN, sd) == math.inf
