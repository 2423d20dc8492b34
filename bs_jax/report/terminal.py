"""The report's summary for a terminal, as a rich table."""

from typing import TYPE_CHECKING

from bs_jax.report import style
from bs_jax.report.numbers import Units
from bs_jax.statistics.analysis import Analysis
from bs_jax.statistics.contrasts import Verdict
from bs_jax.statistics.groups import Group

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_COLOURS = {Verdict.EQUIVALENT: "green", Verdict.DIFFERENT: "red", Verdict.UNDECIDED: "yellow"}


def verdict_table(analysis: Analysis) -> "Table":
    """A line a rule: the final metric at every batch size, marked, and the verdict.

    Args:
      analysis: of `analyse`.

    Returns:
      A rich table, to be printed by a rich console.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    sweep = analysis.sweep
    units = Units(sweep.accuracy_metric)
    sizes = {group.batch_size for group in analysis.groups if group.offset == 1}
    sizes = sorted({*sizes, sweep.base_batch_size})
    result = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,  # five batch sizes and the verdict fit 80 columns
        title=f"Final {units.name}{' (%)' if units.percent else ''} by batch size",
        caption=f"✓ within ±{units.spread(sweep.margin)} of the base (5 % test)   "
        "✗ beyond it   ? too few seeds",
    )
    result.add_column("rule", no_wrap=True)
    for size in sizes:
        title = f"{size} (base)" if size == sweep.base_batch_size else str(size)
        result.add_column(title, justify="right", no_wrap=True)
    few = len(sizes) <= 5  # with more there is room for the verdict's sign alone
    result.add_column("verdict" if few else "", no_wrap=True)
    cells = {
        (group.arm, group.batch_size): _cell(group, units)
        for group in analysis.groups
        if group.offset == 1
    }
    base = _cell(analysis.base, units) if analysis.base else Text("–")
    for arm in analysis.arms:
        sign = style.SIGNS[arm.verdict]
        result.add_row(
            Text(style.label(arm.arm)),
            *(
                base if size == sweep.base_batch_size else cells.get((arm.arm, size), Text("–"))
                for size in sizes
            ),
            Text(f"{sign} {arm.verdict}" if few else sign, style=_COLOURS[arm.verdict]),
        )
    return result


def _cell(group: Group, units: Units) -> "Text":
    from rich.text import Text

    if group.diverged:
        text = "diverged"
    elif group.values:
        digits = 2 if units.percent else 4
        text = f"{group.interval.mean * units.factor:.{digits}f}"
    else:
        return Text("–")
    if group.verdict is None:
        return Text(text)
    return Text(f"{text} {style.SIGNS[group.verdict]}", style=_COLOURS[group.verdict])
