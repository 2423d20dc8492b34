"""Figures: what is drawn where, and that hostile names and empty sweeps draw too."""

import json
import math
import re

import numpy as np
import pytest
from helpers.synthetic_records import diverge, edit_json, write_records

pytest.importorskip("matplotlib")

from bs_jax.records.results import load_results
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
    assert [line.get_color() for line in axes.lines].count(style.INK) == 1
    assert len(axes.lines) == 4
    assert len(plots.curve_figure(found, "sqrt").axes[0].lines) == 5
    visible = [axes for axes in plots.curves_figure(found).axes if axes.get_visible()]
    assert len(visible) == 5


def test_deviation_marks_seed_noise_and_draws_no_line_through_the_base(found):
    axes = plots.deviation_figure(found).axes[0]
    assert axes.get_yscale() == "log"
    lines = [line for line in axes.lines if len(line.get_xdata()) and line.get_marker() != "None"]
    assert all(max(line.get_xdata()) < 6 or min(line.get_xdata()) > 6 for line in lines)


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
