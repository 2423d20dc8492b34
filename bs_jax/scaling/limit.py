"""How far the batch may grow: the guard on the length of steps, and a batch that follows noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp

from bs_jax.errors import UserError
from bs_jax.scaling.rules import Scalar

# The guard's noise scale is averaged over about fifty base-size updates, however large k is over
# a few updates at least: a spread cannot be told from fewer.
GUARD_DECAY = 0.98
SMALLEST_GUARD_DECAY = 0.8
# Standard errors that the guard takes off: what is not known must not lengthen a step.
GUARD_ERRORS = 1.0


def step_share(k: Scalar, phi: Scalar) -> Scalar:
    r"""Return the guard: the share of k by which every step may grow.

    A batch of k base sizes replaces k steps by one. Where noise dominates (k below phi, the noise
    scale over the base batch size), the k steps would have gone in k random directions, and one
    step k times as long ends where they do. Where the signal dominates they would have followed
    the curvature on their way, and a step k times as long overshoots. So::

        k share = min(k, max(1, phi))

    and 1 for k <= 1.

    Args:
        k: batch size over base batch size.
        phi: noise scale over base batch size, in the metric that the optimizer moves in; 0 where
            it is not known.

    Returns:
        share, in (0, 1].

    Example:
        >>> step_share(8.0, 4.0), step_share(8.0, 0.5), step_share(8.0, 100.0)
        (0.5, 0.125, 1.0)

    Reference:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018, has the smooth form
        (1 + phi)/(1 + phi/k) for the best rate; docs/limit.md compares both.
    """
    if isinstance(k, (int, float)) and k <= 1:
        return 1.0
    if isinstance(k, (int, float)) and isinstance(phi, (int, float)):
        return min(1.0, max(1.0, phi) / k)
    return jnp.minimum(1.0, jnp.maximum(1.0, phi) / k)


def guard_decay(k: Scalar) -> Scalar:
    """Return the decay of the guard's noise scale over one update of k base sizes."""
    decay = GUARD_DECAY**k
    if isinstance(decay, (int, float)):
        return max(decay, SMALLEST_GUARD_DECAY)
    return jnp.maximum(decay, SMALLEST_GUARD_DECAY)


@dataclasses.dataclass
class BatchRamp:
    r"""A batch size that follows the measured noise scale: asked between updates, outside jit.

    The batch is multiplied by ``growth`` once ``patience`` answers in a row find
    ``growth * batch_size <= share * noise scale``, of which the lower end counts (``low``): a noise
    scale that is not known yet, or infinite, never lets a batch grow. It never shrinks unless
    ``may_shrink``: then it halves likewise once ``batch_size > 2 * share * noise scale``.

    Args:
        batch_size: examples per update to start from.
        largest: examples per update that are never exceeded.
        share: of the noise scale that a batch may reach.
        growth: factor of one rise; sizes are few, and each compiles its own program.
        multiple_of: every size is a multiple of this: devices times examples a micro-batch.
        patience: answers in a row that must agree.
        may_shrink: whether the batch may fall again, never below the size it started from.

    Attributes:
        batch_size: examples per update now.

    Raises:
        UserError: for sizes, a share or a growth that make no ramp.

    Example:
        >>> ramp = BatchRamp(batch_size=64, largest=256, patience=1)
        >>> [ramp.next_batch_size(low) for low in (100.0, 500.0, math.inf, 1e6, 1e9)]
        [64, 128, 128, 256, 256]
        >>> BatchRamp.from_dict(ramp.to_dict()) == ramp  # beside the checkpoint
        True

    Reference:
        McCandlish et al. 2018; Merrill et al., Critical Batch Size Revisited, 2025.
    """

    batch_size: int
    largest: int
    share: float = 0.5
    growth: float = 2.0
    multiple_of: int = 1
    patience: int = 3
    may_shrink: bool = False
    smallest: int = 0
    agreeing: int = 0

    def __post_init__(self) -> None:
        self.smallest = self.smallest or self.batch_size
        sizes = (self.smallest, self.batch_size, self.largest, self.multiple_of)
        whole = [isinstance(cast(object, x), int) and not isinstance(x, bool) for x in sizes]
        if not all(whole) or min(sizes) < 1 or not (self.batch_size <= self.largest):
            raise UserError(
                f"batch_size {self.batch_size!r}, largest {self.largest!r}, multiple_of"
                f" {self.multiple_of!r}: give whole numbers, 1 <= batch_size <= largest"
            )
        if self.batch_size % self.multiple_of:
            raise UserError(
                f"batch_size {self.batch_size} is no multiple of {self.multiple_of}; start from"
                f" {-(-self.batch_size // self.multiple_of) * self.multiple_of}"
            )
        if not 0 < self.share < math.inf or not 1 < self.growth < math.inf or self.patience < 1:
            raise UserError(
                f"share {self.share}, growth {self.growth}, patience {self.patience}: give share"
                " above 0, growth above 1, e.g. 0.5 and 2, and a patience of at least 1"
            )

    def next_batch_size(self, noise_scale: Any) -> int:
        """Take one look at the noise scale and return the batch size of the next update.

        Args:
            noise_scale: a lower bound of it in examples, or what ``noise_scale_estimate`` returns
                (then its ``preconditioned`` lower end counts, where there is one), or ``None``.

        Returns:
            Examples per update.
        """
        low = _lower_end(noise_scale)
        wanted = self._wanted(low)
        self.agreeing = self.agreeing + 1 if wanted != self.batch_size else 0
        if self.agreeing >= self.patience:
            self.batch_size, self.agreeing = wanted, 0
        return self.batch_size

    def microbatches(self, micro_batch_size: int) -> int:
        """Return the number of micro-batches of a fixed size that make up a batch now.

        Raises:
            UserError: if the size does not divide the batch.
        """
        if micro_batch_size < 1 or self.batch_size % micro_batch_size:
            raise UserError(
                f"a batch of {self.batch_size} holds no whole number of micro-batches of"
                f" {micro_batch_size}; give multiple_of={micro_batch_size} to the ramp"
            )
        return self.batch_size // micro_batch_size

    def sizes(self) -> list[int]:
        """Return every batch size that the ramp may come to: compile a program for each."""
        found = [self.smallest]
        while (following := self._grown(found[-1])) != found[-1]:
            found.append(following)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return settings and state as plain JSON values, to be kept beside the checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> BatchRamp:
        """Return the ramp that ``to_dict`` described.

        Raises:
            UserError: for fields that a ramp does not have.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(content) - known):
            raise UserError(f"a ramp has no {', '.join(unknown)}; give what to_dict() returned")
        return cls(**content)

    def _grown(self, size: int) -> int:
        wanted = min(round(size * self.growth), self.largest)
        wanted -= wanted % self.multiple_of
        return max(wanted, size)

    def _wanted(self, low: float) -> int:
        if not 0 <= low < math.inf:
            return self.batch_size
        grown = self._grown(self.batch_size)
        if grown <= self.share * low:
            return grown
        if self.may_shrink and self.batch_size > 2 * self.share * low:
            smaller = [size for size in self.sizes() if size < self.batch_size]
            return smaller[-1] if smaller else self.batch_size
        return self.batch_size


def _lower_end(noise_scale: Any) -> float:
    """Return the lower end of a noise scale; NaN where nothing is known."""
    if noise_scale is None:
        return math.nan
    finer = getattr(noise_scale, "preconditioned", None)
    found = noise_scale if finer is None else finer
    return float(getattr(found, "low", found))
