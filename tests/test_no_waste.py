"""The loop wastes nothing: compiles once, copies no state, waits for the device once a chunk."""

import functools
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training import counted_compilations, tiny_config, tiny_data

from bs_jax.records.run_folder import RunFolder
from bs_jax.sweep.points import resolve
from bs_jax.training import compilation, memory, parallel, profiling, step
from bs_jax.training.train import Trainer


def folders(path, *overrides):
    runs = [resolve(tiny_config(**override)) for override in overrides]
    return [RunFolder(path / str(number), run) for number, run in enumerate(runs)]


def test_each_program_is_compiled_once_and_runs_that_differ_in_values_only_compile_nothing(
    tmp_path, monkeypatch
):
    lengths = []
    uneven = {"train_examples": 208, "eval_every_examples": 72}  # 4.5 updates
    first, *others = folders(
        tmp_path,
        uneven,
        uneven | {"seed": 1},
        uneven | {"optimizer.hyperparams.learning_rate": 1e-3, "optimizer.hyperparams.b2": 0.9},
        uneven | {"bn_decay": 0.5, "optimizer.hyperparams.weight_decay": 0.2},
    )

    def counted_chunk(train_chunk, *args):
        lengths.append(int(args[3]))
        return train_chunk(*args)

    with_train_chunk(monkeypatch, counted_chunk)
    trainer = Trainer(first.run, tiny_data(), jax.devices()[:1])
    with counted_compilations() as found:
        trainer.train([first])
        assert lengths == [5, 1, 3, 3, 1]  # a checkpoint after 96 and 192 examples
        compiled = [name for event, name in found if event == "backend_compile_duration"]
        for program in ("init", "train_chunk", "evaluate"):
            assert compiled.count(f"jit({program})") == 1, compiled
        found.clear()
        trainer.train(others)
        assert not found


def with_train_chunk(monkeypatch, wrapped):
    """Let trainers call ``wrapped(train_chunk, *arguments)`` for every chunk."""
    make_programs = step.make_programs

    def made(*args, **kwargs):
        programs = make_programs(*args, **kwargs)
        chunk = functools.partial(wrapped, programs.train_chunk)
        chunk.trace = programs.train_chunk.trace  # for the estimate of its memory
        chunk.lower = programs.train_chunk.lower
        return programs._replace(train_chunk=chunk)

    monkeypatch.setattr(step, "make_programs", made)


def test_the_device_is_waited_for_once_a_chunk(tmp_path, monkeypatch):
    (folder,) = folders(
        tmp_path,
        {"train_examples": 288, "log_every_examples": 16, "checkpoint_every_examples": 0},
    )
    fetches, chunks = [], []
    get = jax.device_get

    def counted_get(tree):
        fetches.append(len(chunks))
        return get(tree)

    def counted_chunk(train_chunk, *args):
        chunks.append(1)
        # All that the chunk reads is on the device, but for the numbers of its examples.
        with jax.transfer_guard_device_to_host("disallow"):
            return train_chunk(*args)

    with_train_chunk(monkeypatch, counted_chunk)
    trainer = Trainer(folder.run, tiny_data(), jax.devices()[:1])
    monkeypatch.setattr(jax, "device_get", counted_get)
    trainer.train([folder])
    # 288 examples in chunks of 96: after the first state, the numbers of a chunk are fetched when
    # the next one has begun.
    assert len(chunks) == 3
    assert fetches == [0, 2, 3, 3]


def test_the_state_is_donated_and_lives_on_in_the_same_memory():
    config = resolve(tiny_config())
    devices = jax.devices()[:1]
    programs = step.make_programs(config, 3, (8, 8, 1), devices)
    inputs = step.run_inputs(config)
    state = parallel.replicate(programs.init(inputs), devices)
    batches = np.zeros((1, 6, 16), np.int32)  # of the program that the first test trains by
    data = parallel.replicate(
        (np.zeros((96, 8, 8, 1), np.uint8), np.zeros(96, np.int32), np.ones(96, np.float32)),
        devices,
    )
    new, _ = programs.train_chunk(state, inputs, data, np.int32(6), batches)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, inputs, data)))


def test_compiled_programs_are_kept_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BS_JAX_CACHE", str(tmp_path))
    before = {
        name: jax.config.values[name]
        for name in (
            "jax_compilation_cache_dir",
            "jax_persistent_cache_min_compile_time_secs",
            "jax_persistent_cache_min_entry_size_bytes",
        )
    }
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation.enable_cache()
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "xla")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_options_for_the_compiler_are_given_on_cpus_only_and_leave_the_users_alone(monkeypatch):
    compilation.compiler_options.cache_clear()
    assert compilation.compiler_options("gpu") == {}
    for name in compilation._CPU_OPTIONS:
        monkeypatch.setenv("XLA_FLAGS", f"--{name}=")
        assert compilation.compiler_options("cpu") == {}
        compilation.compiler_options.cache_clear()
    monkeypatch.setattr(compilation, "_CPU_OPTIONS", {"xla_of_another_version": "1"})
    assert compilation.compiler_options("cpu") == {}
    compilation.compiler_options.cache_clear()


def test_a_profile_names_operations_and_opens_in_perfetto(tmp_path):
    config = resolve(tiny_config())
    found = profiling.profile(config, tiny_data(), jax.devices()[:1], tmp_path, updates=2)
    assert found.seconds_per_update > 0
    assert sum(share for _, share in found.operations) == pytest.approx(1)
    assert len(found.operations) > 10
    assert str(tmp_path) in found.to_text()
    # Other devices' traces may name their operations otherwise.
    assert "xprof alone" in profiling.Profile(tmp_path, 1e-3, []).to_text()
    (perfetto,) = tmp_path.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert found.operations[0][0] in names


def test_peak_memory_counts_what_is_alive_at_once():
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    assert memory.peak_bytes(lambda x: x + 1, x) == 8000
    assert memory.peak_bytes(lambda x: jnp.sin(jnp.sin(jnp.sin(x))), x) == 8000  # x is not needed
    assert memory.peak_bytes(lambda x: jnp.sin(x) + jnp.cos(x), x) == 12000

    def loop(x):
        return jax.lax.scan(lambda c, _: (c + jnp.sin(c) * 2, None), x, None, length=100)[0]

    assert 12000 <= memory.peak_bytes(loop, x) <= 20000


def test_what_every_round_of_a_loop_reads_stays_to_the_last():
    """As resident images do: else the memory of a run beside them is taken for theirs."""
    data = x = jax.ShapeDtypeStruct((1000,), jnp.float32)

    def round_of(data, x):
        return jnp.sin(jnp.sin(x + data[0]))  # reads the data first, then needs room of its own

    def scanned(data, x):
        return jax.lax.scan(lambda x, _: (round_of(data, x), None), x, None, length=3)[0]

    def counted(data, x):
        return jax.lax.fori_loop(0, data[0].astype(int), lambda _, x: round_of(data, x), x)

    for function in (scanned, counted):
        assert 12000 <= memory.peak_bytes(function, data, x) <= 16100  # data, x, what becomes of it


@pytest.mark.long
def test_vmapped_runs_go_in_groups_where_not_all_fit(tmp_path, monkeypatch):
    runs = folders(tmp_path, *({"seed": seed} for seed in range(5)))
    one, sizes = [], []
    decide = memory.runs_at_once

    def little_memory(own, shared, budget, wanted):
        one.append(own)
        return decide(own, shared, shared + int(2.1 / 0.4 * own), wanted)

    monkeypatch.setattr(memory, "runs_at_once", little_memory)

    def sized(train_chunk, state, *args):
        sizes.append(len(state.step))
        return train_chunk(state, *args)

    with_train_chunk(monkeypatch, sized)
    trainer = Trainer(runs[0].run, tiny_data(), jax.devices()[:1], vmapped=True)
    trainer.train(runs)
    assert sizes == [2, 2, 2, 2, 1, 1]  # two chunks a group
    assert all(folder.done for folder in runs)
    parameters = 77_000 // 100  # the tiny network has about a thousand, held several times
    assert one[0] > 4 * 3 * parameters
