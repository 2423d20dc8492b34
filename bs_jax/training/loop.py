"""Train the runs of one cohort: same compiled programs, different seeds and hyperparameters."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bs_jax.data import pipeline
from bs_jax.data.image_data import ImageData
from bs_jax.training import parallel, plan, records, step, validate
from bs_jax.training.checkpoint import Checkpoints
from bs_jax.training.plan import Chunk, Plan
from bs_jax.training.records import MetricsFile, RunFolder
from bs_jax.training.state import TrainState

Event = dict[str, Any]
_RESIDENT_SHARE = 0.4  # of a device's memory, for training images held there


class Interrupted(Exception):
    """Training was asked to stop and has saved its state."""


class Trainer:
    """Compiled programs and device-resident data for all runs of a cohort.

    Args:
        config: a resolved config; every run trained with this trainer must have the same
            `optimizers.static_config`.
        data: the data set that the config names.
        devices: to spread every batch over.
        vmapped: `train` advances its runs together in one program; otherwise one after another.

    Raises:
        UserError: the config does not fit the devices or the data.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        data: ImageData,
        devices: parallel.Devices,
        *,
        vmapped: bool = False,
    ) -> None:
        validate.check_devices(config, len(devices))
        validate.check_data(config, len(data.train), data.image_shape[-1])
        self._config = config
        self._data = data
        self._devices = list(devices)
        self._vmapped = vmapped
        self._streamed = config["data"]["streamed"] or not pipeline.fits_on_device(
            data.train, pipeline.device_budget_bytes(self._devices[0], _RESIDENT_SHARE)
        )
        self._plan = dataclasses.replace(Plan.of(config), short_chunks=self._streamed)
        self._programs = step.make_programs(
            config, data.num_classes, data.train.image_shape, devices, vmapped=vmapped
        )
        self._train_data = () if self._streamed else self._resident(data.train)
        self._eval_data = self._resident(data.eval)
        self._eval_batches = self._make_eval_batches()

    def train(
        self,
        folders: Sequence[RunFolder],
        on_event: Callable[[Event], None] = lambda event: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[dict[str, Any]]:
        """Train every run to its end, going on from its checkpoint if it has one.

        Args:
            folders: the runs and where they are recorded; finished ones are passed over.
            on_event: called with ``{"event": "progress" | "run_finished", "run_id": ..., ...}``.
            should_stop: asked between chunks; where it says so, all state is saved.

        Returns:
            The summaries, in the order of `folders`.

        Raises:
            Interrupted: `should_stop` said so.
        """
        open_folders = [folder for folder in folders if not folder.done]
        sessions = []
        for folder in open_folders:
            template = self._initial_state(folder)
            sessions.append(_Session(folder, self._plan, template, self._devices, on_event))
        try:
            for group in self._groups(sessions):
                self._train_group(group, should_stop)
        finally:
            for session in sessions:
                session.close()
        return [folder.summary() for folder in folders]

    def _groups(self, sessions: list[_Session]) -> list[list[_Session]]:
        """Runs that advance together: all at the same step if vmapped, else each on its own."""
        if not self._vmapped:
            return [[session] for session in sessions]
        by_step: dict[int, list[_Session]] = {}
        for session in sessions:
            by_step.setdefault(session.start_step, []).append(session)
        return list(by_step.values())

    def _train_group(self, group: list[_Session], should_stop: Callable[[], bool]) -> None:
        for session in group:
            session.begin()
        state = self._join([session.state for session in group])
        inputs = self._join([step.run_inputs(session.config) for session in group])
        inputs = parallel.replicate(inputs, self._devices)
        late: Callable[[], None] | None = None
        for chunk, batches in self._chunks(group):
            state, metrics = self._programs.train_chunk(state, inputs, self._train_data, batches)
            sums = None
            if chunk.evaluate:
                sums = self._programs.evaluate(state, inputs, self._eval_data, self._eval_batches)
            # The device is busy with this chunk while the numbers of the one before are fetched.
            if late is not None:
                late()
            late = self._reporter(group, chunk, metrics, sums)
            stopping = should_stop()
            if chunk.checkpoint or stopping:
                late()
                late = None
                for session, own in zip(group, self._split(state, len(group)), strict=True):
                    session.checkpoint(own)
            if stopping and chunk.end < self._plan.num_steps:
                for session in group:
                    session.finish("interrupted")
                raise Interrupted
            if late is None and all(session.diverged_at is not None for session in group):
                break
        if late is not None:
            late()
        for session in group:
            session.finish("diverged" if session.diverged_at is not None else "done")

    def _reporter(
        self, group: list[_Session], chunk: Chunk, metrics: Any, sums: Any
    ) -> Callable[[], None]:
        def report() -> None:
            fetched = jax.device_get((metrics, sums))
            for position, session in enumerate(group):
                own = fetched
                if self._vmapped:
                    own = jax.tree.map(lambda leaf, at=position: leaf[at], fetched)
                session.record(chunk, *own)

        return report

    def _chunks(self, group: list[_Session]):
        """The chunks still to train, with their batches for the devices."""
        start = group[0].start_step
        if self._streamed:
            yield from self._streamed_chunks(group, start)
            return
        for chunk in self._plan.chunks(start):
            yield chunk, self._stack([self._indices(session, chunk) for session in group])

    def _streamed_chunks(self, group: list[_Session], start: int):
        from bs_jax.data import streaming

        chunks = list(self._plan.chunks(start))
        streams = [
            streaming.stream(self._data.train, [self._order(session, chunk) for chunk in chunks])
            for session in group
        ]
        for chunk, *parts in zip(chunks, *streams, strict=True):
            images, labels = zip(*parts, strict=True)
            yield (
                chunk,
                tuple(
                    self._stack([plan.per_device(part, len(self._devices)) for part in leaf])
                    for leaf in (images, labels)
                ),
            )

    def _order(self, session: _Session, chunk: Chunk) -> np.ndarray:
        batch = self._plan.batch_size
        order = pipeline.example_order(
            session.config["seed"],
            len(self._data.train),
            chunk.start * batch,
            (chunk.end - chunk.start) * batch,
            drop_remainder_batch_size=batch if self._config["drop_remainder"] else None,
        )
        return order.reshape(-1, batch)

    def _indices(self, session: _Session, chunk: Chunk) -> np.ndarray:
        return plan.per_device(self._order(session, chunk), len(self._devices))

    def _initial_state(self, folder: RunFolder) -> TrainState:
        inputs = step.run_inputs(folder.run.config)
        if self._vmapped:
            inputs = jax.tree.map(lambda leaf: leaf[None], inputs)
        return self._split(self._programs.init(inputs), 1)[0]

    def _join(self, trees: list[Any]) -> Any:
        if not self._vmapped:
            return trees[0]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def _split(self, tree: Any, count: int) -> list[Any]:
        if not self._vmapped:
            return [tree]
        return [jax.tree.map(lambda leaf, at=at: leaf[at], tree) for at in range(count)]

    def _stack(self, parts: list[np.ndarray]) -> np.ndarray:
        return np.stack(parts, axis=1) if self._vmapped else parts[0]

    def _resident(self, split: Any) -> tuple[jax.Array, jax.Array]:
        return parallel.replicate(pipeline.device_arrays(split), self._devices)

    def _make_eval_batches(self) -> tuple[np.ndarray, np.ndarray]:
        devices = len(self._devices)
        wanted = min(self._config["eval_batch_size"], len(self._data.eval))
        size = -(-wanted // devices) * devices
        indices, mask = pipeline.eval_batches(len(self._data.eval), size)
        return plan.per_device(indices, devices), plan.per_device(mask, devices)


@dataclasses.dataclass
class _Session:
    """One run while it is trained: its state to go on from, its files, what it has shown so far."""

    folder: RunFolder
    plan: Plan
    state: TrainState
    devices: parallel.Devices
    on_event: Callable[[Event], None]
    diverged_at: int | None = None

    def __post_init__(self) -> None:
        self.config = self.folder.run.config
        self._checkpoints = Checkpoints(self.folder.path / "checkpoints")
        restored = self._checkpoints.restore(self.state)
        if restored is not None:
            self.state = restored
        self.state = parallel.replicate(self.state, self.devices)
        self.start_step = int(self.state.step)
        self._metrics_file: MetricsFile | None = None
        self._tensorboard: Any = None
        self._final: dict[str, float] = {}
        self._last = (self.start_step, self.start_step * self.plan.batch_size)

    def begin(self) -> None:
        self.folder.begin()
        self._started_at, self._clock = records.now(), time.monotonic()
        self._metrics_file = MetricsFile(
            self.folder.path / "metrics.jsonl", self.start_step * self.plan.batch_size
        )
        for row in self._metrics_file.kept:
            self._keep_final(row)
        if self.config["tensorboard"]:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(self.folder.path / "tensorboard"), purge_step=self.start_step
            )

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

    def _write(self, rows: list[dict[str, Any]]) -> None:
        assert self._metrics_file is not None
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
        if self.diverged_at is None:
            with records.disk_errors(self.folder.path):
                self._checkpoints.save(state)

    def finish(self, status: str) -> None:
        step_now, examples = self._last
        device = self.devices[0]
        summary = {
            "run_id": self.folder.run.run_id,
            "status": status,
            "final": self._final if status != "diverged" else {},
            "step": step_now,
            "examples": examples,
            "diverged_at_step": self.diverged_at,
            "git_revision": records.git_revision(),
            "versions": records.versions(),
            "device": f"{len(self.devices)} x {device.device_kind} ({device.platform})",
            "resumed_at_step": self.start_step,
            "wall_time_seconds": round(time.monotonic() - self._clock, 3),
            "started_at": self._started_at,
            "finished_at": records.now(),
        }
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
        self._checkpoints.close()
        if self._metrics_file is not None:
            self._metrics_file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
