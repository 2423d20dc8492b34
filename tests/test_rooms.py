"""Which room may look into which: statistics know no words, reports no study, neither knows JAX."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "bs_jax"
MAY_IMPORT = {
    "statistics": {"records", "errors"},
    "report": {"statistics", "records", "errors"},
    "studies": {"report", "statistics", "records", "errors"},
}


def imported(path):
    """(module, name) of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_those_below_it_and_nothing_private(room):
    for path in (ROOT / room).rglob("*.py"):
        for module, name in imported(path):
            top, *inside = module.split(".")
            assert top not in ("jax", "optax", "flax"), f"{path} imports {module}"
            if top != "bs_jax":
                continue
            seen = inside[0] if inside else name
            assert seen in {*MAY_IMPORT[room], room}, f"{path} imports {module}"
            private = [part for part in (*inside, name) if part.startswith("_")]
            assert not private, f"{path} imports {module}.{name}"
