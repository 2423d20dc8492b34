"""The examples run in a short form, and the study that is built on one counts right."""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy

import bs_jax
from benchmarks import _language_arms as arms
from benchmarks import language_model as study
from examples import language_model as example

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def text():
    return example.load_text(vocabulary=260)


def test_byte_pairs_lose_nothing_and_shorten_the_text(text):
    assert text.train.shape[1] == text.validation.shape[1] == example.CONTEXT + 1
    assert text.train.max() == 259
    assert len(text.train) >= example.EXAMPLES
    assert len(text.train) < len(example.load_text(vocabulary=256).train)


@pytest.mark.parametrize("raw", [b"aaaaa", b"aabaab", b"abab", b"baaab", b"xyz", b"aa"])
def test_merged_tokens_decode_to_the_text(raw):
    tokens = np.frombuffer(raw, np.uint8).astype(np.int32)
    for pair in ((97, 97), (97, 98)):
        merged = example._merge(tokens, pair, 300)
        decoded = b"".join(bytes(pair) if t == 300 else bytes([t]) for t in merged.tolist())
        assert decoded == raw
        assert not any((a, b) == pair for a, b in itertools.pairwise(merged))


def test_the_language_model_learns_while_its_batch_may_follow_the_noise(monkeypatch):
    monkeypatch.setattr(example, "GPT", functools.partial(example.GPT, width=64, layers=1))
    monkeypatch.setattr(example, "CONTEXT", 16)
    flags = ["--vocabulary=256", "--batch_size=32", "--ramp", "--examples=640"]
    assert example.main(flags) < math.log(256) - 1.0


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("plain_optax", ["--examples=4096"]),
        ("nnx_batchnorm_dropout", ["--updates=12"]),
        ("train_state", ["--updates=12"]),
        ("accumulate_from_loader", ["--updates=12"]),
        ("several_devices", ["--updates=24"]),
    ],
)
def test_short_examples_learn(name, flags):
    losses = importlib.import_module(f"examples.{name}").main(flags)
    ends = max(1, len(losses) // 4)
    assert np.mean(losses[-ends:]) < 0.95 * np.mean(losses[:ends])


def test_the_table_for_pytorch_has_every_number(capsys):
    new = importlib.import_module("examples.pytorch_numbers").main(["--batch_size=1024"])
    assert new["learning_rate"] == pytest.approx(1e-3 * 4)
    assert new["b2"] == pytest.approx(0.999**16)
    assert f"betas=({new['b1']:.6g}, {new['b2']:.6g})" in capsys.readouterr().out


def test_the_notebook_prints_what_it_shows(capsys):
    notebook = json.loads((ROOT / "examples" / "first_ten_minutes.ipynb").read_text())
    space, number = {"__name__": "__main__"}, re.compile(r"[-+]?\d+\.?\d*(?:e-?\d+)?")
    for cell in (c for c in notebook["cells"] if c["cell_type"] == "code"):
        exec("".join(cell["source"]), space)
        told = capsys.readouterr().out
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        assert number.sub("", told) == number.sub("", shown)
        for found, wanted in zip(number.findall(told), number.findall(shown), strict=True):
            # Other processors round otherwise, which a noise scale shows most.
            assert float(found) == pytest.approx(float(wanted), rel=0.1, abs=2e-3)


class TestStudy:
    # Without a block the next token follows from the last alone, which can be learned as well.
    problem = arms.Problem(
        width=8, layers=0, vocabulary=256, base_batch_size=8, examples=256, chunk_examples=64,
        validation=16,
    )  # fmt: skip

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(study, "TINY", self.problem)
        # One program at a time, so that a study that ends early compiles no others behind it.
        monkeypatch.setattr(study, "_cores", lambda: 1)

    def test_a_row_says_what_was_trained(self, tmp_path):
        flags = ["--tiny", "--seeds=0", "--arms=base", f"--out={tmp_path / 'rows.jsonl'}"]
        (base,) = study.main(flags)
        assert (base["arm"], base["k"], base["seed"], base["updates"]) == ("base", 1.0, 0, 32)
        assert base["validation_loss"] < math.log(256) - 0.3
        assert study.main(flags) == [base]

    @pytest.mark.long
    def test_rows_are_kept_and_not_trained_again(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(study, "TINY", dataclasses.replace(self.problem, layers=1))
        out = tmp_path / "rows.jsonl"
        flags = ["--tiny", "--seeds=0", "--scales=2", f"--out={out}"]
        flags += ["--arms=base,guard:follow1000:invariant"]
        base, ramp = study.main(flags)
        assert (base["arm"], base["k"], base["seed"], base["updates"]) == ("base", 1.0, 0, 32)
        assert ramp["batch_sizes"] == [8, 16, 16, 16]
        assert ramp["updates"] == 8 + 3 * 4
        assert len(ramp["curve"]) == len(ramp["gain"]) == 4
        assert max(base["validation_loss"], ramp["validation_loss"]) < math.log(256)
        # A line cut short, as by a kill: that run alone is trained again, to the bit.
        header, first, second = out.read_text().splitlines()
        out.write_text("\n".join([header, second, first[:20]]))
        capsys.readouterr()
        again = study.main(flags)
        assert "1 runs to train, 1 done before" in capsys.readouterr().out
        assert again[0] == ramp
        assert again[1]["curve"] == base["curve"]
        assert study.read(out, json.loads(header)) == again

    def test_a_spent_budget_ends_cleanly(self, tmp_path, capsys):
        flags = ["--tiny", "--seeds=0", "--arms=base", "--budget_minutes=0"]
        assert study.main([*flags, f"--out={tmp_path / 'rows.jsonl'}"]) == []
        assert "the same command goes on from here" in capsys.readouterr().out

    def test_a_file_of_another_problem_is_refused(self, tmp_path):
        out = tmp_path / "rows.jsonl"
        flags = ["--tiny", "--seeds=0", "--arms=base", "--budget_minutes=0", f"--out={out}"]
        study.main(flags)
        with pytest.raises(SystemExit, match="another problem"):
            study.main([*flags, "--problem=learning_rate=0.1"])

    @pytest.mark.parametrize(
        ("flag", "words"),
        [
            ("--scales=0.125", "which must be a whole number from 2"),
            ("--scales=32", "divides 64"),
            ("--arms=gard:sqrt", "'gard' is no form"),
            ("--arms=guard:sqrt", "sqrt measures no noise scale"),
            ("--problem=depth=2", "no field 'depth'"),
        ],
    )
    def test_flags_that_make_no_study_are_refused(self, flag, words):
        with pytest.raises(SystemExit, match=words):
            study.main(["--tiny", flag])


def test_the_difference_is_paired_by_seed_with_a_t_interval():
    base, other = [1.0, 2.0, 4.0], [1.1, 2.3, 4.2]
    rows = [
        {"arm": arm, "k": k, "seed": seed, "validation_loss": loss, "updates": 5}
        for arm, k, losses in (("base", 1.0, base), ("sqrt", 4.0, other))
        for seed, loss in enumerate(losses)
    ]
    half = scipy.stats.ttest_rel(other, base).confidence_interval(0.95).high - 0.2
    assert f"| sqrt | +0.200 ± {half:.3f} (3) | 5 |" in study.table(rows)


def test_signal_and_noise_are_unbiased_in_every_metric():
    g, sigma, b, n = np.array([1.0, -2.0, 0.5]), np.array([2.0, 1.0, 3.0]), 4, 2
    draws = g + sigma / math.sqrt(b) * np.random.default_rng(0).normal(size=(10_000, n, 3))
    draws = draws.astype(np.float32)
    # With k so small that the averages hardly move, v is what they were: here 4.
    v = {"w": np.full(3, 4.0, np.float32)}, {"w": np.zeros(3, np.float32)}

    @jax.jit
    @jax.vmap
    def measured(mean, square):
        stats = bs_jax.MicrobatchStats({"w": square}, n, {"w": mean})
        return study.measure(v, stats, b * n, 1e-6)[1]

    found = measured(draws.mean(1), np.square(draws).mean(1))
    found = jax.tree.map(lambda x: np.asarray(x).mean(0), found)
    scale = np.array([1.0, 0.5, 0.25])
    np.testing.assert_allclose(found.signal, scale * np.sum(g**2), rtol=0.05)
    np.testing.assert_allclose(found.noise, scale * np.sum(sigma**2), rtol=0.05)


def test_gains_are_right_at_both_ends():
    for k in (2.0, 8.0):
        assert arms.adascale_gain(0.0, k) == pytest.approx(1.0)
        assert arms.adascale_gain(np.inf, k) == pytest.approx(k)
        assert arms.adascale_gain(3.0, k) == pytest.approx((3.0 + 1) / (3.0 / k + 1))
        assert arms.adaptdl_gain(3.0, k) == pytest.approx(arms.adascale_gain(3.0, k) ** 0.5)


def test_an_arm_says_whether_it_is_guarded():
    assert not arms.find_arm("invariant").rule.guard
    assert arms.find_arm("guard:invariant").rule.guard
    arm = arms.find_arm("guard:follow.25:noise_aware")
    assert (arm.rule.guard, arm.form, arm.follow_share) == (True, "follow", 0.25)
    floor = arms.find_arm("floor.25:invariant").rule
    assert (floor.guard, floor.guard_power) == (True, 0.25)
    assert arms.find_arm("ramp:merrill").rule.lr_power == 0.5


def test_ramps_make_the_updates_that_their_stages_say():
    problem = arms.Problem()
    for scale, updates in ((4.0, 328), (8.0, 308)):
        job = study.Job(arms.find_arm("ramp:invariant"), scale, (0,))
        sizes = [study.batch_size_of(problem, job, c) for c in range(problem.chunks)]
        assert sum(problem.chunk_examples // size for size in sizes) == updates
