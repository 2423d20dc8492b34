"""Object stores: the same answers as a disk, whole objects; a server of its own for every test."""

import importlib.util
import json
import os
import shutil
import sys
import threading

import numpy as np
import pytest
from helpers.fake_gcs import BUCKET
from helpers.synthetic_records import edit_json, write_records

from bs_jax.data import sources
from bs_jax.errors import UserError
from bs_jax.records import metrics_file, results, stores
from bs_jax.records.stores import files
from bs_jax.report import style
from bs_jax.report import write as report
from bs_jax.report.tables import write_tables
from bs_jax.statistics.analysis import analyse
from bs_jax.training import checkpoint, compilation
from bs_jax.training.state import TrainState

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="needs gcsfs")


def put_folder(store, folder, key):
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(f"{key}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@pytest.mark.parametrize("kind", ["disk", "store"])
def test_a_store_answers_as_a_disk_does(kind, tmp_path, root):
    folder = tmp_path / "some" if kind == "disk" else root
    stores.make_folder(folder)
    stores.make_folder(folder / "runs")
    for name, content in {
        "a b.json": b"{}\n",
        "DONE": b"",
        "é %2F": b"\x00\n\n--\xff",
    }.items():
        stores.write_bytes(folder / name, content)
        assert stores.read_bytes(folder / name) == content
        assert stores.exists(folder / name)
    stores.write_bytes(folder / "DONE", b"again")
    stores.rename(folder / "DONE", folder / "runs" / "DONE")
    assert not stores.exists(folder / "DONE")
    assert stores.read_bytes(folder / "runs" / "DONE") == b"again"
    assert stores.names(folder) == {"a b.json", "é %2F", "runs"}
    assert stores.names(folder / "nowhere") == set()
    stores.unlink(folder / "a b.json")
    stores.unlink(folder / "a b.json")
    with pytest.raises(FileNotFoundError):
        stores.read_bytes(folder / "a b.json")
    stores.write_bytes(folder / "rows", b"")
    growing = stores.GrowingFile(folder / "rows", "")
    growing.write("1\n")
    growing.write("2\n")
    growing.flush()
    assert stores.read_bytes(folder / "rows") == b"1\n2\n"
    growing.close()
    assert stores.each(folder, lambda n: n * n, range(40)) == [n * n for n in range(40)]


def test_a_path_of_a_store_is_told_as_it_was_given(root):
    assert str(root / "x") == f"gs://{BUCKET}/some/folder/x"
    assert (root / "x").name == "x"
    assert stores.to_path(stores.text_of(root)) == root
    assert os.path.isabs(stores.text_of(stores.to_path("here")))


def test_listings_of_many_pages_are_whole(store, root):
    for number in range(45):
        store.put(f"some/folder/runs/{number}/DONE", b"")
    store.put("some/folder2/runs/x/DONE", b"")
    assert len(stores.names(root / "runs")) == 45
    before = files.stamps(root)
    assert before.keys() == {f"runs/{number}/DONE" for number in range(45)}
    stores.write_bytes(root / "runs" / "7" / "DONE", b"")
    after = files.stamps(root)
    assert [name for name in after if after[name] != before[name]] == ["runs/7/DONE"]


def test_of_many_who_create_an_object_one_succeeds(root):
    won, start = [], threading.Barrier(8)

    def contend(number):
        start.wait()
        try:
            files.create(root / "LOCK", str(number).encode())
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert stores.read_bytes(root / "LOCK") == str(won[0]).encode()


def test_metrics_are_put_whole_and_no_more_often_than_needed(store, root, monkeypatch):
    monkeypatch.setattr(files, "_SECONDS_BETWEEN_PUTS", 3600.0)
    path = root / "metrics.jsonl"
    rows = [{"step": n, "examples": 8 * n, "train/loss": 1.0 / n} for n in range(1, 40)]
    store.put("some/folder/metrics.jsonl", (json.dumps(rows[0]) + '\n{"step": 2, "ex').encode())
    metrics = metrics_file.MetricsFile(path, examples=8)
    assert metrics.kept == rows[:1]
    store.requests.clear()
    for row in rows[1:]:
        metrics.append([row])
    metrics.flush()
    metrics.flush()
    metrics.close()
    assert len(store.requests) <= 2
    assert [json.loads(line) for line in stores.read_bytes(path).splitlines()] == rows
    assert metrics_file.metrics_digest(path, 8 * 39) == metrics.digest


def test_what_only_a_disk_can_hold_is_sent_once(store, root):
    box = stores.Outbox(root / "logs")
    (box.folder / "deep").mkdir()
    (box.folder / "deep" / "a.log").write_text("1")
    box.send()
    store.requests.clear()
    box.send()
    assert store.requests == []
    (box.folder / "b.log").write_text("2")
    box.close()
    assert stores.read_bytes(root / "logs" / "deep" / "a.log") == b"1"
    assert stores.read_bytes(root / "logs" / "b.log") == b"2"
    assert not box.folder.exists()


def state_of(step):
    return TrainState(
        step=np.array(step, np.int32),
        examples=np.array(8 * step, np.int32),
        params={"w": np.full((40, 50), step, np.float32)},
        batch_stats={},
        opt_state=(),
        ema_params=(),
    )


@pytest.fixture
def checkpoints(root):
    def opened():
        return checkpoint.Checkpoints(root / "checkpoints", lambda examples: bytes(32))

    saving = opened()
    for step in (1, 2, 3):
        saving.save(state_of(step), bytes(32))
    saving.close()
    return opened


def restored(opened):
    reading = opened()
    try:
        found = reading.restore(state_of(0))
        return None if found is None else int(found.step)
    finally:
        reading.close()


def test_two_checkpoints_are_kept_each_one_object(store, checkpoints):
    kept = {"some/folder/checkpoints/2.tar", "some/folder/checkpoints/3.tar"}
    assert store.objects.keys() == kept
    assert restored(checkpoints) == 3
    going_back = checkpoints()
    going_back.forget_after(2)
    assert int(going_back.restore(state_of(0)).step) == 2
    going_back.save(state_of(3), bytes(32))
    going_back.close()
    assert store.objects.keys() == kept


@pytest.mark.parametrize("damage", ["truncated", "flipped", "hostile"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(store, checkpoints, damage, tmp_path):
    key = "some/folder/checkpoints/3.tar"
    content = bytearray(store.objects[key])
    if damage == "truncated":
        content = content[: len(content) // 3]
    elif damage == "flipped":
        for at in range(2000, len(content), 997):
            content[at] ^= 4
    else:
        content = store.objects[key].replace(b"3/", b"//")
    store.put(key, bytes(content))
    assert restored(checkpoints) == 2
    assert "some/folder/checkpoints/unreadable-3.tar" in store.objects
    assert restored(checkpoints) == 2


def test_a_checkpoint_that_has_lost_its_arrays_leaves_the_others_readable(tmp_path):
    saving = checkpoint.Checkpoints(tmp_path, lambda examples: bytes(32))
    for step in (1, 2):
        saving.save(state_of(step), bytes(32))
    saving.close()
    shutil.rmtree(tmp_path / "2" / "default")
    assert restored(lambda: checkpoint.Checkpoints(tmp_path, lambda examples: bytes(32))) == 1


def test_a_store_out_of_reach_damages_nothing(store, checkpoints):
    store.refused = (403, "no storage.objects.get access")
    with pytest.raises(stores.StoreError, match=r"no storage\.objects\.get access"):
        restored(checkpoints)
    store.refused = None
    assert restored(checkpoints) == 3


def test_a_report_of_a_store_is_that_of_a_disk_and_reads_what_changed(
    store, root, tmp_path, monkeypatch
):
    for draw, drawn in (("to_png", b"png"), ("to_svg", "<svg></svg>")):  # they have their own tests
        monkeypatch.setattr(style, draw, lambda *_, drawn=drawn: drawn)
    local = write_records(tmp_path / "sweep", ("sqrt",), seeds=2, batch_sizes=(32, 64), rows=5)
    (local / "runs" / "b32-s0-sqrt-1.0" / "summary.json").write_text("{")
    put_folder(store, local, "some/folder")
    found, wanted = results.load_results(root), results.load_results(local)
    assert found.rows == wanted.rows
    assert found.problems == wanted.problems
    assert len(found.problems) == 1
    assert report.write_report(found, analyse(found)) == root / "report" / "index.html"
    (local / "tables").mkdir()
    for path in write_tables(wanted, local / "tables"):
        assert stores.read_bytes(root / "report" / path.name) == path.read_bytes()
    assert stores.names(root / "report") >= {"curves.png", "results.csv", "index.html"}

    edit_json(local / "runs/b32-s1-sqrt-1.0/summary.json", status="diverged", final={})
    key = "some/folder/runs/b32-s1-sqrt-1.0/summary.json"
    store.put(key, (local / "runs/b32-s1-sqrt-1.0/summary.json").read_bytes())
    store.requests.clear()
    again = results.load_results(str(root))
    assert again.runs["b32-s1-sqrt-1.0"].status == results.DIVERGED
    asked = (request.partition("/runs/")[2] for request in store.requests)
    opened = {text.split("/")[0] for text in asked}
    assert opened - {""} == {"b32-s0-sqrt-1.0", "b32-s1-sqrt-1.0"}  # one is not done


def test_names_in_a_store_lead_nowhere_else(store, root, tmp_path):
    local = write_records(tmp_path / "sweep", seeds=1, batch_sizes=(32,), rows=2)
    put_folder(store, local, "some/folder")
    store.put("some/folder/runs/../summary.json", b"{}")
    store.put("some/folder/runs/x/../../DONE", b"{}")
    before = sorted(path for path in tmp_path.rglob("*"))
    assert results.load_results(root).rows == results.load_results(local).rows
    assert sorted(p for p in tmp_path.rglob("*") if p.name != ".index.json") == before


@pytest.mark.parametrize("text", ["ftp://host/x", "gs:/bucket/x", "gs://", "memory://x", "s3:///x"])
def test_other_urls_are_refused(text):
    with pytest.raises(UserError, match="give a folder, gs://BUCKET/PATH or s3://BUCKET/PATH"):
        stores.to_path(text)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_missing_package_is_named(monkeypatch, scheme, package):
    monkeypatch.setitem(sys.modules, f"{package}.core", None)
    monkeypatch.setitem(sys.modules, package, None)
    files.driver.cache_clear()
    extra = {"gs": "gcs", "s3": "s3"}[scheme]
    with pytest.raises(UserError, match=rf"pip install {package}, or 'bs_jax\[{extra}\]'"):
        stores.to_path(f"{scheme}://bucket/x")


def test_a_missing_bucket_and_missing_rights_are_one_line(store, root):
    with pytest.raises(UserError, match=r"gs://other/x/.*no such bucket") as refused:
        stores.check_writable(stores.to_path("gs://other/x"))
    assert "\n" not in str(refused.value)
    store.refused = (401, "Anonymous caller does not have\nstorage.objects.create access")
    with pytest.raises(UserError, match=r"Anonymous caller.*your credentials") as refused:
        stores.check_writable(root)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="Anonymous caller"):
        results.load_results(root)
    store.refused = None
    with pytest.raises(UserError, match=r"missing; run `python main\.py"):
        results.load_results(root)


def test_what_must_lie_on_a_disk_says_so(monkeypatch):
    with pytest.raises(UserError, match="copy it to one, or mount it"):
        sources.load("folder:gs://bucket/imagenette", image_size=8)
    monkeypatch.setenv("BS_JAX_CACHE", "gs://bucket/cache")
    with pytest.raises(UserError, match="BS_JAX_CACHE gs://bucket/cache is not on a disk"):
        compilation.cache_folder()
