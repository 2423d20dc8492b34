"""Long runs stay healthy: memory, file handles and logs do not grow."""

import gc
import time
from pathlib import Path

import jax
import pytest
from helpers.process import open_files, resident_mib
from helpers.training import rows, tiny_config, tiny_data, trainer_of

from bs_jax.records.run_folder import RunFolder
from bs_jax.sweep import worker
from bs_jax.sweep.points import resolve
from bs_jax.training.train import Trainer

linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")


@linux
def test_run_after_run_leaves_no_file_open(tmp_path):
    runs = [resolve(tiny_config(seed=seed, tensorboard=True)) for seed in range(5)]
    trainer = trainer_of(runs[0])
    trainer.train([RunFolder(tmp_path / "0", runs[0])])
    before = open_files()
    for number, run in enumerate(runs[1:], 1):
        trainer.train([RunFolder(tmp_path / str(number), run)])
        ours = [path for path in open_files().values() if path.startswith(str(tmp_path))]
        assert not ours, ours
    # TensorBoard's writer has a thread with a pipe, which ends a moment after the writer's close.
    deadline = time.monotonic() + 30
    while len(open_files()) > len(before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    assert len(open_files()) <= len(before), (before, open_files())


@linux
@pytest.mark.long
@pytest.mark.parametrize("streamed", [False, True])
def test_memory_does_not_grow_over_ten_thousand_updates(tmp_path, streamed):
    cadence = {f"{name}_every_examples": 1600 for name in ("eval", "log", "checkpoint")}
    run = resolve(tiny_config(**{"train_examples": 160_000, "data.streamed": streamed, **cadence}))
    seen = []
    trainer = Trainer(run, tiny_data(), jax.devices()[:1])
    trainer.train(
        [RunFolder(tmp_path, run)],
        lambda event: seen.append((event.get("examples"), resident_mib())),
    )
    memory = dict(item for item in seen if item[0])
    early, late = memory[32_000], memory[160_000]  # after 2,000 and 10,000 updates
    print(f"resident: {early:.1f} MiB after 2,000 updates, {late:.1f} MiB after 10,000")
    assert rows(tmp_path)[-1]["step"] == 10_000
    assert late - early < 10, memory


def test_the_log_of_a_worker_is_bounded(tmp_path):
    path = tmp_path / "logs" / "worker-0.log"
    path.parent.mkdir()
    path.write_bytes(b"x" * (worker.LOG_BYTES + 1))
    for _ in range(2):
        with worker.open_log(path) as log:
            log.write("more\n")
    assert path.read_text() == "more\nmore\n"
    assert path.with_suffix(".log.old").stat().st_size == worker.LOG_BYTES + 1
