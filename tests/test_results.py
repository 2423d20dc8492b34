"""Collecting records: everything usable is read, everything else is named, nothing is executed."""

import csv
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.synthetic_records import diverge, edit_json, write_records
from hypothesis import given
from hypothesis import strategies as st

from bs_jax.errors import UserError
from bs_jax.records import results
from bs_jax.records.metrics_file import MetricsFile
from bs_jax.records.run_folder import RunFolder
from bs_jax.report.tables import write_tables

FIRST_BUILD = Path(__file__).parent / "golden/first_build"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@pytest.fixture
def workdir(tmp_path):
    return write_records(tmp_path, arms=("none", "sqrt"), batch_sizes=(32, 64), seeds=2, rows=5)


def run_of(found, run_id):
    return found.runs[run_id]


def test_rows_follow_the_points_and_share_the_base_runs(workdir):
    found = results.load_results(workdir)
    assert len(found.rows) == 8
    assert len(found.runs) == 6
    first = found.rows[0]
    assert (first.arm, first.batch_size, first.k, first.seed) == ("none", 32, 0.5, 0)
    assert first.status == "done"
    assert 0.7 < first.metrics["eval/accuracy"] < 0.9
    assert first.scaled["b1"] == pytest.approx(0.9**0.5)
    assert found.problems == ()
    assert found.foreign == ()


def test_curves_keep_each_metric_on_its_own_examples(workdir):
    curves = results.load_results(workdir).curves["b64-s0"]
    assert len(curves["train/loss"].examples) == 5
    assert len(curves["eval/accuracy"].examples) == 1
    assert curves["train/loss"].examples.dtype == np.int64
    assert np.all(np.diff(curves["train/loss"].examples) > 0)


def test_a_line_written_twice_by_a_resumed_run_counts_once_and_the_later_one_wins(workdir):
    path = workdir / "runs/b64-s0/metrics.jsonl"
    written = ((64, 3.0), (128, 2.0), (64, 1.0))
    lines = [{"step": 1, "examples": examples, "train/loss": loss} for examples, loss in written]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = results.load_results(workdir).curves["b64-s0"]["train/loss"]
    assert curve.examples.tolist() == [64, 128]
    assert curve.values.tolist() == [1.0, 2.0]


def test_missing_and_unfinished_runs_are_counted_as_such(workdir):
    shutil.rmtree(workdir / "runs/b64-s0")
    (workdir / "runs/b64-s1/DONE").unlink()
    edit_json(workdir / "runs/b32-s0-none-1.0/summary.json", status="interrupted")
    found = results.load_results(workdir)
    assert run_of(found, "b64-s0").status == results.MISSING
    assert run_of(found, "b64-s1").status == results.UNFINISHED
    assert run_of(found, "b64-s1").metrics == {}
    assert run_of(found, "b32-s0-none-1.0").status == results.UNFINISHED
    assert found.problems == ()


def test_a_diverged_run_is_a_result(workdir):
    diverge(workdir / "runs/b64-s0")
    run = run_of(results.load_results(workdir), "b64-s0")
    assert run.status == results.DIVERGED
    assert math.isnan(run.curves["train/loss"].values[-1])


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("summary.json", b'{"status": "do', "not JSON"),
        ("summary.json", b"", "not JSON"),
        ("summary.json", b"[1, 2]", "not a JSON object"),
        ("summary.json", b"\xff\xfe\x00", "not JSON"),
        ("summary.json", b"[" * 100_000, "not JSON"),
        ("summary.json", b'{"status": "done", "final": {"eval/accuracy": "0.9"}}', "eval/accuracy"),
        ("summary.json", b'{"status": "done", "final": {"eval/accuracy": true}}', "eval/accuracy"),
        ("summary.json", b'{"status": "done", "final": {}}', "no final 'eval/accuracy'"),
        ("summary.json", b'{"status": "fine", "final": {}}', "status 'fine'"),
        ("summary.json", b'{"status": "done", "final": [0.9]}', "final list"),
        ("summary.json", b'{"status": "done", "final": {"eval/accuracy": 1%s}}', "eval/accuracy"),
        ("hparams.json", b"{}", "batch_size None where the sweep says 64"),
        ("hparams.json", b'{"batch_size": 32}', "batch_size 32 where the sweep says 64"),
    ],
)
def test_a_damaged_record_is_named_and_left_out(workdir, file, content, reason):
    content = content.replace(b"%s", b"0" * 400)
    (workdir / "runs/b64-s0" / file).write_bytes(content)
    found = results.load_results(workdir)
    assert run_of(found, "b64-s0").status == results.DAMAGED
    assert len(found.problems) == 1
    assert "b64-s0" in found.problems[0]
    assert reason in found.problems[0]
    assert run_of(found, "b64-s1").status == results.DONE


def test_a_pipe_in_place_of_a_record_does_not_hang_the_report(workdir):
    path = workdir / "runs/b64-s0/summary.json"
    path.unlink()
    os.mkfifo(path)
    found = results.load_results(workdir)
    assert "not an ordinary file" in found.problems[0]


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 9, "examples": 99, "train/lo',
        b'{"step": 9, "examples": "99", "train/loss": 1}',
        b'{"step": 9, "examples": 1%s, "train/loss": 1}' % (b"0" * 30),
        b'{"step": 9, "examples": 1%s, "train/loss": 1}' % (b"0" * 5000),
        b'{"step": 9, "examples": -5, "train/loss": 1}',
        b'{"step": 9, "examples": 99, "train/loss": {"a": 1}}',
        b"[]",
        b"null",
    ],
)
def test_a_damaged_line_is_counted_and_the_others_are_kept(workdir, line):
    path = workdir / "runs/b64-s0/metrics.jsonl"
    path.write_bytes(path.read_bytes() + line)
    found = results.load_results(workdir)
    assert len(found.curves["b64-s0"]["train/loss"].examples) == 5
    assert run_of(found, "b64-s0").status == results.DONE
    assert found.problems == ("runs/b64-s0: metrics.jsonl: 1 damaged lines or values skipped",)


def test_without_curves_the_final_metrics_still_count(workdir):
    (workdir / "runs/b64-s0/metrics.jsonl").unlink()
    found = results.load_results(workdir)
    assert run_of(found, "b64-s0").status == results.DONE
    assert "metrics.jsonl: missing" in found.problems[0]


def test_foreign_folders_are_named_and_run_ids_cannot_leave_the_folder(workdir):
    (workdir / "runs/holiday photos").mkdir()
    (workdir / "secret").mkdir()
    shutil.copytree(workdir / "runs/b64-s0", workdir / "secret/b64-s0")
    points = json.loads((workdir / "sweep.json").read_text())["points"]
    points.append(points[0] | {"run_id": "../secret/b64-s0"})
    edit_json(workdir / "sweep.json", points=points)
    found = results.load_results(workdir)
    assert found.foreign == ("holiday photos",)
    assert run_of(found, "../secret/b64-s0").status == results.MISSING


def test_points_of_wrong_types_are_named_and_the_others_kept(workdir):
    points = json.loads((workdir / "sweep.json").read_text())["points"]
    wrong = [{"seed": 1.5}, {"batch_size": "64"}, {"arm": ""}, {"offset": 0}, {"run_id": None}]
    wrong = [7, {}, *(points[0] | change for change in wrong)]
    edit_json(workdir / "sweep.json", points=points + wrong)
    found = results.load_results(workdir)
    assert len(found.rows) == 8
    assert len(found.problems) == len(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": 0}, "margin is 0, not a positive number"),
        ({"margin": None}, "margin is None"),
        ({"base_batch_size": True}, "base_batch_size is True, not a positive whole number"),
        ({"curve_metric": 3}, "curve_metric is 3, not the name of a metric"),
        ({"points": []}, "names no points"),
        ({"points": {"a": 1}}, "names no points"),
    ],
)
def test_an_unusable_sweep_file_is_a_one_line_error(workdir, changes, message):
    edit_json(workdir / "sweep.json", **changes)
    with pytest.raises(UserError, match=message) as caught:
        results.load_results(workdir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\x00"])
def test_no_sweep_file_says_how_to_make_one(tmp_path, content, monkeypatch):
    """By a command that a shell takes as it stands, in any folder."""
    workdir = tmp_path / "a b's"
    workdir.mkdir()
    if content is not None:
        (workdir / "sweep.json").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"run `python main\.py ") as caught:
        results.load_results(Path(workdir.name))
    command = str(caught.value).split("`")[1]
    assert shlex.split(command)[2:] == [f"--workdir={workdir}"]


def test_records_of_the_first_build_are_read_and_their_runs_stay_done(tmp_path):
    shutil.copytree(FIRST_BUILD, tmp_path / "sweep")
    found = results.load_results(tmp_path / "sweep")
    assert (found.problems, found.foreign) == ((), ())
    assert [row.status for row in found.rows] == [results.DONE] * 4
    assert found.sweep.train_examples == 192
    run = found.runs["b32-s0-19d3415161ed"]
    assert run.metrics["eval/loss"] == 1.071445147196452
    assert (run.rule, run.scaled["learning_rate"]) == ("sqrt", pytest.approx(2e-3 * 2**0.5))
    assert run.curves["train/loss"].examples.tolist() == [32, 64, 96, 128, 160, 192]
    assert "noise_scale" not in run.curves
    assert run.summary.versions["optax"] == "0.2.8"
    folder = tmp_path / "sweep/runs" / run.run_id
    content = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in ("config", "hparams")
    }
    assert RunFolder(folder, SimpleNamespace(run_id=run.run_id, **content)).done
    metrics = MetricsFile(folder / "metrics.jsonl", 192)
    metrics.close()
    assert metrics.digest == hashlib.sha256((folder / "metrics.jsonl").read_bytes()).digest()


def test_the_batch_size_and_the_noise_scale_are_read_as_curves(workdir):
    folder = workdir / "runs/b64-s0"
    rows = [
        {"step": 1, "examples": 64, "train/loss": 1.0, "batch_size": 64, "noise_scale": math.inf}
        | {"noise_scale_low": 30.5, "noise_scale_high": math.inf},
        {"step": 2, "examples": 192, "train/loss": 0.9, "batch_size": 128, "noise_scale": 90.0}
        | {"noise_scale_low": 60.0, "noise_scale_high": 150.0},
    ]
    (folder / "metrics.jsonl").unlink()
    metrics = MetricsFile(folder / "metrics.jsonl", 0)
    metrics.append(rows)
    metrics.close()
    run = results.load_results(workdir).runs["b64-s0"]
    assert run.curves["batch_size"].values.tolist() == [64.0, 128.0]
    assert run.curves["noise_scale_low"].values.tolist() == [30.5, 60.0]
    assert math.isnan(run.curves["noise_scale"].values[0])


@given(summary=JSON, hparams=JSON, lines=st.lists(JSON, max_size=4), data=st.data())
def test_any_json_anywhere_is_read_or_named(tmp_path_factory, summary, hparams, lines, data):
    workdir = write_records(
        tmp_path_factory.mktemp("records"), ("none",), (64,), seeds=1, sd=0, rows=2
    )
    folder = workdir / "runs/b64-s0"
    (folder / "summary.json").write_text(json.dumps(summary))
    if data.draw(st.booleans()):
        (folder / "hparams.json").write_text(json.dumps(hparams))
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    if data.draw(st.booleans()):
        points = data.draw(st.lists(JSON, max_size=2))
        sweep = json.loads((workdir / "sweep.json").read_text())
        edit_json(workdir / "sweep.json", points=sweep["points"] + points)
    found = results.load_results(workdir)
    assert found.runs["b64-s0"].status == results.DAMAGED
    assert found.problems


def test_tables_hold_a_row_a_point(workdir, tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    shutil.rmtree(workdir / "runs/b32-s0-none-1.0")
    found = results.load_results(workdir)
    paths = write_tables(found, tmp_path)
    assert [path.name for path in paths] == ["results.csv", "results.parquet"]
    with open(paths[0], newline="") as file:
        rows = list(csv.DictReader(file))
    table = pyarrow.parquet.read_table(paths[1]).to_pylist()
    assert len(rows) == len(table) == 8
    assert rows[0]["status"] == "missing"
    assert rows[0]["eval/accuracy"] == ""
    assert table[0]["eval/accuracy"] is None
    assert float(rows[1]["eval/accuracy"]) == table[1]["eval/accuracy"]
    assert table[1]["hparams/b1"] == pytest.approx(0.9**0.5)


def test_text_that_no_file_can_hold_does_not_stop_the_tables(workdir, tmp_path):
    points = json.loads((workdir / "sweep.json").read_text())["points"]
    (workdir / "sweep.json").write_text(
        json.dumps(
            json.loads((workdir / "sweep.json").read_text())
            | {"points": [*points, points[0] | {"arm": "half \ud800", "seed": 10**30}]}
        )
    )
    paths = write_tables(results.load_results(workdir), tmp_path)
    assert "half \\ud800" in paths[0].read_text()


def test_the_offline_rooms_do_not_import_jax():
    code = (
        "import sys; from bs_jax.records import results; from bs_jax.statistics import analysis; "
        "from bs_jax.report import plots, write; "
        "print([name for name in ('jax', 'optax', 'flax', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
