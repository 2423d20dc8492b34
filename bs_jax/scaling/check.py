"""invariance_check: train briefly at several batch sizes on the same examples and compare."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bs_jax.errors import UserError
from bs_jax.scaling.hyperparameters import check_batch_sizes
from bs_jax.scaling.microbatch import value_grad_and_stats
from bs_jax.scaling.state import guard_share


class Jump(NamedTuple):
    """A rise of the loss.

    Attributes:
        before: the lowest loss before it.
        after: the loss that it rose to; not finite where training broke.
        examples: that the weights had seen by then.
    """

    before: float
    after: float
    examples: int


@dataclasses.dataclass(frozen=True)
class InvarianceCheck:
    """What a check found.

    Attributes:
        base_batch_size: what the others are compared with.
        examples: examples that the weights have seen at the end of each stretch, shape (points,).
        curves: batch size -> mean training loss in each stretch, shape (seeds, points), at equal
            age of the weights.
        seed_noise: deviation of the base's loss between seeds, root mean square over stretches.
        deviations: batch size -> deviation from the base of the curve averaged over seeds, in
            units of ``seed_noise``.
        drifts: batch size -> mean signed difference of the loss from the base's.
        tolerance: deviations up to this many units pass.
        jumps: batch size -> the largest rise of its loss (mean over seeds) above the lowest before,
            where that is more than twice the base's, which noise explains.
        held_back: batch size -> share of updates in which a guard held the steps back.
    """

    base_batch_size: int
    examples: np.ndarray
    curves: dict[int, np.ndarray]
    seed_noise: float
    deviations: dict[int, float]
    drifts: dict[int, float]
    tolerance: float
    jumps: dict[int, Jump] = dataclasses.field(default_factory=dict["int", "Jump"])
    held_back: dict[int, float] = dataclasses.field(default_factory=dict[int, float])

    @property
    def ok(self) -> bool:
        """Whether every batch size stays within the tolerance."""
        return all(d <= self.tolerance for d in self.deviations.values())

    def to_text(self) -> str:
        """Return one line a batch size, and what to look at where it fails."""
        lines = [f"base batch size {self.base_batch_size}, seed noise {self.seed_noise:.3g}"]
        for size, deviation in self.deviations.items():
            line = f"batch size {size}: {deviation:.1f} x seed noise"
            held = self.held_back.get(size, 0.0)
            guarded = f"; the guard held {held:.0%} of its steps back" if held else ""
            if deviation <= self.tolerance:
                lines.append(f"{line}: follows the base{guarded}")
            else:
                lines.append(f"{line}: does NOT follow{self._reason(size)}{guarded}")
        return "\n".join(lines)

    def _reason(self, size: int) -> str:
        """Return what the curves say of a batch size that does not follow."""
        jump = self.jumps.get(size)
        if jump is not None:
            return (
                f": its loss jumps from {jump.before:.4g} to {jump.after:.4g} after"
                f" {jump.examples:,} examples, so its steps are too long: the learning rate grows"
                " too much with the batch size, or the batch is past the noise scale"
            )
        if not math.isfinite(self.deviations[size]):
            return ": a loss is not finite, here or at the base"
        way = "slower" if self.drifts[size] > 0 else "faster"
        if self.held_back.get(size, 0.0) > 0.1 and way == "slower":
            return (
                ", it learns slower per example: the batch is past the noise scale, where no"
                " batch size follows; use a smaller one, or let it grow while training (BatchRamp)"
            )
        larger = size > self.base_batch_size
        more = "grows too little" if larger == (way == "slower") else "grows too much"
        return (
            f", it learns {way} per example and its loss never jumps: the step {more} with the"
            " batch size (does the learning rate reach the optimizer?)"
        )

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the curves over examples seen, the base's seeds as a band.

        Args:
            path: where to write a PNG; ``None``: nowhere.

        Returns:
            The matplotlib figure.

        Raises:
            UserError: if matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UserError(
                "the picture of invariance_check needs matplotlib: pip install matplotlib, or read"
                " to_text()"
            ) from error

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        base = self.curves[self.base_batch_size]
        mean, spread = base.mean(axis=0), base.std(axis=0, ddof=1)
        low, high = mean - 2 * spread, mean + 2 * spread
        axes.fill_between(self.examples, low, high, color="0.85", label="base, 2 seed deviations")
        for size, curve in sorted(self.curves.items()):
            found = self.deviations.get(size)
            label = f"{size}: " + ("base" if found is None else f"{found:.1f} x seed noise")
            axes.plot(self.examples, curve.mean(axis=0), marker="o", ms=3, label=label)
        axes.set_xlabel("examples seen")
        axes.set_ylabel("training loss")
        axes.set_title("Follows the base" if self.ok else "Does not follow the base")
        axes.legend(frameon=False)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def invariance_check(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    data: Any,
    make_optimizer: Callable[[int, int], optax.GradientTransformation],
    *,
    batch_sizes: Sequence[int],
    base_batch_size: int,
    train_examples: int,
    seeds: int = 4,
    points: int = 8,
    tolerance: float = 2.0,
) -> InvarianceCheck:
    r"""Check on your own loss and optimizer that a batch size follows the base.

    Every batch size trains from the same parameters on the same examples in the same order, once
    per seed (a seed is an order). The mean loss curve over examples is compared with the base's,
    in units of the deviation between the base's seeds.

    The loss of a batch is that of the weights before its update, which have seen i B examples. So
    curves are compared over the age of the weights, from 0 to the last update of the largest batch:
    over examples seen, a batch of B would lag (B - B0)/2 examples behind the base.

    Args:
        loss_fn: ``(params, batch) -> loss``, a mean over the examples of the batch.
        params: starting point.
        data: tree of arrays with one leading axis of examples.
        make_optimizer: ``(batch_size, base_batch_size) -> transformation``, e.g. with
            ``scale_by_batch``. It is given micro-batches of at most the base size, at least two.
        batch_sizes: to check.
        base_batch_size: to compare with.
        train_examples: length of each run, in examples.
        seeds: number of orders, at least 2.
        points: stretches of the curve.
        tolerance: seed deviations that still pass.

    Returns:
        The result: ``ok``, ``to_text()``, ``plot(path)``.

    Raises:
        UserError: for sizes that do not fit.

    Example:
        >>> loss = lambda w, x: jnp.mean(jnp.square(x @ w - 1.0))
        >>> data = jax.random.normal(jax.random.key(0), (512, 3))
        >>> linear = lambda b, b0: optax.sgd(0.01 * b / b0)
        >>> check = invariance_check(loss, jnp.zeros(3), data, linear, batch_sizes=[32],
        ...     base_batch_size=16, train_examples=1024)
        >>> check.ok
        True

    Reference:
        The coordinate check of Yang et al., Tensor Programs V, 2022, does this for width.
    """
    sizes = [base_batch_size, *(b for b in batch_sizes if b != base_batch_size)]
    lengths = {jnp.shape(x)[0] if jnp.ndim(x) else 0 for x in jax.tree.leaves(data)}
    if len(lengths) != 1 or 0 in lengths:
        raise UserError(
            f"the arrays of data hold {sorted(lengths)} examples: each needs the same number, above"
            " 0, in front"
        )
    (available,) = lengths
    for size in sizes:
        check_batch_sizes(size, base_batch_size)
        needed = max(points, 2)
        if train_examples < size * needed:
            raise UserError(
                f"{train_examples} examples are under {needed} updates of {size}: train on at least"
                f" {size * needed}, or set points={max(train_examples // size, 1)}"
            )
    if seeds < 2 or points < 1 or len(sizes) < 2:
        raise UserError(
            f"seeds {seeds}, points {points}, {len(sizes) - 1} batch sizes beside the base: give at"
            " least 2 seeds, 1 point and 1 other batch size"
        )
    orders = np.stack([_order(seed, available, train_examples) for seed in range(seeds)])
    runs = {
        size: _train(
            loss_fn, params, data, make_optimizer(size, base_batch_size), orders, size,
            base_batch_size,
        )
        for size in sizes
    }  # fmt: skip
    with np.errstate(invalid="ignore", over="ignore"):  # a loss that is not finite is a result
        return _compared(runs, base_batch_size, train_examples, points, tolerance)


def _compared(
    runs: Mapping[int, tuple[np.ndarray, np.ndarray]],
    base_batch_size: int,
    train_examples: int,
    points: int,
    tolerance: float,
) -> InvarianceCheck:
    """Compare curves, losses and guards of shape (seeds, updates) with the base's."""
    largest = max(runs)
    edges = np.linspace(0, (train_examples // largest - 1) * largest, points + 1)
    curves = {size: _stretch_means(losses, size, edges) for size, (losses, _) in runs.items()}
    base = curves[base_batch_size]
    noise = float(np.sqrt(np.mean(base.var(axis=0, ddof=1))))
    others = {size: curve.mean(axis=0) - base.mean(axis=0) for size, curve in curves.items()}
    del others[base_batch_size]
    rises = {size: _largest_rise(losses.mean(axis=0), size) for size, (losses, _) in runs.items()}
    noisy = rises[base_batch_size].after - rises[base_batch_size].before
    return InvarianceCheck(
        base_batch_size=base_batch_size,
        examples=np.round(edges[1:]).astype(int),
        curves=curves,
        seed_noise=noise,
        deviations={s: float(np.sqrt(np.mean(d**2))) / noise for s, d in others.items()},
        drifts={s: float(np.mean(d)) for s, d in others.items()},
        tolerance=tolerance,
        jumps={
            s: rises[s]
            for s in others
            # Smaller batches are noisier by themselves.
            if not rises[s].after - rises[s].before
            <= 2 * noisy * max(1.0, math.sqrt(base_batch_size / s))
        },
        held_back={s: float(np.mean(runs[s][1] < 1)) for s in others},
    )


def _stretch_means(losses: np.ndarray, batch_size: int, edges: np.ndarray) -> np.ndarray:
    """Return the mean loss between ages of the weights; losses between two updates on a line."""
    ages = np.arange(losses.shape[1]) * float(batch_size)
    grid = np.union1d(ages, edges)
    values = np.stack([np.interp(grid, ages, row) for row in losses])
    pieces = (values[:, 1:] + values[:, :-1]) / 2 * np.diff(grid)
    area = np.concatenate([np.zeros((len(losses), 1)), np.cumsum(pieces, axis=1)], axis=1)
    at_edges = area[:, np.searchsorted(grid, edges)]
    return np.diff(at_edges, axis=1) / np.diff(edges)


def _largest_rise(losses: np.ndarray, batch_size: int) -> Jump:
    """Return where the loss rises most above its lowest so far, or stops being finite."""
    lowest = np.minimum.accumulate(losses)  # NaN from the first NaN on
    broken = np.flatnonzero(~np.isfinite(losses))
    rises = losses[1:] - lowest[:-1]
    at = int(broken[0]) if broken.size else 1 + int(np.argmax(rises))
    before = float(lowest[max(at - 1, 0)])
    return Jump(before, float(losses[at]), at * batch_size)


def _order(seed: int, available: int, needed: int) -> np.ndarray:
    """Return indices of a stream of examples: one permutation after another."""
    rng = np.random.default_rng(seed)
    epochs = -(-needed // available)
    return np.concatenate([rng.permutation(available) for _ in range(epochs)])[:needed]


def _train(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    data: Any,
    optimizer: optax.GradientTransformation,
    orders: np.ndarray,
    batch_size: int,
    base_batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Train once per order; return the losses and the guard's share, shape (seeds, updates)."""
    parts = _parts(batch_size, base_batch_size)
    gradient = value_grad_and_stats(loss_fn, microbatches=parts)
    tx = optax.with_extra_args_support(optimizer)
    updates = orders.shape[1] // batch_size

    def step(carry: tuple[Any, Any], indices: jax.Array) -> tuple[tuple[Any, Any], Any]:
        params, state = carry
        batch = jax.tree.map(lambda x: jnp.asarray(x)[indices], data)
        loss, grads, stats = gradient(params, batch)
        changes, state = tx.update(grads, state, params, microbatch=stats)
        return (optax.apply_updates(params, changes), state), (loss, guard_share(state))

    @jax.jit
    def train(order: jax.Array) -> Any:
        indices = order[: updates * batch_size].reshape(updates, batch_size)
        return jax.lax.scan(step, (params, tx.init(params)), indices)[1]

    found = [train(jnp.asarray(order)) for order in orders]
    losses, shares = (np.stack([np.asarray(x[i], np.float64) for x in found]) for i in (0, 1))
    return losses, shares


def _parts(batch_size: int, base_batch_size: int) -> int:
    """Return the fewest equal micro-batches of at most the base size; two where that divides."""
    for parts in range(2, batch_size + 1):
        if batch_size % parts == 0 and batch_size // parts <= base_batch_size:
            return parts
    return 1
