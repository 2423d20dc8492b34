"""Collecting many records: only what changed is read again, and the index may be lost."""

import json

import numpy as np
import pytest
from helpers.synthetic_records import diverge, edit_json, write_records

from bs_jax.records import results, stores
from bs_jax.statistics import analysis


@pytest.fixture
def workdir(tmp_path):
    return write_records(tmp_path, seeds=2, batch_sizes=(32, 64), rows=5)


@pytest.fixture
def opened(monkeypatch):
    """Names of the run folders whose records were read."""
    names = []
    listed = stores.names

    def listening(folder):
        names.append(folder.name)
        return listed(folder)

    monkeypatch.setattr(stores, "names", listening)
    return names


def same(one, other):
    assert one.rows == other.rows
    assert one.problems == other.problems
    for run_id, run in one.runs.items():
        twin = other.runs[run_id]
        assert {**vars(run), "curves": None} == {**vars(twin), "curves": None}
        assert run.curves.keys() == twin.curves.keys()
        for name, curve in run.curves.items():
            np.testing.assert_array_equal(curve.examples, twin.curves[name].examples)
            np.testing.assert_array_equal(curve.values, twin.curves[name].values)
            assert curve.examples.dtype == twin.curves[name].examples.dtype


def test_what_has_not_changed_is_not_read_again(workdir, opened):
    diverge(workdir / "runs/b32-s0-none-1.0")
    first = results.load_results(workdir)
    assert len(opened) == len(first.runs)
    opened.clear()
    same(results.load_results(workdir), first)
    assert opened == []
    edit_json(workdir / "runs/b32-s1-sqrt-1.0/summary.json", status="diverged", final={})
    changed = results.load_results(workdir)
    assert opened == ["b32-s1-sqrt-1.0"]
    assert changed.runs["b32-s1-sqrt-1.0"].status == results.DIVERGED


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"key": 1}', b'{"key": [2, "eval/accuracy"], "runs": 3}', b"\xff"],
)
def test_a_damaged_index_costs_time_alone(workdir, content):
    first = results.load_results(workdir)
    (workdir / ".index.json").write_bytes(content)
    same(results.load_results(workdir), first)


def test_a_damaged_entry_is_read_again(workdir):
    first = results.load_results(workdir)
    index = json.loads((workdir / ".index.json").read_text())
    for number, entry in enumerate(index["runs"].values()):
        entry["found"] = [None, [{}, []], [{"status": 1}, []]][number % 3]
    (workdir / ".index.json").write_text(json.dumps(index))
    same(results.load_results(workdir), first)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metrics", {"eval/accuracy": "x"}),
        ("status", 7),
        ("summary", [1]),
        ("scaled", 5),
        ("base", {"b1": []}),
        ("rule", None),
        ("summary", {"status": "interrupted", "final": {}}),
        ("warnings", [1]),
        ("curves", {"train/loss": [[1, 2], [0.5]]}),
    ],
)
def test_an_entry_of_other_types_is_read_again(workdir, field, value):
    first = results.load_results(workdir)
    index = json.loads((workdir / ".index.json").read_text())
    for entry in index["runs"].values():
        entry["found"][0][field] = value
    (workdir / ".index.json").write_text(json.dumps(index))
    same(results.load_results(workdir), first)


def test_what_is_not_done_is_always_read(workdir, opened):
    (workdir / "runs/b32-s0-sqrt-1.0/DONE").unlink()
    results.load_results(workdir)
    opened.clear()
    results.load_results(workdir)
    assert opened == ["b32-s0-sqrt-1.0"]


def test_another_metric_is_another_index(workdir, opened):
    results.load_results(workdir)
    opened.clear()
    edit_json(workdir / "sweep.json", accuracy_metric="eval/smoothed_accuracy")
    found = results.load_results(workdir)
    assert len(opened) == len(found.runs)
    analysis.analyse(found)
