"""One process, several devices: pmap, and jit over a mesh, to the same bits."""

import json
import os
import subprocess
import sys
import types

import jax
import pytest
from helpers.training import rows, tiny_config, trainer_of

from bs_jax.errors import UserError
from bs_jax.records.run_folder import RunFolder
from bs_jax.sweep.points import resolve
from bs_jax.training import parallel, step
from bs_jax.training.train import Interrupted

BOTH = ("pmap", "jit")
# Ghost batches of 4 can be spread over four devices, or eight.
BATCH = 16 if jax.device_count() <= 4 else 32


def test_a_run_goes_on_the_other_way_to_the_same_bits(tmp_path):
    runs = {by: resolve(tiny_config(parallel=by, batch_size=BATCH)) for by in BOTH}
    assert runs["pmap"].run_id == runs["jit"].run_id
    trainers = {by: trainer_of(run, devices=jax.device_count()) for by, run in runs.items()}
    for by in BOTH:
        trainers[by].train([RunFolder(tmp_path / by, runs[by])])
    wanted = rows(tmp_path / "pmap")
    assert rows(tmp_path / "jit") == wanted
    for first, second in (BOTH, BOTH[::-1]):
        path = tmp_path / f"{first}-{second}"
        with pytest.raises(Interrupted):
            trainers[first].train([RunFolder(path, runs[first])], should_stop=lambda: True)
        trainers[second].train([RunFolder(path, runs[second])])
        assert rows(path) == wanted
        summary = json.loads((path / "summary.json").read_text())
        assert summary["resumed_at_step"] == 96 // BATCH
        assert summary["device"].startswith(f"{jax.device_count()} x ")


@pytest.mark.long
@pytest.mark.parametrize("devices", [8, 1])
def test_so_it_does_on_other_numbers_of_devices(devices):
    name = test_a_run_goes_on_the_other_way_to_the_same_bits.__name__
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"{__file__}::{name}"],
        env={**os.environ, "BS_JAX_TEST_DEVICES": str(devices)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_a_process_on_its_own_takes_no_device_of_another_host(monkeypatch):
    """A host of a TPU slice lists all of the slice's chips, also where it was not joined."""
    own = jax.local_devices()
    other = types.SimpleNamespace(process_index=1, id=own[-1].id + 1)
    monkeypatch.setattr(jax, "devices", lambda: [other, *own])
    assert parallel.training_devices() == own
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert parallel.training_devices() == [*own, other]


def test_the_config_says_which(monkeypatch):
    mapped = []
    monkeypatch.setattr(jax, "pmap", lambda function, **options: mapped.append(1) or function)
    for by, programs in (("jit", 0), ("pmap", 2)):
        run = resolve(tiny_config(parallel=by))
        step.make_programs(run, 3, (8, 8, 1), jax.devices()[:1])
        assert len(mapped) == programs
    with pytest.raises(UserError, match=r"unknown config\.parallel 'jitt'; did you mean 'jit'"):
        resolve(tiny_config(parallel="jitt"))
