"""Figures: numbers in, matplotlib Figure out; nothing is read or written here."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bs_jax.report import style
from bs_jax.report.numbers import Units, fraction, in_words
from bs_jax.statistics.analysis import Analysis
from bs_jax.statistics.groups import Group

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# How far from the base, in margins, a point may lie before it is drawn as an arrow at the edge:
# beyond, the margin itself would be too thin to see.
_REACH_MARGINS = 14.0


def metric_figure(
    analysis: Analysis, width: float = 7.4, height: float = 4.2, arm: str | None = None
) -> "Figure":
    """Final metric against batch size, a line an arm, over the band base ± margin.

    A bar is the 90 % interval of the difference from the base, put at the group's mean: all of it
    inside the band is what the equivalence test asks.

    Args:
      analysis: of `analyse`.
      width: in inches.
      height: in inches.
      arm: draw this one with its seeds, and the others as faint lines; None draws all alike.

    Returns:
      The figure.
    """
    with style.drawing():
        figure, axes = _figure(width, height)
        arms = [verdict.arm for verdict in analysis.arms]
        units = Units(analysis.sweep.accuracy_metric)
        factor = units.factor
        low, high = _limits(analysis)
        base, margin = analysis.base, analysis.sweep.margin
        if base is not None and base.values:
            mean = base.interval.mean
            axes.axhspan((mean - margin) * factor, (mean + margin) * factor, color=style.BAND, lw=0)
            axes.axhline(mean * factor, color=style.MUTED, lw=0.8)
        shown = [arm] if arm is not None else arms
        if arm is not None:
            for other in (name for name in arms if name != arm):
                x, y = _line(analysis, other)
                axes.plot(x, np.clip(y, low, high) * factor, color=style.GRID, lw=1.2)
        ends = []
        for index, name in enumerate(shown):
            dodge = (index - (len(shown) - 1) / 2) * min(0.07, 0.5 / len(shown))
            colour = style.arm_colour(arms, name)
            marker = style.arm_marker(arms, name)
            x, y = _line(analysis, name)
            if not len(x):
                continue
            moved = x + dodge * (x != math.log2(analysis.sweep.base_batch_size))
            inside = np.clip(y, low, high)
            axes.plot(moved, inside * factor, color=colour, lw=1.5, alpha=0.9)
            _points(axes, analysis, name, dodge, (low, high), colour, marker, arm is not None)
            ends.append((inside[-1] * factor, style.label(name), colour))
        if base is not None and base.values:
            x = math.log2(base.batch_size)
            y = base.interval.mean * factor
            axes.plot([x], [y], "o", color=style.INK, ms=5, zorder=5)
            style.tip_at(axes, x, y, f"base, batch size {base.batch_size}: {units.value(mean)}")
        axes.set_ylim(low * factor, high * factor)
        axes.set_ylabel(f"final {units.name}" + (" (%)" if units.percent else ""))
        _size_axis(axes, analysis)
        if arm is None:
            _end_labels(axes, ends)
        # A narrow figure has no room for the note; its caption says the same.
        if base is not None and base.values and arm is None and width > 5:
            note = f"band: base ± {units.spread(margin)} · bars: 90 % interval of the difference"
            axes.set_title(note, fontsize=8, fontweight="normal", color=style.MUTED)
    return figure


def curve_figure(analysis: Analysis, arm: str, width: float = 3.6, height: float = 2.7) -> "Figure":
    """One arm's training curves at equal age, a colour a batch size, the base in ink.

    Args:
      analysis: of `analyse`.
      arm: whose.
      width: in inches.
      height: in inches.

    Returns:
      The figure; it says so where there are no curves.
    """
    with style.drawing():
        figure, axes = _figure(width, height)
        _curves(axes, analysis, arm)
        axes.set_ylabel(_curve_label(analysis, axes))
    return figure


def evaluation_figure(
    analysis: Analysis, arm: str, width: float = 3.6, height: float = 2.7
) -> "Figure | None":
    """One arm's evaluations on the way, mean over seeds, a colour a batch size, the base in ink.

    Args:
      analysis: of `analyse`.
      arm: whose.
      width: in inches.
      height: in inches.

    Returns:
      The figure; None where no run was evaluated more than once.
    """
    groups = [g for g in _with_base(analysis, arm) if g.evaluations is not None]
    if not any(len(group.evaluations.examples) > 1 for group in groups if group.evaluations):
        return None
    units = Units(analysis.sweep.accuracy_metric)
    colours = style.size_colours(_sizes(analysis), analysis.sweep.base_batch_size)
    with style.drawing():
        figure, axes = _figure(width, height)
        for group in groups:
            assert group.evaluations is not None
            seen, values = group.evaluations.examples, group.evaluations.values * units.factor
            axes.plot(seen, values, color=colours[group.batch_size], lw=1.4, marker=".", ms=5)
            for x, y in zip(seen, values, strict=True):
                if math.isfinite(y):
                    text = f"after {x:,} examples: {units.value(y / units.factor)}"
                    style.tip_at(axes, x, y, f"batch size {group.batch_size} {text}")
        axes.set_ylabel(units.name + (" (%)" if units.percent else ""))
        axes.set_xlabel("examples seen")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(4))
        axes.xaxis.set_major_formatter(_ticker().FuncFormatter(_examples_label))
    return figure


def gap_figure(
    analysis: Analysis, arm: str, width: float = 3.6, height: float = 2.7
) -> "Figure | None":
    """One arm's training curves minus the base's at equal age, a colour a batch size.

    Args:
      analysis: of `analyse`.
      arm: whose.
      width: in inches.
      height: in inches.

    Returns:
      The figure; None where no curve can be compared.
    """
    groups = [group for group in _judged(analysis, arm) if group.deviation is not None]
    if not groups:
        return None
    colours = style.size_colours(_sizes(analysis), analysis.sweep.base_batch_size)
    centres = (analysis.edges[1:] + analysis.edges[:-1]) / 2
    with style.drawing():
        figure, axes = _figure(width, height)
        axes.axhline(0, color=style.INK, lw=1.2)
        for group in groups:
            assert group.deviation is not None
            gap = group.deviation.gap
            axes.plot(centres, gap, color=colours[group.batch_size], lw=1.4)
            for index in _some(len(centres), 8):
                if math.isfinite(gap[index]):
                    text = f"{gap[index]:+.4f} after {centres[index]:,.0f} examples"
                    text = f"batch size {group.batch_size} minus base: {text}"
                    style.tip_at(axes, centres[index], gap[index], text)
        axes.set_ylabel(f"{in_words(analysis.sweep.curve_metric)} minus the base's")
        _age_axis(axes, analysis)
    return figure


def curves_figure(analysis: Analysis, width: float = 7.4) -> "Figure":
    """The training curves of all arms as small multiples with one legend.

    Args:
      analysis: of `analyse`.
      width: in inches.

    Returns:
      The figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    arms = [verdict.arm for verdict in analysis.arms]
    columns = min(3, len(arms))
    rows = math.ceil(len(arms) / columns)
    with style.drawing():
        figure = Figure(figsize=(width, 0.6 + 2.1 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, arm in zip(grid, arms, strict=False):
            _curves(axes, analysis, arm, tips=False)
            axes.set_title(style.label(arm))
        for axes in grid[len(arms) :]:
            axes.set_visible(False)
        for axes in grid[len(arms) - columns : len(arms)]:
            axes.tick_params(labelbottom=True)
        colours = style.size_colours(_sizes(analysis), analysis.sweep.base_batch_size)
        figure.legend(
            handles=[Line2D([], [], color=colours[size]) for size in sorted(colours)],
            labels=[str(size) for size in sorted(colours)],
            title="batch size",
            loc="outside upper left",
            ncols=min(len(colours), 10),
            handlelength=1.2,
        )
        figure.supxlabel(_AGE, color=style.MUTED, fontsize=8.5)
        label = _curve_label(analysis, grid[0])
        figure.supylabel(label, color=style.MUTED, fontsize=8.5)
    return figure


def deviation_figure(analysis: Analysis, width: float = 7.4, height: float = 3.4) -> "Figure":
    """Deviation of the training curve from the base's, in units of seed noise, against batch size.

    Args:
      analysis: of `analyse`.
      width: in inches.
      height: in inches.

    Returns:
      The figure; in the curve metric's own units where no seed noise is known.
    """
    with style.drawing():
        figure, axes = _figure(width, height)
        arms = [verdict.arm for verdict in analysis.arms]
        in_noise = any(
            group.deviation is not None and math.isfinite(group.deviation.in_noise)
            for group in analysis.groups
        )
        ends = []
        for arm in arms:
            points = [
                (math.log2(group.batch_size), value)
                for group in _judged(analysis, arm)
                if group.deviation is not None
                and (value := group.deviation.in_noise if in_noise else group.deviation.rms) > 0
            ]
            if not points:
                continue
            colour = style.arm_colour(arms, arm)
            # The base has no deviation from itself: a line through k = 1 would invent one.
            centre = math.log2(analysis.sweep.base_batch_size)
            for side in (
                [point for point in points if point[0] <= centre],
                [point for point in points if point[0] >= centre],
            ):
                axes.plot(
                    [x for x, _ in side],
                    [y for _, y in side],
                    color=colour,
                    marker=style.arm_marker(arms, arm),
                    ms=5,
                )
            unit = "× seed noise" if in_noise else in_words(analysis.sweep.curve_metric)
            for x, y in points:
                style.tip_at(axes, x, y, f"{arm} at batch size {2**x:.0f}: {y:.3g} {unit}")
            ends.append((points[-1][1], style.label(arm), colour))
        axes.set_yscale("log")
        if ends and in_noise:
            axes.axhline(1, color=style.INK, lw=1, ls=(0, (4, 3)))
            axes.annotate(
                "seed noise alone",
                (math.log2(analysis.sweep.base_batch_size), 1),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        _plain_log_labels(axes)
        unit = "× seed noise" if in_noise else in_words(analysis.sweep.curve_metric)
        axes.set_ylabel(f"distance from the base's curve\n({unit}, log scale)")
        _size_axis(axes, analysis)
        _end_labels(axes, ends)
    return figure


def noise_scale_figure(
    rows: Sequence[Mapping[str, float]],
    batch_size: int,
    base_batch_size: int,
    errors: float,
    width: float = 7.4,
    height: float = 3.8,
) -> "Figure":
    """Noise scale over examples seen, its spread as a band, the batch size in use as a line.

    Args:
      rows: one a logging window, with `examples`, `noise_scale`, `low`, `high` and
        `window_noise_scale`, all in examples.
      batch_size: examples per update.
      base_batch_size: examples per update that the recipe was tuned at.
      errors: standard errors from `noise_scale` to `low` and `high`.
      width: in inches.
      height: in inches.

    Returns:
      The figure. Windows in which no signal was found are marked at the upper edge.
    """
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    examples, scale = columns["examples"], columns["noise_scale"]
    colour, batch_colour = style.ARM_COLOURS[0][0], style.ARM_COLOURS[1][0]
    with style.drawing():
        figure, axes = _figure(width, height)
        window = columns["window_noise_scale"]
        shown = np.isfinite(window) & (window > 0)
        known = np.isfinite(scale) & (scale > 0)
        lines = [batch_size, *(scale[known]), *(window[shown])]
        bottom, top = min(lines) / 2, 2 * max(*lines, base_batch_size)
        axes.plot(examples[shown], window[shown], ".", color=style.MUTED, ms=3)
        beyond = examples[~shown]
        axes.plot(beyond, np.full(len(beyond), top), "^", color=style.MUTED, ms=3, clip_on=False)
        # Where the signal may be zero the range has no upper end.
        low, high = (np.clip(columns[end], bottom, top) for end in ("low", "high"))
        axes.fill_between(examples, low, high, color=colour, alpha=0.18, lw=0)
        axes.plot(examples[known], scale[known], color=colour, lw=1.8)
        axes.axhline(batch_size, color=batch_colour, lw=1.4)
        labels = [(float(batch_size), f"batch size {batch_size}", batch_colour)]
        if base_batch_size != batch_size:
            axes.axhline(base_batch_size, color=style.INK, lw=1, ls=(0, (4, 3)))
            base = f"base {base_batch_size}"
            labels.append((float(base_batch_size), base, style.INK))
        if known.any():
            labels.append((float(scale[known][-1]), "noise scale", colour))
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
        axes.set_xlim(0, examples[-1])
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(6))
        axes.xaxis.set_major_formatter(_ticker().FuncFormatter(_examples_label))
        axes.yaxis.set_major_formatter(_ticker().FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_xlabel("examples seen")
        axes.set_ylabel("examples")
        axes.set_title(
            f"dots: single windows · line: running · band: ± {errors:g} standard errors",
            fontsize=8,
            fontweight="normal",
            color=style.MUTED,
        )
        _end_labels(axes, labels)
    return figure


def _figure(width: float, height: float) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _with_base(analysis: Analysis, arm: str) -> list[Group]:
    """An arm's judged groups, then the base, so that it is drawn above them."""
    return [*_judged(analysis, arm), *([analysis.base] if analysis.base is not None else [])]


def _some(length: int, most: int) -> list[int]:
    """At most so many places of a row, evenly spread, the last among them."""
    step = -(-length // most)
    return list(range(length - 1, -1, -step))[::-1]


def _curve_label(analysis: Analysis, axes: Any) -> str:
    scale = " (log scale)" if axes.get_yscale() == "log" else ""
    return in_words(analysis.sweep.curve_metric) + scale


def _judged(analysis: Analysis, arm: str) -> list[Group]:
    return [group for group in analysis.groups if group.arm == arm and group.offset == 1]


def _sizes(analysis: Analysis) -> list[int]:
    sizes = {group.batch_size for group in analysis.groups if group.offset == 1}
    return sorted({*sizes, analysis.sweep.base_batch_size})


def _line(analysis: Analysis, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """An arm's means by log2 batch size, through the base, without groups that have none."""
    groups = [group for group in _judged(analysis, arm) if group.values]
    if analysis.base is not None and analysis.base.values:
        groups.append(analysis.base)
    groups.sort(key=lambda group: group.batch_size)
    x = np.array([math.log2(group.batch_size) for group in groups])
    return x, np.array([group.interval.mean for group in groups])


def _limits(analysis: Analysis) -> tuple[float, float]:
    """Range of the vertical axis: all points, but no further from the base than the reach."""
    margin = analysis.sweep.margin
    groups = [group for group in analysis.groups if group.offset == 1 and group.values]
    base = analysis.base
    if base is None or not base.values:
        means = [group.interval.mean for group in groups]
        low, high = (min(means), max(means)) if means else (0.0, 1.0)
        room = 0.08 * (high - low) + margin
        return low - room, high + room
    centre, reach = base.interval.mean, _REACH_MARGINS * margin
    ends = [-2 * margin, 2 * margin]
    for group in groups:
        shift = group.interval.mean - centre
        half = 0.0
        if group.comparison is not None and math.isfinite(group.comparison.standard_error):
            half = min(group.comparison.high_90 - group.comparison.difference, 4 * margin)
        if abs(shift) <= reach:
            ends += [shift - half, shift + half]
        else:
            ends.append(math.copysign(reach, shift))
    room = 0.03 * (max(ends) - min(ends))
    return centre + min(ends) - room, centre + max(ends) + room


def _points(
    axes: Any,
    analysis: Analysis,
    arm: str,
    dodge: float,
    limits: tuple[float, float],
    colour: str,
    marker: str,
    with_seeds: bool,
) -> None:
    units = Units(analysis.sweep.accuracy_metric)
    low, high = limits
    for group in _judged(analysis, arm):
        x = math.log2(group.batch_size) + dodge
        if group.diverged:
            axes.plot([x], [low * units.factor], "x", color=colour, ms=7, mew=2, clip_on=False)
        if not group.values:
            continue
        mean = group.interval.mean
        shown = min(max(mean, low), high) * units.factor
        style.tip_at(axes, x, shown, _point_text(group, units))
        if not low <= mean <= high:
            edge = low if mean < low else high
            axes.annotate(
                f"{'↓' if mean < low else '↑'} {units.value(mean)}",
                (x, edge * units.factor),
                xytext=(4, 4 if mean < low else -10),
                textcoords="offset points",
                color=colour,
                fontsize=7.5,
            )
            continue
        if with_seeds:
            values = np.array(group.values) * units.factor
            axes.plot(np.full(len(values), x + 0.12), values, ".", color=style.MUTED, ms=3.5)
        error = None
        if group.comparison is not None and math.isfinite(group.comparison.standard_error):
            half = (group.comparison.high_90 - group.comparison.low_90) / 2
            error = [half * units.factor]
        axes.errorbar(
            [x],
            [mean * units.factor],
            yerr=error,
            fmt=marker,
            color=colour,
            ms=5,
            elinewidth=1.3,
            capsize=2.5,
        )


def _point_text(group: Group, units: Units) -> str:
    """A point of the figure in words: what it is, where it ends, how far from the base."""
    text = f"{group.arm} at batch size {group.batch_size} (k = {fraction(group.k)}): "
    text += units.value(group.interval.mean)
    comparison = group.comparison
    if comparison is not None:
        text += f", {units.signed(comparison.difference)} from the base"
        if math.isfinite(comparison.low):
            text += f" [{units.signed(comparison.low)}, {units.signed(comparison.high)}]"
    return text + (f", {group.verdict}" if group.verdict else "")


def _curves(axes: Any, analysis: Analysis, arm: str, tips: bool = True) -> None:
    centres = (analysis.edges[1:] + analysis.edges[:-1]) / 2
    colours = style.size_colours(_sizes(analysis), analysis.sweep.base_batch_size)
    lowest = []
    for group in _with_base(analysis, arm):
        if group.curve is None or not np.isfinite(group.curve).any():
            continue
        is_base = group is analysis.base
        axes.plot(
            centres,
            group.curve,
            color=colours[group.batch_size],
            lw=1.8 if is_base else 1.4,
            zorder=4 if is_base else 3,
        )
        lowest.append(np.nanmin(group.curve))
        if tips:
            for index in _some(len(centres), 6):
                if math.isfinite(group.curve[index]):
                    text = f"{group.curve[index]:.4f} after {centres[index]:,.0f} examples"
                    text = f"batch size {group.batch_size}: {text}"
                    style.tip_at(axes, centres[index], group.curve[index], text)
    if not lowest:
        axes.text(0.5, 0.5, "no curves", ha="center", transform=axes.transAxes, color=style.MUTED)
        return
    if min(lowest) > 0:
        axes.set_yscale("log")
        _plain_log_labels(axes)
    _age_axis(axes, analysis, label=tips)


_AGE = "examples that the weights have seen"


def _age_axis(axes: Any, analysis: Analysis, label: bool = True) -> None:
    axes.set_xlim(0, analysis.edges[-1])
    axes.xaxis.set_major_locator(_ticker().MaxNLocator(4))
    axes.xaxis.set_major_formatter(_ticker().FuncFormatter(_examples_label))
    if label:
        axes.set_xlabel(_AGE)


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker


def _examples_label(value: float, _: int) -> str:
    """A number of examples on an axis: 500, 20 k, 3 M."""
    if value >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value / 1e3:g} k" if value >= 1e3 else f"{value:g}"


def _plain_log_labels(axes: Any) -> None:
    """1, 2, 5 instead of powers of ten: these axes rarely span more than one or two."""
    axes.yaxis.set_major_locator(_ticker().LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter(_ticker().FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(_ticker().NullLocator())


def _size_axis(axes: Any, analysis: Analysis) -> None:
    sizes = _sizes(analysis)
    axes.set_xticks([math.log2(size) for size in sizes], [str(size) for size in sizes])
    axes.set_xlim(math.log2(sizes[0]) - 0.35, math.log2(sizes[-1]) + 0.35)
    axes.set_xlabel(f"batch size, log scale (recipe tuned at {analysis.sweep.base_batch_size})")


def _end_labels(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names at the right end of their lines, moved apart until none covers another."""
    ordered = sorted(ends)
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [float(to_axes.transform((0, y))[1]) for y, _, _ in ordered]
    gap = 9.5 / 72 / (axes.figure.get_figheight() * 0.8)
    for _ in range(200):
        for index in range(1, len(places)):
            overlap = gap - (places[index] - places[index - 1])
            if overlap > 0:
                places[index] += overlap / 2
                places[index - 1] -= overlap / 2
    for place, (_, text, colour) in zip(places, ordered, strict=True):
        axes.annotate(
            text, (1.005, place), xycoords="axes fraction", color=colour, va="center", fontsize=8.5
        )
