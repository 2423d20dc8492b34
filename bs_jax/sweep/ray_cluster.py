"""Runs trained on a Ray cluster: a task trains a share of a cohort in a fresh worker process.

Ray starts the tasks, gives them their accelerators, and starts them again after a node is lost. The
rest is as on one machine: the same worker processes and the same run folders, which must lie in an
object store or on a file system that all nodes share. A task that is started again passes over the
runs that are done.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bs_jax.errors import UserError
from bs_jax.records import stores
from bs_jax.run import ResolvedRun
from bs_jax.sweep.cohorts import Assignment, Schedule
from bs_jax.sweep.plan import run_folder
from bs_jax.sweep.progress import Display, describe
from bs_jax.sweep.stopping import GRACE_SECONDS, Stopped, StopRequest
from bs_jax.sweep.worker import Event, Setup, WorkerProcess, python_path

_RETRIES = 3  # of a task whose node or process was lost
_POLL_SECONDS = 0.3


def train_on_ray(
    schedule: Schedule,
    workdir: Path,
    display: Display,
    *,
    grace_seconds: float = GRACE_SECONDS,
    address: str | None = None,
    cpus: float = 1.0,
    gpus: float = -1.0,
) -> list[str]:
    """Train on a Ray cluster.

    Args:
        schedule: the runs to train.
        workdir: the sweep's folder, that all nodes reach.
        display: shows progress.
        grace_seconds: from a signal to the end of a worker, whatever it is doing.
        address: of the cluster; None: ``$RAY_ADDRESS``, else one is started on this machine.
        cpus: cores of a task.
        gpus: of a task; below 0: one where the cluster has any.

    Returns:
        A line for each run that failed.

    Raises:
        Stopped: SIGTERM or SIGINT came; the tasks were told to save and end.
        UserError: Ray is not installed or the cluster not there.
    """
    ray = connect(address)
    try:
        gpus = gpus if gpus >= 0 else float(ray.cluster_resources().get("GPU", 0) > 0)
        setup = Setup(
            workdir=stores.text_of(workdir),
            grace_seconds=grace_seconds,
            dies_with_parent=True,  # where its node is lost but the machine is not
        )
        shares = shares_of(schedule, slots(ray.cluster_resources(), cpus, gpus))
        with StopRequest(grace_seconds + 10, answer=display.note) as stop:
            return _serve(ray, shares, setup, display, stop, {"num_cpus": cpus, "num_gpus": gpus})
    finally:
        ray.shutdown()


def connect(address: str | None) -> Any:
    """Connect to a cluster, or start one on this machine; returns the module ``ray``.

    Args:
        address: of the cluster; None: ``$RAY_ADDRESS``, else this machine.

    Raises:
        UserError: Ray is not installed or the cluster not there.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"--launcher=ray needs Ray ({error}); install it: pip install 'bs_jax[ray]'"
        ) from error
    try:
        ray.init(
            address=address or os.environ.get("RAY_ADDRESS"),
            log_to_driver=False,
            include_dashboard=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"no Ray cluster at {address or os.environ.get('RAY_ADDRESS')}: {reason}; "
            "start one (ray start --head), or leave --ray_address out"
        ) from error
    return ray


def slots(resources: dict[str, float], cpus: float, gpus: float) -> int:
    """How many tasks of so many cores and GPUs run at once on a cluster's resources."""
    limits = [
        int(resources.get(name, 0) // needed)
        for name, needed in (("CPU", cpus), ("GPU", gpus))
        if needed > 0
    ]
    return max(min(limits, default=1), 1)


def shares_of(schedule: Schedule, slots: int) -> list[list[Assignment]]:
    """Split what is to be trained into the shares of tasks, as many as can run at once.

    Args:
        schedule: the runs to train.
        slots: tasks that run at once.

    Returns:
        A task's assignments, all of one cohort. A cohort that is vmapped stays whole.
    """
    cohorts = schedule.cohorts()
    parts = [1] * len(cohorts)
    while sum(parts) < slots:  # the largest share is split further
        largest = max(range(len(cohorts)), key=lambda at: len(cohorts[at]) / parts[at])
        if len(cohorts[largest]) <= parts[largest]:
            break
        parts[largest] += 1
    return [
        cohort[start::count]
        for cohort, count in zip(cohorts, parts, strict=True)
        for start in range(count)
    ]


class WorkerLost(Exception):
    """A worker process ended before its work; Ray starts the task again."""


class Mailbox:
    """An actor beside the driver that holds the events of all tasks until they are shown."""

    def __init__(self) -> None:
        self._events: list[tuple[int, dict[str, Any]]] = []

    def put(self, task: int, event: dict[str, Any]) -> None:
        """Take in an event."""
        self._events.append((task, event))

    def settle(self) -> None:
        """Return once everything that the caller put before has arrived: calls keep their order."""

    def take(self) -> list[tuple[int, dict[str, Any]]]:
        """Hand out what came since the last call."""
        events, self._events = self._events, []
        return events


class Told:
    """Tells the display of every finished run once, although nodes may be lost.

    Args:
        display: to tell.
        workdir: the sweep's folder.
    """

    def __init__(self, display: Display, workdir: Path) -> None:
        self._display, self._workdir = display, workdir
        self._finished: set[str] = set()

    def event(self, task: int, event: dict[str, Any]) -> None:
        """Hand an event of a task on."""
        if event["event"] == "run_finished" and event["status"] != "interrupted":
            if event["run_id"] in self._finished:
                return
            self._finished.add(event["run_id"])
        self._display.event(task, event)

    def ended(self, task: int, runs: Sequence[ResolvedRun]) -> None:
        """Tell of runs that are recorded as done but were not told of, after their task ended.

        A node can be lost after it records a run and before it tells of it. The task's next attempt
        passes over that run in silence.
        """
        for run in runs:
            if run.run_id in self._finished:
                continue
            folder = run_folder(self._workdir, run, writes=False)
            if folder.done:
                status = folder.summary().status
                self.event(task, {"event": "run_finished", "run_id": run.run_id, "status": status})


def train_share(
    share: list[Assignment], setup: Setup, report: Callable[[Event], None]
) -> list[str]:
    """Train a share in a fresh worker process: the body of a task.

    Args:
        share: assignments of one cohort.
        setup: of the worker.
        report: given every event that the display shows.

    Returns:
        A line for each run that crashed.

    Raises:
        WorkerLost: the process ended early.
    """
    name = f"worker-{socket.gethostname()}-{os.getpid()}.log"
    failures: list[str] = []
    logs = stores.Outbox(stores.to_path(setup.workdir) / "logs")
    worker = WorkerProcess(setup, logs.folder / name, own_session=False)
    done, stopped = 0, False
    try:
        for assignment in share:
            worker.train(assignment)
        worker.no_more()
        for event in worker.events():
            if event["event"] in ("assignment_done", "crashed", "user_error"):
                done += 1
            if event["event"] in ("crashed", "user_error"):
                failures += [f"{describe(run)}: {event['message']}" for run in share[done - 1].runs]
            elif event["event"] != "assignment_done":
                report(event)
    except KeyboardInterrupt:  # Ray cancels the task
        stopped = True
        worker.interrupt()
        for event in worker.events():  # it saves its state meanwhile
            report(event)
    except BaseException:
        worker.kill()
        list(worker.events())
        raise
    finally:
        code = worker.wait()
        logs.close()
    if done < len(share) and not stopped and code not in (0, 128 + signal.SIGTERM):
        raise WorkerLost(f"worker process ended with code {code}")
    return failures


def _serve(
    ray: Any,
    shares: list[list[Assignment]],
    setup: Setup,
    display: Display,
    stop: StopRequest,
    resources: dict[str, float],
) -> list[str]:
    from ray.util.scheduling_strategies import (  # pyright: ignore[reportMissingImports]
        NodeAffinitySchedulingStrategy,
    )

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()

    def task(number: int, share: list[Assignment], mailbox: Any) -> list[str]:
        import ray  # pyright: ignore[reportMissingImports]

        from bs_jax.sweep import ray_cluster

        try:
            return ray_cluster.train_share(
                share, setup, lambda event: mailbox.put.remote(number, event)
            )
        finally:
            ray.get(mailbox.settle.remote())

    remote = ray.remote(task).options(
        max_retries=_RETRIES,
        retry_exceptions=[WorkerLost],
        runtime_env={"env_vars": {"PYTHONPATH": python_path()}},
        **resources,
    )
    open_tasks = {}
    for number, share in enumerate(shares):
        runs = [run for assignment in share for run in assignment.runs]
        display.starting(number, runs[0])
        open_tasks[remote.remote(number, share, mailbox)] = (number, runs)
    failures: list[str] = []
    told = Told(display, stores.to_path(setup.workdir))
    while open_tasks and not stop():
        ready, _ = ray.wait(list(open_tasks), timeout=_POLL_SECONDS)
        for number, event in ray.get(mailbox.take.remote()):
            told.event(number, event)
        for reference in ready:
            number, runs = open_tasks.pop(reference)
            told.ended(number, runs)
            display.idle(number)
            try:
                found = ray.get(reference)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                found = [f"{', '.join(describe(run) for run in runs)}: {reason}"]
            failures += found
            for line in found:
                display.note(f"failed: {line}")
    if stop.number is not None:
        _cancel(ray, open_tasks, setup.grace_seconds)
        raise Stopped(stop.number)
    return failures


def _cancel(ray: Any, open_tasks: dict[Any, Any], grace_seconds: float) -> None:
    """Have the workers save their states, and wait for that."""
    for reference in open_tasks:
        ray.cancel(reference, force=False)
    deadline = time.monotonic() + grace_seconds
    while open_tasks and time.monotonic() < deadline:
        ready, _ = ray.wait(list(open_tasks), timeout=_POLL_SECONDS)
        for reference in ready:
            open_tasks.pop(reference)
