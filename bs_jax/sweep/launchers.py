"""Engines that train the runs of a sweep: in this process, or one process a core."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from bs_jax.errors import UserError
from bs_jax.records.run_folder import Run, RunFolder
from bs_jax.records.stores import storage
from bs_jax.sweep import plan as sweep
from bs_jax.sweep.progress import Display, describe
from bs_jax.sweep.stopping import GRACE_SECONDS, Stopped, StopRequest
from bs_jax.training import distributed, optimizers

_MAX_TRIES = 2  # of a run whose process died under it
LOG_BYTES = 1 << 20  # of a worker's log, beside the old one
_PARTING_SECONDS = 10.0  # that a worker gets beyond its grace


class Schedule:
    """Hands out runs so that a worker keeps its compiled programs as long as it can.

    A worker is given runs of the cohort it has compiled; then the largest cohort that nobody has
    begun; then part of the largest that somebody else is at (its programs come from the
    persistent cache).

    Args:
        runs: what is to be trained.
        at_once: the most runs in one assignment (more than 1 where they are vmapped).
    """

    def __init__(self, runs: Sequence[Run], at_once: int = 1) -> None:
        self._cohorts: dict[str, list[Run]] = {}
        for run in runs:
            self._cohorts.setdefault(optimizers.cohort_key(run.config), []).append(run)
        self._at_once = at_once
        self._held: dict[int, str] = {}

    def next(self, worker: int) -> list[Run]:
        """The next assignment of a worker; empty where none is left."""
        open_keys = [key for key, runs in self._cohorts.items() if runs]
        if not open_keys:
            self._held.pop(worker, None)
            return []
        key = self._held.get(worker)
        if key not in open_keys:
            others = {held for other, held in self._held.items() if other != worker}
            fresh = [candidate for candidate in open_keys if candidate not in others]
            key = max(fresh or open_keys, key=lambda name: _cost(self._cohorts[name]))
            self._held[worker] = key
        taken = self._cohorts[key][: self._at_once]
        del self._cohorts[key][: self._at_once]
        return taken


def with_cohorts(pending: Sequence[Run], runs: Sequence[Run]) -> list[Run]:
    """What is pending and the finished runs of the same cohorts, which are vmapped with it.

    Args:
        pending: what is to be trained.
        runs: all runs of the sweep.
    """
    keys = {optimizers.cohort_key(run.config) for run in pending}
    return [run for run in runs if optimizers.cohort_key(run.config) in keys]


def _cost(runs: Sequence[Run]) -> float:
    # A pass over a micro-batch costs about as much overhead as twenty examples on a CPU.
    return sum(
        run.config["train_examples"] * (1 + 20 / run.config["micro_batch_size"]) for run in runs
    )


def run_inline(
    runs: Sequence[Run],
    workdir: Path,
    display: Display,
    *,
    run_axis: str,
    grace_seconds: float = GRACE_SECONDS,
) -> list[str]:
    """Train in this process, on all of its devices; or in all processes of a joined run.

    Args:
        runs: what is to be trained.
        workdir: the sweep's folder.
        display: shows progress.
        run_axis: "loop" or "vmap".
        grace_seconds: from a signal to the end of the process, come what may.

    Returns:
        A line for each run that crashed.

    Raises:
        Stopped: SIGTERM or SIGINT came; the state is saved.
        UserError: a mistake of the user's.
    """
    from bs_jax.sweep.worker import CohortTrainer

    trainer = CohortTrainer(run_axis)
    schedule = Schedule(runs, at_once=len(runs) if run_axis == "vmap" else 1)
    with StopRequest(grace_seconds) as stop:
        while assignment := schedule.next(0):
            writes = distributed.is_first()
            folders = [sweep.run_folder(workdir, run, writes=writes) for run in assignment]
            _train_here(trainer, folders, display, stop)
    return []


def run_one(
    folder: RunFolder,
    display: Display,
    *,
    grace_seconds: float = GRACE_SECONDS,
    other_run: Any = None,
) -> None:
    """Train one run in this process, in a folder of its own.

    Args:
        folder: where it is recorded.
        display: shows progress.
        grace_seconds: from a signal to the end of the process, come what may.
        other_run: an `OtherRun` to begin with.

    Raises:
        Stopped: SIGTERM or SIGINT came; the state is saved.
        UserError: a mistake of the user's.
    """
    from bs_jax.sweep.worker import CohortTrainer

    with StopRequest(grace_seconds) as stop:
        _train_here(CohortTrainer("loop"), [folder], display, stop, other_run)


def _train_here(
    trainer: Any, folders: list[RunFolder], display: Display, stop: StopRequest, other: Any = None
) -> None:
    from bs_jax.training.loop import Interrupted

    display.starting(0, folders[0].run)
    try:
        trainer.train(folders, lambda event: display.event(0, event), stop, other)
    except Interrupted:
        raise Stopped(stop.number or signal.SIGTERM) from None  # another process may have got it
    if distributed.any_process(stop()):
        raise Stopped(stop.number or signal.SIGTERM)


def open_log(path: Path) -> TextIO:
    """Open a worker's log to append to; what is over a size becomes the old one first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LOG_BYTES:
        path.replace(path.with_name(path.name + ".old"))
    return open(path, "a", encoding="utf-8")


@dataclasses.dataclass
class _Worker:
    """A worker process and what it was last told to do."""

    number: int
    process: subprocess.Popen[str]
    assignment: list[Run]


def run_processes(
    runs: Sequence[Run],
    workdir: Path,
    display: Display,
    *,
    workers: int,
    run_axis: str,
    grace_seconds: float = GRACE_SECONDS,
) -> list[str]:
    """Train in worker processes, each on a core of its own.

    For small networks one single-threaded process a core is the best use of a CPU: their
    operations are too small to share among threads.

    Args:
        runs: what is to be trained.
        workdir: the sweep's folder.
        display: shows progress.
        workers: how many processes.
        run_axis: "loop" or "vmap" within a process.
        grace_seconds: from a signal to the end of a worker, come what may.

    Returns:
        A line for each run that crashed or whose process died twice.

    Raises:
        Stopped: SIGTERM or SIGINT came; the workers have saved their states.
        UserError: a mistake of the user's, found by a worker.
    """
    pool = _Pool(runs, workdir, display, run_axis, grace_seconds)
    with StopRequest(grace_seconds + 2 * _PARTING_SECONDS, before_exit=pool.kill) as stop:
        try:
            failures = pool.serve(workers, stop)
        finally:
            pool.stop()
        if stop.number is not None:
            raise Stopped(stop.number)
        return failures


class _Pool:
    def __init__(
        self,
        runs: Sequence[Run],
        workdir: Path,
        display: Display,
        run_axis: str,
        grace_seconds: float,
    ) -> None:
        self._grace_seconds = grace_seconds
        self._schedule = Schedule(runs, at_once=len(runs) if run_axis == "vmap" else 1)
        self._workdir, self._display, self._run_axis = workdir, display, run_axis
        self._logs = storage.Outbox(workdir / "logs")
        self._events: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
        self._workers: dict[int, _Worker] = {}
        self._tries: dict[str, int] = {}
        self._failures: list[str] = []
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def serve(self, count: int, stopping: Callable[[], bool]) -> list[str]:
        for number in range(count):
            self._assign(self._start(number))
        while self._workers and not stopping():
            try:
                worker, event = self._events.get(timeout=0.2)
            except queue.Empty:
                continue
            if event is None:
                self._lost(worker)
            elif event["event"] == "assignment_done":
                self._assign(worker)
            elif event["event"] == "user_error":
                raise UserError(event["message"])
            elif event["event"] == "crashed":
                names = ", ".join(describe(run) for run in worker.assignment)
                self._fail(f"{names}: {event['message']}")
                self._assign(worker)
            else:
                self._display.event(worker.number, event)
        return self._failures

    def _start(self, number: int) -> _Worker:
        log = open_log(self._logs.folder / f"worker-{number}.log")
        process = subprocess.Popen(
            [sys.executable, "-m", "bs_jax.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # an interrupt at the terminal comes to us alone
        )
        log.close()
        worker = _Worker(number, process, [])
        core = self._cores[number % len(self._cores)] if self._cores else None
        setup = {
            "workdir": storage.text_of(self._workdir),
            "core": core,
            "run_axis": self._run_axis,
            "grace_seconds": self._grace_seconds,
        }
        self._tell(worker, setup)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        self._workers[number] = worker
        return worker

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            with contextlib.suppress(ValueError):  # a line torn by a kill
                self._events.put((worker, json.loads(line)))
        self._events.put((worker, None))

    def _assign(self, worker: _Worker) -> None:
        worker.assignment = self._schedule.next(worker.number)
        if not worker.assignment:
            self._close(worker)
            return
        self._display.starting(worker.number, worker.assignment[0])
        self._tell(worker, {"runs": [dataclasses.asdict(run) for run in worker.assignment]})

    def _tell(self, worker: _Worker, message: dict[str, Any]) -> None:
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is noticed by the listener
            worker.process.stdin.write(json.dumps(message) + "\n")
            worker.process.stdin.flush()

    def _close(self, worker: _Worker) -> None:
        self._workers.pop(worker.number, None)
        self._display.idle(worker.number)
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            worker.process.stdin.close()

    def _lost(self, worker: _Worker) -> None:
        """A worker's process ended: if it had work, give that to a new one, once."""
        if self._workers.get(worker.number) is not worker:
            return
        del self._workers[worker.number]
        code = worker.process.wait()
        again, runs = [], worker.assignment
        for run in runs:
            self._tries[run.run_id] = self._tries.get(run.run_id, 0) + 1
            if self._tries[run.run_id] < _MAX_TRIES:
                again.append(run)
            else:
                self._fail(f"{describe(run)}: its process ended with code {code}")
        self._display.note(f"worker {worker.number} ended with code {code}; starting another")
        fresh = self._start(worker.number)
        if again:
            fresh.assignment = again
            self._tell(fresh, {"runs": [dataclasses.asdict(run) for run in again]})
        else:
            self._assign(fresh)

    def _fail(self, line: str) -> None:
        self._failures.append(line)
        self._display.note(f"failed: {line}")

    def kill(self) -> None:
        """End the workers that are left, at once."""
        for worker in self._workers.values():
            worker.process.kill()

    def stop(self) -> None:
        """End the workers that are left: they save their states at the next chunk."""
        for worker in self._workers.values():
            worker.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(OSError):
                assert worker.process.stdin is not None
                worker.process.stdin.close()
        deadline = time.monotonic() + self._grace_seconds + _PARTING_SECONDS
        for worker in self._workers.values():
            try:
                worker.process.wait(timeout=max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._logs.close()
