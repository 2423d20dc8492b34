"""Records that nobody vouches for: any JSON, any bytes; named and left out, never a traceback."""

import ast
import json
from pathlib import Path

import pytest
from helpers.synthetic_records import Run, write_records
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_jax.errors import UserError
from bs_jax.records import metrics_file, results
from bs_jax.records.metrics_file import MetricsFile
from bs_jax.records.run_files import Summary
from bs_jax.records.run_folder import RunFolder
from bs_jax.report import terminal
from bs_jax.statistics import analysis

ROOT = Path(__file__).resolve().parents[1]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6),
    st.sampled_from([10**400, -1, "done", "../../etc", "eval/accuracy", "\ud800"]),
)  # fmt: skip
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
FILES = ["summary.json", "hparams.json", "metrics.jsonl", "DONE", "config.json"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("sweep"), ("none", "sqrt"), (32, 64), 2, rows=4)


def restored(path, content):
    """Write content for the time of a check."""
    before = path.read_bytes()
    path.write_bytes(content)
    return before


def check(sweep):
    found = results.load_results(sweep)
    analysed = analysis.analyse(found)
    terminal.verdict_table(analysed)
    return found


@settings(max_examples=120)
@given(file=st.sampled_from(FILES), content=st.one_of(anything, st.binary(max_size=40)))
def test_any_content_of_a_record(sweep, file, content):
    path = sweep / "runs" / "b32-s0-sqrt-1.0" / file
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    before = restored(path, raw)
    try:
        found = check(sweep)
        assert len(found.runs) == len({row.run_id for row in found.rows})
    finally:
        path.write_bytes(before)


@settings(max_examples=120)
@given(
    file=st.sampled_from(["summary.json", "hparams.json"]), field=st.integers(0, 30), value=anything
)
def test_any_value_in_a_field_of_a_record(sweep, file, field, value):
    path = sweep / "runs" / "b32-s0-sqrt-1.0" / file
    content = json.loads(path.read_text())
    before = restored(
        path, json.dumps({**content, sorted(content)[field % len(content)]: value}).encode()
    )
    try:
        check(sweep)
    finally:
        path.write_bytes(before)


@settings(max_examples=120)
@given(field=st.integers(0, 30), value=anything)
def test_any_value_in_a_field_of_the_sweep(sweep, field, value):
    path = sweep / "sweep.json"
    content = json.loads(path.read_text())
    before = restored(
        path, json.dumps({**content, sorted(content)[field % len(content)]: value}).encode()
    )
    try:
        check(sweep)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 (most values are fine)
    finally:
        path.write_bytes(before)


@given(file=st.sampled_from(FILES), content=st.one_of(anything, st.binary(max_size=40)))
def test_a_run_folder_with_any_content_is_opened_or_refused(tmp_path_factory, file, content):
    folder = tmp_path_factory.mktemp("run")
    run = Run("r", {"batch_size": 4}, {"k": 1.0})
    RunFolder(folder, run).begin()
    (folder / "metrics.jsonl").write_text('{"examples": 4, "train/loss": 1.0}\n')
    RunFolder(folder, run).finish(Summary("done", {}))
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / file).write_bytes(raw)
    try:
        assert RunFolder(folder, run).done in (True, False)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 (most contents are fine)
    MetricsFile(folder / "metrics.jsonl", 100).close()
    metrics_file.metrics_digest(folder / "metrics.jsonl", 100)


def test_nothing_that_is_read_can_be_executed():
    """No pickle, no eval or exec of what was read, no shell; arrays come through Orbax alone."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    for path in [*ROOT.glob("bs_jax/**/*.py"), *ROOT.glob("configs/*.py"), ROOT / "main.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names}
                names.add((getattr(node, "module", "") or "").split(".")[0])
                assert not names & forbidden, (path, names)
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", "")
                assert name not in ("eval", "exec", "compile"), (path, node.lineno)
                keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert keywords.get("shell") is not True, (path, node.lineno)
                assert keywords.get("allow_pickle") is not True, (path, node.lineno)
