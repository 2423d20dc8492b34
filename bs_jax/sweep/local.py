"""Runs trained on this machine: in this process, or in worker processes."""

from __future__ import annotations

import dataclasses
import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bs_jax.errors import UserError
from bs_jax.records import stores
from bs_jax.records.run_folder import RunFolder
from bs_jax.run import ResolvedRun
from bs_jax.sweep import machine
from bs_jax.sweep.cohorts import Assignment, CohortTrainer, Schedule
from bs_jax.sweep.plan import run_folder
from bs_jax.sweep.progress import Display, describe
from bs_jax.sweep.stopping import GRACE_SECONDS, Stopped, StopRequest
from bs_jax.sweep.worker import Event, Setup, WorkerProcess
from bs_jax.training import distributed

_MAX_TRIES = 2  # of a run whose process died under it
_PARTING_SECONDS = 10.0  # that a worker gets beyond its grace


def train_here(
    schedule: Schedule, workdir: Path, display: Display, *, grace_seconds: float = GRACE_SECONDS
) -> None:
    """Train in this process, on all of its devices; or in all processes of a joined run.

    Args:
        schedule: the runs to train.
        workdir: the sweep's folder.
        display: shows progress.
        grace_seconds: from a signal to the end of the process, whatever it is doing.

    Raises:
        Stopped: SIGTERM or SIGINT came; the state is saved.
        UserError: a mistake of the user's.
    """
    trainer = CohortTrainer()
    with StopRequest(grace_seconds, answer=display.note) as stop:
        while assignment := schedule.next(0):
            writes = distributed.is_first()
            folders = [run_folder(workdir, run, writes=writes) for run in assignment.runs]
            _train(trainer, folders, assignment.vmapped, display, stop)


def train_one(
    folder: RunFolder[ResolvedRun],
    display: Display,
    *,
    grace_seconds: float = GRACE_SECONDS,
    other_run: Any = None,
) -> None:
    """Train one run in this process, in a folder of its own.

    Args:
        folder: where it is recorded.
        display: shows progress.
        grace_seconds: from a signal to the end of the process, whatever it is doing.
        other_run: an `OtherRun` to begin with.

    Raises:
        Stopped: SIGTERM or SIGINT came; the state is saved.
        UserError: a mistake of the user's.
    """
    with StopRequest(grace_seconds, answer=display.note) as stop:
        _train(CohortTrainer(), [folder], False, display, stop, other_run)


def _train(
    trainer: CohortTrainer,
    folders: list[RunFolder[ResolvedRun]],
    vmapped: bool,
    display: Display,
    stop: StopRequest,
    other_run: Any = None,
) -> None:
    from bs_jax.training.train import Interrupted

    display.starting(0, folders[0].run)
    try:
        trainer.train(folders, vmapped, lambda event: display.event(0, event), stop, other_run)
    except Interrupted:
        raise Stopped(stop.number or signal.SIGTERM) from None  # another process may have got it
    if distributed.any_process(stop()):
        raise Stopped(stop.number or signal.SIGTERM)


def train_in_processes(
    schedule: Schedule,
    workdir: Path,
    display: Display,
    *,
    workers: int,
    grace_seconds: float = GRACE_SECONDS,
) -> list[str]:
    """Train in worker processes, each on a CPU core of its own, or on a card.

    For small networks one single-threaded process a core is the best use of a CPU: their
    operations are too small to share among threads.

    Args:
        schedule: the runs to train.
        workdir: the sweep's folder.
        display: shows progress.
        workers: how many processes.
        grace_seconds: from a signal to the end of a worker, whatever it is doing.

    Returns:
        A line for each run that crashed or whose process died twice.

    Raises:
        Stopped: SIGTERM or SIGINT came; the workers have saved their states.
        UserError: a mistake of the user's, found by a worker.
    """
    pool = _Pool(schedule, workdir, display, grace_seconds)
    patience = grace_seconds + 2 * _PARTING_SECONDS
    with StopRequest(patience, before_exit=pool.kill, answer=display.note) as stop:
        try:
            failures = pool.serve(workers, stop)
        finally:
            pool.stop()
        if stop.number is not None:
            raise Stopped(stop.number)
        return failures


@dataclasses.dataclass
class _Worker:
    """A worker process and what it was last told to do."""

    number: int
    process: WorkerProcess
    assignment: Assignment | None = None


class _Pool:
    def __init__(
        self, schedule: Schedule, workdir: Path, display: Display, grace_seconds: float
    ) -> None:
        self._schedule, self._workdir, self._display = schedule, workdir, display
        self._grace_seconds = grace_seconds
        self._logs = stores.Outbox(workdir / "logs")
        self._events: queue.Queue[tuple[_Worker, Event | None]] = queue.Queue()
        self._workers: dict[int, _Worker] = {}
        self._tries: dict[str, int] = {}
        self._failures: list[str] = []
        self._machine = machine.here()

    def serve(self, count: int, stopping: Callable[[], bool]) -> list[str]:
        self._count = count
        for number in range(count):
            self._give(self._start(number), self._schedule.next(number))
        while self._workers and not stopping():
            try:
                worker, event = self._events.get(timeout=0.2)
            except queue.Empty:
                continue
            if event is None:
                self._lost(worker)
            elif event["event"] == "assignment_done":
                self._give(worker, self._schedule.next(worker.number))
            elif event["event"] == "user_error":
                raise UserError(event["message"])
            elif event["event"] == "crashed":
                assert worker.assignment is not None
                names = ", ".join(describe(run) for run in worker.assignment.runs)
                self._fail(f"{names}: {event['message']}")
                self._give(worker, self._schedule.next(worker.number))
            else:
                self._display.event(worker.number, event)
        return self._failures

    def _start(self, number: int) -> _Worker:
        setup = Setup(
            workdir=stores.text_of(self._workdir),
            grace_seconds=self._grace_seconds,
            core=self._machine.core_of(number),
        )
        environment = self._machine.environment_of(number, self._count)
        log = self._logs.folder / f"worker-{number}.log"
        worker = _Worker(number, WorkerProcess(setup, log, environment=environment))
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        self._workers[number] = worker
        return worker

    def _listen(self, worker: _Worker) -> None:
        for event in worker.process.events():
            self._events.put((worker, event))
        self._events.put((worker, None))

    def _give(self, worker: _Worker, assignment: Assignment | None) -> None:
        """Hand a worker what comes next; let it go if there is nothing."""
        worker.assignment = assignment
        if assignment is None:
            del self._workers[worker.number]
            self._display.idle(worker.number)
            worker.process.no_more()
            return
        self._display.starting(worker.number, assignment.runs[0])
        worker.process.train(assignment)

    def _lost(self, worker: _Worker) -> None:
        """A worker's process ended: if it had work, give that to a new one, once."""
        if self._workers.get(worker.number) is not worker:
            return
        del self._workers[worker.number]
        code = worker.process.wait()
        assert worker.assignment is not None
        again = []
        for run in worker.assignment.runs:
            self._tries[run.run_id] = self._tries.get(run.run_id, 0) + 1
            if self._tries[run.run_id] < _MAX_TRIES:
                again.append(run)
            else:
                self._fail(f"{describe(run)}: its process ended with code {code}")
        self._display.note(f"worker {worker.number} ended with code {code}; starting another")
        next_one = dataclasses.replace(worker.assignment, runs=again) if again else None
        self._give(self._start(worker.number), next_one or self._schedule.next(worker.number))

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
            worker.process.interrupt()
        deadline = time.monotonic() + self._grace_seconds + _PARTING_SECONDS
        for worker in self._workers.values():
            worker.process.wait(max(deadline - time.monotonic(), 0.1))
        self._logs.close()
