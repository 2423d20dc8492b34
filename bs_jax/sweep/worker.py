"""A process that trains the runs it is handed, one line of JSON in, one line an event out.

Started by the launcher as ``python -m bs_jax.sweep.worker``. The first line on standard
input is the setup, every further line an assignment; the end of the input is the end of the
process. Nothing but events is written to standard output.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from typing import Any, TextIO

from bs_jax.errors import UserError
from bs_jax.records.run_folder import Run, RunFolder
from bs_jax.records.stores import storage
from bs_jax.sweep.stopping import StopRequest
from bs_jax.training import distributed

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


class CohortTrainer:
    """Trains assignments, keeping the programs of the last cohort compiled.

    Args:
        run_axis: "loop" or "vmap".
    """

    def __init__(self, run_axis: str) -> None:
        self._vmapped = run_axis == "vmap"
        self._key: str | None = None
        self._trainer: Any = None
        self._data: dict[str, Any] = {}

    def train(
        self, folders: list[RunFolder], on_event: Any, should_stop: Any, other_run: Any = None
    ) -> None:
        """Train runs of one cohort to their ends; see `Trainer.train`."""
        from bs_jax.training import inputs, loop, optimizers, parallel

        config = folders[0].run.config
        key = optimizers.cohort_key(config)
        if key != self._key:
            self._trainer = None  # frees the old programs before new ones are made
            source = inputs.data_key(config)
            if source not in self._data:
                self._data[source] = inputs.load_data(config)
            self._trainer = loop.Trainer(
                config, self._data[source], parallel.training_devices(), vmapped=self._vmapped
            )
            self._key = key
        with contextlib.ExitStack() as stack:

            def lock() -> None:
                for folder in folders:
                    stack.enter_context(folder.locked())

            distributed.on_first(lock)
            self._trainer.train(folders, on_event, should_stop, other_run)


def main() -> int:
    """Serve assignments until the input ends."""
    # Libraries may print: keep the event channel to ourselves and let them have the log.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    setup = json.loads(sys.stdin.readline())
    if setup["core"] is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {setup["core"]})  # before JAX counts the cores
    if setup.get("dies_with_parent"):
        _die_with_parent()
    with StopRequest(setup["grace_seconds"]) as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher's to answer
        return _serve(setup, events, stop)


def _die_with_parent() -> None:
    """Let Linux kill this process when the one that started it ends, so that no lock is left."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(setup: dict[str, Any], events: TextIO, stop: StopRequest) -> int:
    from bs_jax.sweep import plan as sweep
    from bs_jax.training import compilation
    from bs_jax.training.loop import Interrupted

    compilation.enable_cache()
    trainer = CohortTrainer(setup["run_axis"])
    workdir = storage.to_path(setup["workdir"])
    for line in sys.stdin:
        runs = [Run(**fields) for fields in json.loads(line)["runs"]]
        try:
            folders = [sweep.run_folder(workdir, run) for run in runs]
            trainer.train(folders, lambda event: _send(events, event), stop)
            _send(events, {"event": "assignment_done"})
        except Interrupted:
            _send(events, {"event": "interrupted"})
            return 0
        except UserError as error:
            _send(events, {"event": "user_error", "message": str(error)})
        except Exception:
            text = traceback.format_exc()
            print(text, file=sys.stderr, flush=True)
            _send(events, {"event": "crashed", "message": text.strip().splitlines()[-1]})
        if stop():
            return 0
    return 0


def _send(events: TextIO, event: dict[str, Any]) -> None:
    try:
        events.write(json.dumps(event) + "\n")
        events.flush()
    except BrokenPipeError:
        os._exit(0)  # the launcher is gone; whatever is unsaved will be trained again


if __name__ == "__main__":
    sys.exit(main())
