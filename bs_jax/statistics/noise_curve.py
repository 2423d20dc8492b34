"""The gradient noise scale of a run over training, beside its batch size."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bs_jax.errors import UserError
from bs_jax.scaling.noise import ERRORS

COLUMNS: tuple[str, ...] = (
    "step",
    "examples",
    "noise_scale",
    "standard_error",
    "low",
    "high",
    "phi",
    "signal",
    "noise",
    "largest_k",
    "window_noise_scale",
)
_TABLE_LINES = 16


@dataclasses.dataclass(frozen=True)
class NoiseScaleCurve:
    """The noise scale of one run over training.

    Attributes:
        batch_size: examples per update, in use.
        base_batch_size: examples per update that the recipe was tuned at.
        rows: one dict a logging window with the keys in ``COLUMNS``: ``noise_scale`` (examples) is
            tr(Sigma)/|g|^2 from running averages of both, ``standard_error``, ``low`` and
            ``high`` its spread (see ``scaling.NoiseScale``), ``phi`` it over the base batch size,
            ``largest_k`` the largest batch size over the base one that surely lies inside it,
            ``window_noise_scale`` the same ratio from this window alone. Infinite where no signal
            can be told from zero.
    """

    batch_size: int
    base_batch_size: int
    rows: list[dict[str, float]]

    def to_text(self) -> str:
        """Return an aligned table of at most ``_TABLE_LINES`` rows, and what it comes to."""
        header = ("examples", "B_noise", "from", "to", "phi", "batch", "largest k inside")
        cells = [header, *(self._cells(row) for row in _thinned(self.rows, _TABLE_LINES))]
        widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in cells
        ]
        return "\n".join([*lines, self.conclusion(), self.advice()])

    def _cells(self, row: Mapping[str, float]) -> tuple[str, ...]:
        return (
            f"{row['examples']:,}",
            _number(row["noise_scale"]),
            _number(row["low"]),
            _number(row["high"]),
            _number(row["phi"]),
            str(self.batch_size),
            _number(row["largest_k"]),
        )

    def conclusion(self) -> str:
        """Return for how much of training the batch size in use lies inside the noise scale."""
        sizes = [(row["low"], row["high"]) for row in self.rows]
        inside = sum(low >= self.batch_size for low, _ in sizes) / len(sizes)
        past = sum(high < self.batch_size for _, high in sizes) / len(sizes)
        return (
            f"Batch size {self.batch_size} lies inside the noise scale in {100 * inside:.0f} % of "
            f"training and past it in {100 * past:.0f} %, both beyond {ERRORS:g} standard errors. "
            "Past it a larger batch buys little and no rule follows the base."
        )

    def ramp(self) -> list[tuple[int, int]]:
        """The stages (examples, batch size) that a `scaling.BatchRamp` from the base would take."""
        from bs_jax.scaling import BatchRamp

        size, end = self.base_batch_size, int(self.rows[-1]["examples"])
        asked = BatchRamp(batch_size=size, largest=max(end, size), patience=1)
        stages = [(0, size)]
        for row in self.rows:
            if asked.next_batch_size(row["low"]) != stages[-1][1]:
                stages.append((int(row["examples"]), asked.batch_size))
        return [stages[0], *(stage for stage in stages[1:] if sum(stage) <= end)]

    def advice(self) -> str:
        """Return the ramp in words, what it saves, and how to train it."""
        (_, base), *rises = stages = self.ramp()
        if not rises:
            return f"It never allows twice the base batch size of {base}: no ramp is advised."
        end = int(self.rows[-1]["examples"])
        ends = [start for start, _ in rises] + [end]
        updates = sum((to - at) / size for (at, size), to in zip(stages, ends, strict=True))
        shown = ", ".join(f"{size} from {start:,} examples" for start, size in rises)
        flags = f"--config.batch_size={rises[-1][1]} --config.batch_ramp.kind"
        return (
            f"A ramp at half of its lower end: {base}, {shown}. That is {updates:,.0f} updates for "
            f"{end / base:,.0f} at {base} throughout, {100 * (1 - updates * base / end):.0f} % "
            f"fewer. To train it: {flags}=noise, which measures for itself, or "
            f"{flags}=stages '--config.batch_ramp.stages={tuple(stages)}'"
        )

    def to_csv(self) -> str:
        """Return the rows as CSV; an infinite noise scale reads ``inf``."""
        text = io.StringIO()
        columns: list[str] = [*COLUMNS]
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()


def from_metrics(
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    base_batch_size: int,
    where: str = "the records",
) -> NoiseScaleCurve:
    r"""Average what was measured in each window of updates, and divide last.

    With d the decay of the running noise scale (per base-size update) a window of n updates is
    taken in as ``S <- d^(nk) S + (1 - d^(nk)) mean``, for |g|^2 and tr(Sigma) alike.

    Args:
        rows: metrics by window, with ``step``, ``examples`` and ``noise/...``.
        batch_size: examples per update.
        base_batch_size: examples per update that the recipe was tuned at.
        where: the rows come from, for the error.

    Returns:
        The curve, up to the first number that is not finite.

    Raises:
        UserError: there is no noise in them.
    """
    from bs_jax.scaling import noise as lib

    decay = lib.DECAY ** (batch_size / base_batch_size)
    empty = lib.NoiseScaleState._make([0.0] * len(lib.NoiseScaleState._fields))
    running, windows, done = [empty], [], 0
    for row in rows:
        means = {name: row.get(f"noise/{name}") for name in lib.SAMPLE}
        if any(value is None for value in means.values()):
            break
        updates = row["step"] - done
        done = row["step"]
        running.append(lib.average(running[-1], means, updates=updates, decay=decay))
        windows.append(lib.average(empty, means, updates=updates, decay=0.0))
    if not windows:
        raise UserError(
            f"{where} hold no gradient noise: the run diverged at once, or was trained in another "
            "mode; look at train/loss, or give --mode=noise_scale a --workdir of its own"
        )
    now = _estimates(running[1:])
    window = _estimates(windows)["noise_scale"]
    found = [
        {
            "step": row["step"],
            "examples": row["examples"],
            **{name: values[i] for name, values in now.items()},
            "phi": now["noise_scale"][i] / base_batch_size,
            "largest_k": now["low"][i] / base_batch_size,
            "window_noise_scale": window[i],
        }
        for i, row in enumerate(rows[: len(windows)])
    ]
    return NoiseScaleCurve(batch_size, base_batch_size, found)


def _estimates(states: Sequence[Any]) -> dict[str, list[float]]:
    """Every state's estimate, all at once, by name."""
    from bs_jax.scaling import noise as lib

    stacked = lib.NoiseScaleState._make(np.asarray(states, np.float32).T)
    found = lib.estimate(stacked)._asdict()  # without the preconditioned scale: no optimizer here
    return {name: np.asarray(value).tolist() for name, value in found.items() if value is not None}


def _thinned(rows: Sequence[Any], count: int) -> list[Any]:
    """At most so many rows, evenly spread, the last among them."""
    step = -(-len(rows) // count)
    return list(reversed(rows[::-1][::step]))


def _number(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) and value >= 100 else f"{value:.3g}"
