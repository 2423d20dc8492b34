"""The fields of a recipe: names, values and comments, and the nearest to a wrong name."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import io
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_ROOT = "config"  # the variable of get_config that the fields are set on


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a recipe.

    Attributes:
        name: dotted, e.g. ``"optimizer.name"``.
        value: as the recipe has it.
        comment: what the file says beside or above it; empty where it says nothing.
    """

    name: str
    value: Any
    comment: str


def fields_of(config: Mapping[str, Any], source: str) -> list[Field]:
    r"""Every field that holds a value, in the order of the file.

    Args:
        config: the recipe, nested.
        source: the text of its file.

    >>> text = "config.size = 64  # examples\nconfig.data.name = 'mine'"
    >>> [(f.name, f.value, f.comment) for f in fields_of({"data": {"name": "x"}, "size": 8}, text)]
    [('size', 8, 'examples'), ('data.name', 'x', '')]
    """
    said = comments(source)
    order = {name: at for at, name in enumerate(said)}
    leaves = sorted(_leaves(config), key=lambda leaf: order.get(leaf[0], len(order)))
    return [Field(name, value, said.get(name, "")) for name, value in leaves]


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def comments(source: str) -> dict[str, str]:
    """What the text of a recipe says of each field that it sets, in its order.

    A comment belongs to the assignment that it stands behind, or that it stands right above.

    Args:
        source: Python, with assignments like ``config.batch_size = 64  # examples per update``.
    """
    behind, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            where = behind if token.line[: token.start[1]].strip() else alone
            where[token.start[0]] = token.string.lstrip("# ").strip()
    found: dict[str, str] = {}
    assignments = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign)]
    for node in sorted(assignments, key=lambda node: node.lineno):
        name = _dotted(node.targets[0])
        if name is None:
            continue
        line, above = node.lineno - 1, []
        while line in alone:
            above.insert(0, alone[line])
            line -= 1
        parts = (" ".join(above), behind.get(node.end_lineno or node.lineno, ""))
        found[name] = " ".join(part for part in parts if part)
    return found


def _dotted(target: ast.expr) -> str | None:
    """The name of the field that an assignment sets; None where it sets something else."""
    names: list[str] = []
    while isinstance(target, ast.Attribute):
        names.insert(0, target.attr)
        target = target.value
    return ".".join(names) if names and getattr(target, "id", None) == _ROOT else None


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known dotted names most like a wrong one: the same last part first, then by spelling.

    >>> nearest("rule", ["seed", "scaling.rule"]), nearest("bach_size", ["seed", "batch_size"])
    (['scaling.rule'], ['batch_size'])
    """
    known = list(known)
    last = {full: full.rsplit(".", 1)[-1] for full in known}
    same = [full for full in known if name in (full, last[full])]
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.7)
    parts = difflib.get_close_matches(name.rsplit(".", 1)[-1], set(last.values()), n=count)
    close += [full for part in parts for full in known if last[full] == part]
    return list(dict.fromkeys(same or close))[:count]
