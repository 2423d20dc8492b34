"""The batch size of the next chunk: constant, by given stages, or as the gradient noise allows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Protocol

from bs_jax.run import ResolvedRun
from bs_jax.training.plan import Chunk, Plan


class Ramp(Protocol):
    """Says the batch size from a point of the run on, and where it may next change.

    The answers depend on the state that training goes on from and on nothing else, so a run that
    is interrupted anywhere goes on with the sizes that it would have had.
    """

    def batch_size(self, examples: int, current: int, noise_scale: Callable[[], float]) -> int:
        """Examples per update from here.

        Args:
            examples: seen so far.
            current: examples in the last update; of the first one there is none, and 0 stands.
            noise_scale: gives the lower end of the noise scale in examples, NaN if not known. It
                waits for the device.
        """
        ...

    def next_change(self, examples: int) -> int | None:
        """The next point, in examples, at which the size may change; None: it stays."""
        ...


@dataclasses.dataclass(frozen=True)
class Constant:
    """One batch size.

    Attributes:
        size: examples per update.
    """

    size: int

    def batch_size(self, examples: int, current: int, noise_scale: Callable[[], float]) -> int:
        """See `Ramp`."""
        return self.size

    def next_change(self, examples: int) -> int | None:
        """See `Ramp`."""
        return None


@dataclasses.dataclass(frozen=True)
class Stages:
    """Given sizes, each from the first update that has seen so many examples.

    Attributes:
        stages: pairs (examples, batch size), ascending, the first at 0.

    >>> ramp = Stages(((0, 64), (300, 128)))
    >>> [ramp.batch_size(examples, 0, float) for examples in (0, 299, 320)]
    [64, 64, 128]
    """

    stages: tuple[tuple[int, int], ...]

    def batch_size(self, examples: int, current: int, noise_scale: Callable[[], float]) -> int:
        """See `Ramp`."""
        return next(size for start, size in reversed(self.stages) if start <= examples)

    def next_change(self, examples: int) -> int | None:
        """See `Ramp`."""
        return next((start for start, _ in self.stages if start > examples), None)


@dataclasses.dataclass(frozen=True)
class FollowNoise:
    """A size that rises once the noise scale surely allows the next one; it never falls.

    It is asked at the first update past each multiple of `every_examples`.

    Attributes:
        sizes: examples per update, ascending.
        share: of the noise scale's lower end that a batch may reach.
        every_examples: how often it is asked.

    >>> ramp = FollowNoise((64, 128, 256), share=0.5, every_examples=640)
    >>> [ramp.batch_size(640, 64, lambda: low) for low in (math.nan, 255.0, 256.0, math.inf)]
    [64, 64, 128, 64]
    """

    sizes: tuple[int, ...]
    share: float
    every_examples: int

    def batch_size(self, examples: int, current: int, noise_scale: Callable[[], float]) -> int:
        """See `Ramp`."""
        if not current:
            return self.sizes[0]
        asked = examples // self.every_examples > (examples - current) // self.every_examples
        following = next((size for size in self.sizes if size > current), None)
        if not asked or following is None:
            return current
        low = noise_scale()  # infinite where no noise was seen: that is no knowledge either
        return following if math.isfinite(low) and following <= self.share * low else current

    def next_change(self, examples: int) -> int | None:
        """See `Ramp`."""
        return (examples // self.every_examples + 1) * self.every_examples


def ramp_of(run: ResolvedRun) -> Ramp:
    """The ramp that a run asks for."""
    asked = run.batch_ramp
    if asked.kind == "stages":
        return Stages(tuple(asked.starts(run.train_examples)))
    if asked.kind == "noise":
        return FollowNoise(run.batch_sizes, asked.share, asked.every_examples)
    return Constant(run.batch_size)


def planned_chunks(run: ResolvedRun) -> Iterator[Chunk]:
    """The chunks of a run from its beginning; of one that follows the noise, as if none were known.

    >>> from bs_jax.recipe import BatchRamp
    >>> BatchRamp("stages", ((0, 8), (0.5, 16))).starts(train_examples=64)
    [(0, 8), (32, 16)]
    """
    plan, ramp = Plan.of(run), ramp_of(run)
    step = examples = 0
    size = ramp.batch_size(0, 0, lambda: math.nan)
    while chunk := plan.chunk(step, examples, size, ramp.next_change(examples)):
        yield chunk
        step, examples = chunk.end, chunk.end_examples
        size = ramp.batch_size(examples, size, lambda: math.nan)
