"""One run while it is trained: the state it goes on from, its files, its latest metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bs_jax.records import json_files, metrics_file, stores
from bs_jax.records.metrics_file import CLOCKS, CONDITIONS, MetricsFile
from bs_jax.records.run_files import Summary
from bs_jax.records.run_folder import RunFolder
from bs_jax.run import ResolvedRun
from bs_jax.training import distributed, parallel, provenance, trackers
from bs_jax.training.checkpoint import Checkpoints
from bs_jax.training.plan import Chunk, Plan
from bs_jax.training.state import TrainState

Event = dict[str, Any]


class Session:
    """A run between being opened and closed. Of many processes only the first writes its files.

    Args:
        run: the run.
        folder: where it is recorded.
        plan: what happens when.
        devices: that train it.
        on_event: called with every event, see `Trainer.train`.

    Attributes:
        run: the run.
        state: to go on from, as numpy arrays.
        start_step: updates done in it.
        start_examples: examples that it has seen.
        diverged_at: the update whose loss was not finite, or None.
    """

    def __init__(
        self,
        run: ResolvedRun,
        folder: RunFolder,
        plan: Plan,
        devices: parallel.Devices,
        on_event: Callable[[Event], None],
    ) -> None:
        self.run, self._folder, self._plan, self._devices = run, folder, plan, devices
        self._on_event = on_event
        self.diverged_at: int | None = None
        self._writes = distributed.is_first()
        self._metrics_path = folder.path / "metrics.jsonl"
        self._checkpoints = Checkpoints(
            folder.path / "checkpoints",
            lambda examples: metrics_file.metrics_digest(self._metrics_path, examples),
        )
        self._restored = False
        self._metrics_file: MetricsFile | None = None
        self._trackers: list[trackers.Tracker] = []
        self._final: dict[str, float] = {}

    def restore(
        self, fresh: TrainState, begin: Callable[[TrainState], TrainState] = lambda fresh: fresh
    ) -> None:
        """Read the newest whole checkpoint, or begin.

        Args:
            fresh: an initial state of the run, of numpy arrays.
            begin: fresh -> the state to begin with, called where there is no checkpoint.
        """
        self._fresh = fresh

        def read() -> None:
            found = self._checkpoints.restore(fresh)
            self._restored = found is not None
            self.state = begin(fresh) if found is None else found

        self._take(read)

    def go_back(self, step: int) -> None:
        """Read the newest whole checkpoint at or before a step, or begin; delete later ones."""

        def read() -> None:
            self._checkpoints.forget_after(step)
            self.state = self._checkpoints.restore(self._fresh) or self._fresh

        self._take(read)

    def _take(self, read: Callable[[], None]) -> None:
        self.state = self._fresh
        distributed.on_first(read)
        self.state = distributed.arrays_of_first(self.state)
        self.start_step = int(self.state.step)
        self.start_examples = int(self.state.examples)
        self._last = (self.start_step, self.start_examples)

    def begin(self, runs_at_once: int = 1) -> None:
        """Open the files, cut back to what the state has seen.

        Args:
            runs_at_once: this run and those that advance with it in one program.
        """
        self._runs_at_once = runs_at_once
        self._started_at, self._clock = provenance.now(), time.monotonic()
        if not self._writes:
            return
        self._folder.begin()
        self._metrics_file = MetricsFile(self._metrics_path, self.start_examples)
        for row in self._metrics_file.kept:
            self._keep_final(row)
        if self.start_step and not self._restored:
            self.checkpoint(self.state)  # the other run may have gone on by the next start
        self._trackers = trackers.opened(self.run, self._folder.path, self.start_examples)

    def record(self, chunk: Chunk, metrics: Mapping[str, np.ndarray], sums: Any) -> None:
        """Write a chunk's metrics; the first non-finite loss ends the record."""
        if self.diverged_at is not None:
            return
        metrics = {name: values[: chunk.updates] for name, values in metrics.items()}
        bad = np.flatnonzero(~np.isfinite(metrics["train/loss"]))
        if bad.size:
            self.diverged_at = chunk.start + int(bad[0]) + 1
        rows = []
        for start, end in self._plan.log_windows(chunk):
            window = slice(start - chunk.start, end - chunk.start)
            examples = chunk.examples + (end - chunk.start) * chunk.batch_size
            row: dict[str, Any] = {"step": end, "examples": examples}
            row |= {
                name: float(values[window][-1] if name in CONDITIONS else np.mean(values[window]))
                for name, values in metrics.items()
            }
            row["batch_size"] = chunk.batch_size
            rows.append(row)
            if self.diverged_at is not None and end >= self.diverged_at:
                break
        if sums is not None and self.diverged_at is None:
            count = float(sums["count"])
            rows[-1] |= {
                f"eval/{name}": float(total) / count
                for name, total in sums.items()
                if name != "count"
            }
        self._write(rows)
        if self.diverged_at is not None:
            self.finish("diverged")

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if self._metrics_file is not None:
            self._folder.check_held()
            self._metrics_file.append(rows)
        for row in rows:
            self._keep_final(row)
            values = {name: value for name, value in row.items() if name not in CLOCKS}
            for tracker in self._trackers:
                tracker.log(row["examples"], values)
        self._on_event(
            {
                "event": "progress",
                "run_id": self.run.run_id,
                "examples": self._last[1],
                "resumed_at": self.start_examples,
                "train_examples": self._plan.last_examples(self.run.batch_size),
                "metrics": json_files.finite(self._final),
                **json_files.finite({n: v for n, v in rows[-1].items() if n in CONDITIONS}),
            }
        )

    def _keep_final(self, row: Mapping[str, Any]) -> None:
        self._last = (row["step"], row["examples"])
        self._final |= {n: v for n, v in row.items() if n not in CLOCKS + CONDITIONS}

    def checkpoint(self, state: TrainState) -> None:
        """Save a state (numpy arrays), unless the run has diverged before it."""
        if self._metrics_file is not None and self.diverged_at is None:
            self._folder.check_held()
            self._metrics_file.flush()
            with stores.disk_errors(self._folder.path):
                self._checkpoints.save(state, self._metrics_file.digest)
            for tracker in self._trackers:
                tracker.flush()

    def finish(self, status: str) -> None:
        """Write the summary: "done", "diverged" or "interrupted"; a run that diverged has it."""
        if self.diverged_at is not None and status != "diverged":
            return
        step_now, examples = self._last
        device = self._devices[0]
        summary = Summary(
            status=status,
            final=self._final if status != "diverged" else {},
            run_id=self.run.run_id,
            step=step_now,
            examples=examples,
            diverged_at_step=self.diverged_at,
            resumed_at_step=self.start_step,
            processes=distributed.process_count(),
            device=f"{len(self._devices)} x {device.device_kind} ({device.platform})",
            wall_time_seconds=round(time.monotonic() - self._clock, 3),
            runs_at_once=self._runs_at_once,
            started_at=self._started_at,
            finished_at=provenance.now(),
            git_revision=provenance.git_revision() or "",
            versions=provenance.versions(),
        )
        if self._metrics_file is not None:
            self._folder.check_held()
            self._metrics_file.flush()
        if self._writes:
            trackers.write_csv(self._folder.path)
            self._folder.finish(summary)
        self._on_event(
            {
                "event": "run_finished",
                "run_id": self.run.run_id,
                "status": status,
                "metrics": json_files.finite(summary.final),
                "wall_time_seconds": summary.wall_time_seconds,
            }
        )

    def close(self) -> None:
        """Close the files."""
        self._checkpoints.close()
        if self._metrics_file is not None:
            self._metrics_file.close()
        for tracker in self._trackers:
            tracker.close()
