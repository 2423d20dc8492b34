"""The published recipe and its sweeps: every point, every hyperparameter, without data."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import commands
from PIL import Image

from bs_jax.errors import UserError
from bs_jax.run import FixedValues
from bs_jax.sweep.plan import listing, plan_sweep
from bs_jax.sweep.points import resolve
from bs_jax.training.optimizers import schedule_shape
from bs_jax.training.plan import Plan
from configs import imagenette

ROOT = Path(__file__).resolve().parents[1]
BASE = {"learning_rate": 8e-3, "b1": 0.95, "b2": 0.99, "weight_decay": 1e-2, "bn_decay": 0.9}
SCALED = {  # as the study names its arms
    "no": "",
    "all_lin": "learning_rate weight_decay b1 b2",
    "all_sqrt": "learning_rate weight_decay b1 b2",
    "lr_lin": "learning_rate",
    "wd_lin": "weight_decay",
    "moms_lin": "b1 b2",
    "mom_lin": "b1",
    "sqmom_lin": "b2",
    "not_lr_lin": "weight_decay b1 b2",
    "not_wd_lin": "learning_rate b1 b2",
    "not_moms_lin": "learning_rate weight_decay",
    "bn_lin": "bn_decay",
}


def recipe(form=""):
    return json.loads(imagenette.get_config(form).to_json())


def planned(name, form=""):
    points = getattr(imagenette, f"sweep_{name}")()
    return plan_sweep(name, recipe(form), points)


@pytest.fixture(scope="module")
def seed_sweep():
    return planned("seed")


def test_the_published_sweep_is_twelve_arms_of_25_points(seed_sweep):
    assert Counter(row["arm"] for row in seed_sweep.rows) == dict.fromkeys(SCALED, 25)
    below, above = (0.5, 1, 2, 4), (0.25, 0.5, 1, 2)
    offsets = {8: below, 16: below, 32: below, 64: (0.25, 0.5, 1, 2, 4), 128: above, 256: above}
    expected = {(arm, size, o) for arm in SCALED for size in offsets for o in offsets[size]}
    assert {(r["arm"], r["batch_size"], r["offset"]) for r in seed_sweep.rows} == expected


def test_every_point_has_the_published_hyperparameters(seed_sweep):
    runs = {run.run_id: run for run in seed_sweep.runs}
    for row in seed_sweep.rows:
        run = runs[row["run_id"]]
        s = row["batch_size"] / 64 * row["offset"]
        s = s**0.5 if row["arm"] == "all_sqrt" else s
        expected = {
            name: value * s if name in ("learning_rate", "weight_decay") else value**s
            for name, value in BASE.items()
            if name in SCALED[row["arm"]].split()
        }
        found = dict(run.optimizer.hyperparams) | {"bn_decay": run.bn_decay}
        untouched = {"eps": 1e-6, "sync_period": 6, "slow_step_size": 0.5}
        assert found == pytest.approx(BASE | expected | untouched, rel=1e-12), row
        assert isinstance(run.optimizer, FixedValues)
        assert (run.label_smoothing, run.ghost_batch_size) == (0.1, 0)


def test_points_that_come_to_the_same_numbers_share_a_run(seed_sweep):
    runs = {(r["arm"], r["batch_size"], r["offset"]): r["run_id"] for r in seed_sweep.rows}
    assert len({runs[arm, 64, 1.0] for arm in SCALED}) == 1
    assert len({runs["no", 8, offset] for offset in (0.5, 1.0, 2.0, 4.0)}) == 1
    assert runs["all_lin", 256, 0.25] == runs["bn_lin", 256, 0.25] == runs["no", 256, 1.0]
    assert runs["all_sqrt", 64, 4.0] == runs["all_lin", 64, 2.0]
    assert len(seed_sweep.runs) == 218


@pytest.mark.parametrize(
    ("batch_size", "updates"), [(8, 1183), (16, 591), (32, 295), (64, 147), (128, 73), (256, 36)]
)
def test_an_epoch_leaves_out_its_last_incomplete_batch(batch_size, updates):
    run = resolve(recipe(), {"batch_size": batch_size})
    assert run.train_examples == 20 * updates * batch_size  # the schedule ends with the run
    last = list(Plan.of(run).chunks(batch_size))[-1]
    assert (last.end, last.evaluate) == (20 * updates, True)


def test_the_learning_rate_is_flat_to_three_quarters_then_a_cosine():
    run = resolve(recipe())
    total = run.train_examples
    shape = schedule_shape(run.schedule, total)
    shares = np.array([0, 0.5, 0.75, 0.875, 1.0])
    expected = [1.0, 1.0, 1.0, 0.5 + 0.5e-5, 1e-5]
    np.testing.assert_allclose([shape(share * total) for share in shares], expected, atol=2e-7)


def test_the_controls_separate_the_learning_rate_from_the_decay_it_multiplies():
    sweep = planned("controls")
    runs = {run.run_id: run.optimizer.hyperparams for run in sweep.runs}
    factors = {
        (
            row["batch_size"],
            runs[row["run_id"]]["learning_rate"] / 8e-3,
            runs[row["run_id"]]["weight_decay"] / 1e-2,
        )
        for row in sweep.rows
    }
    away = {size: size / 64 for size in (8, 16, 32, 128, 256)}
    expected = {(64, 1.0, factor) for factor in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)}  # (a)
    for size, k in away.items():
        expected |= {(size, k, 1.0), (size, k, k), (size, 1.0, k), (size, 1.0, 1.0)}  # (b) (c) (d)
    assert factors == expected
    # They are arms of the published sweep too: no name for the same thing twice.
    assert {row["arm"] for row in sweep.rows} <= set(SCALED)


def test_the_study_has_the_noise_measuring_rules_on_the_same_points():
    rows = planned("study").rows
    points = {
        arm: {(r["batch_size"], r["offset"]) for r in rows if r["arm"] == arm} for arm in SCALED
    }
    for rule in ("noise_aware", "invariant"):
        measured = {(r["batch_size"], r["offset"]) for r in rows if r["arm"] == rule}
        assert measured == points["all_lin"]
    assert Counter(r["seed"] for r in rows if r["arm"] == "all_lin") == {0: 25, 1: 25, 2: 25}


def test_ghost_batches_are_the_same_at_every_batch_size():
    sweep = planned("ghost")
    assert {run.ghost_batch_size for run in sweep.runs} == {8}
    assert sweep.warnings == []
    assert len(planned("seed").warnings) == 1


@pytest.mark.parametrize("name", ["anchor", "limit", "quick"])
def test_the_other_sweeps_can_be_trained(name):
    sweep = planned(name, "quick")
    assert {run.model.name for run in sweep.runs} == {"xresnet10_small"}
    assert all(run.train_examples % run.batch_size == 0 for run in sweep.runs)


@pytest.mark.parametrize(
    ("form", "model", "epochs", "size"),
    [
        ("", "xresnet50", 20, 128),
        ("xse_resnext50", "xse_resnext50", 20, 128),
        ("xse_resnext50_blur,5epochs", "xse_resnext50_blur", 5, 128),
        ("quick", "xresnet10_small", 3, 32),
        ("quick,5epochs", "xresnet10_small", 5, 32),
    ],
)
def test_forms(form, model, epochs, size):
    config = recipe(form)
    assert (config["model"]["name"], config["train_epochs"]) == (model, epochs)
    assert config["data"]["image_size"] == size
    assert config["data"]["eval_storage_size"] == round(1.19 * size)
    assert config["name"] == "-".join(["imagenette", *form.split(",")]).rstrip("-")
    resolve(config)


def test_an_unknown_form_is_named():
    with pytest.raises(UserError, match="no form 'quik'; known: xresnet50"):
        imagenette.get_config("quik")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_examples": 512}, "both give the length"),
        ({"train_epochs": 0.0}, "neither gives the length"),
        ({"train_epochs": -1.0}, "at least 0"),
        ({"data.train_size": 0}, "say how many examples the training split holds"),
        ({"batch_size": 16384}, "use 1 to 9,469"),
        ({"drop_remainder": 1}, "True or False"),
    ],
)
def test_a_length_that_cannot_be_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        resolve(recipe(), changes)


def test_a_length_in_epochs_with_their_remainders():
    run = resolve(recipe(), {"drop_remainder": False, "train_epochs": 1.5})
    assert run.train_examples == int(1.5 * 9469)


def test_the_listing_has_a_line_a_point_and_says_what_is_measured(seed_sweep):
    lines = listing(seed_sweep).splitlines()
    assert sum(" b64-s0-" in line for line in lines) == 60
    assert lines[0].split()[:5] == ["arm", "batch_size", "offset", "updates", "learning_rate"]
    assert "at all points: eps 1e-06, sync_period 6, slow_step_size 0.5" in lines
    assert "300 points, 218 runs" in lines
    line = next(line.split() for line in lines if line.startswith("mom_lin") and " 256 " in line)
    assert line[:6] == ["mom_lin", "256", "0.25", "720", "0.008", "0.95"]
    assert "measured" in listing(planned("ghost"))


def test_a_dry_run_needs_no_data_and_lists_300_points():
    flags = ("--config=configs/imagenette.py", "--mode=sweep", "--sweep=seed", "--dry_run")
    code, out = commands.run(*flags, "--config.data.name=folder:/nowhere", recipe=())
    assert code == 0, out
    lines = out.splitlines()
    assert sum(line.split()[0] in SCALED for line in lines) == 300
    assert "300 points, 218 runs" in lines
    code, out = commands.run("--config=configs/imagenette.py:quik", "--dry_run", recipe=())
    assert code == 2
    assert out.startswith("error: configs/imagenette.py has no form 'quik'")


@pytest.mark.long
def test_the_controls_run_from_a_folder_of_images_and_answer_the_findings(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 130), ("val", 20)):
        for number, name in enumerate(("dark", "bright")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(100 * number, 100 * number + 90, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    flags = {
        "config": "configs/imagenette.py:quick",
        "sweep": "controls",
        "workers": "1",
        "workdir": str(tmp_path / "work"),
        "config.data.name": f"folder:{tmp_path / 'images'}",
        "config.data.train_size": "260",
        "config.data.image_size": "16",
        "config.data.train_storage_size": "20",
        "config.data.eval_storage_size": "19",
        "config.train_epochs": "1",
        "config.model.name": "resnet4_patch",
    }
    process = commands.start(
        *(f"--{name}={value}" for name, value in flags.items()),
        recipe=(),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    code, out = commands.finish(process, 900)
    assert code == 0, out[-2000:]
    assert "The published findings" in out
    page = (tmp_path / "work/report/index.html").read_text()
    assert "2 weight decay" in page
    assert "Weight decay alone at the base batch size 64" in page
    assert (tmp_path / "work/report/findings.csv").exists()
