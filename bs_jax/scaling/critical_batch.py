"""critical_batch_size: branch a run at several batch sizes and see up to which the loss follows."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax.scipy.special
import numpy as np

from bs_jax.errors import UserError

FOLLOWS, LAGS, UNDECIDED = "follows", "lags", "undecided"
_LEVEL = 0.05  # of each one-sided test
State = TypeVar("State")


@dataclasses.dataclass(frozen=True)
class Branch:
    """One batch size beside the smallest one.

    Attributes:
        batch_size: examples per update.
        losses: the loss of each seed, shape (seeds,).
        difference: mean over seeds of its loss minus the smallest batch's, seed by seed.
        low: lower end of a one-sided 95 % interval of the difference.
        high: upper end of a one-sided 95 % interval of the difference.
        verdict: "follows" if `high` is within the tolerance, "lags" if `low` is beyond it, else
            "undecided": more seeds would tell.
    """

    batch_size: int
    losses: np.ndarray
    difference: float
    low: float
    high: float
    verdict: str


@dataclasses.dataclass(frozen=True)
class CriticalBatch:
    """Up to which batch size the loss follows the smallest one's.

    Attributes:
        branches: one a batch size, ascending; the first is the one that the others are held to.
        tolerance: differences of the loss up to this count as equal.
        noise_scale: the gradient noise scale where the run was branched, in examples, or None.
    """

    branches: tuple[Branch, ...]
    tolerance: float
    noise_scale: float | None = None

    @property
    def low(self) -> int:
        """The largest batch size that follows, with every smaller one."""
        found = self.branches[0].batch_size
        for branch in self.branches:
            if branch.verdict != FOLLOWS:
                break
            found = branch.batch_size
        return found

    @property
    def high(self) -> float:
        """The smallest batch size that lags; infinite if none of them does."""
        return min((b.batch_size for b in self.branches if b.verdict == LAGS), default=math.inf)

    @property
    def estimate(self) -> float:
        """The batch size at which the mean difference reaches the tolerance, in examples.

        Interpolated in log(batch size) between the last size within the tolerance and the first
        beyond it; infinite if no size is beyond.
        """
        for inner, outer in zip(self.branches, self.branches[1:], strict=False):
            if not outer.difference <= self.tolerance:  # NaN is beyond it too
                span = outer.difference - inner.difference
                share = (self.tolerance - inner.difference) / span if math.isfinite(span) else 0.0
                ratio = outer.batch_size / inner.batch_size
                return inner.batch_size * ratio**share
        return math.inf

    def to_text(self) -> str:
        """Return one line a batch size, and what it comes to."""
        reference = self.branches[0]
        lines = [
            f"batch size {reference.batch_size}: loss {reference.losses.mean():.4g} "
            f"({len(reference.losses)} seeds); the others are held to it"
        ]
        for branch in self.branches[1:]:
            lines.append(
                f"batch size {branch.batch_size}: loss {branch.difference:+.4g} "
                f"({branch.low:+.4g} to {branch.high:+.4g}): {branch.verdict}"
            )
        return "\n".join([*lines, self.conclusion()])

    def conclusion(self) -> str:
        """Return the range of the critical batch size, and the noise scale beside it."""
        largest = self.branches[-1].batch_size
        if self.low == largest:
            text = f"The loss follows up to {largest}, the largest batch size tried"
        elif math.isinf(self.high):
            text = f"The loss follows up to {self.low}; beyond it more seeds are needed to tell"
        else:
            text = f"The critical batch size is at least {self.low} and below {self.high:g}"
        if math.isfinite(self.estimate):
            text += f" (about {self.estimate:.3g})"
        text += f", for a tolerance of {self.tolerance:g} in the loss."
        if self.noise_scale is not None:
            text += f" The gradient noise scale is {self.noise_scale:.3g}"
            if math.isfinite(self.estimate):
                text += f", {self.noise_scale / self.estimate:.2g} times that"
            text += "."
        return text


def critical_batch_size(
    train_branch: Callable[[State, int, int], float],
    state: State,
    batch_sizes: Sequence[int],
    *,
    tolerance: float,
    seeds: int = 3,
    noise_scale: float | None = None,
) -> CriticalBatch:
    r"""Measure the critical batch size of a run at one point, by branches of it.

    Every branch starts from the same state and trains on the same number of examples, once per seed
    and batch size; the learning rate and the rest follow the batch size by a rule of your choice.
    With d_s(B) the loss of batch size B and seed s minus that of the smallest batch size and the
    same seed, B follows if the mean of d_s(B) is shown to be below the tolerance, and lags if it is
    shown to be above (one-sided t tests at 5 % over seeds). The critical batch size is the largest
    up to which the loss follows; unlike the gradient noise scale it needs no assumption about the
    curvature or the optimizer (Merrill et al. 2025, arXiv 2505.23971).

    Args:
        train_branch: ``train_branch(state, batch_size, seed) -> loss`` trains a copy of the state
            and returns its loss afterwards, best on held-out examples. It sees the same examples
            at every batch size; the seed decides which, and is a number from 0 to ``seeds`` - 1.
        state: where the branches start; handed on as it is.
        batch_sizes: examples per update, two or more.
        tolerance: largest difference that counts as equal, in units of the loss; the paper's is
            0.01 for a language model's loss in nats.
        seeds: branches a batch size, two or more.
        noise_scale: the gradient noise scale at this state, in examples, to be shown beside.

    Returns:
        The verdict of each batch size, and the range that they leave. A branch whose loss is not
        finite lags.

    Raises:
        UserError: impossible arguments, or the smallest batch size's loss is not finite.

    >>> def train_branch(state, batch_size, seed):  # as if 64 were too large
    ...     return 1.0 + 0.001 * seed + (0.5 if batch_size > 32 else 0.0)
    >>> found = critical_batch_size(train_branch, None, [16, 32, 64], tolerance=0.01)
    >>> found.low, found.high
    (32, 64)
    """
    sizes = _checked(batch_sizes, tolerance, seeds)
    losses = {
        size: np.array([_loss(train_branch(state, size, seed), size) for seed in range(seeds)])
        for size in sizes
    }
    return from_losses(losses, tolerance=tolerance, noise_scale=noise_scale)


def from_losses(
    losses: Mapping[int, Sequence[float] | np.ndarray],
    *,
    tolerance: float,
    noise_scale: float | None = None,
) -> CriticalBatch:
    """Compare branches that were trained already; see `critical_batch_size`.

    Args:
        losses: batch size -> the loss of each seed, in the same order for all.
        tolerance: largest difference that counts as equal, in units of the loss.
        noise_scale: the gradient noise scale where the run was branched, in examples.

    Raises:
        UserError: impossible arguments, or the smallest batch size's loss is not finite.
    """
    seeds = min((len(found) for found in losses.values()), default=0)
    sizes = _checked(list(losses), tolerance, seeds)
    reference = np.asarray(losses[sizes[0]], np.float64)
    if not np.all(np.isfinite(reference)):
        raise UserError(
            f"the loss at batch size {sizes[0]} is {reference.tolist()}; the smallest batch size "
            "must train well, since the others are held to it: give a smaller one or a lower rate"
        )
    quantile = _t_quantile(1 - _LEVEL, seeds - 1)
    branches = []
    for size in sizes:
        found = np.asarray(losses[size], np.float64)
        if found.shape != reference.shape:
            raise UserError(
                f"batch size {size} has {found.size} losses and batch size {sizes[0]} has "
                f"{reference.size}; give one for each seed, in the same order"
            )
        branches.append(_branch(size, found, reference, quantile, tolerance))
    return CriticalBatch(tuple(branches), tolerance, noise_scale)


def _branch(
    size: int, losses: np.ndarray, reference: np.ndarray, quantile: float, tolerance: float
) -> Branch:
    if not np.all(np.isfinite(losses)):
        return Branch(size, losses, math.inf, math.inf, math.inf, LAGS)
    differences = losses - reference
    mean = float(differences.mean())
    margin = quantile * float(differences.std(ddof=1)) / math.sqrt(differences.size)
    low, high = mean - margin, mean + margin
    verdict = FOLLOWS if high <= tolerance else LAGS if low > tolerance else UNDECIDED
    return Branch(size, losses, mean, low, high, verdict)


def _loss(value: Any, size: int) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"train_branch at batch size {size} returned {type(value).__name__}; it must return "
            f"the loss after training, one number ({error})"
        ) from None


def _checked(batch_sizes: Sequence[int], tolerance: float, seeds: int) -> list[int]:
    for size in cast(Sequence[object], batch_sizes):
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise UserError(
                f"batch size {size!r}; give positive whole numbers (examples an update)"
            )
    sizes = sorted({int(size) for size in batch_sizes})
    if len(sizes) < 2:
        raise UserError(
            f"batch_sizes are {list(batch_sizes)}; give two or more different ones: the smallest "
            "is what the others are held to"
        )
    if not 0 < tolerance < math.inf:
        raise UserError(f"tolerance is {tolerance!r}; give a positive number in units of the loss")
    if seeds < 2:
        raise UserError(
            f"seeds is {seeds}; give two or more: the difference between them is what tells a "
            "larger loss from chance"
        )
    return sizes


@functools.cache
def _t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution for a probability above 1/2, by bisection.

    >>> round(_t_quantile(0.95, 2), 3), round(_t_quantile(0.95, 9), 3)
    (2.92, 1.833)
    """
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        tail = float(
            jax.scipy.special.betainc(degrees / 2, 0.5, degrees / (degrees + middle**2)) / 2
        )
        low, high = (middle, high) if tail > 1 - probability else (low, middle)
    return high
