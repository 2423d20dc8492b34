"""What is running, how much is done, how long it will take: live on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from bs_jax.recipe import ResolvedRun

_PLAIN_SECONDS = 10.0  # between lines where there is no terminal


class Display:
    """Progress of a sweep. A context manager.

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
        self._total, self._finished, self._failed = len(runs), finished, 0
        self._examples = {run.run_id: 0 for run in runs}
        self._goal = {run.run_id: run.train_examples for run in runs}
        self._names = {run.run_id: describe(run) for run in runs}
        self._pending_goal = 1
        self._workers: dict[int, str] = {}
        self._started = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=36),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
        )
        self._task = self._bar.add_task(
            "runs done", total=self._total, completed=finished, left="starting"
        )
        self._live: Live | None = None

    def __enter__(self) -> Display:
        self._started = time.monotonic()
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
            self._console.print(f"{self._finished} of {self._total} runs done, {self._left()}")

    def pending(self, runs: Sequence[ResolvedRun]) -> None:
        """Say which runs are still to be trained: the measure of the time left."""
        self._pending_goal = max(sum(self._goal[run.run_id] for run in runs), 1)

    def event(self, worker: int, event: dict[str, Any]) -> None:
        """Take in an event of a worker."""
        run_id = event.get("run_id")
        if event["event"] == "progress" and run_id:
            self._examples[run_id] = event["examples"]
            self._workers[worker] = self._line(run_id, event)
        elif event["event"] == "run_finished" and run_id and event["status"] != "interrupted":
            self._finished += 1
            self._examples[run_id] = self._goal[run_id]
            if event["status"] == "diverged":
                self.note(f"{self._names[run_id]}: diverged (recorded; the sweep goes on)")
        self._bar.update(self._task, completed=self._finished, left=self._left())
        if self._live is None and time.monotonic() - self._last_line >= _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            running = "; ".join(self._workers.values())
            self._console.print(
                f"{self._finished} of {self._total} runs done, {self._left()}; {running}",
                soft_wrap=True,
            )

    def starting(self, worker: int, run: ResolvedRun) -> None:
        """Say what a worker turned to."""
        self._workers[worker] = f"{self._names[run.run_id]}: starting"

    def idle(self, worker: int) -> None:
        """Say that a worker has nothing left to do."""
        self._workers.pop(worker, None)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(Text(text))

    def _line(self, run_id: str, event: dict[str, Any]) -> str:
        loss = event["metrics"].get("train/loss")
        shown = "" if loss is None else f", train loss {loss:.3f}"
        return (
            f"{self._names[run_id]}: {event['examples']:,} of {event['train_examples']:,} "
            f"examples{shown}"
        )

    def _left(self) -> str:
        elapsed = time.monotonic() - self._started
        done = sum(self._examples.values())
        if self._finished == self._total:
            return f"all done in {_duration(elapsed)}"
        if not done:
            return "starting"
        left = max(self._pending_goal - done, 0) * elapsed / done
        return f"about {_duration(left)} left"

    def _render(self) -> Group:
        self._bar.update(self._task, left=self._left())
        lines = [Text(f"  {text}", style="dim") for _, text in sorted(self._workers.items())]
        return Group(self._bar, *lines)


def describe(run: ResolvedRun) -> str:
    """A run in a few words: rule, batch size, seed."""
    k = run.scaled.k
    name = "base recipe" if k == 1 else run.scaled.rule
    return f"{name}, batch size {run.batch_size} (k = {k:g}), seed {run.seed}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
