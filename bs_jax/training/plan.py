"""When what happens in a run, in updates and examples: chunks, logging, evaluation, checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bs_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive updates that run as one compiled scan.

    Attributes:
        start: first update, counted from 0.
        end: one past the last update.
        evaluate: whether to evaluate after it.
        checkpoint: whether to write a checkpoint after it.
    """

    start: int
    end: int
    evaluate: bool
    checkpoint: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run of `train_examples` in updates of `batch_size` examples.

    Cadences are in examples, so that runs at any batch size are seen at the same points: event m
    happens at the first update that has seen m * cadence examples. Chunks always end at the same
    updates, whether or not a run was interrupted: a resumed run goes through the same programs.

    Attributes:
        batch_size: examples per update.
        train_examples: examples to see; the last, incomplete update is left out.
        log_every_examples: length of the windows over which training metrics are averaged.
        eval_every_examples: cadence of evaluation; it also happens at the end.
        checkpoint_every_examples: cadence of checkpoints, also at the end; 0: none.
        short_chunks: end a chunk at every logging point, to bound the memory of streamed data.
    """

    batch_size: int
    train_examples: int
    log_every_examples: int
    eval_every_examples: int
    checkpoint_every_examples: int
    short_chunks: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Plan:
        """The plan that a run's config asks for."""
        return cls(
            batch_size=config["batch_size"],
            train_examples=config["train_examples"],
            log_every_examples=config["log_every_examples"],
            eval_every_examples=config["eval_every_examples"],
            checkpoint_every_examples=config["checkpoint_every_examples"],
            short_chunks=config["data"]["streamed"],
        )

    @property
    def num_steps(self) -> int:
        """Updates in the whole run."""
        return self.train_examples // self.batch_size

    def _steps_every(self, examples: int) -> set[int]:
        """The updates at whose end a cadence falls due; the last one always."""
        if not examples:
            return set()
        due = {
            -(-multiple * examples // self.batch_size)
            for multiple in range(1, self.train_examples // examples + 1)
        }
        return {step for step in due if step <= self.num_steps} | {self.num_steps}

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """The chunks from update `start` (a chunk's end, or 0) to the end of the run.

        >>> plan = Plan(batch_size=4, train_examples=40, log_every_examples=4,
        ...             eval_every_examples=20, checkpoint_every_examples=0)
        >>> [(chunk.start, chunk.end) for chunk in plan.chunks()]
        [(0, 5), (5, 10)]
        """
        evaluations = self._steps_every(self.eval_every_examples)
        checkpoints = self._steps_every(self.checkpoint_every_examples)
        ends = evaluations | checkpoints
        if self.short_chunks:
            ends |= self._steps_every(self.log_every_examples)
        for end in sorted(ends):
            if end > start:
                yield Chunk(start, end, end in evaluations, end in checkpoints)
                start = end

    def log_windows(self, chunk: Chunk) -> list[tuple[int, int]]:
        """Split a chunk's updates into the windows that a line of metrics is the mean of.

        >>> plan = Plan(batch_size=4, train_examples=40, log_every_examples=8,
        ...             eval_every_examples=20, checkpoint_every_examples=0)
        >>> plan.log_windows(Chunk(0, 5, True, False))
        [(0, 2), (2, 4), (4, 5)]
        """
        due = self._steps_every(self.log_every_examples)
        ends = sorted({step for step in due if chunk.start < step < chunk.end} | {chunk.end})
        return list(zip([chunk.start, *ends[:-1]], ends, strict=True))


def with_length(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its length in examples, where it gives it in epochs.

    An epoch holds ``train_size`` examples, or its whole batches alone with ``drop_remainder``:
    `steps = epochs * floor(train_size / batch_size)`.

    Args:
        config: a recipe, with ``train_epochs``, ``train_examples`` and ``data.train_size``.

    Returns:
        A shallow copy; ``train_epochs`` is 0 in it, so that asking twice changes nothing.

    Raises:
        UserError: neither or both lengths are given, or one cannot be.

    >>> recipe = {"train_epochs": 2.0, "train_examples": 0, "batch_size": 64,
    ...           "drop_remainder": True, "data": {"train_size": 9469}}
    >>> with_length(recipe)["train_examples"]  # 2 x 147 updates
    18816
    """
    epochs, examples = config["train_epochs"], config["train_examples"]
    for name, value in (("train_epochs", epochs), ("train_examples", examples)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**31:
            raise UserError(
                f"config.{name} is {value!r}; it must be a number of at least 0 and below 2**31"
            )
    if bool(epochs) == bool(examples):
        both = "both give" if epochs else "neither gives"
        raise UserError(
            f"config.train_epochs {epochs} and config.train_examples {examples}: {both} the length "
            "of training; set one of them, and the other to 0"
        )
    if not epochs:
        return dict(config)
    size, batch = config["data"]["train_size"], config["batch_size"]
    if not size:
        raise UserError(
            f"config.train_epochs is {epochs} but config.data.train_size is 0; say how many "
            "examples the training split holds, or give config.train_examples instead"
        )
    if config["drop_remainder"]:
        if not 1 <= batch <= size:
            raise UserError(
                f"batch_size {batch} does not fit an epoch of {size:,} examples without its "
                f"remainder; use 1 to {size:,}, or config.drop_remainder=False"
            )
        size -= size % batch
    return {**config, "train_epochs": 0.0, "train_examples": int(epochs * size)}


def per_device(batches: np.ndarray, devices: int) -> np.ndarray:
    """Give each device its consecutive share of every batch: [K, B, ...] -> [D, K, B / D, ...].

    >>> per_device(np.arange(8).reshape(2, 4), 2).tolist()
    [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    """
    steps, size = batches.shape[:2]
    split = batches.reshape(steps, devices, size // devices, *batches.shape[2:])
    return np.ascontiguousarray(np.moveaxis(split, 1, 0))
