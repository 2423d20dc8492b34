"""Trains the runs of a sweep on a Ray cluster, each cohort's share in a fresh process of a task.

Ray starts the tasks, gives them their accelerators and starts them again where a node was lost;
the rest is as on one machine: the same worker processes, the same run folders, which must lie in an
object store or on a file system that all nodes share. A task that is started again passes over
what is done.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bs_jax.errors import UserError
from bs_jax.records.run_folder import Run
from bs_jax.records.stores import storage
from bs_jax.sweep.launchers import Schedule, open_log
from bs_jax.sweep.plan import run_folder
from bs_jax.sweep.progress import Display, describe
from bs_jax.sweep.stopping import GRACE_SECONDS, Stopped, StopRequest

_RETRIES = 3  # of a task whose node or process was lost
_POLL_SECONDS = 0.3
_ROOT = Path(__file__).resolve().parents[2]


def run_ray(
    runs: Sequence[Run],
    workdir: Path,
    display: Display,
    *,
    run_axis: str,
    grace_seconds: float = GRACE_SECONDS,
    address: str | None = None,
    cpus: float = 1.0,
    gpus: float = -1.0,
) -> list[str]:
    """Train on a Ray cluster.

    Args:
        runs: what is to be trained.
        workdir: the sweep's folder, that all nodes reach.
        display: shows progress.
        run_axis: "loop" or "vmap" within a task.
        grace_seconds: from a signal to the end of a worker, come what may.
        address: of the cluster; None: ``$RAY_ADDRESS``, else one is started on this machine.
        cpus: cores of a task.
        gpus: of a task; below 0: one where the cluster has any.

    Returns:
        A line for each run that failed.

    Raises:
        Stopped: SIGTERM or SIGINT came; the tasks were told to save and end.
        UserError: Ray is not installed or the cluster not there.
    """
    ray = _connect(address)
    try:
        gpus = gpus if gpus >= 0 else float(ray.cluster_resources().get("GPU", 0) > 0)
        setup = {
            "workdir": storage.text_of(workdir),
            "core": None,
            "run_axis": run_axis,
            "grace_seconds": grace_seconds,
            "dies_with_parent": True,  # where its node is lost but the machine is not
        }
        shares = shares_of(runs, _slots(ray.cluster_resources(), cpus, gpus), run_axis)
        with StopRequest(grace_seconds + 10) as stop:
            return _serve(ray, shares, setup, display, stop, {"num_cpus": cpus, "num_gpus": gpus})
    finally:
        ray.shutdown()


def _connect(address: str | None) -> Any:
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


def _slots(resources: dict[str, float], cpus: float, gpus: float) -> int:
    """How many tasks run at once."""
    limits = [
        int(resources.get(name, 0) // needed)
        for name, needed in (("CPU", cpus), ("GPU", gpus))
        if needed > 0
    ]
    return max(min(limits, default=1), 1)


def shares_of(runs: Sequence[Run], slots: int, run_axis: str) -> list[list[Run]]:
    """Split runs into the shares of tasks: each of one cohort, as many as can run at once.

    Args:
        runs: what is to be trained.
        slots: tasks that run at once.
        run_axis: "vmap" keeps a cohort whole.
    """
    schedule = Schedule(runs, at_once=len(runs))
    cohorts = []
    while cohort := schedule.next(0):
        cohorts.append(cohort)
    if run_axis == "vmap":
        return cohorts
    parts = [1] * len(cohorts)
    while sum(parts) < min(slots, len(runs)):  # the largest share is split further
        largest = max(range(len(cohorts)), key=lambda at: len(cohorts[at]) / parts[at])
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
        """Back when all that its caller put before is there: calls keep their order."""

    def take(self) -> list[tuple[int, dict[str, Any]]]:
        """Hand out what came since the last call."""
        events, self._events = self._events, []
        return events


class Told:
    """Tells the display of every finished run once, whatever was lost with a node.

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

    def ended(self, task: int, runs: Sequence[Run]) -> None:
        """Tell of the runs of a task that ended which are recorded as done, and nobody told of.

        A node can be lost after it recorded a run and before it told; the task's next attempt
        passes over that run in silence.
        """
        for run in runs:
            if run.run_id in self._finished:
                continue
            folder = run_folder(self._workdir, run, writes=False)
            if folder.done:
                status = folder.summary()["status"]
                self.event(task, {"event": "run_finished", "run_id": run.run_id, "status": status})


def train_share(
    runs: list[dict[str, Any]], setup: dict[str, Any], report: Callable[[dict[str, Any]], None]
) -> list[str]:
    """Train runs in a fresh worker process: the body of a task.

    Args:
        runs: the fields of each `Run`, of one cohort.
        setup: of the worker.
        report: given every event that the display shows.

    Returns:
        A line for each run that crashed.

    Raises:
        WorkerLost: the process ended early.
    """
    name = f"worker-{socket.gethostname()}-{os.getpid()}.log"
    assignments = [runs] if setup["run_axis"] == "vmap" else [[run] for run in runs]
    failures: list[str] = []
    logs = storage.Outbox(storage.to_path(setup["workdir"]) / "logs")
    with open_log(logs.folder / name) as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "bs_jax.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": _python_path()},
        )
    assert process.stdin is not None
    assert process.stdout is not None
    done = 0
    try:
        process.stdin.write("".join(json.dumps(line) + "\n" for line in _lines(setup, assignments)))
        process.stdin.close()
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] in ("assignment_done", "crashed", "user_error"):
                done += 1
            if event["event"] in ("crashed", "user_error"):
                failures += [
                    f"{describe(Run(**run))}: {event['message']}" for run in assignments[done - 1]
                ]
            elif event["event"] != "assignment_done":
                report(event)
    except (KeyboardInterrupt, BrokenPipeError):
        process.send_signal(signal.SIGTERM)
    finally:
        if process.stdout is not None:
            process.stdout.close()
        code = process.wait()
        logs.close()
    if done < len(assignments) and code not in (0, 128 + signal.SIGTERM):
        raise WorkerLost(f"worker process ended with code {code}")
    return failures


def _lines(setup: dict[str, Any], assignments: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [setup, *({"runs": runs} for runs in assignments)]


def _python_path() -> str:
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path for path in paths if path)


def _serve(
    ray: Any,
    shares: list[list[Run]],
    setup: dict[str, Any],
    display: Display,
    stop: StopRequest,
    resources: dict[str, float],
) -> list[str]:
    from ray.util.scheduling_strategies import (  # pyright: ignore[reportMissingImports]
        NodeAffinitySchedulingStrategy,
    )

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()

    def task(number: int, runs: list[dict[str, Any]], mailbox: Any) -> list[str]:
        import ray  # pyright: ignore[reportMissingImports]

        from bs_jax.sweep import ray_cluster as ray_launcher

        try:
            return ray_launcher.train_share(
                runs, setup, lambda event: mailbox.put.remote(number, event)
            )
        finally:
            ray.get(mailbox.settle.remote())

    remote = ray.remote(task).options(
        max_retries=_RETRIES,
        retry_exceptions=[WorkerLost],
        runtime_env={"env_vars": {"PYTHONPATH": _python_path()}},
        **resources,
    )
    open_tasks = {}
    for number, share in enumerate(shares):
        display.starting(number, share[0])
        runs = [dataclasses.asdict(run) for run in share]
        open_tasks[remote.remote(number, runs, mailbox)] = (number, share)
    failures: list[str] = []
    told = Told(display, storage.to_path(setup["workdir"]))
    while open_tasks and not stop():
        ready, _ = ray.wait(list(open_tasks), timeout=_POLL_SECONDS)
        for number, event in ray.get(mailbox.take.remote()):
            told.event(number, event)
        for reference in ready:
            number, share = open_tasks.pop(reference)
            told.ended(number, share)
            display.idle(number)
            try:
                found = ray.get(reference)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                found = [f"{', '.join(describe(run) for run in share)}: {reason}"]
            failures += found
            for line in found:
                display.note(f"failed: {line}")
    if stop.number is not None:
        _cancel(ray, open_tasks, setup["grace_seconds"])
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
