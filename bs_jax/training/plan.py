"""When what happens in a run, in updates and examples: chunks, logging, evaluation, checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from bs_jax.run import ResolvedRun


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive updates that run as one compiled scan.

    Attributes:
        start: first update, counted from 0.
        end: one past the last update.
        examples: seen before it.
        batch_size: examples per update.
        evaluate: whether to evaluate after it.
        checkpoint: whether to write a checkpoint after it.
        longest: updates of the longest chunk of this batch size. The batches of a shorter one are
            filled up to it, so that all are one compiled program.
    """

    start: int
    end: int
    examples: int
    batch_size: int
    evaluate: bool
    checkpoint: bool
    longest: int

    @property
    def updates(self) -> int:
        """How many updates it has."""
        return self.end - self.start

    @property
    def end_examples(self) -> int:
        """Examples seen after it."""
        return self.examples + self.updates * self.batch_size


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run over `train_examples`, on the clock of examples.

    Cadences are in examples, so that runs at any batch size are seen at the same points: event m
    happens at the first update that has seen m * cadence examples. Chunks always end at the same
    updates, whether or not a run was interrupted: a resumed run goes through the same programs.

    Attributes:
        train_examples: examples to see; the last, incomplete update is left out.
        log_every_examples: length of the windows over which training metrics are averaged.
        eval_every_examples: cadence of evaluation; it also happens at the end.
        checkpoint_every_examples: cadence of checkpoints, also at the end; 0: none.
        short_chunks: end a chunk at every logging point, to bound the memory of streamed data.
    """

    train_examples: int
    log_every_examples: int
    eval_every_examples: int
    checkpoint_every_examples: int
    short_chunks: bool = False

    @classmethod
    def of(cls, run: ResolvedRun, *, short_chunks: bool = False) -> Plan:
        """The plan of a run."""
        return cls(
            train_examples=run.train_examples,
            log_every_examples=run.log_every_examples,
            eval_every_examples=run.eval_every_examples,
            checkpoint_every_examples=run.checkpoint_every_examples,
            short_chunks=short_chunks,
        )

    def chunk(
        self, step: int, examples: int, batch_size: int, until: int | None = None
    ) -> Chunk | None:
        """The chunk that follows a state; None at the end of the run.

        Args:
            step: updates done.
            examples: seen; where a chunk ends, or 0.
            batch_size: examples per update, from here.
            until: examples at which the chunk ends in any case, at the first update past them.
        """
        updates = (self.train_examples - examples) // batch_size
        if updates < 1:
            return None
        cadences = self._cadences
        due = [examples // every * every + every for every in cadences]
        due += [] if until is None else [until]
        taken = min([updates, *(-(-(at - examples) // batch_size) for at in due)])
        after, last = examples + taken * batch_size, taken == updates

        def falls_due(every: int) -> bool:
            return bool(every) and (last or after // every > examples // every)

        return Chunk(
            start=step,
            end=step + taken,
            examples=examples,
            batch_size=batch_size,
            evaluate=falls_due(self.eval_every_examples),
            checkpoint=falls_due(self.checkpoint_every_examples),
            longest=min(
                [
                    self.train_examples // batch_size,
                    *(-(-every // batch_size) for every in cadences),
                ]
            ),
        )

    def chunks(
        self,
        batch_size: int,
        step: int = 0,
        examples: int = 0,
        next_change: Callable[[int], int | None] = lambda examples: None,
    ) -> Iterator[Chunk]:
        """All chunks that follow a state while the batch size stays.

        Args:
            batch_size: examples per update.
            step: updates done.
            examples: seen.
            next_change: examples -> where the batch size may change after them; a chunk ends there.

        >>> plan = Plan(train_examples=40, log_every_examples=4, eval_every_examples=20,
        ...             checkpoint_every_examples=0)
        >>> [(chunk.start, chunk.end) for chunk in plan.chunks(batch_size=4)]
        [(0, 5), (5, 10)]
        """
        while chunk := self.chunk(step, examples, batch_size, next_change(examples)):
            yield chunk
            step, examples = chunk.end, chunk.end_examples

    @property
    def _cadences(self) -> list[int]:
        """What a chunk ends at, in examples."""
        cadences = [self.eval_every_examples, self.checkpoint_every_examples]
        cadences += [self.log_every_examples] * self.short_chunks
        return [every for every in cadences if every]

    def is_even(self, batch_size: int) -> bool:
        """Whether all chunks of a batch size have one length, from the start of a run.

        >>> plan = Plan(train_examples=40, log_every_examples=4, eval_every_examples=20,
        ...             checkpoint_every_examples=0)
        >>> plan.is_even(4), plan.is_even(8)  # 5 and 5 updates; 3 and 2
        (True, False)
        """
        updates, shortest = self.train_examples // batch_size, min(self._cadences)
        return -(-shortest // batch_size) >= updates or (
            shortest % batch_size == 0
            and all(every % shortest == 0 for every in self._cadences)
            and updates % (shortest // batch_size) == 0
        )

    def last_examples(self, batch_size: int) -> int:
        """Examples seen at the end, without the incomplete last update."""
        return self.train_examples // batch_size * batch_size

    def is_last(self, chunk: Chunk) -> bool:
        """Whether the run ends with a chunk."""
        return chunk.end_examples + chunk.batch_size > self.train_examples

    def log_windows(self, chunk: Chunk) -> list[tuple[int, int]]:
        """Split a chunk's updates into the windows that a line of metrics is the mean of.

        >>> plan = Plan(train_examples=40, log_every_examples=8, eval_every_examples=20,
        ...             checkpoint_every_examples=0)
        >>> plan.log_windows(plan.chunk(step=0, examples=0, batch_size=4))
        [(0, 2), (2, 4), (4, 5)]
        """
        every, size = self.log_every_examples, chunk.batch_size
        multiples = range(chunk.examples // every + 1, chunk.end_examples // every + 1)
        due = {chunk.start - (chunk.examples - m * every) // size for m in multiples}
        ends = sorted({step for step in due if step < chunk.end} | {chunk.end})
        return list(zip([chunk.start, *ends[:-1]], ends, strict=True))


def per_device(batches: np.ndarray, devices: int) -> np.ndarray:
    """Give each device its consecutive share of every batch: [K, B, ...] -> [D, K, B / D, ...].

    >>> per_device(np.arange(8).reshape(2, 4), 2).tolist()
    [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    """
    steps, size = batches.shape[:2]
    split = batches.reshape(steps, devices, size // devices, *batches.shape[2:])
    return np.ascontiguousarray(np.moveaxis(split, 1, 0))
