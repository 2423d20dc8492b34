"""Figures: what is drawn where, and that hostile names and empty sweeps draw too."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from helpers.synthetic_records import diverge, edit_json, write_records

pytest.importorskip("matplotlib")

from bs_jax.records.results import Curve, load_results
from bs_jax.report import plots, style
from bs_jax.statistics.analysis import analyse


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    workdir = write_records(tmp_path_factory.mktemp("records"), seeds=2, rows=12)
    for seed in range(2):
        diverge(workdir / f"runs/b256-s{seed}-linear-1.0")
    return analyse(load_results(workdir))


def texts(figure):
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]


def lines_seen(axes):
    """The lines of a figure without the spots that only carry a tooltip."""
    return [line for line in axes.lines if line.get_alpha() != 0]


def test_bars_are_the_ninety_percent_interval_of_the_difference_at_the_mean(found):
    axes = plots.metric_figure(found, arm="invariant").axes[0]
    groups = [group for group in found.groups if group.arm == "invariant"]
    bars = [collection.get_segments()[0] for collection in axes.collections[-len(groups) :]]
    for bar, group in zip(bars, groups, strict=True):
        (x, low), (_, high) = bar
        assert x == math.log2(group.batch_size)
        assert low == pytest.approx(100 * (found.base.interval.mean + group.comparison.low_90))
        assert high == pytest.approx(100 * (found.base.interval.mean + group.comparison.high_90))


def test_the_band_is_base_and_margin_and_all_points_are_in_view(found):
    axes = plots.metric_figure(found).axes[0]
    low, high = axes.get_ylim()
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    mean = 100 * found.base.interval.mean
    assert (band.y0, band.y1) == pytest.approx((mean - 1, mean + 1))
    means = [100 * group.interval.mean for group in found.groups if group.values]
    assert low < min(means) < max(means) < high


def test_a_point_far_off_is_an_arrow_with_its_value_and_does_not_squeeze_the_band(tmp_path):
    effects = {"none": lambda k: -0.7 if k > 1 else 0.0}
    workdir = write_records(tmp_path, ("none",), (32, 64, 128), effects=effects, rows=4)
    figure = plots.metric_figure(analyse(load_results(workdir)))
    low, high = figure.axes[0].get_ylim()
    assert high - low < 30
    assert any(re.fullmatch(r"↓ 1\d\.\d\d %", text) for text in texts(figure))


def test_every_arm_is_named_beside_its_line_without_overlap(found):
    axes = plots.metric_figure(found).axes[0]
    axes.figure.canvas.draw()
    named = {text.get_text(): text for text in axes.texts}
    assert {"none", "linear", "sqrt", "noise_aware", "invariant"} <= set(named)
    boxes = [named[arm.arm].get_window_extent() for arm in found.arms]
    middles = np.sort([(box.y0 + box.y1) / 2 for box in boxes])
    assert np.diff(middles).min() > 8 / 72 * axes.figure.dpi  # points: the height of the letters


def test_curves_put_the_base_in_ink_and_leave_diverged_sizes_out(found):
    axes = plots.curve_figure(found, "linear").axes[0]
    assert [line.get_color() for line in lines_seen(axes)].count(style.INK) == 1
    assert len(lines_seen(axes)) == 4
    assert len(lines_seen(plots.curve_figure(found, "sqrt").axes[0])) == 5
    visible = [axes for axes in plots.curves_figure(found).axes if axes.get_visible()]
    assert len(visible) == 5


def test_deviation_marks_seed_noise_and_draws_no_line_through_the_base(found):
    axes = plots.deviation_figure(found).axes[0]
    assert axes.get_yscale() == "log"
    lines = [line for line in lines_seen(axes) if line.get_marker() != "None"]
    assert all(max(line.get_xdata()) < 6 or min(line.get_xdata()) > 6 for line in lines)


def test_a_tooltip_at_every_point_says_what_it_is_in_numbers(found):
    svg = style.to_svg(plots.metric_figure(found, arm="invariant"), "x", "p-")
    titles = re.findall(r"<g><title>([^<]*)</title>", svg)
    assert len(titles) == 5
    (group,) = [g for g in found.groups if (g.arm, g.batch_size) == ("invariant", 256)]
    text = f"invariant at batch size 256 (k = 4): {100 * group.interval.mean:.2f} %"
    assert any(title.startswith(text) and title.endswith(group.verdict) for title in titles)
    # Only the pointer finds a spot.
    assert len(re.findall(r"opacity: 0(?![.\d])", svg)) == 5
    for figure in (plots.curve_figure(found, "none"), plots.gap_figure(found, "none")):
        titles = re.findall(r"<title>([^<]*)</title>", style.to_svg(figure, "x", "p-"))
        assert len(titles) >= 16
        assert all(re.match(r"batch size \d+", title) for title in titles)


def test_axes_say_in_words_what_they_show_and_by_which_scale(found):
    metric, curve = plots.metric_figure(found).axes[0], plots.curve_figure(found, "none").axes[0]
    assert metric.get_xlabel() == "batch size, log scale (recipe tuned at 64)"
    assert metric.get_ylabel() == "final accuracy (%)"
    assert curve.get_ylabel() == "training loss (log scale)"
    assert curve.get_xlabel() == "examples that the weights have seen"
    gap = plots.gap_figure(found, "none").axes[0]
    assert gap.get_ylabel() == "training loss minus the base's"
    assert "log scale" in plots.deviation_figure(found).axes[0].get_ylabel()


def test_the_gap_is_drawn_as_it_was_found(found):
    axes = plots.gap_figure(found, "sqrt").axes[0]
    groups = [group for group in found.groups if group.arm == "sqrt"]
    lines = [line for line in lines_seen(axes) if len(line.get_xdata()) > 2]
    for line, group in zip(lines, groups, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), group.deviation.gap)


def test_evaluations_are_drawn_where_there_is_more_than_one(found):
    assert plots.evaluation_figure(found, "none") is None
    seen = np.array([100, 200])
    groups = tuple(
        dataclasses.replace(group, evaluations=Curve(seen, np.array([0.5, 0.25])))
        for group in found.groups
    )
    figure = plots.evaluation_figure(dataclasses.replace(found, groups=groups), "none")
    line = lines_seen(figure.axes[0])[0]
    np.testing.assert_array_equal(line.get_xdata(), seen)
    np.testing.assert_array_equal(line.get_ydata(), [50, 25])


def test_hostile_names_are_drawn_as_text(tmp_path):
    names = ("$x_{1$", "a\nb", "<script>", "\x00\x07", "漢字" * 40, "}{%s")
    workdir = write_records(tmp_path, ("x",), (32, 64), effects={"x": lambda k: 0.0}, rows=3)
    points = json.loads((workdir / "sweep.json").read_text())["points"]
    points = [point | {"arm": name} for name in names for point in points]
    edit_json(workdir / "sweep.json", points=points)
    found = analyse(load_results(workdir))
    for figure in (plots.metric_figure(found), plots.curves_figure(found)):
        svg = style.to_svg(figure, "a & b", "p-")
        assert "<script>" not in svg
        assert "$x_{1$" in svg


def test_svg_takes_its_colours_from_the_page_and_ids_from_the_prefix(found):
    svg = style.to_svg(plots.metric_figure(found), 'say "so" & <that>', "p-")
    assert svg.startswith("<svg ")
    assert "var(--arm0)" in svg
    assert style.ARM_COLOURS[0][0] not in svg
    assert 'aria-label="say &quot;so&quot; &amp; &lt;that&gt;"' in svg
    assert all(name.startswith("p-") for name in re.findall(r'\bid="([^"]*)"', svg))
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    assert used <= set(re.findall(r'\bid="([^"]*)"', svg))
    assert style.to_svg(plots.metric_figure(found), 'say "so" & <that>', "p-") == svg


def test_colours_stand_for_one_role_each():
    lights = [light for light, _ in style.ROLES.values()]
    assert len(set(lights)) == len(lights)


def test_nothing_finished_still_draws(tmp_path):
    workdir = write_records(tmp_path, ("none",), (32, 64), seeds=1, rows=2)
    for folder in (workdir / "runs").iterdir():
        (folder / "DONE").unlink()
    found = analyse(load_results(workdir))
    for figure in (
        plots.metric_figure(found),
        plots.metric_figure(found, arm="none"),
        plots.curves_figure(found),
        plots.deviation_figure(found),
    ):
        assert style.to_png(figure).startswith(b"\x89PNG")
