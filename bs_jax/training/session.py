"""One run while it is trained: its state to go on from, its files, what it has shown so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from bs_jax.records import run_folder as records
from bs_jax.records.run_folder import MetricsFile, RunFolder
from bs_jax.records.stores import storage
from bs_jax.training import distributed, parallel, provenance
from bs_jax.training.checkpoint import Checkpoints
from bs_jax.training.plan import Chunk, Plan
from bs_jax.training.state import TrainState

Event = dict[str, Any]


class Session:
    """A run between being opened and closed. Of many processes only the first writes its files.

    Args:
        folder: where it is recorded.
        plan: when what is due.
        devices: that it is trained on.
        on_event: told of progress.

    Attributes:
        state: to go on from, as numpy arrays.
        start_step: updates done in it.
        diverged_at: the update whose loss was not finite, or None.
    """

    def __init__(
        self,
        folder: RunFolder,
        plan: Plan,
        devices: parallel.Devices,
        on_event: Callable[[Event], None],
    ) -> None:
        self.folder, self.plan, self.devices, self.on_event = folder, plan, devices, on_event
        self.config = folder.run.config
        self.diverged_at: int | None = None
        self._writes = distributed.is_first()
        self._metrics_path = folder.path / "metrics.jsonl"
        self._checkpoints = Checkpoints(
            folder.path / "checkpoints",
            lambda examples: records.metrics_digest(self._metrics_path, examples),
        )
        self._restored = False
        self._metrics_file: MetricsFile | None = None
        self._tensorboard: Any = None
        self._events: storage.Outbox | None = None
        self._final: dict[str, float] = {}

    def restore(
        self, fresh: TrainState, begin: Callable[[TrainState], TrainState] = lambda fresh: fresh
    ) -> None:
        """Take the newest whole checkpoint, or begin.

        Args:
            fresh: a state of the run, of numpy arrays.
            begin: makes of it the state to begin with where there is no checkpoint.
        """
        self._fresh = fresh

        def read() -> None:
            found = self._checkpoints.restore(fresh)
            self._restored = found is not None
            self.state = begin(fresh) if found is None else found

        self._take(read)

    def go_back(self, step: int) -> None:
        """Take the newest whole checkpoint at or before a step, or begin; forget later ones."""

        def read() -> None:
            self._checkpoints.forget_after(step)
            self.state = self._checkpoints.restore(self._fresh) or self._fresh

        self._take(read)

    def _take(self, read: Callable[[], None]) -> None:
        self.state = self._fresh
        distributed.on_first(read)
        self.state = distributed.arrays_of_first(self.state)
        self.start_step = int(self.state.step)
        self._last = (self.start_step, self.start_step * self.plan.batch_size)

    def begin(self) -> None:
        """Open the files, cut back to what the state has seen."""
        self._started_at, self._clock = provenance.now(), time.monotonic()
        if not self._writes:
            return
        self.folder.begin()
        self._metrics_file = MetricsFile(self._metrics_path, self.start_step * self.plan.batch_size)
        for row in self._metrics_file.kept:
            self._keep_final(row)
        if self.start_step and not self._restored:
            self.checkpoint(self.state)  # the other run may have gone on by the next start
        if self.config["tensorboard"]:
            from tensorboardX import SummaryWriter

            self._events = storage.Outbox(self.folder.path / "tensorboard")
            self._tensorboard = SummaryWriter(str(self._events.folder), purge_step=self.start_step)

    def record(self, chunk: Chunk, metrics: Mapping[str, np.ndarray], sums: Any) -> None:
        """Write a chunk's metrics; the first non-finite loss ends the record."""
        if self.diverged_at is not None:
            return
        bad = np.flatnonzero(~np.isfinite(metrics["train/loss"]))
        if bad.size:
            self.diverged_at = chunk.start + int(bad[0]) + 1
        rows = []
        for start, end in self.plan.log_windows(chunk):
            window = slice(start - chunk.start, end - chunk.start)
            row: dict[str, Any] = {"step": end, "examples": end * self.plan.batch_size}
            row |= {name: float(np.mean(values[window])) for name, values in metrics.items()}
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
            self.folder.check_held()
            self._metrics_file.append(rows)
        for row in rows:
            self._keep_final(row)
            if self._tensorboard is not None:
                for name, value in row.items():
                    if name not in ("step", "examples"):
                        self._tensorboard.add_scalar(name, value, row["examples"])
        self.on_event(
            {
                "event": "progress",
                "run_id": self.folder.run.run_id,
                "examples": self._last[1],
                "train_examples": self.plan.num_steps * self.plan.batch_size,
                "metrics": records.finite(self._final),
            }
        )

    def _keep_final(self, row: Mapping[str, Any]) -> None:
        self._last = (row["step"], row["examples"])
        self._final |= {n: v for n, v in row.items() if n not in ("step", "examples")}

    def checkpoint(self, state: TrainState) -> None:
        """Save a state (numpy arrays), unless the run has diverged before it."""
        if self._metrics_file is not None and self.diverged_at is None:
            self.folder.check_held()
            self._metrics_file.flush()
            with records.disk_errors(self.folder.path):
                self._checkpoints.save(state, self._metrics_file.digest)
            if self._tensorboard is not None and self._events is not None:
                self._tensorboard.flush()
                with records.disk_errors(self.folder.path):
                    self._events.send()

    def finish(self, status: str) -> None:
        """Write the summary: "done", "diverged" or "interrupted"; a run that diverged has it."""
        if self.diverged_at is not None and status != "diverged":
            return
        step_now, examples = self._last
        device = self.devices[0]
        summary = {
            "run_id": self.folder.run.run_id,
            "status": status,
            "final": self._final if status != "diverged" else {},
            "step": step_now,
            "examples": examples,
            "diverged_at_step": self.diverged_at,
            "git_revision": provenance.git_revision(),
            "versions": provenance.versions(),
            "device": f"{len(self.devices)} x {device.device_kind} ({device.platform})",
            "processes": jax.process_count(),
            "resumed_at_step": self.start_step,
            "wall_time_seconds": round(time.monotonic() - self._clock, 3),
            "started_at": self._started_at,
            "finished_at": provenance.now(),
        }
        if self._metrics_file is not None:
            self.folder.check_held()
            self._metrics_file.flush()
        if self._writes:
            self.folder.finish(summary)
        self.on_event(
            {
                "event": "run_finished",
                "run_id": self.folder.run.run_id,
                "status": status,
                "metrics": records.finite(summary["final"]),
                "wall_time_seconds": summary["wall_time_seconds"],
            }
        )

    def close(self) -> None:
        """Close the files."""
        self._checkpoints.close()
        if self._metrics_file is not None:
            self._metrics_file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._events is not None:
            self._events.close()
