"""The page around a report: escaped HTML elements, the style sheet, the skeleton."""

import re
from collections.abc import Iterable, Sequence
from html import escape

from bs_jax.report.style import ROLES


class Html(str):
    """Text that is HTML already; any other string is escaped before it enters the page."""

    __slots__ = ()


def html(*parts: str) -> Html:
    """Joins parts, escaping those that are plain text.

    >>> html("a < b", Html("<br>"))
    'a &lt; b<br>'
    """
    return Html("".join(part if isinstance(part, Html) else _escaped(part) for part in parts))


def _escaped(text: str) -> str:
    return escape("".join(char if char.isprintable() or char == "\n" else " " for char in text))


def tag(name: str, *parts: str, **attributes: str) -> Html:
    """One element; `class_` is written `class`, `aria_label` is `aria-label`.

    >>> tag("p", "1 < 2", class_="note")
    '<p class="note">1 &lt; 2</p>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{written}>{html(*parts)}</{name}>")


class Section:
    """A section of the page.

    Args:
      title: its heading.
      parts: what it holds; plain text is escaped.

    Attributes:
      anchor: by which a link finds it.

    >>> Section("The numbers", "1 < 2").html()
    '<section id="the-numbers"><h2>The numbers</h2>1 &lt; 2</section>'
    """

    def __init__(self, title: str, *parts: str) -> None:
        self.title = title
        self.anchor = re.sub(r"\W+", "-", title.lower()).strip("-")
        self._content = html(*parts)

    def html(self) -> Html:
        """The element."""
        return tag("section", tag("h2", self.title), self._content, id=self.anchor)


def bullets(items: Iterable[str]) -> Html:
    """A list."""
    return tag("ul", *(tag("li", item) for item in items))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table that scrolls sideways on a narrow screen; all but its first column align right."""
    kind = ["number" if index else "" for index in range(len(header))]
    head = tag("tr", *(tag("th", cell, class_=k) for cell, k in zip(header, kind, strict=True)))
    body = [
        tag("tr", *(tag("td", cell, class_=k) for cell, k in zip(row, kind, strict=True)))
        for row in rows
    ]
    content = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", content, class_="scroll", tabindex="0")


def page(title: str, opening: str, sections: Sequence[Section]) -> str:
    """The whole document: no script, no network, colours by the reader's light or dark setting."""
    contents = tag(
        "nav",
        *(tag("a", section.title, href=f"#{section.anchor}") for section in sections),
        class_="contents",
        aria_label="contents",
    )
    light = "".join(f"--{role}:{pair[0]};" for role, pair in ROLES.items())
    dark = "".join(f"--{role}:{pair[1]};" for role, pair in ROLES.items())
    colours = f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # The page needs nothing from anywhere, so nothing in it may ask for anything.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src 'self' data:\">"
        f"{tag('title', title)}<style>{colours}{_CSS}</style></head>\n"
        f"<body><main>{html(opening, contents)}{''.join(s.html() for s in sections)}</main>"
        "</body></html>\n"
    )


_CSS = """
:root{--good:#0b7a55;--good-soft:#e2f4ec;--bad:#b3371b;--bad-soft:#fbe9e4;--open:#80600b;
--open-soft:#faf1d9;--soft:#f3f5f7}
@media(prefers-color-scheme:dark){:root{--good:#4fd6a5;--good-soft:#12352a;--bad:#ff9175;
--bad-soft:#41201a;--open:#f0c95a;--open-soft:#3a2f10;--soft:#1f242a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1000px;margin:0 auto;padding:2.2rem 1.2rem 4rem}
h1{font-size:clamp(1.5rem,4.5vw,2.1rem);line-height:1.2;margin:.2rem 0 .5rem;text-wrap:balance;
overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.8rem 0 .6rem;line-height:1.3}
h3{font-size:1.05rem;margin:0;overflow-wrap:anywhere}
p{margin:.5rem 0;max-width:46rem}
ul{padding-left:1.2rem;max-width:46rem}
li{margin:.25rem 0;overflow-wrap:anywhere}
a{color:inherit}
.note,figcaption{color:var(--muted);font-size:.875rem}
.lead{font-size:1.15rem;line-height:1.5}
.note,figcaption{max-width:46rem}
.facts{display:flex;flex-wrap:wrap;gap:.6rem 2rem;margin:1.3rem 0 0;padding:0}
.facts div{min-width:6.5rem}
.facts dt{color:var(--muted);font-size:.8rem}
.facts dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums}
.verdicts{list-style:none;padding:0;margin:1.2rem 0 0;max-width:none;
border-top:1px solid var(--grid)}
.verdicts li{display:grid;grid-template-columns:9rem 9.5rem 1fr;gap:.2rem 1rem;margin:0;
padding:.65rem 0;border-bottom:1px solid var(--grid);align-items:baseline}
.verdicts b{overflow-wrap:anywhere}
.badge{display:inline-block;padding:.1rem .6rem;border-radius:1rem;font-size:.82rem;
font-weight:600;white-space:nowrap;justify-self:start}
.good{color:var(--good);background:var(--good-soft)}
.bad{color:var(--bad);background:var(--bad-soft)}
.open{color:var(--open);background:var(--open-soft)}
.warning{background:var(--open-soft);border-left:4px solid var(--open);border-radius:4px;
padding:.7rem 1rem;margin:1.4rem 0 0}
.warning ul{margin:.3rem 0 0}
figure{margin:.8rem 0 0}
svg{display:block;width:100%;height:auto}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif!important}
.narrow{display:none}
figcaption{margin-top:.5rem}
.arm{border-top:1px solid var(--grid);padding:1.1rem 0 .6rem}
.arm header{display:flex;flex-wrap:wrap;gap:.3rem .8rem;align-items:center;margin-bottom:.5rem}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1.2rem}
.pair>*{min-width:0}
.contents{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;margin:1.4rem 0 0;font-size:.875rem}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;padding:0;margin:.6rem 0 1rem;list-style:none;
font-size:.875rem;color:var(--muted)}
.key i{display:inline-block;width:1.3rem;height:.22rem;border-radius:2px;margin-right:.4rem;
vertical-align:middle}
.scroll{overflow-x:auto;margin:.8rem 0;border:1px solid var(--grid);border-radius:6px}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;width:100%}
code{font:.95em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
th,td{padding:.38rem .7rem;text-align:left;white-space:nowrap;border-bottom:1px solid var(--grid)}
tbody tr:last-child td{border-bottom:0}
th{color:var(--muted);font-weight:600;background:var(--soft);white-space:normal;
vertical-align:bottom}
.number{text-align:right}
th:first-child,td:first-child{position:sticky;left:0;background:var(--paper);max-width:11rem;
overflow:hidden;text-overflow:ellipsis}
th:first-child{background:var(--soft)}
td small{color:var(--muted)}
pre{background:var(--soft);border-radius:6px;padding:.8rem 1rem;overflow-x:auto;margin:.6rem 0;
font:.86rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details{margin:.8rem 0}
summary{cursor:pointer}
@media(max-width:640px){
main{padding:1.4rem 1rem 3rem}
.verdicts li{grid-template-columns:1fr auto}
.verdicts p{grid-column:1/-1}
.wide{display:none}.narrow{display:block}
.pair{grid-template-columns:1fr}
h2{margin-top:2.2rem}
}
.verdicts p{margin:0}
@media print{.scroll{overflow:visible}main{max-width:none}}
"""
