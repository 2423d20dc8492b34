"""The clock of a run: base-size updates, which schedules count, at any batch size and length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bs_jax.scaling.rules import Scalar

_LARGEST = np.iinfo(np.int32).max


class ExampleClock(NamedTuple):
    """Examples seen, exact in two words, for batches counted in tokens and for very long runs.

    Attributes:
        base_updates: base-size updates that the examples seen amount to; int32 scalar. Like
            optax's own counts it stops at its largest value.
        remainder: examples seen beside these, below the base batch size; int32 scalar.
        base_batch_size: examples in a base-size update; int32 scalar.
    """

    base_updates: jax.Array
    remainder: jax.Array
    base_batch_size: jax.Array

    @classmethod
    def at(cls, examples: int, base_batch_size: int) -> ExampleClock:
        """Return the clock after so many examples; 0 before any update."""
        updates, rest = divmod(examples, base_batch_size)
        words = (min(updates, _LARGEST), rest, base_batch_size)
        return cls(*(jnp.asarray(word, jnp.int32) for word in words))

    @property
    def examples(self) -> Any:
        """Examples seen: exact int64 outside jit; a rounded float32 inside, where no int64 is."""
        words = (self.base_updates, self.remainder, self.base_batch_size)
        if any(isinstance(word, Tracer) for word in words):
            updates, rest, size = (jnp.asarray(word, jnp.float32) for word in words)
            return updates * size + rest
        updates, rest, size = (np.asarray(word, np.int64) for word in words)
        return updates * size + rest

    def advance(self, batch_size: Any, base_batch_size: int) -> ExampleClock:
        """Return the clock after an update of ``batch_size`` examples."""
        if isinstance(batch_size, int) and batch_size % base_batch_size == 0:
            more, rest = batch_size // base_batch_size, self.remainder
        else:
            total = self.remainder + jnp.asarray(batch_size, jnp.int32)
            more, rest = total // base_batch_size, total % base_batch_size
        full = self.base_updates > _LARGEST - more
        updates = jnp.where(full, _LARGEST, self.base_updates + more)
        return self._replace(base_updates=updates, remainder=rest)

    def updates(self, k: Scalar, base_batch_size: int) -> jax.Array:
        """Return the updates of k base sizes that the examples seen amount to, a fraction."""
        return (self.base_updates + self.remainder / base_batch_size) / k

    def read(
        self,
        schedule: Callable[[Any], Any],
        batch_size: Any,
        base_batch_size: int,
        *,
        middle: bool = True,
    ) -> Any:
        """Return a schedule's value for the next update, of ``batch_size`` examples.

        The schedule is written in base-size updates. An update of k base sizes stands for k of
        them, so it reads the middle of these: ``(examples + (B - B0)/2) / B0``. Between two
        base-size updates the value is interpolated, so that the schedule is only ever asked at
        int32 counts, as optax asks.

        Args:
            schedule: in base-size updates.
            batch_size: examples in the next update; may be traced.
            base_batch_size: examples in a base-size update.
            middle: whether to read the middle, or the start, of the update.
        """
        # Twice the distance from the first base-size update to what is read.
        half = batch_size - base_batch_size if middle else 0
        ahead = self.remainder + half // 2
        count = self.base_updates + ahead // base_batch_size
        within = (ahead % base_batch_size + (half % 2) / 2) / base_batch_size
        # Before the middle of the first base-size update there is nothing to read.
        within = jnp.where(count < 0, 0.0, within)
        return _between(schedule, jnp.maximum(count, 0), within)


def rescaled(
    schedule: Callable[[Any], Any], k: Scalar, *, middle: bool = True
) -> Callable[[Any], Any]:
    """Return a schedule of base-size updates as one of updates of k base sizes.

    Each reads what ``ExampleClock.read`` reads.

    Args:
        schedule: in base-size updates, asked at int32 counts.
        k: batch size over base batch size; a number.
        middle: whether an update reads the middle, or the start, of those it stands for.

    Example:
        >>> schedule = rescaled(lambda count: 1.0 * count, 4)
        >>> float(schedule(0)), float(schedule(1))
        (1.5, 5.5)
    """
    ahead = (k - 1) / 2 if middle else 0.0
    if float(k).is_integer():
        whole, rest = divmod(ahead, 1.0)
        if not rest:
            return lambda step: schedule(step * int(k) + int(whole))
        return lambda step: _between(schedule, step * int(k) + int(whole), rest)

    def read(step: Any) -> Any:
        position = jnp.maximum(step * k + ahead, 0.0)
        count = jnp.asarray(jnp.floor(position), jnp.int32)
        return _between(schedule, count, position - count)

    return read


def _between(schedule: Callable[[Any], Any], count: Any, within: Any) -> Any:
    first = schedule(count)
    # A value of dtype bfloat16 or an integer would round what lies between.
    return first + (schedule(count + 1) - first) * within
