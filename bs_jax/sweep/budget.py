"""A time budget: a sweep that ends by itself before the time is up, and what it can get done."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bs_jax.records.run_files import Summary
from bs_jax.run import ResolvedRun
from bs_jax.sweep.cohorts import OVERHEAD

_REPORT_SECONDS = 12.0  # that it takes, with something to spare


class Budget:
    """Asks this process to stop, as a SIGTERM does, in time for saving and the report.

    A context manager; it must be entered in the main thread.

    Args:
        minutes: from `began` to the end of the process; 0: as long as it takes.
        grace_seconds: that saving may take.
        began: time of the process's begin, of `time.monotonic`.
        say: called with a line for the user before this process is asked to stop.

    Attributes:
        over: whether the time was up.
        grace_seconds: what is left for saving where the budget is short.
    """

    def __init__(
        self,
        minutes: float,
        grace_seconds: float,
        began: float,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._say = say
        reserve = min(grace_seconds + _REPORT_SECONDS, 60 * minutes / 3)
        self.grace_seconds = min(grace_seconds, reserve / 2) if minutes else grace_seconds
        self._end_at = began + 60 * minutes if minutes else math.inf
        self._stop_at = self._end_at - reserve
        self._timer: threading.Timer | None = None
        self._left = threading.Event()
        self.over = False

    def __enter__(self) -> Budget:
        if self._stop_at < math.inf:
            left = min(max(self._stop_at - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
            self._timer = threading.Timer(left, self._end)
            self._timer.daemon = True
            self._timer.start()
        return self

    @property
    def room_for_report(self) -> bool:
        """Whether a report can be written before the time is up."""
        return time.monotonic() + _REPORT_SECONDS < self._end_at

    def _end(self) -> None:
        self.over = True
        # Before a `StopRequest` is there, the signal would kill the process.
        while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            if self._left.wait(0.05):
                return
        self._say("the time of --budget_minutes is nearly over")  # who else would send a signal?
        os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *failure: Any) -> None:
        self._left.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()


@dataclasses.dataclass(frozen=True)
class Speed:
    """How long training takes, from finished runs.

    Attributes:
        seconds_per_example: micro-batch size -> median over its runs, all that a run does included.
    """

    seconds_per_example: Mapping[int, float]

    @classmethod
    def of(cls, runs: Iterable[ResolvedRun], summaries: Mapping[str, Summary]) -> Speed:
        """Read it from the runs that one process trained from begin to end.

        Args:
            runs: of the sweep.
            summaries: run id -> how a finished run ended.
        """
        found: dict[int, list[float]] = {}
        for run in runs:
            summary = summaries.get(run.run_id)
            if summary is None or summary.resumed_at_step or not summary.seconds > 0:
                continue
            if summary.examples:
                own = found.setdefault(run.micro_batch_size, [])
                own.append(summary.seconds / summary.examples)
        return cls({size: statistics.median(values) for size, values in found.items()})

    def seconds(self, run: ResolvedRun) -> float:
        """How long a run will take; NaN where no run is finished.

        A micro-batch of m examples that was not measured takes ``a + b m``, with both fitted to
        those that were; with a = 20 b where they tell no such two (see `cost_per_example`).

        >>> from types import SimpleNamespace as Run
        >>> speed = Speed({8: 2.0, 32: 0.5 + 1.5 / 4})  # 12 s a micro-batch and .5 s an example
        >>> speed.seconds(Run(micro_batch_size=8, train_examples=10))
        20.0
        >>> round(speed.seconds(Run(micro_batch_size=64, train_examples=64)), 6)
        44.0
        """
        measured, size = self.seconds_per_example, run.micro_batch_size
        if not measured:
            return math.nan
        if size in measured:
            return run.train_examples * measured[size]
        sizes, values = np.array([*measured], float), np.array([*measured.values()])
        parts = np.stack([1 / sizes, np.ones_like(sizes)], 1) / values[:, None]
        a, b = np.linalg.lstsq(parts, np.ones_like(values))[0]
        if len(measured) < 2 or min(a, b) < 0:
            b = np.median(values / (1 + OVERHEAD / sizes))
            a = OVERHEAD * b
        return float(run.train_examples * (a / size + b))


def forecast(pending: Sequence[ResolvedRun], speed: Speed, workers: int, minutes: float) -> str:
    """What a budget is likely to get done, in a sentence.

    Args:
        pending: runs to train, in the order of their priorities.
        speed: of the finished runs.
        workers: processes that train at the same time.
        minutes: the budget.
    """
    costs = [speed.seconds(run) / workers / 60 for run in pending]
    total, fitting, left = sum(costs), 0, minutes
    if math.isnan(total):
        return f"at most {minutes:g} minutes; no run is finished yet, so their time is not known"
    for cost in costs:
        left -= cost
        if left < 0:
            break
        fitting += 1
    return (
        f"at most {minutes:g} minutes; at the speed of the finished runs {len(pending)} runs take "
        f"about {total:.0f}, so about {fitting} of them get done"
    )
