"""What is running, how much is done, how long it will take: live on a terminal, lines elsewhere."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from bs_jax.run import ResolvedRun
from bs_jax.sweep.cohorts import cohorts_of, cost_per_example

_PLAIN_SECONDS = 10.0  # between lines where there is no terminal


@dataclasses.dataclass
class _Worker:
    """What is known of a process that trains.

    Attributes:
        text: what it does now.
        since: when it began with that, in seconds of `time.monotonic`.
        compiling: whether it makes programs, which no event tells the end of but progress.
        compile_seconds: that it has spent on making programs.
        examples: that it has trained since it was first seen.
        cost: the same, by what they cost.
        seconds: that it has trained for, without making programs.
    """

    text: str
    since: float
    compiling: bool = False
    compile_seconds: float = 0.0
    examples: int = 0
    cost: float = 0.0
    seconds: float = 0.0


class Display:
    """Progress of a sweep, or of a single run. A context manager.

    The time left comes from how fast examples were trained, the time of compiling apart: programs
    that are still to be made count as long as those that were made.

    Args:
        runs: all distinct runs of the sweep.
        finished: how many of them were done before.
        console: where to write; standard error by default.
        quiet: write nothing.
    """

    def __init__(
        self,
        runs: Sequence[ResolvedRun],
        finished: int,
        console: Console | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        self._console = console or Console(file=sys.stderr, highlight=False, quiet=quiet)
        self._total, self._finished = len(runs), finished
        self._runs = {run.run_id: run for run in runs}
        self._examples = {run.run_id: 0 for run in runs}
        self._names = {run.run_id: describe(run) for run in runs}
        self._open: set[str] = set()  # runs that are still to be trained
        self._cohort_of: dict[str, int] = {}
        self._compiled: set[int] = set()  # cohorts whose programs were made
        self._workers: dict[int, _Worker] = {}
        self._gone: list[_Worker] = []
        self._started = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[left]}"),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=1, count="", left="")
        self._live: Live | None = None

    def __enter__(self) -> Display:
        self._started = self._last_line = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=4
            )
            self._live.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*failure)
        else:  # the last word of a log: how far it came, however soon after the line before
            self._console.print(f"{self._count()} done, {self._left()}")

    def pending(self, runs: Sequence[ResolvedRun]) -> None:
        """Say which runs are still to be trained: the measure of the time left."""
        self._open = {run.run_id for run in runs}
        for number, cohort in enumerate(cohorts_of(runs).values()):
            self._cohort_of |= {run.run_id: number for run in cohort}

    def event(self, worker: int, event: dict[str, Any]) -> None:
        """Take in an event of a worker."""
        run_id = event.get("run_id")
        if run_id not in self._runs:
            return
        if event["event"] == "compiling":
            self._begin(worker, f"{self._names[run_id]}: compiling", compiling=True)
            if self._live is None and self._total == 1:
                self._console.print("compiling")
            return
        state = self._workers.setdefault(worker, _Worker("", time.monotonic()))
        if event["event"] == "progress":
            self._measure(state, run_id, event)
            state.text = self._line(run_id, event, state)
        elif event["event"] == "run_finished" and event["status"] != "interrupted":
            self._finished += 1
            self._open.discard(run_id)
            if event["status"] == "diverged":
                self.note(f"{self._names[run_id]}: diverged (recorded; the sweep goes on)")
        if self._live is None and time.monotonic() - self._last_line >= _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            running = "; ".join(one.text for one in self._workers.values())
            self._console.print(f"{self._count()}, {self._left()}; {running}", soft_wrap=True)

    def _measure(self, state: _Worker, run_id: str, event: dict[str, Any]) -> None:
        """Take in how many examples were trained in how much time."""
        now, compiled = time.monotonic(), event.get("compile_seconds", 0.0)
        taken = now - state.since
        made = min(max(compiled - state.compile_seconds, 0.0), taken)
        before = max(self._examples[run_id], event.get("resumed_at", 0))
        trained = max(event["examples"] - before, 0)
        state.seconds += taken - made
        state.examples += trained
        state.cost += trained * cost_per_example(self._runs[run_id])
        state.since, state.compile_seconds, state.compiling = now, compiled, False
        self._examples[run_id] = event["examples"]
        self._compiled.add(self._cohort_of.get(run_id, -1))

    def starting(self, worker: int, run: ResolvedRun) -> None:
        """Say what a worker turned to."""
        self._begin(worker, f"{self._names[run.run_id]}: starting")

    def _begin(self, worker: int, text: str, compiling: bool = False) -> None:
        state = self._workers.setdefault(worker, _Worker(text, time.monotonic()))
        if compiling:  # what it did before, such as importing, was no training
            state.since = time.monotonic()
        state.text, state.compiling = text, compiling

    def idle(self, worker: int) -> None:
        """Say that a worker has nothing left to do."""
        if state := self._workers.pop(worker, None):
            self._gone.append(state)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(Text(text))

    def _line(self, run_id: str, event: dict[str, Any], state: _Worker) -> str:
        loss = event["metrics"].get("train/loss")
        parts = [f"{event['examples']:,} of {event['train_examples']:,} examples"]
        if state.seconds > 0:
            parts.append(f"{state.examples / state.seconds:,.0f} images/s")
        if loss is not None:
            parts.append(f"train loss {loss:.3f}")
        if self._runs[run_id].ramps:
            parts.append(f"batch size {event['batch_size']}")
        if "noise_scale" in event:  # absent where the rule measures none
            parts.append(
                noise_scale(*(event[f"noise_scale{end}"] for end in ("", "_low", "_high")))
            )
        return f"{self._names[run_id]}: {', '.join(parts)}"

    def _count(self) -> str:
        """How much is done: runs of a sweep, examples of a single run."""
        if self._total != 1:
            return f"{self._finished} of {self._total} runs"
        (run_id,) = self._runs
        goal = self._runs[run_id].train_examples
        done = goal if self._finished else self._examples[run_id]
        return f"{done:,} of {goal:,} examples"

    def _left(self) -> str:
        if self._finished == self._total:
            return f"all done in {_duration(time.monotonic() - self._started)}"
        workers = [*self._workers.values(), *self._gone]
        seconds, cost = sum(w.seconds for w in workers), sum(w.cost for w in workers)
        if not cost or not seconds:
            return "compiling" if any(w.compiling for w in self._workers.values()) else "starting"
        left = sum(
            max(run.train_examples - self._examples[run_id], 0) * cost_per_example(run)
            for run_id, run in self._runs.items()
            if run_id in self._open
        )
        made = sum(w.compile_seconds for w in workers)
        cohorts = {self._cohort_of[run_id] for run_id in self._open if run_id in self._cohort_of}
        to_make = len(cohorts - self._compiled) * made / max(len(self._compiled), 1)
        work = left * seconds / cost + to_make
        return f"about {_duration(work / max(len(self._workers), 1))} left"

    def _render(self) -> Group:
        if self._total == 1:
            (run_id,) = self._runs
            total, done = self._runs[run_id].train_examples, self._examples[run_id]
            done = total if self._finished else done
        else:
            total, done = self._total, self._finished
        self._bar.update(
            self._task, total=total, completed=done, count=self._count(), left=self._left()
        )
        now = time.monotonic()
        lines = [
            Text(f"  {w.text}" + (f", {_duration(now - w.since)}" if w.compiling else ""), "dim")
            for _, w in sorted(self._workers.items())
        ]
        return Group(self._bar, *lines)


def describe(run: ResolvedRun) -> str:
    """A run in a few words: rule, batch size, k and seed."""
    name = "base recipe" if run.scaled.k == 1 else run.scaled.rule
    return f"{name}, batch size {run.batch_size} (k = {run.scaled.k:g}), seed {run.seed}"


def noise_scale(value: float | None, low: float | None, high: float | None) -> str:
    """The measured noise scale and its range, in examples; None: not finite, which is not known.

    >>> noise_scale(812.4, 520.0, 1300.0), noise_scale(900.0, 520.0, None)
    ('noise scale 812 (520 to 1,300)', 'noise scale 900 (520 or more)')
    >>> noise_scale(None, None, None), noise_scale(None, 520.0, None)
    ('noise scale not known yet', 'noise scale 520 or more')
    """
    least = None if low is None else f"{low:,.0f}"
    most = "or more" if high is None else f"to {high:,.0f}"
    if value is None:
        return f"noise scale {'not known yet' if least is None else f'{least} or more'}"
    return f"noise scale {value:,.0f}" + ("" if least is None else f" ({least} {most})")


def number(value: float) -> str:
    """A metric as a person reads it: four decimals, or three digits of a small number.

    >>> number(0.91234), number(1e-8), number(0.0)
    ('0.9123', '1e-08', '0')
    """
    return f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
