"""Train the runs of one cohort: same compiled programs, different seeds and hyperparameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bs_jax.data import pipeline
from bs_jax.data.image_data import ImageData
from bs_jax.records.run_folder import RunFolder
from bs_jax.training import distributed, memory, parallel, plan, step, validate
from bs_jax.training.carry_over import OtherRun
from bs_jax.training.plan import Chunk, Plan
from bs_jax.training.session import Event, Session
from bs_jax.training.state import TrainState

_RESIDENT_SHARE = 0.4  # of a device's memory, for training images held there


class Interrupted(Exception):
    """Training was asked to stop and has saved its state."""


class Trainer:
    """Compiled programs and device-resident data for all runs of a cohort.

    Args:
        config: a resolved config; every run trained with this trainer must have the same
            `optimizers.static_config`.
        data: the data set that the config names.
        devices: to spread every batch over; of all processes that train together.
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
        self._local = parallel.local_devices(devices)
        distributed.check_same("data", data.checksum)
        self._vmapped = vmapped
        self._streamed = config["data"]["streamed"] or not pipeline.fits_on_device(
            data.train, pipeline.device_budget_bytes(self._local[0], _RESIDENT_SHARE)
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
        other_run: OtherRun | None = None,
    ) -> list[dict[str, Any]]:
        """Train every run to its end, going on from its checkpoint if it has one.

        Args:
            folders: the runs and where they are recorded; finished ones are passed over. If
                vmapped, give all that belong together even so: their number decides the numbers.
            on_event: called with ``{"event": "progress" | "run_finished", "run_id": ..., ...}``.
            should_stop: asked between chunks; where it says so, all state is saved.
            other_run: a run without checkpoints of its own begins with the state of that one.

        Returns:
            The summaries, in the order of `folders`.

        Raises:
            Interrupted: `should_stop` said so.
        """
        done = distributed.on_first(lambda: [folder.done for folder in folders])
        sessions: list[Session | None] = []
        try:
            for folder, finished in zip(folders, done, strict=True):
                sessions.append(None if finished else self._session(folder, on_event, other_run))
            for group, lanes in self._groups(sessions):
                if group:
                    _meet(group)
                    self._train_group(group, should_stop, lanes)
        finally:
            for session in sessions:
                if session:
                    session.close()
        return distributed.on_first(lambda: [folder.summary() for folder in folders])

    def _session(
        self, folder: RunFolder, on_event: Callable[[Event], None], other_run: OtherRun | None
    ) -> Session:
        """An unfinished run at the state that it goes on from."""
        fresh = self._initial_state(folder)
        session = Session(folder, self._plan, self._devices, on_event)
        session.restore(fresh, functools.partial(self._begin, folder, other_run))
        return session

    def _groups(self, sessions: Sequence[Session | None]) -> list[tuple[list[Session], int]]:
        """Runs that advance together, and how many lanes their program has.

        Each on its own; if vmapped, as many as fit in memory. A finished run (None) keeps its
        place, so that who shares a program does not depend on interruptions.
        """
        size = self._runs_at_once(sessions) if self._vmapped else 1
        parts = [sessions[at : at + size] for at in range(0, len(sessions), size)]
        return [([session for session in part if session], len(part)) for part in parts]

    def _runs_at_once(self, sessions: Sequence[Session | None]) -> int:
        """How many of these runs fit on a device side by side."""
        open_sessions = [session for session in sessions if session is not None]
        if len(sessions) == 1 or not open_sessions:
            return 1
        session, chunk = open_sessions[0], Chunk(0, 1, evaluate=False, checkpoint=False)
        order = self._per_device(self._order(session, chunk))
        read = (self._data.train.image_shape, (np.uint8, np.int32, np.float32))
        batches = order
        if self._streamed:
            shapes = [(*order.shape, *read[0]), order.shape, order.shape]
            batches = tuple(map(jax.ShapeDtypeStruct, shapes, read[1]))
        one = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype),
            (session.state, step.run_inputs(session.config)),
        )
        batches = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0], 1, *leaf.shape[1:]), leaf.dtype),
            batches,
        )
        peak = memory.peak_bytes(self._programs.train_chunk, *one, self._train_data, batches)
        shared = sum(leaf.nbytes for leaf in (*self._train_data, *self._eval_data))
        budget = pipeline.device_budget_bytes(self._local[0], 1.0)
        own = peak - sum(leaf.nbytes for leaf in self._train_data)
        return memory.runs_at_once(own, shared, budget, len(sessions))

    def _train_group(
        self, group: list[Session], should_stop: Callable[[], bool], lanes: int
    ) -> None:
        for session in group:
            session.begin()
        # A program for fewer runs would round otherwise: finished ones leave their lanes occupied.
        members = [*group, *[group[-1]] * (lanes - len(group))]
        state = self._join([session.state for session in members])
        inputs = self._join([step.run_inputs(session.config) for session in members])
        state, inputs = parallel.replicate((state, inputs), self._devices)
        late: Callable[[], None] | None = None
        for chunk, batches in self._chunks(members):
            state, metrics = self._programs.train_chunk(state, inputs, self._train_data, batches)
            sums = None
            if chunk.evaluate:
                sums = self._programs.evaluate(state, inputs, self._eval_data, self._eval_batches)
            # The device is busy with this chunk while the numbers of the one before are fetched.
            if late is not None:
                late()
            late = self._reporter(group, chunk, metrics, sums)
            stopping = distributed.any_process(should_stop())
            if chunk.checkpoint or stopping:
                late()
                late = None
                found = self._split(jax.device_get(state), len(group))
                for session, own in zip(group, found, strict=True):
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
            session.finish("done")

    def _reporter(
        self, group: list[Session], chunk: Chunk, metrics: Any, sums: Any
    ) -> Callable[[], None]:
        def report() -> None:
            fetched = jax.device_get((metrics, sums))
            for position, session in enumerate(group):
                own = fetched
                if self._vmapped:
                    own = jax.tree.map(lambda leaf, at=position: leaf[at], fetched)
                session.record(chunk, *own)

        return report

    def _chunks(self, group: list[Session]):
        """The chunks still to train, with their batches for the devices."""
        start = group[0].start_step
        if self._streamed:
            yield from self._streamed_chunks(group, start)
            return
        for chunk in self._plan.chunks(start):
            parts = [self._per_device(self._order(session, chunk)) for session in group]
            yield chunk, parallel.spread(self._stack(parts), self._devices)

    def _streamed_chunks(self, group: list[Session], start: int):
        from bs_jax.data import streaming

        chunks = list(self._plan.chunks(start))
        streams = [
            streaming.stream(self._data.train, [self._order(session, chunk) for chunk in chunks])
            for session in group
        ]
        for chunk, *parts in zip(chunks, *streams, strict=True):
            batches = tuple(
                self._stack([self._per_device(part) for part in leaf])
                for leaf in zip(*parts, strict=True)
            )
            yield chunk, parallel.spread(batches, self._devices)

    def _order(self, session: Session, chunk: Chunk) -> np.ndarray:
        """The chunk's examples that this process feeds, [steps, examples of this process]."""
        batch = self._plan.batch_size
        order = pipeline.example_order(
            session.config["seed"],
            len(self._data.train),
            chunk.start * batch,
            (chunk.end - chunk.start) * batch,
            drop_remainder_batch_size=batch if self._config["drop_remainder"] else None,
        )
        return self._own(order.reshape(-1, batch))

    def _own(self, batches: np.ndarray) -> np.ndarray:
        """The columns of batches [steps, examples] that this process feeds."""
        processes = len(self._devices) // len(self._local)
        position = self._devices.index(self._local[0]) // len(self._local)
        return batches[:, pipeline.process_columns(batches.shape[1], position, processes)]

    def _per_device(self, batches: np.ndarray) -> np.ndarray:
        return plan.per_device(batches, len(self._local))

    def _initial_state(self, folder: RunFolder) -> TrainState:
        inputs = step.run_inputs(folder.run.config)
        if self._vmapped:
            inputs = jax.tree.map(lambda leaf: leaf[None], inputs)
        return self._split(jax.device_get(self._programs.init(inputs)), 1)[0]

    def _begin(
        self, folder: RunFolder, other_run: OtherRun | None, fresh: TrainState
    ) -> TrainState:
        """The state of a run that has none yet."""
        if other_run is None:
            return fresh
        return other_run.state_for(
            folder.run.config, fresh, self._data.num_classes, self._data.train.image_shape
        )

    def _join(self, trees: list[Any]) -> Any:
        if not self._vmapped:
            return trees[0]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    def _split(self, tree: Any, count: int) -> list[Any]:
        if not self._vmapped:
            return [tree]
        return [jax.tree.map(lambda leaf, at=at: np.asarray(leaf[at]), tree) for at in range(count)]

    def _stack(self, parts: list[np.ndarray]) -> np.ndarray:
        return np.stack(parts, axis=1) if self._vmapped else parts[0]

    def _resident(self, split: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        return parallel.replicate(pipeline.device_arrays(split), self._devices)

    def _make_eval_batches(self) -> Any:
        devices = len(self._devices)
        wanted = min(self._config["eval_batch_size"], len(self._data.eval))
        size = -(-wanted // devices) * devices
        indices, mask = pipeline.eval_batches(len(self._data.eval), size)
        own = (self._per_device(self._own(indices)), self._per_device(self._own(mask)))
        return parallel.spread(own, self._devices)


def _meet(sessions: list[Session]) -> None:
    """Let runs that advance together begin at the newest step that all of them have."""
    while True:
        first = min(session.start_step for session in sessions)
        ahead = [session for session in sessions if session.start_step > first]
        if not ahead:
            return
        for session in ahead:
            session.go_back(first)
