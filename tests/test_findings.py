"""The published findings against made-up sweeps whose truth is known."""

import csv
import dataclasses
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.synthetic_records import write_records

from bs_jax import studies
from bs_jax.records.results import Curve, Results, Row, Run, Sweep, load_results
from bs_jax.report import style
from bs_jax.report.tables import to_csv
from bs_jax.report.write import write_report
from bs_jax.statistics import analysis
from bs_jax.statistics.contrasts import linear_contrast
from bs_jax.statistics.seed_noise import SeedNoise
from bs_jax.studies.imagenette import findings, shown
from bs_jax.studies.imagenette.findings import CONTRADICTED, SUPPORTED, UNDECIDED
from configs import imagenette

MARGIN = 0.01
SWEEP = Sweep("s", "c", "t", "", 64, "acc", "loss", "train/loss", MARGIN, (), "", "", None)
SIZES = (16, 32, 128, 256)
NAMES = [finding.name for finding in findings.PUBLISHED]

# What scaling each hyperparameter does to the final accuracy below and above the base, as the
# study has it; and half of the learning rate's way back to the base.
PUBLISHED_TRUTH = {
    "learning_rate": (0.02, 0.06),
    "weight_decay": (0.0, 0.012),
    "b1": (-0.006, -0.006),
    "b2": (0.0, 0.0),
    "bn_decay": (-0.007, -0.007),
    "half_way": (0.008, 0.008),
}


def sweep_of(truth, *, seeds=6, sd=0.002, arms=tuple(imagenette.ARMS), rng=None, diverged=()):
    """A sweep of the study's arms; additive effects, normal seed noise.

    `diverged` names (arm, batch size, offset) all of whose runs diverged.
    """
    rng = rng or np.random.default_rng(0)
    scalable = [imagenette.LR, imagenette.WD, imagenette.MOM, imagenette.SQMOM, imagenette.BN]
    rows, runs = [], {}

    def add(arm, size, offset, mean):
        for seed in range(seeds):
            run_id = f"{arm}-{size}-{offset}-{seed}"
            status = "diverged" if (arm, size, offset) in diverged else "done"
            value = mean + sd * rng.standard_normal()
            metrics = {} if status == "diverged" else {"acc": value, "loss": 1 - value}
            runs[run_id] = Run(run_id, status, metrics, "", {}, {}, (), {}, None)
            rows.append(Row(arm, size, size / 64, offset, seed, run_id, status, metrics, {}))

    for arm in arms:
        off = imagenette.ARMS[arm].get("scaling.off")
        scaled = [] if off is None else [name for name in scalable if name not in off]
        for size in SIZES:
            side = int(size > 64)
            mean = 0.8 + sum(truth[name][side] for name in scaled)
            add(arm, size, 1.0, mean)
            if arm == "lr_lin":
                add(arm, size, 0.5 if side else 2.0, mean + truth["half_way"][side])
    add("no", 64, 1.0, 0.8)
    return Results(Path(), SWEEP, tuple(rows), runs, (), ())


def verdicts(results):
    answers = findings.answer(analysis.analyse(results))
    return {found.finding.name: found.verdict for found in answers}


def test_a_sweep_in_which_every_finding_is_true_supports_them_all():
    assert verdicts(sweep_of(PUBLISHED_TRUTH)) == dict.fromkeys(NAMES, SUPPORTED)


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        # Weight decay does more than the learning rate, in either direction, on one side.
        (0, {"weight_decay": (-0.05, 0.012)}),
        (0, {"weight_decay": (0.0, 0.09)}),
        (1, {"half_way": (0.008, -0.01)}),
        (2, {"weight_decay": (0.0, -0.01)}),  # raising it hurts
        (2, {"weight_decay": (0.02, 0.012)}),  # lowering it helps
        (3, {"b2": (0.0, -0.02)}),
        (4, {"b1": (0.01, -0.006)}),
        (4, {"b1": (-0.006, -0.035)}),  # worse, and by far more than slightly
        (5, {"bn_decay": (-0.007, 0.01)}),
    ],
)
def test_the_opposite_on_one_side_contradicts_that_finding_alone(number, changes):
    found = verdicts(sweep_of(PUBLISHED_TRUTH | changes))
    assert found[NAMES[number]] == CONTRADICTED
    assert all(found[name] != CONTRADICTED for name in NAMES if name != NAMES[number])


def test_too_few_seeds_for_the_noise_decide_nothing():
    found = verdicts(sweep_of(PUBLISHED_TRUTH, seeds=2, sd=0.05))
    assert found == dict.fromkeys(NAMES, UNDECIDED)


def test_a_single_seed_has_no_noise_to_judge_by():
    results = sweep_of(PUBLISHED_TRUTH, seeds=1)
    answers = findings.answer(analysis.analyse(results))
    assert {found.verdict for found in answers} == {UNDECIDED}
    assert all(math.isnan(found.p_supported) for found in answers)
    effect = answers[1].effects[0]
    assert effect.estimate is not None
    assert effect.estimate.value == pytest.approx(0.008, abs=0.01)
    assert math.isnan(effect.low)


def test_arms_that_a_sweep_lacks_leave_their_findings_out_or_open():
    found = verdicts(sweep_of(PUBLISHED_TRUTH, arms=("no", "mom_lin", "lr_lin")))
    # Without weight decay, momenta and BatchNorm scaled there is no rival to the learning rate.
    assert found == {NAMES[1]: SUPPORTED, NAMES[4]: SUPPORTED}
    found = verdicts(sweep_of(PUBLISHED_TRUTH, arms=("no", "lr_lin", "bn_lin")))
    assert found[NAMES[0]] == UNDECIDED  # one rival of three
    assert verdicts(sweep_of(PUBLISHED_TRUTH, arms=("no",))) == {}


def test_more_pairs_answer_the_same_question_more_sharply():
    few = findings.answer(analysis.analyse(sweep_of(PUBLISHED_TRUTH, arms=("no", "wd_lin"))))
    many = findings.answer(analysis.analyse(sweep_of(PUBLISHED_TRUTH)))
    (few,), many = few, many[2]
    assert [effect.pairs for effect in few.effects] == [1, 1]
    assert [effect.pairs for effect in many.effects] == [4, 4]
    for narrow, wide in zip(many.effects, few.effects, strict=True):
        # Four pairs of groups in place of one: half the standard error.
        assert (narrow.high - narrow.low) / (wide.high - wide.low) == pytest.approx(0.5, abs=0.12)


def test_diverged_runs_are_compared_by_their_number():
    lost = [("bn_lin", size, 1.0) for size in (128, 256)]
    results = sweep_of(PUBLISHED_TRUTH, diverged=lost)
    answers = {found.finding.name: found for found in findings.answer(analysis.analyse(results))}
    above = answers[NAMES[5]].effects[1]
    # 12 of 12 against 0 of 12: one in C(24, 12) by chance, either way.
    assert above.diverged == 12
    assert above.p_contradicted == pytest.approx(2 / math.comb(24, 12), rel=1e-6)
    assert answers[NAMES[5]].verdict == CONTRADICTED
    assert answers[NAMES[0]].verdict == UNDECIDED  # the rival has no effect to compare with
    assert answers[NAMES[3]].verdict == SUPPORTED

    lost = [("lr_lin", size, 1.0) for size in (128, 256)]
    results = sweep_of(PUBLISHED_TRUTH, diverged=lost)
    answers = {found.finding.name: found for found in findings.answer(analysis.analyse(results))}
    above = answers[NAMES[1]].effects[1]  # half way back to the base did not diverge
    assert above.p_supported == pytest.approx(1 / math.comb(24, 12), rel=1e-6)
    assert answers[NAMES[1]].verdict == SUPPORTED


def test_wrong_verdicts_are_rare_where_nothing_has_an_effect():
    """Only "no visible effect" is true then; any other verdict is wrong, 5 % of tables at most."""
    truth = dict.fromkeys(PUBLISHED_TRUTH, (0.0, 0.0))
    rng = np.random.default_rng(1)
    trials, wrong = 60, 0
    for _ in range(trials):
        found = verdicts(sweep_of(truth, seeds=3, sd=0.004, rng=rng))
        wrong += any(v != UNDECIDED for name, v in found.items() if name != NAMES[3])
    assert wrong <= 7  # P(more of 60 at 5 %) is 1 %


def test_a_contrast_by_hand():
    groups = [
        (0.5, {0: 1.0, 1: 2.0}),
        (0.5, {2: 3.0, 3: 5.0}),
        (-1.0, {4: 2.0, 5: 2.5, 6: 3.0}),
    ]
    own = linear_contrast(groups)
    parts = [0.25 * 0.5 / 2, 0.25 * 2.0 / 2, 0.25 / 3]
    assert own.value == pytest.approx(0.5 * 1.5 + 0.5 * 4.0 - 2.5)
    assert own.error == pytest.approx(math.sqrt(sum(parts)))
    assert own.df == pytest.approx(
        sum(parts) ** 2 / (parts[0] ** 2 + parts[1] ** 2 + parts[2] ** 2 / 2)
    )
    pooled = linear_contrast(groups, SeedNoise(0.04, 9, 3, 1.0))
    assert pooled.error == pytest.approx(math.sqrt(0.04 * (0.25 / 2 + 0.25 / 2 + 1 / 3)))
    assert pooled.df == 9


@pytest.mark.parametrize(
    ("size", "lr", "wd", "left"),
    [
        *((8, 1, 1, 0.191), (64, 1, 1, 0.814), (256, 1, 1, 0.951)),
        *((8, 1 / 8, 1, 0.813), (256, 4, 1, 0.817)),
        *((8, 1 / 8, 1 / 8, 0.974), (256, 4, 4, 0.446)),
    ],
)
def test_what_weight_decay_leaves_of_a_weight_is_the_published_number(size, lr, wd, left):
    updates = 20 * (9469 // size)
    step = np.arange(updates) / updates
    shape = np.where(step < 0.75, 1.0, 0.5 * (1 + np.cos(np.pi * (step - 0.75) / 0.25)))
    curve = Curve((np.arange(updates) + 1) * size, 8e-3 * lr * shape)
    run = Run(
        *("r", "done", {}, "", {}, {"weight_decay": 1e-2 * wd}, ()),
        {"optim/learning_rate": curve},
        None,
    )
    assert shown.weight_left(run, size) == pytest.approx(left, abs=6e-4)


def test_the_page_and_the_terminal_show_every_finding():
    from rich.console import Console

    results = sweep_of(PUBLISHED_TRUTH)
    found = analysis.analyse(results)
    page = shown.section(results, found, None).html()
    assert all(name in page for name in NAMES)
    assert page.count("supported</span>") == 2 * len(NAMES)  # in the list, and over its tests
    assert page.count("6 seeds a point.") == len(NAMES)
    console = Console(width=80, record=True, file=io.StringIO())
    table = shown.terminal(found)
    console.print(table)
    text = console.export_text()
    assert text.count("✓ supported") == len(NAMES)
    assert max(map(len, text.splitlines())) <= 80


def test_a_finding_says_how_many_runs_it_waits_for():
    results = sweep_of(PUBLISHED_TRUTH)
    gone = {run_id for run_id in results.runs if run_id.startswith("bn_lin-256")}
    missing = {"status": "unfinished", "metrics": {}}
    results = dataclasses.replace(
        results,
        rows=tuple(
            dataclasses.replace(row, **missing) if row.run_id in gone else row
            for row in results.rows
        ),
        runs={
            i: dataclasses.replace(run, **missing) if i in gone else run
            for i, run in results.runs.items()
        },
    )
    found = analysis.analyse(results)
    waits = [answer.waits_for for answer in findings.answer(found)]
    assert waits == [len(gone), 0, 0, 0, 0, len(gone)]  # BatchNorm's, and what is held against it
    page = shown.section(results, found, None).html()
    assert page.count(f"0 seeds a point; it waits for {len(gone)} runs.") == 2


def test_controls_and_measuring_rules_stand_beside_the_findings():
    results = sweep_of(PUBLISHED_TRUTH, sd=1e-6)
    curve = {"optim/learning_rate": Curve(np.array([64, 128]), np.array([0.1, 0.1]))}
    run = dataclasses.replace(
        results.runs["wd_lin-256-1.0-0"], curves=curve, scaled={"weight_decay": 4.0}
    )
    results = dataclasses.replace(results, runs={**results.runs, run.run_id: run})
    page = shown.section(results, analysis.analyse(results), None).html()
    controls = page.split("Controls, and rules")[1].replace("</td>", "\n")
    text = re.sub(r"<[^>]*>", "", controls)
    lines = [line for line in text.splitlines() if line]
    start = lines.index("decay alone")
    # Two rows of a quarter of an update each: exp(-0.5 x 0.1 x 4).
    assert lines[start + 5] == "0.8120 +0.0120 [+0.0120, +0.0120] (0.819)"
    assert lines[start + 3] == "0.8000"  # the base itself
    assert "lr and decay" in lines


def test_the_smoothed_accuracy_is_a_second_witness():
    results = sweep_of(PUBLISHED_TRUTH)
    assert shown.smoothed_analysis(results) is None
    metrics = {
        run_id: {**run.metrics, "smooth": run.metrics["acc"] - 0.1}
        for run_id, run in results.runs.items()
    }
    runs = {i: dataclasses.replace(run, metrics=metrics[i]) for i, run in results.runs.items()}
    rows = tuple(dataclasses.replace(row, metrics=metrics[row.run_id]) for row in results.rows)
    sweep = dataclasses.replace(SWEEP, smoothed_metric="smooth")
    results = dataclasses.replace(results, sweep=sweep, runs=runs, rows=rows)
    smoothed = shown.smoothed_analysis(results)
    assert smoothed is not None
    assert smoothed.base is not None
    assert smoothed.base.interval.mean == pytest.approx(0.7, abs=0.01)
    page = shown.section(results, analysis.analyse(results), smoothed).html()
    assert page.count("By the smoothed accuracy: supported.") == len(NAMES)


def test_findings_are_written_as_a_table_too():
    answers = findings.answer(analysis.analyse(sweep_of(PUBLISHED_TRUTH, seeds=1)))
    written = to_csv(shown.rows({"acc": answers})).decode()
    rows = list(csv.DictReader(written.splitlines()))
    assert [row["finding"] for row in rows].count(NAMES[0]) == 6
    assert len(rows) == 6 + 5 * 2
    assert {row["verdict"] for row in rows} == {UNDECIDED}
    assert all(row["low_95"] == "" and float(row["effect"]) < 1 for row in rows)


def test_a_whole_report_from_records_has_the_findings_by_both_metrics(tmp_path, monkeypatch):
    for draw, drawn in (("to_png", b""), ("to_svg", "<svg></svg>")):  # they have their own tests
        monkeypatch.setattr(style, draw, lambda *_, drawn=drawn: drawn)
    effects = {"no": lambda k: -0.02 if k > 1 else 0.0, "mom_lin": lambda k: -0.03}
    write_records(
        *(tmp_path, tuple(effects), (16, 64, 256)),
        sd=0.001,
        effects=effects,
        smoothed_metric="eval/smoothed_accuracy",
    )
    results = load_results(tmp_path)
    found = analysis.analyse(results)
    page = write_report(results, found, studies.extras(results, found)).read_text()
    assert "The published findings" in page
    assert page.count("By the smoothed accuracy: contradicted.") == 1  # far worse below the base
    lines = (tmp_path / "report/findings.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == [
        *["eval/accuracy"] * 2,
        *["eval/smoothed_accuracy"] * 2,
    ]


def test_other_sweeps_have_no_such_section():
    results = sweep_of(PUBLISHED_TRUTH, arms=("no",))
    found = analysis.analyse(results)
    assert studies.extras(results, found) == []
