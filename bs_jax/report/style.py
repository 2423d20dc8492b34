"""Colours shared by figures and page, fit for colour-blind readers, and figures as SVG or PNG."""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from bs_jax.statistics.contrasts import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Beside each verdict, so that colour is not all that tells it.
SIGNS = {Verdict.EQUIVALENT: "✓", Verdict.DIFFERENT: "✗", Verdict.UNDECIDED: "?"}

# Each colour by its role: on a light page, on a dark page. Figures are drawn in the light ones,
# which the page replaces by CSS variables, so that every colour has to stand for one role only.
INK, MUTED, GRID, BAND, PAPER = "#1c2024", "#687078", "#e4e7ea", "#e6edf3", "#fefefe"
ARM_COLOURS = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#ff9450"),
    ("#a87400", "#f0c04a"),
    ("#b04f8c", "#e79cc9"),
    ("#008a64", "#35cfa0"),
    ("#4a4fa8", "#a3a8ff"),
    ("#7a5c3e", "#cda882"),
    ("#5a6672", "#a8b4c0"),
)
SMALLER = (
    ("#8dbbe8", "#4d7fb0"),
    ("#5a96d6", "#5a9be0"),
    ("#2f6db4", "#86bdf5"),
    ("#1b4a84", "#b9dcff"),
)
LARGER = (
    ("#f2b169", "#9a6428"),
    ("#e6843a", "#dc8136"),
    ("#c8561a", "#ff9d55"),
    ("#93390a", "#ffc79a"),
)
ROLES = {
    "ink": (INK, "#e8eaed"),
    "muted": (MUTED, "#9aa3ad"),
    "grid": (GRID, "#2d333a"),
    "band": (BAND, "#233240"),
    "paper": (PAPER, "#16191d"),
    **{f"arm{index}": pair for index, pair in enumerate(ARM_COLOURS)},
    **{f"smaller{index}": pair for index, pair in enumerate(SMALLER)},
    **{f"larger{index}": pair for index, pair in enumerate(LARGER)},
}
MARKERS = "osD^vPX*"

_RC: Any = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "axes.unicode_minus": True,
    # Names of arms are text, whatever dollar signs they hold.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "bs_jax",
}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """The style of every figure; a glyph that the font lacks is no reason to warn."""
    import matplotlib

    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


def arm_colour(arms: Sequence[str], arm: str) -> str:
    """The colour of an arm by its place among all arms."""
    return ARM_COLOURS[arms.index(arm) % len(ARM_COLOURS)][0]


def arm_marker(arms: Sequence[str], arm: str) -> str:
    """The marker of an arm; beyond eight arms colours repeat and markers tell them apart."""
    index = arms.index(arm)
    return MARKERS[(index + index // len(ARM_COLOURS)) % len(MARKERS)]


def size_colours(sizes: Sequence[int], base: int) -> dict[int, str]:
    """A colour a batch size: ink for the base, blues below, oranges above, stronger further off.

    >>> size_colours([32, 64, 128], 64)
    {64: '#1c2024', 32: '#1b4a84', 128: '#93390a'}
    """
    colours = {base: INK}
    below = sorted((size for size in set(sizes) if size < base), reverse=True)
    above = sorted(size for size in set(sizes) if size > base)
    for side, shades in ((below, SMALLER), (above, LARGER)):
        for index, size in enumerate(side):
            shade = int((index + 1) / len(side) * (len(shades) - 1))
            colours[size] = shades[shade][0]
    return colours


def label(text: str, limit: int = 24) -> str:
    """A name as a label: one line, printable, no longer than the figure bears.

    >>> label("a" + chr(10) + "b"), label("x" * 30, 8)
    ('a b', 'xxxxxxx…')
    """
    plain = "".join(char if char.isprintable() else " " for char in text)
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"


_TIP = "tip: "


def tip(artist: Any, text: str) -> None:
    """What a browser shows when the pointer rests on an artist: a `<title>` in its SVG group."""
    artist.set_gid(_TIP + label(text, 120))


def tip_at(axes: Any, x: float, y: float, text: str) -> None:
    """A tooltip about a point, wider than its marker, that itself is not seen."""
    (spot,) = axes.plot([x], [y], "o", ms=15, mew=0, alpha=0, color=INK, clip_on=False, zorder=9)
    spot.set_in_layout(False)
    tip(spot, text)


def to_png(figure: "Figure") -> bytes:
    """A figure as PNG, sharp on a dense screen."""
    buffer = io.BytesIO()
    with drawing():
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: "Figure", description: str, prefix: str) -> str:
    """A figure as an inline SVG element that takes its colours from the page.

    Args:
      figure: what to draw.
      description: for readers who do not see it.
      prefix: makes the element's ids its own on a page with several figures.

    Returns:
      `<svg ...>...</svg>`, text kept as text.
    """
    buffer = io.StringIO()
    with drawing():
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(rf'<g id="{_TIP}([^"]*)">', r"<g><title>\1</title>", text)
    text = text.replace(' id="', f' id="{prefix}').replace("url(#", f"url(#{prefix}")
    text = text.replace('xlink:href="#', f'href="#{prefix}')
    for role, (light, _) in ROLES.items():
        text = text.replace(light, f"var(--{role})")
    text = re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", text)
    width = f"max-width:{figure.get_figwidth() * 110:.0f}px"
    opening = f'<svg role="img" aria-label="{escape(description)}" style="{width}" '
    return text.replace("<svg ", opening, 1)
