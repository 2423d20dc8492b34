"""Cohorts: runs that share compiled programs. Who trains which next, and what stays compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bs_jax.records.run_folder import RunFolder
from bs_jax.run import ResolvedRun
from bs_jax.training import distributed

OVERHEAD = 20  # examples that take as long as what a pass over a micro-batch costs beside, on a CPU


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Runs of one cohort that a process trains before it asks for more.

    Attributes:
        runs: the runs; finished ones among them are passed over.
        vmapped: train them side by side in one program, rather than one after another.
    """

    runs: list[ResolvedRun]
    vmapped: bool = False


class Schedule:
    """Hands out runs so that a worker keeps its compiled programs as long as it can.

    A worker gets runs of the cohort that it has compiled. After that it gets the largest cohort
    that nobody has begun, and then part of the largest that another worker is at (whose programs
    come from the persistent cache). Runs of a lower priority wait until those before are handed
    out.

    Args:
        pending: the runs to train.
        planned: all runs of the sweep. A cohort that is vmapped takes its finished runs along,
            because the number of runs in a program decides how it rounds.
        vmapped: whether the runs of a cohort, given one of them, are trained side by side.
        priorities: run id -> priority, 0 before 1; a run that is not named has 0. A cohort that is
            vmapped has that of its first run.
    """

    def __init__(
        self,
        pending: Sequence[ResolvedRun],
        planned: Sequence[ResolvedRun] = (),
        vmapped: Callable[[ResolvedRun], bool] = lambda run: False,
        priorities: Mapping[str, int] | None = None,
    ) -> None:
        self._priorities = priorities or {}
        self._cohorts = cohorts_of(sorted(pending, key=self._priority))
        self._vmapped = {key: vmapped(runs[0]) for key, runs in self._cohorts.items()}
        whole = cohorts_of(planned or pending)
        self._urgent: dict[str, int] = {}  # of cohorts that are vmapped
        for key in self._cohorts:
            if self._vmapped[key]:
                self._urgent[key] = self._priority(self._cohorts[key][0])
                self._cohorts[key] = whole[key]
        self._held: dict[int, str] = {}

    def _priority(self, run: ResolvedRun) -> int:
        return self._priorities.get(run.run_id, 0)

    def _level(self, key: str) -> int:
        """The priority of what a cohort would hand out next."""
        return self._urgent.get(key, self._priority(self._cohorts[key][0]))

    def next(self, worker: int) -> Assignment | None:
        """The next assignment of a worker; None if no run is left."""
        open_keys = [key for key, runs in self._cohorts.items() if runs]
        if not open_keys:
            self._held.pop(worker, None)
            return None
        first = min(map(self._level, open_keys))
        open_keys = [key for key in open_keys if self._level(key) == first]
        key = self._held.get(worker)
        if key not in open_keys:
            others = {held for other, held in self._held.items() if other != worker}
            fresh = [candidate for candidate in open_keys if candidate not in others]
            key = max(fresh or open_keys, key=lambda name: _cost(self._cohorts[name]))
            self._held[worker] = key
        assignment = self._assignments(key)[0]
        self._cohorts[key] = self._cohorts[key][len(assignment.runs) :]
        return assignment

    def cohorts(self) -> list[list[Assignment]]:
        """All assignments that are left, by cohort, the costliest first; none is handed out."""
        keys = sorted(self._cohorts, key=lambda key: _cost(self._cohorts[key]), reverse=True)
        return [self._assignments(key) for key in keys if self._cohorts[key]]

    def _assignments(self, key: str) -> list[Assignment]:
        runs = self._cohorts[key]
        return [Assignment(runs, True)] if self._vmapped[key] else [Assignment([r]) for r in runs]


def cohorts_of(runs: Sequence[ResolvedRun]) -> dict[str, list[ResolvedRun]]:
    """Runs by what their compiled programs depend on; see `optimizers.cohort_key`."""
    from bs_jax.training import optimizers

    cohorts: dict[str, list[ResolvedRun]] = {}
    for run in runs:
        cohorts.setdefault(optimizers.cohort_key(run), []).append(run)
    return cohorts


def _cost(runs: Sequence[ResolvedRun]) -> float:
    return sum(run.train_examples * cost_per_example(run) for run in runs)


def cost_per_example(run: ResolvedRun) -> float:
    """The time that an example takes, in units of one in a very large batch."""
    return 1 + OVERHEAD / run.micro_batch_size


class CohortTrainer:
    """Trains assignments, and keeps the programs of the last cohort compiled."""

    def __init__(self) -> None:
        self._key: tuple[str, bool] | None = None
        self._trainer: Any = None
        self._data: dict[Any, Any] = {}

    def train(
        self,
        folders: list[RunFolder[ResolvedRun]],
        vmapped: bool,
        on_event: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
        other_run: Any = None,
        until_examples: float = math.inf,
    ) -> None:
        """Train runs of one cohort to their ends.

        Args:
            folders: the runs and where they are recorded.
            vmapped: train them side by side.
            on_event: see `train.Trainer.train`; every event has ``compile_seconds`` beside, which
                this process has spent on making programs. First comes ``compiling`` where programs
                have to be made.
            should_stop: see `train.Trainer.train`.
            other_run: see `train.Trainer.train`.
            until_examples: see `train.Trainer.train`.

        Raises:
            Interrupted: `should_stop` said so; the states are saved.
            UserError: a mistake of the user's.
        """
        from bs_jax.training import checks, compilation, inputs, optimizers, parallel, train

        run = folders[0].run
        key = (optimizers.cohort_key(run), vmapped)
        watch = compilation.stopwatch()
        if key != self._key:
            on_event({"event": "compiling", "run_id": run.run_id})
            self._trainer = None  # frees the old programs before new ones are made
            source = inputs.data_key(run.data)
            if source not in self._data:
                self._data[source] = inputs.load_data(run.data)
            devices = parallel.training_devices()
            if distributed.process_count() == 1:  # a small batch cannot be split among many
                devices = devices[: checks.most_devices(run, len(devices))]
            self._trainer = train.Trainer(run, self._data[source], devices, vmapped=vmapped)
            self._key = key
        with contextlib.ExitStack() as stack:

            def lock() -> None:
                for folder in folders:
                    stack.enter_context(folder.locked())

            distributed.on_first(lock)
            self._trainer.train(
                folders,
                lambda event: on_event({**event, "compile_seconds": watch.seconds}),
                should_stop,
                other_run,
                until_examples,
            )
