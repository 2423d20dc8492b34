"""What a run is, from top to bottom: programs, compile, restore, loop, record, finish.

``python main.py --mode=train`` arrives here by `cli/train.py`, `sweep/local.py` (signals) and
`sweep/cohorts.py` (lock, data). From `Trainer.train` on the whole run is here, up to
`Session.finish`, which has ``DONE`` written; the other modules of this folder are what it calls.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from bs_jax.data.image_data import ImageData
from bs_jax.records.run_files import Summary
from bs_jax.records.run_folder import RunFolder
from bs_jax.run import ResolvedRun
from bs_jax.scaling import ScaleByBatchState
from bs_jax.training import (
    checks,
    compilation,
    distributed,
    memory,
    optimizers,
    parallel,
    step,
)
from bs_jax.training.carry_over import OtherRun
from bs_jax.training.feed import Feed
from bs_jax.training.lanes import Lanes
from bs_jax.training.plan import Chunk, Plan
from bs_jax.training.ramp import ramp_of
from bs_jax.training.session import Event, Session
from bs_jax.training.state import TrainState


class Interrupted(Exception):
    """Training was asked to stop and has saved its state."""


class Trainer:
    """Compiled programs and data on the devices, for all runs of a cohort.

    Args:
        run: a run; every run trained with this trainer must have the same
            `optimizers.cohort_key`.
        data: the data set that it names.
        devices: to spread every batch over; of all processes that train together.
        vmapped: `train` advances its runs together in one program; otherwise one after another.

    Raises:
        UserError: the run does not fit the devices or the data.
    """

    def __init__(
        self,
        run: ResolvedRun,
        data: ImageData,
        devices: parallel.Devices,
        *,
        vmapped: bool = False,
    ) -> None:
        # Check what can be checked only now that devices and data are there.
        checks.check_devices(run, len(devices))
        checks.check_data(run, len(data.train), data.image_shape[-1])
        distributed.check_same("data", data.checksum)
        self._run, self._data, self._devices = run, data, list(devices)
        # Programs: built once, the same for all runs of the cohort.
        self._lanes = Lanes(vmapped)
        self._programs = step.make_programs(
            run, data.num_classes, data.train.image_shape, devices, vmapped=vmapped
        )
        # Data: held on the devices where they fit; the plan says what happens when.
        self._feed = Feed(run, data, devices, self._lanes)
        self._plan = Plan.of(run, short_chunks=self._feed.streamed)
        self._ramp = ramp_of(run)
        self._even = not run.ramps and self._plan.is_even(run.batch_size)

    def train(
        self,
        folders: Sequence[RunFolder[ResolvedRun]],
        on_event: Callable[[Event], None] = lambda event: None,
        should_stop: Callable[[], bool] = lambda: False,
        other_run: OtherRun | None = None,
        until_examples: float = math.inf,
    ) -> list[Summary]:
        """Train every run to its end, going on from its checkpoint if it has one.

        Args:
            folders: the runs and where they are recorded; finished ones are passed over. If
                vmapped, give all that belong together even so: their number decides the numbers.
            on_event: called with ``{"event": "progress" | "run_finished", "run_id": ..., ...}``.
            should_stop: asked between chunks; where it says so, all state is saved.
            other_run: a run without checkpoints of its own begins with the state of that one.
            until_examples: leave a run at the end of the chunk that has seen so many, with its
                state saved and its summary "interrupted".

        Returns:
            The summaries, in the order of `folders`.

        Raises:
            Interrupted: `should_stop` said so.
        """
        done = distributed.on_first(lambda: [folder.done for folder in folders])
        # Compile: runs that share a program advance in groups, one run a group unless vmapped. A
        # finished run keeps its place: who shares a program must not depend on interruptions.
        size = self._runs_at_once(len(folders))
        # Another run's state may not fit this one: that is said before what takes long to compile.
        restores_first = distributed.on_first(lambda: other_run is not None)
        if not all(done) and not restores_first:
            self._compile(size)
        # Restore: each unfinished run goes on from its newest whole checkpoint, or begins.
        sessions: list[Session | None] = []
        try:
            for folder, is_done in zip(folders, done, strict=True):
                sessions.append(None if is_done else self._restored(folder, on_event, other_run))
            if not all(done) and restores_first:
                self._compile(size)
            for at in range(0, len(sessions), size):
                part = sessions[at : at + size]
                group = [session for session in part if session is not None]
                if group:
                    self._train_group(group, len(part), should_stop, until_examples)
        finally:
            for session in sessions:
                if session:
                    session.close()
        # What process 0 has recorded is what all processes return.
        found = distributed.on_first(
            lambda: [dataclasses.asdict(folder.summary()) for folder in folders]
        )
        return [Summary.parse(content) for content in found]

    def _train_group(
        self,
        group: list[Session],
        lanes: int,
        should_stop: Callable[[], bool],
        until_examples: float,
    ) -> None:
        """Train runs that advance together; a program of more lanes has its last run repeated."""
        # Begin: all at the newest step that each of them has, their records cut back to it.
        meet(group)
        for session in group:
            session.begin(len(group))
        members = [*group, *[group[-1]] * (lanes - len(group))]
        state = self._lanes.join([session.state for session in members])
        state = parallel.replicate(state, self._devices)

        # Loop: a chunk of updates, an evaluation, a checkpoint, as the plan says.
        late: Callable[[], None] | None = None

        def now() -> TrainState:
            return state

        status = "done"
        for chunk, batches, inputs in self._chunks(members, now):
            if chunk.examples >= until_examples:
                status = "interrupted"
                break
            train_data, eval_data = self._feed.train_data, self._feed.eval_data
            updates = None
            # A run that goes on between the ends of an even plan's chunks begins with a short one.
            if not self._even or chunk.updates < chunk.longest:
                updates = parallel.replicate(np.int32(chunk.updates), self._devices)
            state, metrics = self._programs.train_chunk(state, inputs, train_data, updates, batches)
            sums = None
            if chunk.evaluate:
                sums = self._programs.evaluate(state, inputs, eval_data, self._feed.eval_batches)
            # Record: the device is busy with this chunk while the one before is fetched.
            if late is not None:
                late()
            late = functools.partial(self._record, group, chunk, metrics, sums)
            stopping = distributed.any_process(should_stop())
            if chunk.checkpoint or stopping or chunk.end_examples >= until_examples:
                late()
                late = None
                found = self._lanes.split(jax.device_get(state), len(group))
                for session, own in zip(group, found, strict=True):
                    session.checkpoint(own)
            if stopping and not self._plan.is_last(chunk):
                for session in group:
                    session.finish("interrupted")
                raise Interrupted
            if late is None and all(session.diverged_at is not None for session in group):
                break

        # Finish: the last chunk's metrics and the summary; a run that diverged has its own.
        if late is not None:
            late()
        for session in group:
            session.finish(status)

    def _chunks(
        self, members: list[Session], state: Callable[[], TrainState]
    ) -> Iterator[tuple[Chunk, Any, step.RunInputs]]:
        """The chunks still to train, with their batches and the runs' numbers.

        The batch size is asked for between chunks; for most runs the answer is always the same.

        Args:
            members: the runs, a lane each.
            state: gives their state after the chunk before.
        """
        seeds = [session.run.seed for session in members]
        done, examples = members[0].start_step, members[0].start_examples
        size = self._batch_size(examples, _last_batch_size(members[0].state), state)
        while True:
            inputs = self._lanes.join([step.run_inputs(session.run, size) for session in members])
            inputs = parallel.replicate(inputs, self._devices)
            chunks = self._plan.chunks(size, done, examples, self._ramp.next_change)
            for chunk, batches in self._feed.batches(seeds, chunks):
                yield chunk, batches, inputs
                if self._plan.is_last(chunk):
                    return
                done, examples = chunk.end, chunk.end_examples
                following = self._batch_size(examples, size, state)
                if following != size:
                    size = following
                    break
            else:  # nothing is left: the state was saved at the end, but not marked done
                return

    def _batch_size(self, examples: int, current: int, state: Callable[[], TrainState]) -> int:
        """Examples per update from a point of the run on; all processes get the first's answer."""

        def noise_scale() -> float:
            found = optimizers.noise_scale(state().opt_state)
            return math.nan if found is None else float(np.ravel(found.low)[0])

        def asked() -> int:
            size = self._ramp.batch_size(examples, current, noise_scale)
            fits = self._plan.chunk(0, examples, size) is not None
            return size if fits or not current else current  # the rest is no update of the new size

        return distributed.on_first(asked) if self._run.ramps else asked()

    def _record(self, group: list[Session], chunk: Chunk, metrics: Any, sums: Any) -> None:
        fetched = self._lanes.split(jax.device_get((metrics, sums)), len(group))
        for session, own in zip(group, fetched, strict=True):
            session.record(chunk, *own)

    def _restored(
        self,
        folder: RunFolder[ResolvedRun],
        on_event: Callable[[Event], None],
        other_run: OtherRun | None,
    ) -> Session:
        """An unfinished run at the state that it goes on from."""
        run = folder.run
        inputs = self._lanes.join([step.run_inputs(run)])
        (fresh,) = self._lanes.split(jax.device_get(self._programs.init(inputs)), 1)
        session = Session(run, folder, self._plan, self._devices, on_event)

        def begin(fresh: TrainState) -> TrainState:
            if other_run is None:
                return fresh
            return other_run.state_for(
                run, fresh, self._data.num_classes, self._data.train.image_shape
            )

        session.restore(fresh, begin)
        return session

    def _runs_at_once(self, wanted: int) -> int:
        """How many runs one program advances: one, or as many of those wanted as fit."""
        follows_noise = self._run.batch_ramp.kind == "noise"  # each run its own
        if not self._lanes.vmapped or wanted == 1 or follows_noise:
            return 1
        data = self._feed.train_data
        one = self._arguments(1, Chunk(0, 1, 0, self._run.batch_size, False, False, 1))
        held_bytes = sum(leaf.nbytes for leaf in data)
        own_bytes = memory.peak_bytes(self._programs.train_chunk, *one) - held_bytes
        shared_bytes = held_bytes + sum(leaf.nbytes for leaf in self._feed.eval_data)
        return memory.runs_at_once(own_bytes, shared_bytes, self._feed.budget_bytes(1.0), wanted)

    def _compile(self, runs_at_once: int) -> None:
        """Compile what the runs begin with, all at once; of a ramp, not yet what trains."""
        inputs = step.run_inputs(self._run)
        one = self._lanes.shapes(inputs, 1)
        programs: list[tuple[Any, tuple[Any, ...]]] = [(self._programs.init, (one,))]
        chunk = self._plan.chunk(0, 0, self._run.batch_size)
        if chunk is not None and not self._run.ramps:
            arguments = self._arguments(runs_at_once, chunk)
            programs.append((self._programs.train_chunk, arguments))
            if self._plan.eval_every_examples:
                shared = (self._feed.eval_data, self._feed.eval_batches)
                programs.append((self._programs.evaluate, (*arguments[:2], *shared)))
        compilation.side_by_side(programs)

    def _arguments(self, lanes: int, chunk: Chunk) -> tuple[Any, ...]:
        """What ``train_chunk`` is called with, or its shapes, for runs that advance together."""
        inputs = self._lanes.shapes(step.run_inputs(self._run, chunk.batch_size), lanes)
        state = jax.eval_shape(self._programs.init, inputs)
        updates = None if self._even else jax.ShapeDtypeStruct((), np.int32)
        state, inputs, updates = parallel.replicated_shapes((state, inputs, updates), self._devices)
        batches = self._lanes.batch_shapes(self._feed.batch_shapes(chunk), lanes)
        batches = parallel.spread_shapes(batches, self._devices)
        return state, inputs, self._feed.train_data, updates, batches


def _last_batch_size(state: TrainState) -> int:
    """Examples in the last update, of a run whose batch ramps; 0 before the first one."""
    if not int(state.step) or not isinstance(state.opt_state, ScaleByBatchState):
        return 0
    return int(state.opt_state.batch_size)


def meet(sessions: list[Session]) -> None:
    """Let runs that advance together begin at the newest step that all of them have."""
    while True:
        first = min(session.start_step for session in sessions)
        ahead = [session for session in sessions if session.start_step > first]
        if not ahead:
            return
        for session in ahead:
            session.go_back(first)
