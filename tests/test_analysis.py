"""Verdicts from known records and simulated sweeps."""

import itertools
import math

import numpy as np
import pytest
from helpers.sweeps import MARGIN, made_up
from helpers.synthetic_records import diverge, edit_json, write_records

from bs_jax.records.results import Curve, Run, load_results
from bs_jax.report import words
from bs_jax.statistics import analysis, curves, groups
from bs_jax.statistics.contrasts import Verdict


def test_the_share_of_falsely_invariant_arms_is_at_most_five_percent():
    generator = np.random.default_rng(11)
    wrong = 0
    for _ in range(200):
        groups = {("base", 64): 0.82 + 0.005 * generator.standard_normal(3)}
        for size in (16, 32, 128, 256):
            shift = MARGIN if size == 256 else 0.0
            groups["arm", size] = 0.82 + shift + 0.005 * generator.standard_normal(3)
        found = analysis.analyse(made_up(groups))
        wrong += found.arms[1].verdict == Verdict.EQUIVALENT
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
        wrong += found.arms[1].verdict == Verdict.DIFFERENT
    assert wrong / 200 <= 0.08


SPREAD = (-0.004, 0.0, 0.004)


def around(mean, scale=1.0):
    return [mean + scale * value for value in SPREAD]


def arm_of(found, arm):
    return next(verdict for verdict in found.arms if verdict.arm == arm)


def sentence(found, arm):
    return words.verdict_sentence(arm_of(found, arm), found)


def analysed(groups, **kwargs):
    """The analysis of made-up groups, and what a reader must know before believing it."""
    results = made_up(groups, **kwargs)
    found = analysis.analyse(results)
    return found, words.caveats(results, found)


def test_verdicts_and_ranges_of_known_groups():
    groups = {("good", 64): around(0.82)}
    groups |= {("good", size): around(0.82) for size in (16, 32, 128, 256)}
    groups |= {("bad", 32): around(0.82), ("bad", 128): around(0.82), ("bad", 256): around(0.7)}
    groups |= {("open", 128): around(0.829), ("open", 32): around(0.82)}
    found, caveats = analysed(groups)
    good, bad, unsure = (arm_of(found, arm) for arm in ("good", "bad", "open"))
    assert (good.verdict, good.low, good.high) == (Verdict.EQUIVALENT, 16, 256)
    assert "from batch size 16 to 256 (k = 1/4 to 4)" in sentence(found, "good")
    assert (bad.verdict, bad.low, bad.high) == (Verdict.DIFFERENT, 32, 128)
    assert "256 (−0.1200)" in sentence(found, "bad")
    assert (unsure.verdict, unsure.low, unsure.high) == (Verdict.UNDECIDED, 32, 64)
    assert 3 < unsure.seeds_needed < 100
    assert caveats == []


def test_a_gap_ends_the_range():
    groups = {("a", 64): around(0.82), ("a", 128): around(0.829), ("a", 256): around(0.82)}
    verdict = arm_of(analysis.analyse(made_up(groups)), "a")
    assert (verdict.low, verdict.high) == (64, 64)


def test_one_diverged_run_makes_its_arm_not_invariant():
    groups = {("a", 64): around(0.82), ("a", 128): [0.82, 0.82, None], ("b", 128): around(0.82)}
    found = analysis.analyse(made_up(groups))
    assert arm_of(found, "a").verdict == Verdict.DIFFERENT
    assert "128 (1 of 3 diverged)" in sentence(found, "a")
    assert arm_of(found, "b").verdict == Verdict.EQUIVALENT


def test_a_metric_that_is_not_finite_counts_as_diverged():
    groups = {("a", 64): around(0.82), ("a", 128): [math.nan, 0.82, 0.82]}
    assert arm_of(analysis.analyse(made_up(groups)), "a").verdict == Verdict.DIFFERENT


def test_a_group_far_away_does_not_swell_the_noise_and_is_still_told_apart():
    groups = {("a", 64): around(0.82), ("a", 32): around(0.82), ("a", 256): around(0.6, scale=8)}
    found = analysis.analyse(made_up(groups))
    assert found.noise is not None
    assert found.noise.sd == pytest.approx(0.004)
    assert arm_of(found, "a").verdict == Verdict.DIFFERENT
    far = found.groups[-1]
    assert far.comparison is not None
    assert far.comparison.df < 3  # its own scatter, by Welch
    # One that scatters like the others uses what is known from all of them.
    groups["a", 256] = around(0.6)
    far = analysis.analyse(made_up(groups)).groups[-1]
    assert far.comparison is not None
    assert far.comparison.df == 4


def test_unequal_noise_falls_back_to_own_scatter_and_says_so():
    rng = np.random.default_rng(0)
    groups = {
        ("a", 64 * 2**i): 0.82 + (0.0001 if i % 2 else 0.01) * rng.standard_normal(4)
        for i in range(7)
    }
    found, caveats = analysed(groups)
    assert any("Bartlett" in text for text in caveats)
    assert all(group.comparison is not None and group.comparison.df < 4 for group in found.groups)


def test_single_seeds_are_undecided_with_differences_but_no_intervals():
    found, caveats = analysed({("a", 64): [0.82], ("a", 128): [0.7]})
    assert arm_of(found, "a").verdict == Verdict.UNDECIDED
    assert "2 seeds" in sentence(found, "a")
    assert found.groups[0].comparison is not None
    assert found.groups[0].comparison.difference == pytest.approx(-0.12)
    assert math.isnan(found.groups[0].comparison.low)
    assert any("No seed noise" in text for text in caveats)


def test_seeds_too_few_for_the_margin_are_pointed_out():
    groups = {("a", 64): around(0.82, 4), ("a", 128): around(0.82, 4)}
    _, caveats = analysed(groups)
    assert any("could pass the equivalence test" in text for text in caveats)


def test_without_a_base_nothing_is_claimed():
    found, caveats = analysed({("a", 32): around(0.82), ("a", 128): around(0.6)})
    assert found.base is None
    assert arm_of(found, "a").verdict == Verdict.UNDECIDED
    assert any("no point at the base batch size 64" in text for text in caveats)


def test_a_base_that_diverged_is_pointed_out_and_an_all_diverged_one_decides_nothing():
    _, caveats = analysed({("a", 64): [0.82, 0.81, None], ("a", 128): around(0.82)})
    assert any("1 of 3 base runs diverged" in text for text in caveats)
    found = analysis.analyse(made_up({("a", 64): [None, None], ("a", 128): around(0.6)}))
    assert arm_of(found, "a").verdict == Verdict.UNDECIDED


def test_arms_with_base_runs_of_their_own_are_pointed_out():
    groups = {("a", 64): around(0.82), ("b", 64): around(0.82), ("a", 128): around(0.82)}
    found, caveats = analysed(groups)
    assert found.base is not None
    assert found.base.planned == 6
    assert any("do not share" in text for text in caveats)


def noisy_curve(generator, sd, examples):
    return Curve(examples, 1.0 + sd * generator.standard_normal(len(examples)))


@pytest.mark.parametrize("paired", [False, True])
def test_curve_deviation_is_one_when_only_the_seed_differs(paired):
    generator = np.random.default_rng(0)
    squares, chances = [], []
    for _ in range(300):
        seeds = 0.05 * generator.standard_normal((4, 3, 20))
        if paired:
            seeds += generator.standard_normal((3, 20))  # what a seed does everywhere
        groups = [dict(enumerate(group)) for group in seeds]
        noise = curves.curve_noise(groups, paired=paired)
        found = curves.curve_deviation(groups[1], groups[0], noise, paired=paired)
        squares.append(found.in_noise**2)
        chances.append(found.p_chance)
    assert np.mean(squares) == pytest.approx(1, abs=0.06)
    assert 0.02 <= np.mean(np.array(chances) <= 0.05) <= 0.09  # 5 % of 300, within 2.4 sd


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
    assert by_size[256].deviation.rms == pytest.approx(0.3, rel=0.05)
    # The shifted group is near in its final metric, so it shares in the noise estimate.
    assert by_size[256].deviation.in_noise == pytest.approx(0.3 / unit, rel=0.15)
    assert by_size[256].deviation.p_chance < 1e-6
    assert 0.5 < by_size[32].deviation.in_noise < 1.5
    assert by_size[32].deviation.p_chance > 0.01


def test_curves_logged_at_different_places_are_met_at_matched_examples():
    fine = curves.at_age(Curve(np.arange(16, 4801, 16), np.linspace(2, 1, 300)), 0)
    means = np.linspace(2, 1, 300).reshape(15, 20).mean(axis=1)
    coarse = curves.at_age(Curve(np.arange(320, 4801, 320), means), 0)
    edges = curves.window_edges([fine, coarse])
    assert len(edges) == 16
    np.testing.assert_allclose(
        curves.window_means(fine, edges), curves.window_means(coarse, edges), rtol=1e-9
    )


def test_a_curve_cut_short_loses_its_windows_and_not_those_of_others():
    whole = [curves.at_age(Curve(np.arange(1, 41), np.ones(40)), 0)] * 3
    cut = curves.at_age(Curve(np.arange(1, 6), np.ones(5)), 0)
    edges = curves.window_edges([*whole, cut])
    assert len(edges) == 41
    assert np.isnan(curves.window_means(cut, edges)).sum() == 35


@pytest.mark.parametrize("log_every", [256, 1024])
@pytest.mark.parametrize("batch_size", [16, 32, 128, 256])
def test_sizes_that_train_alike_have_the_same_curve_at_equal_age(batch_size, log_every):
    """An update of B examples shows the loss of weights that have seen B examples less."""

    def curve(arm, size, seed):
        age = size * np.arange(30_720 // size)
        loss = 0.4 + 1.9 * np.exp(-age / 4000) + 1e-12 * seed
        means = loss.reshape(-1, log_every // size).mean(axis=1)
        return Curve(log_every * np.arange(1, len(means) + 1), means)

    found, _ = analysed({("a", 64): around(0.82), ("a", batch_size): around(0.82)}, curve=curve)
    (group,) = found.groups
    # Over examples seen, rows at the same places would differ by this much in the first windows.
    lag = abs(1.9 * (np.exp((batch_size - 64) / 2 / 4000) - 1))
    assert np.abs(group.deviation.gap).max() < 0.1 * lag


def test_a_batch_size_that_changes_while_training_is_read_from_the_records():
    seen = np.array([64, 128, 256, 384, 512])
    sizes = np.array([64.0, 64.0, 128.0, 128.0, 128.0])
    loss = 1 - 1e-3 * (seen - sizes)
    run = Run("r", "done", {}, "", {}, {}, (), {
        "train/loss": Curve(seen, loss), "batch_size": Curve(seen, sizes),
    }, None)  # fmt: skip
    aged = groups.aged_curve(run, "train/loss", 128)
    np.testing.assert_allclose(aged.ends, seen - sizes / 2)
    # An evaluation tells of the weights as they are.
    run.curves["eval/loss"] = Curve(seen, loss)
    np.testing.assert_array_equal(groups.aged_curve(run, "eval/loss", 128).ends, seen)


def test_records_on_disk_to_verdicts(tmp_path):
    workdir = write_records(tmp_path, seeds=6, sd=0.003)
    diverge(workdir / "runs/b32-s0-sqrt-1.0")
    edit_json(workdir / "runs/b16-s0-sqrt-1.0/hparams.json", batch_size=17)
    found = analysis.analyse(load_results(workdir))
    verdicts = {verdict.arm: verdict.verdict for verdict in found.arms}
    assert list(verdicts) == ["none", "linear", "sqrt", "noise_aware", "invariant"]
    assert verdicts["none"] == verdicts["linear"] == verdicts["sqrt"] == Verdict.DIFFERENT
    assert verdicts["invariant"] == Verdict.EQUIVALENT
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
    assert all((verdict is None) == (offset != 1) for (_, offset), verdict in verdicts.items())
    assert all(group.comparison is not None for group in found.groups)


def test_more_seeds_at_the_base_than_elsewhere_do_no_harm():
    groups = {("a", 64): [0.82, 0.825, 0.815, 0.821, 0.819], ("b", 128): [0.821, 0.825, 0.814]}
    found, caveats = analysed(groups)
    assert found.base is not None
    assert found.base.interval.n == 5
    assert caveats == []
