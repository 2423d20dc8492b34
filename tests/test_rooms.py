"""How modules depend on one another: no circles, nothing private shared, one door to stores."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "records": {"errors"},
    "statistics": {"records", "errors"},
    "report": {"statistics", "records", "errors"},
    "studies": {"report", "statistics", "records", "errors"},
}
# What the library measures while training is read back by the library's own formulas.
ALSO = {"bs_jax.statistics.noise_curve": {"scaling"}}
STORES = "bs_jax.records.stores"


@functools.cache
def modules():
    """Module name -> its syntax tree."""
    found = {}
    for path in sorted(ROOT.glob("bs_jax/**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(
            path.read_text(encoding="utf-8")
        )
    return found


def imports(tree):
    """(imported module, imported name or "", name in use here, whether on loading) of ours."""
    for node in ast.walk(tree):
        loading = getattr(node, "col_offset", 1) == 0
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bs_jax":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                target = (whole, "") if whole in modules() else (node.module, alias.name)
                yield *target, alias.asname or alias.name, loading
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "bs_jax":
                    yield alias.name, "", alias.asname or alias.name, loading


def all_imports(tree):
    """Names of the modules that a tree imports, ours or others'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def circles(graph):
    """Every circle of a graph that a walk meets first, as a path."""
    found, done = [], set()

    def walk(name, path):
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in graph.get(name, ()):
                walk(target, [*path, name])
            done.add(name)

    for name in graph:
        walk(name, [])
    return found


def test_a_circle_is_found():
    assert circles({"a": ["b"], "b": ["c"], "c": ["b"], "d": []}) == [["b", "c", "b"]]


def test_modules_import_one_another_in_no_circle():
    graph = {
        name: {target for target, *_, loading in imports(tree) if loading and target != name}
        for name, tree in modules().items()
    }
    assert sum(map(len, graph.values())) > 100
    assert circles(graph) == []


def test_what_begins_with_an_underscore_stays_in_its_module():
    wrong = []
    for name, tree in modules().items():
        local = {used: target for target, wanted, used, _ in imports(tree) if not wanted}
        for target, wanted, *_ in imports(tree):
            if wanted.startswith("_") and target != name:
                wrong.append(f"{name} imports {target}.{wanted}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                if private and node.value.id in local:
                    wrong.append(f"{name} uses {local[node.value.id]}.{node.attr}")
    assert wrong == []


def test_disks_and_object_stores_have_one_door():
    behind = {name for name in modules() if name.startswith(f"{STORES}.")}
    assert behind
    for name, tree in modules().items():
        if name != STORES and name not in behind:
            assert not behind & {target for target, *_ in imports(tree)}, name


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_those_below_it(room):
    """Statistics know no words, reports no study; none of these rooms knows JAX."""
    for name, tree in modules().items():
        if name.split(".")[1:2] != [room]:
            continue
        for target, wanted, *_ in imports(tree):
            seen = (target.split(".")[1:2] or [wanted])[0]
            assert seen in {*MAY_IMPORT[room], *ALSO.get(name, ()), room}, (
                f"{name} imports {target}"
            )
        foreign = {module.split(".")[0] for module in all_imports(tree)}
        assert not foreign & {"jax", "optax", "flax"}, name
