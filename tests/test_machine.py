"""What a sweep makes of a machine: side by side or not, how many workers, which card for whom."""

import types

import pytest
from helpers.training import tiny_config

from bs_jax.errors import UserError
from bs_jax.sweep import machine
from bs_jax.sweep.machine import Machine
from bs_jax.sweep.points import resolve

CPU, CARD, CARDS = Machine("cpu", 1, 2), Machine("gpu", 1, 16), Machine("gpu", 4, 64)


def run_of(model, size, batch, channels=1):
    mean = (0.3,) * channels
    return resolve(
        tiny_config(
            **{"model.name": model, "data.image_size": size, "batch_size": batch,
               "train_examples": 1024, "data.mean": mean, "data.std": mean, "ghost_batch_size": 0}
        )
    )  # fmt: skip


def test_small_runs_are_side_by_side_on_an_accelerator_and_never_on_a_cpu():
    small, large = run_of("resnet8_patch", 28, 64), run_of("xresnet50", 128, 8, channels=3)
    for here in (CARD, CARDS, Machine("tpu", 8, 96)):
        assert here.vmapped("auto")(small)
        assert not here.vmapped("auto")(large)
    assert not CPU.vmapped("auto")(small)
    for run in (small, large):
        assert CPU.vmapped("vmap")(run)
        assert not CARD.vmapped("loop")(run)


def test_multiply_adds_are_those_of_the_batch():
    """A network of its own count: twice the batch is twice the work, channels count."""
    one, two = run_of("resnet8_patch", 28, 64), run_of("resnet8_patch", 28, 128)
    assert machine.multiply_adds(two) == 2 * machine.multiply_adds(one)
    assert machine.multiply_adds(one) == 64 * 697_728


@pytest.mark.parametrize(
    ("here", "wanted", "axis", "pending", "count"),
    [
        (CPU, 0, "auto", 9, 2),
        (CPU, 0, "loop", 1, 1),
        (CPU, 0, "vmap", 9, 0),
        (CPU, 5, "vmap", 9, 5),
        (CARD, 0, "auto", 9, 0),
        (CARD, 3, "auto", 9, 3),
        (CARDS, 0, "auto", 9, 4),
        (CARDS, 0, "auto", 3, 3),
        (Machine("tpu", 8, 96), 0, "auto", 9, 0),
    ],
)
def test_workers(here, wanted, axis, pending, count):
    assert here.workers(pending, wanted, axis) == count


def test_no_second_process_is_started_for_a_tpu():
    with pytest.raises(UserError, match="--workers is 2, but one process holds all chips"):
        Machine("tpu", 4, 96).workers(9, wanted=2)


def test_every_worker_has_a_card_and_its_share_of_the_memory(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    assert CPU.environment_of(0, 2) == {}
    alone = [CARDS.environment_of(number, 4) for number in range(4)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in alone] == ["0", "1", "2", "3"]
    assert all("XLA_PYTHON_CLIENT_PREALLOCATE" not in one for one in alone)
    shared = [CARDS.environment_of(number, 6) for number in range(6)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in shared] == ["0", "1", "2", "3", "0", "1"]
    of_a_card = {}
    for one in shared:
        share = float(one["XLA_PYTHON_CLIENT_MEM_FRACTION"])
        of_a_card.setdefault(one["CUDA_VISIBLE_DEVICES"], []).append(share)
    assert all(sum(shares) <= 0.9 for shares in of_a_card.values())
    assert sorted(map(len, of_a_card.values())) == [1, 1, 2, 2]
    assert shared[0]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    # What the user says of cards and memory stays.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".2")
    found = Machine("gpu", 2, 16).environment_of(1, 2)
    assert found == {"CUDA_VISIBLE_DEVICES": "GPU-b"}
    assert CARD.core_of(0) is None  # XLA compiles on all cores


def test_another_process_looks_for_cards(monkeypatch):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: True)
    told = types.SimpleNamespace(stdout="a library's greeting\ndevices gpu 3\n")
    monkeypatch.setattr(machine.subprocess, "run", lambda *args, **kwargs: told)
    machine.here.cache_clear()
    try:
        assert (machine.here().platform, machine.here().devices) == ("gpu", 3)
    finally:
        machine.here.cache_clear()
