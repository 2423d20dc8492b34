"""Batch sizes over training: ramps, decays turned into batch growth, a batch that follows noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from bs_jax.errors import UserError


class Stage(NamedTuple):
    """A stretch of training at one batch size.

    Attributes:
        batch_size: examples per update.
        updates: number of updates.
        start_examples: examples seen before it.
    """

    batch_size: int
    updates: int
    start_examples: int


def batch_size_ramp(
    batch_sizes: Sequence[int],
    stage_examples: Sequence[int] | int,
) -> list[Stage]:
    r"""Train at each batch size in turn for a given number of examples.

    Each stage is rounded to whole updates; what a stage runs over or short is taken from the next,
    so that the examples seen never stray by more than half an update.

    Args:
        batch_sizes: examples per update, stage by stage, e.g. ``(64, 128, 256)``.
        stage_examples: examples in each stage, or one number for all.

    Returns:
        One ``Stage`` each; call ``update(..., batch_size=stage.batch_size)`` in it.

    Raises:
        UserError: for sizes below 1, or a stage shorter than half an update.

    Example:
        >>> batch_size_ramp((64, 128), 640)
        [Stage(batch_size=64, updates=10, start_examples=0), Stage(batch_size=128, updates=5, start_examples=640)]

    Reference:
        Smith et al., Don't Decay the Learning Rate, Increase the Batch Size, 2018.
    """  # noqa: E501
    lengths = (
        [stage_examples] * len(batch_sizes)
        if isinstance(stage_examples, int)
        else (list(stage_examples))
    )
    if not batch_sizes or len(lengths) != len(batch_sizes):
        raise UserError(
            f"{len(batch_sizes)} batch sizes and {len(lengths)} stage lengths: give one length a"
            " size, or one for all"
        )
    stages: list[Stage] = []
    seen, planned = 0, 0
    for size, length in zip(batch_sizes, lengths, strict=True):
        if size < 1 or length < 1:
            raise UserError(f"a stage of {length} examples at batch size {size}: give at least 1")
        planned += length
        updates = round((planned - seen) / size)
        if updates < 1:
            raise UserError(
                f"a stage of {length} examples holds no update of {size}: make it at least {size}"
                " examples long, or the batch smaller"
            )
        stages.append(Stage(size, updates, seen))
        seen += updates * size
    return stages


def batch_growth_from_decay(
    lr_factors: Sequence[float],
    *,
    batch_size: int,
    largest_batch_size: int,
    lr_power: float = 1.0,
    multiple_of: int = 1,
) -> list[tuple[int, float]]:
    r"""Turn drops of the learning rate into growth of the batch.

    A rule under which lr at k times the batch is worth ``lr k^-lr_power`` at the base lets a drop
    by f be replaced by a batch ``f^(-1/lr_power)`` as large at the same learning rate (1: SGD and
    the invariant second moment; 1/2: Adam under the square-root rule, i.e. a drop by 2 is a batch
    of 4 times the size, as in Seesaw). What the largest batch leaves over stays a drop of the rate.

    Args:
        lr_factors: learning rate relative to the first, stage by stage, e.g. ``(1, .1, .01)``.
        batch_size: of the first stage, in examples.
        largest_batch_size: the batch never grows past this.
        lr_power: of the rule.
        multiple_of: batch sizes are rounded down to a multiple of this (devices).

    Returns:
        (batch size, learning rate relative to the first, at that batch size) for each stage.

    Raises:
        UserError: for factors that are not positive, or sizes that do not fit.

    Example:
        >>> batch_growth_from_decay((1, 0.5, 0.1), batch_size=64, largest_batch_size=256)
        [(64, 1.0), (128, 1.0), (256, 0.4)]

    Reference:
        Smith et al. 2018; Meterez et al., Seesaw, 2025.
    """
    if batch_size < 1 or largest_batch_size < batch_size or batch_size % multiple_of:
        raise UserError(
            f"batch_size {batch_size}, largest_batch_size {largest_batch_size}, multiple_of"
            f" {multiple_of}: the first must be a multiple of the last and at most the second"
        )
    if not lr_power > 0:
        raise UserError(f"lr_power is {lr_power}; give a positive power, e.g. 1.0 or 0.5")
    grown = []
    for factor in lr_factors:
        if not (math.isfinite(factor) and factor > 0):
            raise UserError(f"a learning-rate factor of {factor} has no batch size: give above 0")
        wanted = batch_size * factor ** (-1 / lr_power)
        size = int(min(max(wanted, batch_size), largest_batch_size) + 1e-9)
        size = max(size // multiple_of * multiple_of, batch_size)
        grown.append((size, factor * (size / batch_size) ** lr_power))
    return grown


def ramp_within_noise(
    *,
    batch_size: int,
    largest_batch_size: int,
    share: float = 0.5,
    growth: float = 2.0,
) -> Callable[[int, float], int]:
    r"""Grow the batch as the measured noise scale allows: ``B <= share * B_noise``.

    Past the noise scale the signal dominates a batch and no rule follows the base, so the batch is
    raised by ``growth`` only once the noise scale has risen far enough; it never shrinks.

    Args:
        batch_size: to start from.
        largest_batch_size: never exceeded.
        share: of the noise scale that a batch may reach.
        growth: factor of one rise.

    Returns:
        ``next_batch_size(current, noise_scale) -> int``, to be asked now and then, outside jit. A
        noise scale that is NaN or infinite is not known yet: the batch stays. ``BatchRamp`` also
        asks for the lower end of the measured range, waits for answers that agree, and saves.

    Raises:
        UserError: for sizes, a share or a growth that make no ramp.

    Example:
        >>> next_batch_size = ramp_within_noise(batch_size=64, largest_batch_size=512)
        >>> next_batch_size(64, 200.0), next_batch_size(64, 300.0), next_batch_size(64, math.inf)
        (64, 128, 64)
    """
    if not 1 <= batch_size <= largest_batch_size:
        raise UserError(
            f"batch_size {batch_size} and largest_batch_size {largest_batch_size}: give"
            " 1 <= batch_size <= largest_batch_size"
        )
    if not share > 0 or not growth > 1:
        raise UserError(f"share {share} and growth {growth}: give share > 0 and growth > 1")

    def next_batch_size(current: int, noise_scale: float) -> int:
        wanted = min(round(current * growth), largest_batch_size)
        allowed = math.isfinite(noise_scale) and wanted <= share * noise_scale
        return wanted if allowed else current

    return next_batch_size


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
