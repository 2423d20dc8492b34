"""The report's sentences, from sweeps whose outcome is known."""

import dataclasses
import math

import numpy as np
import pytest
from helpers.sweeps import made_up

from bs_jax.records.results import MISSING, Curve, Run
from bs_jax.records.run_files import Summary
from bs_jax.report import words
from bs_jax.statistics.analysis import analyse
from bs_jax.statistics.curves import Deviation
from bs_jax.statistics.price import Inside, price, share_inside

SPREAD = (-0.004, 0.0, 0.004)
SEEN = np.arange(320, 12_801, 320)


def around(mean):
    return [mean + value for value in SPREAD]


def curves(lag=None):
    """Training curves with seed noise of .01; `lag` (arm, batch size) adds an early bump of .2."""
    generator = np.random.default_rng(2)

    def curve(arm, size, seed):
        age = SEEN - size / 2
        loss = 0.4 + 1.9 * np.exp(-age / 4000) + 0.01 * generator.standard_normal(len(age))
        if lag == (arm, size):
            loss += 0.2 * np.exp(-age / 1500)
        return Curve(SEEN, loss)

    return curve


GOOD = {("good", size): around(0.82) for size in (32, 64, 128)}


def test_the_advice_names_the_rule_its_range_and_where_its_curve_strays():
    found = analyse(made_up(GOOD, curve=curves()))
    assert words.advice(found) == "Use “good” from batch size 32 to 128."
    found = analyse(made_up(GOOD, curve=curves(lag=("good", 128))))
    assert words.advice(found) == (
        "Use “good” from batch size 32 to 128; at 128 its training curve lags early."
    )


def test_of_two_equivalent_rules_the_one_whose_curve_follows_is_advised():
    groups = GOOD | {("other", size): around(0.82) for size in (32, 128)}
    found = analyse(made_up(groups, curve=curves(lag=("good", 32))))
    assert words.advice(found).startswith("Use “other”")


@pytest.mark.parametrize(
    ("groups", "advice"),
    [
        (
            {("half", 64): around(0.82), ("half", 32): around(0.82), ("half", 128): around(0.7)},
            "Use “half” from batch size 32 to 64 only: at 128 it is not shown to end where the "
            "base ends.",
        ),
        (
            {("a", 64): around(0.82), ("a", 128): around(0.7), ("b", 128): around(0.75)},
            "No rule is shown to hold at any batch size; “b” comes nearest, at most 0.0700 from "
            "the base.",
        ),
        (
            {("a", 64): around(0.82), ("a", 128): [None, None, 0.8], ("b", 128): around(0.5)},
            "No rule is shown to hold at any batch size; “b” comes nearest, at most 0.3200 from "
            "the base.",
        ),
        ({("a", 128): around(0.82)}, ""),
        ({("a", 64): around(0.82)}, ""),
    ],
)
def test_the_advice_promises_no_more_than_was_shown(groups, advice):
    assert words.advice(analyse(made_up(groups))) == advice


@pytest.mark.parametrize(
    ("mean", "lag", "sentence"),
    [
        (0.82, None, "Its training loss cannot be told from the base's at any time either."),
        (0.829, None, "Its training loss cannot be told from the base's."),
        (0.7, None, "so the difference arises between training and evaluation."),
        (0.82, 128, "On the way there its training loss lags early at 128 (by 0.0"),
        (0.829, 128, "The curve is the sharper witness: its training loss lags early at 128"),
        (0.7, 128, "The curve says the same: its training loss lags early at 128 (by 0.0"),
    ],
)
def test_the_curve_is_set_beside_the_verdict_in_one_sentence(mean, lag, sentence):
    groups = {("a", 64): around(0.82), ("a", 128): around(mean), ("b", 32): around(0.82)}
    found = analyse(made_up(groups, curve=curves(lag=("a", lag))))
    text = words.curve_sentence(found.arms[0], found)
    assert sentence in text
    assert text.count(". ") == 0


def test_where_the_batch_lay_beyond_the_noise_scale_is_said():
    (arm,) = analyse(made_up(GOOD)).arms
    assert words.limit_sentence(arm) == ""
    shares = (1.0, 0.4)
    groups = tuple(
        dataclasses.replace(group, inside=Inside(share, 0.2, 1.0, 0.0))
        for group, share in zip(arm.groups, shares, strict=True)
    )
    assert words.limit_sentence(dataclasses.replace(arm, groups=groups)) == (
        "Its batch lay inside the measured noise scale for only 40 % of the training at 128."
    )
    unknown = dataclasses.replace(groups[1], inside=Inside(0.4, 0.2, 1.0, 0.25))
    assert words.limit_sentence(dataclasses.replace(arm, groups=(unknown,))) == (
        "Its batch lay inside the measured noise scale for only 40 % of the 75 % where that is "
        "known at 128."
    )


def test_each_direction_is_said_where_it_is():
    gap = np.zeros(30)
    gap[:4] = 0.1
    assert words.where_it_departs(Deviation(gap, 0.1)) == ("early", "lags")
    assert words.where_it_departs(Deviation(-gap[::-1], 0.1)) == ("late", "runs ahead")
    assert words.where_it_departs(Deviation(np.full(30, 0.1), 0.1)) == ("", "lags")


def test_rules_are_explained_and_arms_read_off_their_hyperparameters():
    results = made_up({(arm, 256): around(0.82) for arm in ("invariant", "seed", "mine", "idle")})
    base = {"learning_rate": 2e-3, "b1": 0.9, "eps": 1e-8}
    mine = base | {"learning_rate": 8e-3, "b1": None}
    scaled = {"mine": mine, "idle": base}
    runs = {
        run_id: dataclasses.replace(run, base=base, scaled=scaled.get(run_id.split("-")[0], {}))
        for run_id, run in results.runs.items()
    }
    results = dataclasses.replace(results, runs=runs)
    assert words.explanation("invariant", results).startswith("Learning rate × k,")
    # Neither a verdict nor the seeds of the runs.
    assert "nothing to do with the seeds of the runs" in words.explanation("seed", results)
    assert words.explanation("mine", results) == (
        "At batch size 256: learning_rate 0.002 → 0.008 and b1 (measured while training); leaves "
        "eps alone."
    )
    assert words.explanation("idle", results) == "Changes nothing, whatever the batch size."
    # An arm that is called as a rule is and trains by another one is not explained as that rule.
    runs = {i: dataclasses.replace(run, rule="sqrt", scaled=mine) for i, run in runs.items()}
    text = words.explanation("invariant", dataclasses.replace(results, runs=runs))
    assert text.startswith("At batch size 256")


def test_a_study_that_is_not_finished_says_what_is_decided_and_what_is_open():
    groups = {("good", 64): around(0.82), ("good", 32): around(0.82), ("good", 256): around(0.82)}
    groups |= {("bad", 32): around(0.5), ("bad", 256): around(0.5), ("done", 32): around(0.82)}
    results = made_up(groups)
    assert words.progress(results, analyse(results)) == ""
    missing = {"good-256-0", "good-256-1", "good-256-2", "bad-256-1"}
    runs = {
        i: dataclasses.replace(run, status=MISSING, metrics={}) if i in missing else run
        for i, run in results.runs.items()
    }
    results = dataclasses.replace(results, runs=runs)
    assert words.progress(results, analyse(results)) == (
        "This study is not finished. Decided: bad (different) and done (equivalent). "
        "Open: good (waits for 3 runs at 256)."
    )
    assert "4 of 18 runs have no usable result yet" in words.caveats(results, analyse(results))[0]


def test_a_price_is_the_median_run_and_a_resumed_one_counts_whole():
    def run(**changes):
        summary = Summary("done", {}, step=100, examples=6400, wall_time_seconds=8.0)
        summary = dataclasses.replace(summary, **changes)
        return Run("r", "done", {}, "", {}, {}, (), {}, summary)

    runs = [run(), run(resumed_at_step=75, wall_time_seconds=3.0), run(wall_time_seconds=math.nan)]
    found = price(runs)
    assert (found.updates, found.seconds) == (100, 10.0)
    assert found.examples_per_second == pytest.approx((6400 / 8 + 6400 / 12) / 2)
    assert math.isnan(price([]).seconds)
    assert math.isnan(price([run(step=0), run(resumed_at_step=100)]).updates)


def test_the_updates_of_a_ramp_are_counted_at_the_batch_size_of_their_time():
    seen, size = np.array([320, 640, 1280]), np.array([16.0, 32.0, 64.0])
    run = Run("r", "done", {}, "", {}, {}, (), {"batch_size": Curve(seen, size)}, None)
    found = price([run])
    assert [found.updates_at(share) for share in (0.25, 0.5, 0.75, 1)] == [20, 30, 35, 40]
    run.curves["batch_size"] = Curve(seen, np.full(3, 64.0))
    assert price([run]).ramp is None


def test_an_unknown_noise_scale_is_never_taken_for_a_large_one():
    def run(scale, size=64.0):
        seen = np.array([100, 200, 400])
        made = {"batch_size": Curve(seen, np.full(3, size)), "noise_scale": Curve(seen, scale)}
        return Run("r", "done", {}, "", {}, {}, (), made, None)

    found = share_inside([run(np.array([np.nan, np.inf, np.nan]))])
    assert math.isnan(found.share)
    assert found.unknown == 1
    # A quarter, a quarter and half of the examples.
    found = share_inside([run(np.array([np.nan, 32.0, 64.0]))])
    assert (found.share, found.unknown) == (pytest.approx(2 / 3), 0.25)
    found = share_inside([run(np.array([32.0, 32.0, 64.0])), run(np.array([64.0, 32.0, 64.0]))])
    assert found.share == pytest.approx((0.5 + 0.75) / 2)
    assert share_inside([Run("r", "done", {}, "", {}, {}, (), {}, None)]) is None
