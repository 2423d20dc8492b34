"""Statistics against hand computation, scipy and simulation; verdicts from known records."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.synthetic_records import diverge, edit_json, write_records
from scipy import stats

from bs_jax.experiments import _report_curves as curves
from bs_jax.experiments import _report_statistics as statistics
from bs_jax.experiments import analysis
from bs_jax.experiments.results import Curve, Results, Row, Run, Sweep, load_results

MARGIN = 0.01
SWEEP = Sweep("s", "c", "t", "", 64, "acc", "loss", "train/loss", MARGIN, (), "", "", None)


def made_up(groups, seeds_of=lambda values: range(len(values)), curve=None):
    """Results in memory: {(arm, batch size): finals}; None in the finals is a diverged run."""
    rows, runs = [], {}
    for (arm, batch_size), values in groups.items():
        for seed, value in zip(seeds_of(values), values, strict=True):
            run_id = f"{arm}-{batch_size}-{seed}"
            status = "diverged" if value is None else "done"
            metrics = {} if value is None else {"acc": value, "loss": 1 - value}
            made = {"train/loss": curve(arm, batch_size, seed)} if curve else {}
            runs[run_id] = Run(run_id, status, metrics, "", {}, {}, (), made, {})
            k = batch_size / 64
            rows.append(Row(arm, batch_size, k, 1.0, seed, run_id, status, metrics, {}))
    return Results(Path(), SWEEP, tuple(rows), runs, (), ())


def test_t_interval_by_hand():
    interval = statistics.mean_interval([1.0, 2.0, 3.0, 4.0])
    # t(.975, 3) = 3.18245 and sd = sqrt(5/3), from the tables.
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert interval.low == pytest.approx(2.5 - half, rel=1e-6)
    assert interval.high == pytest.approx(2.5 + half, rel=1e-6)
    assert math.isnan(statistics.mean_interval([1.0]).sd)
    assert statistics.mean_interval([]).n == 0


@pytest.mark.parametrize("pooled", [True, False])
def test_both_tests_equal_scipy(pooled):
    group, base = [0.812, 0.823, 0.819, 0.826], [0.815, 0.811, 0.824]
    noise = statistics.estimate_noise([group, base]) if pooled else None
    found = statistics.compare(group, base, MARGIN, noise)

    def one_sided(shift, alternative):
        moved = [value + shift for value in group]
        return stats.ttest_ind(moved, base, equal_var=pooled, alternative=alternative).pvalue

    expected = max(one_sided(MARGIN, "greater"), one_sided(-MARGIN, "less"))
    assert found.p_equivalent == pytest.approx(expected, rel=1e-9)
    assert found.p_beyond == pytest.approx(one_sided(-MARGIN, "greater"), rel=1e-9)
    reference = stats.ttest_ind(group, base, equal_var=pooled).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(reference), rel=1e-9)
    assert found.p_equivalent <= 0.05 or not (found.low_90 > -MARGIN and found.high_90 < MARGIN)


def test_bartlett_equals_scipy():
    generator = np.random.default_rng(1)
    groups = [generator.normal(size=n) * s for n, s in ((3, 1), (4, 2), (5, 1), (3, 0.5))]
    noise = statistics.estimate_noise(groups)
    assert noise is not None
    assert noise.p_equal == pytest.approx(stats.bartlett(*groups).pvalue, rel=1e-9)
    assert noise.df == 11


def test_no_noise_is_known_from_single_seeds_or_ties():
    assert statistics.estimate_noise([[0.8], [0.9]]) is None
    assert statistics.estimate_noise([[0.8, 0.8], [0.9, 0.9]]) is None
    found = statistics.compare([0.8, 0.8], [0.7, 0.7], MARGIN)
    assert found.difference == pytest.approx(0.1)
    assert math.isnan(found.p_equivalent)


def test_a_tie_among_others_is_no_infinite_logarithm():
    noise = statistics.estimate_noise([[0.8, 0.8, 0.8], [0.7, 0.71, 0.72], [0.75, 0.76, 0.74]])
    assert noise is not None
    assert 0 < noise.p_equal < 1


def simulate(spread, truth, repeats, groups=9, seeds=3):
    """Coverage, share judged equal and share judged beyond, with the choice of test included."""
    generator = np.random.default_rng(7)
    covered = equal = beyond = 0
    for _ in range(repeats):
        sds = 0.005 * np.exp(spread * generator.standard_normal(groups))
        values = sds[:, None] * generator.standard_normal((groups, seeds))
        values[1] += truth
        noise = statistics.estimate_noise(list(values))
        found = statistics.compare(
            values[1], values[0], MARGIN, noise if noise and noise.shared else None
        )
        covered += found.low <= truth <= found.high
        equal += found.p_equivalent <= 0.05
        beyond += found.p_beyond <= 0.05
    return covered / repeats, equal / repeats, beyond / repeats


@pytest.mark.parametrize("spread", [0.0, 0.3, 0.6])
def test_intervals_cover_and_neither_test_claims_too_much_at_the_margin(spread):
    covered, equal, beyond = simulate(spread, MARGIN, 1500)
    # 3.5 standard errors of a share of 5 % of 1,500 are 2 %.
    assert covered >= 0.93
    assert equal <= 0.07
    assert beyond <= 0.07


def test_pooling_gives_power_that_three_seeds_lack_on_their_own():
    _, equal, beyond = simulate(0.0, 0.0, 1000)
    assert equal > 0.45
    assert beyond == 0
    alone = [
        statistics.compare(values[0], values[1], MARGIN).p_equivalent <= 0.05
        for values in 0.005 * np.random.default_rng(3).standard_normal((1000, 2, 3))
    ]
    assert np.mean(alone) < equal - 0.1


def test_the_share_of_falsely_invariant_arms_is_at_most_five_percent():
    generator = np.random.default_rng(11)
    wrong = 0
    for _ in range(200):
        groups = {("base", 64): 0.82 + 0.005 * generator.standard_normal(3)}
        for size in (16, 32, 128, 256):
            shift = MARGIN if size == 256 else 0.0
            groups["arm", size] = 0.82 + shift + 0.005 * generator.standard_normal(3)
        found = analysis.analyse(made_up(groups))
        wrong += found.arms[1].verdict == analysis.INVARIANT
    assert wrong / 200 <= 0.05


def test_the_share_of_falsely_accused_arms_is_at_most_five_percent():
    generator = np.random.default_rng(12)
    wrong = 0
    for _ in range(200):
        groups = {("base", 64): 0.82 + 0.005 * generator.standard_normal(3)}
        for size in (16, 32, 128, 256):
            # The worst case that is still not "beyond": every point sits on the margin.
            groups["arm", size] = 0.82 + MARGIN + 0.005 * generator.standard_normal(3)
        found = analysis.analyse(made_up(groups))
        wrong += found.arms[1].verdict == analysis.NOT_INVARIANT
    assert wrong / 200 <= 0.08


@pytest.mark.parametrize("difference", [0.0, 0.004, 0.02])
def test_the_promised_number_of_seeds_settles_it_four_times_out_of_five(difference):
    sd = 0.006
    seeds = statistics.seeds_to_settle(difference, MARGIN, sd)
    generator = np.random.default_rng(5)
    settled = 0
    for _ in range(600):
        group, base = sd * generator.standard_normal((2, int(seeds)))
        found = statistics.compare(
            group + difference, base, MARGIN, statistics.SeedNoise(sd**2, 60, 20, 1.0)
        )
        settled += min(found.p_equivalent, found.p_beyond) <= 0.05
    assert 0.74 <= settled / 600 <= 0.97
    assert statistics.seeds_to_settle(MARGIN, MARGIN, sd) == math.inf


SPREAD = (-0.004, 0.0, 0.004)


def around(mean, scale=1.0):
    return [mean + scale * value for value in SPREAD]


def arm_of(found, arm):
    return next(verdict for verdict in found.arms if verdict.arm == arm)


def test_verdicts_and_ranges_of_known_groups():
    groups = {("good", 64): around(0.82)}
    groups |= {("good", size): around(0.82) for size in (16, 32, 128, 256)}
    groups |= {("bad", 32): around(0.82), ("bad", 128): around(0.82), ("bad", 256): around(0.7)}
    groups |= {("open", 128): around(0.829), ("open", 32): around(0.82)}
    found = analysis.analyse(made_up(groups))
    good, bad, unsure = (arm_of(found, arm) for arm in ("good", "bad", "open"))
    assert (good.verdict, good.low, good.high) == (analysis.INVARIANT, 16, 256)
    assert "from batch size 16 to 256 (k = 1/4 to 4)" in good.sentence
    assert (bad.verdict, bad.low, bad.high) == (analysis.NOT_INVARIANT, 32, 128)
    assert "256 (−0.1200)" in bad.sentence
    assert (unsure.verdict, unsure.low, unsure.high) == (analysis.UNDECIDED, 32, 64)
    assert 3 < unsure.seeds_needed < 100
    assert found.warnings == ()


def test_a_gap_ends_the_range():
    groups = {("a", 64): around(0.82), ("a", 128): around(0.829), ("a", 256): around(0.82)}
    verdict = arm_of(analysis.analyse(made_up(groups)), "a")
    assert (verdict.low, verdict.high) == (64, 64)


def test_one_diverged_run_makes_its_arm_not_invariant():
    groups = {("a", 64): around(0.82), ("a", 128): [0.82, 0.82, None], ("b", 128): around(0.82)}
    found = analysis.analyse(made_up(groups))
    assert arm_of(found, "a").verdict == analysis.NOT_INVARIANT
    assert "128 (1 of 3 diverged)" in arm_of(found, "a").sentence
    assert arm_of(found, "b").verdict == analysis.INVARIANT


def test_a_metric_that_is_not_finite_counts_as_diverged():
    groups = {("a", 64): around(0.82), ("a", 128): [math.nan, 0.82, 0.82]}
    assert arm_of(analysis.analyse(made_up(groups)), "a").verdict == analysis.NOT_INVARIANT


def test_a_group_far_away_does_not_swell_the_noise_and_is_still_told_apart():
    groups = {("a", 64): around(0.82), ("a", 32): around(0.82), ("a", 256): around(0.6, scale=8)}
    found = analysis.analyse(made_up(groups))
    assert found.noise is not None
    assert found.noise.sd == pytest.approx(0.004)
    assert arm_of(found, "a").verdict == analysis.NOT_INVARIANT
    far = found.groups[-1]
    assert far.comparison is not None
    assert far.comparison.df < 3  # its own scatter, by Welch
    # One that scatters like the others uses what is known from all of them.
    groups["a", 256] = around(0.6)
    far = analysis.analyse(made_up(groups)).groups[-1]
    assert far.comparison is not None
    assert far.comparison.df == 4


def test_unequal_noise_falls_back_to_welch_and_says_so():
    groups = {("a", 64): around(0.82)}
    groups |= {("a", 64 * 2**i): around(0.82, scale=0.02 if i % 2 else 2) for i in range(1, 7)}
    found = analysis.analyse(made_up(groups))
    assert any("Bartlett" in warning for warning in found.warnings)
    assert all(group.comparison is not None and group.comparison.df < 4 for group in found.groups)


def test_single_seeds_are_undecided_with_differences_but_no_intervals():
    found = analysis.analyse(made_up({("a", 64): [0.82], ("a", 128): [0.7]}))
    assert arm_of(found, "a").verdict == analysis.UNDECIDED
    assert "2 seeds" in arm_of(found, "a").sentence
    assert found.groups[0].comparison is not None
    assert found.groups[0].comparison.difference == pytest.approx(-0.12)
    assert math.isnan(found.groups[0].comparison.low)
    assert any("No seed noise" in warning for warning in found.warnings)


def test_seeds_too_few_for_the_margin_are_pointed_out():
    groups = {("a", 64): around(0.82, 4), ("a", 128): around(0.82, 4)}
    found = analysis.analyse(made_up(groups))
    assert any("could pass the equivalence test" in warning for warning in found.warnings)


def test_without_a_base_nothing_is_claimed():
    found = analysis.analyse(made_up({("a", 32): around(0.82), ("a", 128): around(0.6)}))
    assert found.base is None
    assert arm_of(found, "a").verdict == analysis.UNDECIDED
    assert any("no point at the base batch size 64" in warning for warning in found.warnings)


def test_a_base_that_diverged_is_pointed_out_and_an_all_diverged_one_decides_nothing():
    found = analysis.analyse(made_up({("a", 64): [0.82, 0.81, None], ("a", 128): around(0.82)}))
    assert any("1 of 3 base runs diverged" in warning for warning in found.warnings)
    found = analysis.analyse(made_up({("a", 64): [None, None], ("a", 128): around(0.6)}))
    assert arm_of(found, "a").verdict == analysis.UNDECIDED


def test_arms_with_base_runs_of_their_own_are_pointed_out():
    groups = {("a", 64): around(0.82), ("b", 64): around(0.82), ("a", 128): around(0.82)}
    found = analysis.analyse(made_up(groups))
    assert found.base is not None
    assert found.base.planned == 6
    assert any("do not share" in warning for warning in found.warnings)


def noisy_curve(generator, sd, examples):
    return Curve(examples, 1.0 + sd * generator.standard_normal(len(examples)))


def test_curve_deviation_is_one_when_only_the_seed_differs():
    generator = np.random.default_rng(0)
    squares = []
    for _ in range(300):
        seeds = 0.05 * generator.standard_normal((4, 3, 20))
        variance = curves.noise_variance(list(seeds))
        squares.append(curves.curve_deviation(seeds[0], seeds[1], variance)[1] ** 2)
    assert np.mean(squares) == pytest.approx(1, abs=0.06)


def test_curve_deviation_of_a_known_shift_in_loss_and_in_noise():
    examples = np.arange(500, 20_001, 500)
    generator = np.random.default_rng(0)

    def curve(arm, batch_size, seed):
        shift = 0.3 if batch_size == 256 else 0.0
        made = noisy_curve(generator, 0.05, examples)
        return Curve(examples, made.values + shift)

    groups = {("a", size): around(0.82) for size in (32, 64, 128, 256)}
    found = analysis.analyse(made_up(groups, curve=curve))
    by_size = {group.batch_size: group for group in found.groups}
    unit = 0.05 * math.sqrt(2 / 3)
    assert by_size[256].curve_rms == pytest.approx(0.3, rel=0.05)
    # The shifted group is near in its final metric, so it shares in the noise estimate.
    assert by_size[256].curve_noise == pytest.approx(0.3 / unit, rel=0.15)
    assert 0.5 < by_size[32].curve_noise < 1.5


def test_curves_logged_at_different_places_are_met_at_matched_examples():
    fine = Curve(np.arange(16, 4801, 16), np.linspace(2, 1, 300))
    coarse = Curve(np.arange(320, 4801, 320), np.linspace(2, 1, 300).reshape(15, 20).mean(axis=1))
    edges = curves.window_edges([fine, coarse])
    assert len(edges) == 16
    np.testing.assert_allclose(
        curves.window_means(fine, edges), curves.window_means(coarse, edges), rtol=1e-9
    )


def test_a_curve_cut_short_loses_its_windows_and_not_those_of_others():
    whole = [Curve(np.arange(1, 41), np.ones(40))] * 3
    cut = Curve(np.arange(1, 6), np.ones(5))
    edges = curves.window_edges([*whole, cut])
    assert len(edges) == 41
    assert np.isnan(curves.window_means(cut, edges)).sum() == 35


def test_records_on_disk_to_verdicts(tmp_path):
    workdir = write_records(tmp_path, seeds=6, sd=0.003)
    diverge(workdir / "runs/b32-s0-sqrt-1.0")
    edit_json(workdir / "runs/b16-s0-sqrt-1.0/hparams.json", batch_size=17)
    found = analysis.analyse(load_results(workdir))
    verdicts = {verdict.arm: verdict.verdict for verdict in found.arms}
    assert list(verdicts) == ["none", "linear", "sqrt", "noise_aware", "invariant"]
    assert verdicts["none"] == verdicts["linear"] == verdicts["sqrt"] == analysis.NOT_INVARIANT
    assert verdicts["invariant"] == analysis.INVARIANT
    sizes = [group.batch_size for group in found.groups if group.arm == "none"]
    assert sizes == sorted(sizes)
    damaged = next(g for g in found.groups if (g.arm, g.batch_size) == ("sqrt", 16))
    assert (damaged.planned, damaged.unfinished, len(damaged.values)) == (6, 1, 5)


def test_offsets_are_compared_and_carry_no_verdict(tmp_path):
    workdir = write_records(
        tmp_path, ("invariant",), (32, 64, 128), offsets=(0.5, 1.0), seeds=2, rows=4
    )
    found = analysis.analyse(load_results(workdir))
    verdicts = {(g.batch_size, g.offset): g.verdict for g in found.groups}
    assert set(verdicts) == set(itertools.product((32, 64, 128), (0.5, 1.0))) - {(64, 1.0)}
    assert all((verdict == "") == (offset != 1) for (_, offset), verdict in verdicts.items())
    assert all(group.comparison is not None for group in found.groups)


def test_more_seeds_at_the_base_than_elsewhere_are_welcome():
    groups = {("a", 64): [0.82, 0.825, 0.815, 0.821, 0.819], ("b", 128): around(0.82)}
    found = analysis.analyse(made_up(groups))
    assert found.base is not None
    assert found.base.interval.n == 5
    assert found.warnings == ()
