"""SIGTERM while Python code does not run: the grace ends it with the documented code."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers.process import open_files

from bs_jax.sweep.stopping import StopRequest
from bs_jax.training import compilation

# What is prepared, and what then runs without Python.
BUSY = {
    # A device that is at it for minutes, as in a long evaluation.
    "evaluation": (
        "loop = jax.jit(lambda x: jax.lax.while_loop(lambda x: x[0] < 1e9, "
        "lambda x: x + 1e-3 * jnp.sin(x), x)).lower(jnp.ones(1000)).compile()",
        "loop(jnp.ones(1000)).block_until_ready()",
    ),
    # Four and more seconds of compilation.
    "compilation": (
        "part = jax.jit(lambda x: functools.reduce(lambda y, n: jnp.sin(jnp.cumsum(jnp.sort("
        "y @ y)).reshape(4, 4) + n), range(100), x)); "
        "lowered = jax.jit(lambda x: [part(x + c) for c in range(12)]).lower(jnp.ones((4, 4)))",
        "lowered.compile()",
    ),
}
SCRIPT = """
import functools, sys
import jax, jax.numpy as jnp
from bs_jax.sweep.stopping import StopRequest
{prepare}
with StopRequest({grace}, answer=lambda line: print(line, flush=True)) as stop:
    print("ready", flush=True)
    {busy}
    print("through", flush=True)
"""


@pytest.mark.parametrize("what", sorted(BUSY))
def test_a_signal_while_native_code_runs_ends_the_process_in_time(what):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(grace=0.5, prepare=BUSY[what][0], busy=BUSY[what][1])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    began = time.monotonic()
    process.terminate()
    out, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "through" not in out
    assert "give the same command again to go on" in said
    assert out.startswith("SIGTERM: stopping at the next point to save, after at most 0.5 s;")
    assert 0.4 < time.monotonic() - began < 20


def test_a_signal_while_native_code_runs_is_answered_at_once_and_a_second_one_ends_it():
    prepare, busy = BUSY["compilation"] if "compilation" in BUSY else sorted(BUSY.items())[0][1]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(grace=300, prepare=prepare, busy=busy)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline().startswith("SIGINT: stopping at the next point to save")
    answered = time.monotonic() - began
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, said
    assert "through" not in out
    assert "stopped at once; the last checkpoint is kept" in said
    assert answered < 5  # a busy machine; the compilation takes longer
    assert time.monotonic() - began < 20


def test_a_signal_is_noted_and_the_context_left_in_peace():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(grace_seconds=30) as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not stop() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.number == signal.SIGTERM
        # The second signal would have its usual effect.
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_no_thread_and_no_file_is_left():
    pipes, watchers = set(), set()
    for _ in range(20):
        files, threads = set(open_files().values()), set(threading.enumerate())
        with StopRequest():
            pipes |= {name for name in open_files().values() if "pipe" in name} - files
            watchers |= set(threading.enumerate()) - threads
    # By name: what else this process has open may change at any time.
    assert len(pipes) == len(watchers) == 20
    assert not pipes & set(open_files().values())
    assert not any(watcher.is_alive() for watcher in watchers)


class Compiling:
    """A program that XLA compiles until it is let go."""

    def __init__(self):
        self.started, self.goes_on = threading.Event(), threading.Event()

    def lower(self):
        return self

    def compile(self):
        self.started.set()
        assert self.goes_on.wait(60)


def test_ctrl_c_in_ones_own_script_does_not_wait_for_compiling_threads():
    programs = [Compiling(), Compiling()]

    def interrupt():
        assert all(program.started.wait(60) for program in programs)
        os.kill(os.getpid(), signal.SIGINT)

    # A command in the background of a shell without job control ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            compilation.side_by_side([(program, ()) for program in programs])
        assert not any(program.goes_on.is_set() for program in programs)
    finally:
        signal.signal(signal.SIGINT, before)
        for program in programs:
            program.goes_on.set()


def test_what_fails_to_compile_is_raised():
    class Failing(Compiling):
        def compile(self):
            raise ValueError("too large")

    fine = Compiling()
    fine.goes_on.set()
    with pytest.raises(ValueError, match="too large"):
        compilation.side_by_side([(fine, ()), (Failing(), ())])
