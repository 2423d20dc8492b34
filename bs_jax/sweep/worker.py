"""Worker processes: how one is started and told what to train, and what it does.

`WorkerProcess` is the side of whoever starts one; `main` is the worker itself,
``python -m bs_jax.sweep.worker``. Both speak one JSON object a line:

- in: first the `Setup`; then an assignment a line; the end of the input ends the process.
- out: events. Those of `train.Trainer.train`, and after each assignment one that ends it:
  ``assignment_done``, ``crashed`` or ``user_error`` (both with a ``message``), ``interrupted``.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from bs_jax.errors import UserError
from bs_jax.records import stores
from bs_jax.run import ResolvedRun
from bs_jax.sweep.stopping import StopRequest

if TYPE_CHECKING:  # it imports JAX, which has to wait until the worker keeps to its core
    from bs_jax.sweep.cohorts import Assignment

Event = dict[str, Any]
LOG_BYTES = 1 << 20  # of a worker's log, beside the old one
_ROOT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a worker is told once.

    Attributes:
        workdir: the sweep's folder or URL.
        grace_seconds: from a signal to the end of the process, whatever it is doing.
        core: the CPU core that it keeps to; None: any.
        dies_with_parent: the system kills it when the process that started it ends.
    """

    workdir: str
    grace_seconds: float
    core: int | None = None
    dies_with_parent: bool = False


class WorkerProcess:
    """A worker, as seen by the process that started it.

    Args:
        setup: of the worker.
        log: where its standard error goes.
        environment: variables that it gets beside those of this process.
        own_session: keep signals of the terminal from it; its starter answers them.
    """

    def __init__(
        self,
        setup: Setup,
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        own_session: bool = True,
    ) -> None:
        with open_log(log) as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bs_jax.sweep.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=own_session,
                env={**os.environ, **(environment or {}), "PYTHONPATH": python_path()},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._tell(dataclasses.asdict(setup))

    def train(self, assignment: Assignment) -> None:
        """Hand it an assignment, to be trained after those before."""
        runs = [run.to_json() for run in assignment.runs]
        self._tell({"runs": runs, "vmapped": assignment.vmapped})

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # `events` ends, which tells enough
            self._input.write(json.dumps(message) + "\n")
            self._input.flush()

    def no_more(self) -> None:
        """Say that no assignment follows: the worker ends after those it has."""
        with contextlib.suppress(OSError):
            self._input.close()

    def events(self) -> Iterator[Event]:
        """Its events, until it ends."""
        for line in self._output:
            with contextlib.suppress(ValueError):  # a line torn by a kill
                yield json.loads(line)
        self._output.close()

    def interrupt(self) -> None:
        """Ask it to save its state and end."""
        self._process.send_signal(signal.SIGTERM)
        self.no_more()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def wait(self, seconds: float | None = None) -> int:
        """Wait for its end; its exit code.

        Args:
            seconds: kill it after that long.
        """
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def open_log(path: Path) -> TextIO:
    """Open a log to append to; one that has grown past `LOG_BYTES` becomes the old one first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LOG_BYTES:
        path.replace(path.with_name(path.name + ".old"))
    return open(path, "a", encoding="utf-8")


def python_path() -> str:
    """The ``PYTHONPATH`` under which a fresh process imports this very package."""
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path for path in paths if path)


def main() -> int:
    """Serve assignments until the input ends."""
    # Libraries may print: they get the log, so that events alone go to standard output.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    setup = Setup(**json.loads(sys.stdin.readline()))
    if setup.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {setup.core})  # before JAX counts the cores
    if setup.dies_with_parent:
        _die_with_parent()
    with StopRequest(setup.grace_seconds) as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starter answers it
        return _serve(setup, lambda event: _send(events, event), stop)


def _die_with_parent() -> None:
    """Let Linux kill this process when its starter ends, so that it holds no lock any longer."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(setup: Setup, send: Callable[[Event], None], stop: StopRequest) -> int:
    from bs_jax.sweep import plan as sweep
    from bs_jax.sweep.cohorts import CohortTrainer
    from bs_jax.training import compilation
    from bs_jax.training.train import Interrupted

    compilation.enable_cache()
    trainer = CohortTrainer()
    workdir = stores.to_path(setup.workdir)
    for line in sys.stdin:
        message = json.loads(line)
        runs = [ResolvedRun.from_json(fields) for fields in message["runs"]]
        try:
            folders = [sweep.run_folder(workdir, run) for run in runs]
            trainer.train(folders, message["vmapped"], send, stop)
            send({"event": "assignment_done"})
        except Interrupted:
            send({"event": "interrupted"})
            return 0
        except UserError as error:
            send({"event": "user_error", "message": str(error)})
        except Exception:
            text = traceback.format_exc()
            print(text, file=sys.stderr, flush=True)
            send({"event": "crashed", "message": text.strip().splitlines()[-1]})
        if stop():
            return 0
    return 0


def _send(events: TextIO, event: Event) -> None:
    try:
        events.write(json.dumps(event) + "\n")
        events.flush()
    except BrokenPipeError:
        os._exit(0)  # the starter is gone; whatever is unsaved will be trained again


if __name__ == "__main__":
    sys.exit(main())
