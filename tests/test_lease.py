"""Holding a folder of an object store: one holder at a time, whoever dies, sleeps or lies."""

import json
import subprocess
import sys
import threading
import time
import types

import pytest
from helpers.commands import ROOT
from helpers.synthetic_records import Run

from bs_jax.errors import UserError
from bs_jax.records.run_folder import RunFolder
from bs_jax.records.stores import files, lease
from bs_jax.records.stores.lease import Lease

SECONDS = 0.3


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setenv("BS_JAX_LEASE_SECONDS", str(SECONDS))


@pytest.fixture
def lively(monkeypatch):
    """Who holds a folder is seen to live and never stale, however slow this machine is."""
    monkeypatch.setenv("BS_JAX_LEASE_SECONDS", "600")
    monkeypatch.setattr(lease, "_RENEWALS", 6000)
    monkeypatch.setattr(lease, "_MAX_POLL_SECONDS", 0.03)
    monkeypatch.setattr(lease, "_PATIENCE", 2 * SECONDS / 600)


def elsewhere(folder):
    """A holder on another machine, which nobody here can ask about."""
    found = Lease(folder, SECONDS)
    found._owner |= {"process": None, "host": "elsewhere", "pid": 7}
    return found


@pytest.mark.usefixtures("lively")
def test_the_next_one_begins_when_the_first_has_ended(root):
    for _ in range(3):
        with lease.held(root) as found:
            found.check()
            refused = pytest.raises(UserError, match="is training in gs://bucket/some/folder; wait")
            with refused, lease.held(root):
                raise AssertionError
    assert files.names(root / "LOCK") == {"000002", "000003"}


def test_who_is_silent_is_taken_over_and_stops(root):
    first = elsewhere(root)
    first.acquire()
    began = time.monotonic()
    with lease.held(root) as second:
        assert time.monotonic() - began > SECONDS
        with pytest.raises(UserError, match="has taken over gs://bucket/some/folder"):
            first.check()
        second.check()
        first.release()  # touches nothing that is another's
        second._renew()
        second.check()
    elsewhere(root).acquire()  # at once, as the second has released it


def test_who_was_silent_but_not_taken_over_goes_on(root):
    first = elsewhere(root)
    first.acquire()
    time.sleep(1.5 * SECONDS)
    first.check()
    began = time.monotonic()
    elsewhere(root).acquire()
    assert time.monotonic() - began > SECONDS  # the check has renewed it


@pytest.mark.usefixtures("lively")
def test_of_many_who_wait_for_a_stale_lease_one_takes_it(root):
    elsewhere(root).acquire()
    took, refused, settled = [], [], threading.Event()

    def told(answers, answer):
        answers.append(answer)
        if len(took) + len(refused) == 4:
            settled.set()

    def contend():
        try:
            with lease.held(root):
                told(took, 1)
                settled.wait(120)
        except UserError as error:
            told(refused, str(error))

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(took), len(refused)) == (1, 3)


def test_a_holder_of_this_machine_that_was_killed_is_not_waited_for(root, store, monkeypatch):
    monkeypatch.setenv("BS_JAX_LEASE_SECONDS", "500")
    program = (
        "import sys, time\nfrom bs_jax.records.stores import files, lease\n"
        f"with lease.held(files.to_path({str(root)!r})):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert holder.stdout.readline() == b"held\n"
    assert not lease._is_dead(lease._parse(store.objects["some/folder/LOCK/000001"]))
    holder.kill()
    holder.communicate()
    began = time.monotonic()
    with lease.held(root):
        assert time.monotonic() - began < 60


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"seconds": "x", "process": [1, 2]}'])
def test_whatever_lies_there_is_waited_for_as_long_as_a_lease(root, store, content, monkeypatch):
    monkeypatch.setattr(lease, "_SECONDS", 0.3)
    store.put("some/folder/LOCK/000007", content)
    store.put("some/folder/LOCK/notes.txt", b"")
    with lease.held(root) as found:
        found.check()
    assert json.loads(store.objects["some/folder/LOCK/000008"])["released"] is True


def test_a_lost_answer_to_the_creation_is_no_other_holder(root, monkeypatch):
    create = files.create

    def lossy(path, content):
        create(path, content)
        raise FileExistsError(path)  # what a driver's second try finds

    def waited(seconds):
        raise AssertionError("it waits for itself")

    monkeypatch.setenv("BS_JAX_LEASE_SECONDS", "600")
    monkeypatch.setattr(files, "create", lossy)
    monkeypatch.setattr(lease, "time", types.SimpleNamespace(**{**vars(time), "sleep": waited}))
    with lease.held(root) as found:
        found.check()


def test_a_run_that_was_taken_over_writes_no_more(root, store, monkeypatch):
    monkeypatch.setattr(Lease, "renew_until_released", lambda self: None)  # as if it stood still
    run = Run("b8", {"batch_size": 8, "seed": 0}, {"rule": "none"})
    first = RunFolder(root, run)
    with first.locked():
        first.begin()
        store.put("some/folder/LOCK/000002", store.objects["some/folder/LOCK/000001"])
        time.sleep(1.2 * SECONDS)
        before = dict(store.objects)
        with pytest.raises(UserError, match="taken over"):
            first.check_held()
        with pytest.raises(UserError, match="taken over"):
            first.begin()
    assert store.objects == before


@pytest.mark.parametrize("given", ["x", "0", "-3", "nan", "1e9"])
def test_impossible_times_are_refused(monkeypatch, given):
    monkeypatch.setenv("BS_JAX_LEASE_SECONDS", given)
    with pytest.raises(UserError, match="BS_JAX_LEASE_SECONDS"):
        lease.lease_seconds()
