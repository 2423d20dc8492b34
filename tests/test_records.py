"""Run folders: torn files, full disks, other configs, two writers."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from helpers.synthetic_records import Run

from bs_jax.errors import UserError
from bs_jax.records import json_files, stores
from bs_jax.records.metrics_file import MetricsFile
from bs_jax.records.run_files import Summary
from bs_jax.records.run_folder import RunFolder
from bs_jax.records.stores import lock

RUN = Run("b8-s0-x", {"batch_size": 8, "seed": 0, "nested": {"a": 1}}, {"rule": "none", "k": 1.0})


def test_done_is_written_only_for_complete_runs(tmp_path):
    folder = RunFolder(tmp_path / "run", RUN)
    folder.begin()
    folder.finish(Summary("interrupted", {}))
    assert not folder.done
    summary = Summary("done", {"eval/loss": 0.5}, step=3, examples=24)
    folder.finish(summary)
    assert folder.done
    assert dataclasses.replace(folder.summary(), wall_time_seconds=0.0) == dataclasses.replace(
        summary, wall_time_seconds=0.0
    )


def test_another_config_in_the_folder_is_refused_with_the_difference(tmp_path):
    RunFolder(tmp_path, RUN).begin()
    other = Run(RUN.run_id, RUN.config | {"nested": {"a": 2}}, RUN.hparams)
    with pytest.raises(UserError, match=r"nested\.a is 1 there and 2 here"):
        RunFolder(tmp_path, other)
    RunFolder(tmp_path, RUN)  # the same one is welcome


def test_a_config_torn_by_a_kill_is_written_again(tmp_path):
    (tmp_path / "config.json").write_text('{"batch_si')
    folder = RunFolder(tmp_path, RUN)
    folder.begin()
    assert json.loads((tmp_path / "config.json").read_text()) == RUN.config


def test_metrics_after_the_checkpoint_and_a_torn_line_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": n, "examples": 8 * n, "train/loss": 1.0 / n} for n in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "exa')
    metrics = MetricsFile(path, examples=16)
    assert metrics.kept == rows[:2]
    metrics.append([rows[2]])
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_numbers_that_json_lacks_become_null(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl", 0)
    metrics.append([{"step": 1, "examples": 8, "train/loss": float("nan")}])
    metrics.close()
    assert json.loads((tmp_path / "m.jsonl").read_text())["train/loss"] is None


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    json_files.write_json(path, {"old": True})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="no space left while writing"):
        json_files.write_json(path, {"old": False})
    assert json.loads(path.read_text()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_workdir_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="--workdir"):
        stores.check_writable(tmp_path / "taken")


def test_a_second_writer_is_turned_away_until_the_first_has_died(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.2)
    folder = RunFolder(tmp_path, RUN)
    program = (
        "import fcntl, sys\n"
        f"f = open({str(tmp_path / 'LOCK')!r}, 'w')\n"
        "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process is training"), folder.locked():
            pass
    finally:
        holder.kill()
        holder.communicate()
    with folder.locked():
        pass


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "summary.json", "DONE"])
def test_what_is_no_file_in_a_records_place_is_named(tmp_path, make, name):
    make(tmp_path / name)
    said = rf"cannot write .*/{name}: .*give a --workdir|{name}: not an ordinary file"
    with pytest.raises(UserError, match=said):  # noqa: PT012 (which of the calls depends)
        folder = RunFolder(tmp_path, RUN)
        assert not folder.done
        folder.begin()
        MetricsFile(tmp_path / "metrics.jsonl", 0).close()
        if make is os.mkfifo:
            folder.summary()
        folder.finish(Summary("done", {}))
