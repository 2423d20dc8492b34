"""The figure of a noise scale over training: numbers in, matplotlib Figure out."""

from typing import TYPE_CHECKING

import numpy as np

from bs_jax.cli.noise_scale import NoiseScaleCurve
from bs_jax.report import style
from bs_jax.report.plots import end_labels, examples_label
from bs_jax.scaling.noise_scale import ERRORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def noise_scale_figure(curve: NoiseScaleCurve, width: float = 7.4, height: float = 3.8) -> "Figure":
    """Noise scale over examples seen, its spread as a band, the batch size in use as a line.

    Args:
      curve: of `noise_scale.from_metrics`.
      width: in inches.
      height: in inches.

    Returns:
      The figure. Windows in which no signal was found are marked at the upper edge.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    columns = {name: np.array([row[name] for row in curve.rows]) for name in curve.rows[0]}
    examples, scale = columns["examples"], columns["noise_scale"]
    colour, batch_colour = style.ARM_COLOURS[0][0], style.ARM_COLOURS[1][0]
    with style.drawing():
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        window = columns["window_noise_scale"]
        shown = np.isfinite(window) & (window > 0)
        known = np.isfinite(scale) & (scale > 0)
        lines = [curve.batch_size, *(scale[known]), *(window[shown])]
        bottom, top = min(lines) / 2, 2 * max(*lines, curve.base_batch_size)
        axes.plot(examples[shown], window[shown], ".", color=style.MUTED, ms=3)
        beyond = examples[~shown]
        axes.plot(beyond, np.full(len(beyond), top), "^", color=style.MUTED, ms=3, clip_on=False)
        # Where the signal may be zero the range has no upper end.
        low, high = (np.clip(columns[end], bottom, top) for end in ("low", "high"))
        axes.fill_between(examples, low, high, color=colour, alpha=0.18, lw=0)
        axes.plot(examples[known], scale[known], color=colour, lw=1.8)
        axes.axhline(curve.batch_size, color=batch_colour, lw=1.4)
        labels = [(float(curve.batch_size), f"batch size {curve.batch_size}", batch_colour)]
        if curve.base_batch_size != curve.batch_size:
            axes.axhline(curve.base_batch_size, color=style.INK, lw=1, ls=(0, (4, 3)))
            base = f"base {curve.base_batch_size}"
            labels.append((float(curve.base_batch_size), base, style.INK))
        if known.any():
            labels.append((float(scale[known][-1]), "noise scale", colour))
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
        axes.set_xlim(0, examples[-1])
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(examples_label))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_xlabel("examples seen")
        axes.set_ylabel("examples")
        axes.set_title(
            f"dots: single windows   line: running   band: ± {ERRORS:g} standard errors",
            fontsize=8,
            fontweight="normal",
            color=style.MUTED,
        )
        end_labels(axes, labels)
    return figure
