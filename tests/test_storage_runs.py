"""Real commands with their work folder in an object store: they leave what they leave on a disk."""

import functools
import itertools
import json
import random
import threading
import time

import pytest
from faults.bench import RECIPE, TRAIN, outcome
from helpers import commands
from helpers.fake_gcs import serving

pytest.importorskip("gcsfs")
SWEEP = ("--sweep=tiny", "--workers=2")


@pytest.fixture(scope="module")
def store():
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """What a command leaves on a disk, done when it is first asked for."""

    @functools.cache
    def found(kind):
        workdir = tmp_path_factory.mktemp("disk")
        code, out = run(*kind, f"--workdir={workdir}")
        assert code == 0, out
        return outcome(workdir)

    return found


def start(*flags, **environment):
    return commands.start(*flags, recipe=(f"--config={RECIPE}",), **environment)


def run(*flags, **environment):
    return commands.finish(start(*flags, **environment))


def left(store, name, folder):
    """The outcome of what lies in the store below a name, copied to a folder."""
    for key, content in list(store.objects.items()):
        if key.startswith(f"{name}/"):
            target = folder / key
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    return outcome(folder / name)


@pytest.mark.processes
def test_a_killed_run_goes_on_and_ends_as_on_a_disk(store, wanted, tmp_path):
    command = (*TRAIN, f"--workdir={store.url}/killed", "--config.tensorboard=True")
    environment = {**store.environment, "BS_JAX_LEASE_SECONDS": "1"}
    store.gate = "killed/checkpoints/12.tar"
    process = start(*command, **environment)
    assert store.at_gate.wait(120)
    process.kill()
    commands.finish(process)
    store.opened.set()
    assert "killed/DONE" not in store.objects
    # As if the dead process had been on another machine: its lease must grow stale.
    (lock,) = (key for key in store.objects if key.startswith("killed/LOCK/"))
    store.put(lock, json.dumps({**json.loads(store.objects[lock]), "process": None}).encode())
    # The newest checkpoint has suffered as well.
    newest = "killed/checkpoints/8.tar"
    store.put(newest, store.objects[newest][:20000])
    code, out = run(*command, **environment)
    assert code == 0, out
    assert "trying the previous one" in out
    assert left(store, "killed", tmp_path) == wanted(TRAIN)
    assert json.loads(store.objects["killed/summary.json"])["resumed_at_step"] == 4
    assert any(key.startswith("killed/tensorboard/events") for key in store.objects)


def test_a_second_process_is_refused_before_it_writes(store):
    ended = threading.Event()

    def live_elsewhere():
        # Not stale for long, so that it is taken to live even where this thread must wait.
        holder = {"owner": "x", "host": "elsewhere", "pid": 7, "seconds": 60}
        for renewals in itertools.count():
            store.put("two/LOCK/000001", json.dumps({**holder, "renewals": renewals}).encode())
            if ended.wait(0.2):
                return

    thread = threading.Thread(target=live_elsewhere)
    thread.start()
    environment = {**store.environment, "BS_JAX_LEASE_SECONDS": "1"}
    code, out = run(*TRAIN, f"--workdir={store.url}/two", **environment)
    ended.set()
    thread.join()
    assert code == 2, out
    assert "another process (elsewhere, process 7) is training in gs://bucket/two; wait" in out
    assert {key for key in store.objects if key.startswith("two/")} == {"two/LOCK/000001"}


@pytest.mark.processes
def test_a_sweep_of_two_workers_and_its_report_are_those_of_a_disk(store, wanted, tmp_path):
    workdir = f"--workdir={store.url}/sweep"
    code, out = run(*SWEEP, workdir, **store.environment)
    assert code == 0, out
    assert f"Report: {store.url}/sweep/report/index.html" in out.replace("\n", "")
    assert left(store, "sweep", tmp_path) == wanted(SWEEP)
    assert "sweep/logs/worker-0.log" in store.objects
    assert store.objects.pop("sweep/report/index.html")
    code, out = run(*SWEEP, workdir, **store.environment)
    assert code == 0, out
    assert "All 3 runs are done already." in out
    assert b"</html>" in store.objects["sweep/report/index.html"]


@pytest.mark.long
def test_kills_at_random_times(store, wanted, tmp_path):
    rng = random.Random(0)
    kills = 0
    for number in range(8):
        kind = (TRAIN, SWEEP)[number % 2]
        command = (*kind, f"--workdir={store.url}/random-{number}")
        while True:
            process = start(*command, **store.environment)
            time.sleep(rng.uniform(1, 6))
            ended = process.poll() is not None
            process.kill()
            commands.finish(process)
            kills += not ended
            if ended or rng.random() < 0.4:
                break
        code, out = run(*command, **store.environment)
        assert code == 0, out
        assert left(store, f"random-{number}", tmp_path) == wanted(kind)
    assert kills >= 4
    print(f"{kills} kills")
