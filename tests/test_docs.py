"""The pages keep their word: names, code, flags, links, and the lists that code has too."""

import builtins
import dis
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import bs_jax
from bs_jax import scaling
from bs_jax.scaling import FAMILIES, RULES, __main__, optimizers
from bs_jax.scaling.hyperparameters import ROLES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def text_of(name):
    return (ROOT / name).read_text()


def blocks(text, *languages):
    return [
        code
        for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
        if language in languages
    ]


def prose(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def shell_commands(text):
    """Commands in shell blocks, and those given as inline code."""
    inline = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose(text))]
    lines = re.sub(r"\\\n\s*", " ", "\n".join(blocks(text, "sh"))).splitlines()
    return [re.split(r"\s+#\s", line)[0] for line in [*lines, *inline]]


def commands(program, text):
    """Arguments of every call of a program."""
    called = re.compile(rf"(?:^|[\s`]){re.escape(program)}(?=\s|$)([^|;&]*)")
    return [
        shlex.split(found[1])
        for command in shell_commands(text)
        if (found := called.search(command))
    ]


# --- names

IN_A_FRESH_PROCESS = """
import importlib, json, sys
failed = {}
for name in json.loads(sys.stdin.read()):
    for module in [m for m in sys.modules if m.split(".")[0] == "bs_jax"]:
        del sys.modules[module]
    import bs_jax
    try:
        eval(name)
    except Exception as error:
        failed[name] = repr(error)
print(json.dumps(failed))
"""


def test_every_name_works_as_the_first_use_of_a_fresh_process():
    text = re.sub(r"^:::.*$", "", "\n".join(map(text_of, NAMES)), flags=re.M)
    found = set(re.findall(r"(?<![\w./-])bs_jax(?:\.[A-Za-z_]\w*)+(?![\w/-])", text))
    assert len(found) > 20
    # What one import brings together is there at any use of it.
    exported = {f"bs_jax.scaling.{name}" for name in scaling.__all__}
    exported |= {f"bs_jax.{name}" for name in bs_jax.__all__ if hasattr(scaling, name)}
    exported.remove(f"bs_jax.{bs_jax.__all__[-1]}")
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS],
        input=json.dumps(sorted(found - exported)), capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def test_the_reference_has_every_public_name():
    told = re.findall(
        r"^::: bs_jax\.scaling\.(?:explain\.)?(\w+)$", text_of("docs/reference.md"), re.M
    )
    assert sorted({*told} - {"schedules"}) == sorted(scaling.__all__)
    assert len(told) == len(set(told))


def test_names_of_files_exist():
    missing = set()
    for name in NAMES:
        for path in re.findall(
            r"`((?:bs_jax|configs|tests|benchmarks|examples|docs)/[\w./-]+)", text_of(name)
        ):
            if not (ROOT / path).exists():
                missing.add(f"{name}: {path}")
    assert not missing


# --- code


def global_names(code):
    """Names that a code object and the functions in it look up outside themselves."""
    own = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = [c for c in code.co_consts if hasattr(c, "co_code")]
    own -= {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_NAME"}
    return own.union(*map(global_names, inner))


def test_a_name_that_nothing_defines_is_found():
    code = compile("def f(x):\n    return x + missing", "page", "exec")
    assert global_names(code) == {"missing"}


@pytest.mark.parametrize("name", [n for n in NAMES if blocks(text_of(n), "python")])
def test_python_blocks_run_in_order(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for number, block in enumerate(blocks(text_of(name), "python")):
        code = compile(block, f"{name}, block {number + 1}", "exec")
        exec(code, namespace)
        # In functions that nothing calls, too.
        assert not global_names(code) - namespace.keys() - vars(builtins).keys()


def test_shell_commands_of_the_library_run(capsys):
    asked = [argv for name in NAMES for argv in commands("python -m bs_jax.scaling", text_of(name))]
    asked = [argv for argv in asked if argv]
    assert len(asked) >= 3
    for argv in asked:
        assert __main__.main(argv) == 0, capsys.readouterr().err


def test_modules_that_are_run_exist():
    for name in NAMES:
        for command in shell_commands(text_of(name)):
            for module in re.findall(r"python -m ((?:benchmarks|tests)\.[a-z_]+)", command):
                path = ROOT / module.replace(".", "/")
                assert path.is_dir() or path.with_suffix(".py").is_file(), module
            for path in re.findall(r"python ((?:benchmarks|examples)/\w+\.py)", command):
                assert (ROOT / path).is_file(), path


FLAGS_AND_FIELDS = """
import importlib.util, json, sys
from absl import flags
from bs_jax.cli import dispatch
dispatch.define_flags()
known = {n: getattr(flags.FLAGS[n].parser, "enum_values", None) for n in flags.FLAGS}
recipes = {}
for name in ("fashion_mnist", "imagenette"):
    spec = importlib.util.spec_from_file_location(name, f"configs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    def fields(config, path=""):
        for key, value in config.items():
            yield path + key
            if hasattr(value, "items"):
                yield from fields(value, f"{path}{key}.")
    recipes[name] = {
        "fields": list(fields(module.get_config())),
        "sweeps": [n.removeprefix("sweep_") for n in vars(module) if n.startswith("sweep_")],
    }
print(json.dumps([known, recipes]))
"""


@pytest.fixture(scope="module")
def command_line():
    done = subprocess.run(
        [sys.executable, "-c", FLAGS_AND_FIELDS], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def mistakes(argv, command_line):
    """What of a call of main.py does not exist: flags, their choices, fields, sweeps."""
    flags, recipes = command_line
    given = {}
    for word in argv:
        name, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            given[name.removeprefix("no")] = given[name] = value
    named = [recipe for name, recipe in recipes.items() if name in given.get("config", "")]
    fields, sweeps = (
        {item for recipe in named or recipes.values() for item in recipe[kind]}
        for kind in ("fields", "sweeps")
    )
    for name in (word.removeprefix("--").split("=")[0] for word in argv if word.startswith("--")):
        if name in ("help", "helpshort", "config_help", "version"):
            continue
        if name.startswith("config."):
            if name.removeprefix("config.") not in fields:
                yield f"no field {name}"
        elif name not in flags and name.removeprefix("no") not in flags:
            yield f"no flag --{name}"
        elif flags.get(name) and given[name].isidentifier() and given[name] not in flags[name]:
            yield f"--{name} takes {flags[name]}"
        elif name == "sweep" and given[name].islower() and given[name] not in sweeps:
            yield f"no sweep {given[name]}"


# Pages whose inline flags are other programs', which stand beside them.
OTHER_FLAGS = {
    "docs/performance.md",
    "docs/results/README.md",
    *(n for n in NAMES if "notes/" in n),
}


@pytest.mark.parametrize("name", NAMES)
def test_flags_and_fields_exist(name, command_line):
    text = text_of(name)
    called = [*commands("python main.py", text), *commands("bs-jax", text)]
    if name not in OTHER_FLAGS:
        called += [shlex.split(code) for code in re.findall(r"`(--[^`\n]+)`", prose(text))]
    found = [(argv, wrong) for argv in called for wrong in mistakes(argv, command_line)]
    assert not found


def test_a_wrong_flag_is_found(command_line):
    assert list(mistakes(["--mode=trian"], command_line))
    assert list(mistakes(["--sweap=rules"], command_line))
    assert list(mistakes(["--config.batchsize=2"], command_line))
    assert list(mistakes(["--sweep=rule"], command_line))
    assert not list(mistakes(["--mode=train", "--config.batch_size=2"], command_line))


# --- links


def anchors(text):
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_exist(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text_of(name))):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found.read_text()), target


def test_every_page_stands_in_the_index():
    index, site = text_of("docs/README.md"), text_of("mkdocs.yml")
    for page in (ROOT / "docs").rglob("*.md"):
        name = str(page.relative_to(ROOT / "docs"))
        assert name == "README.md" or f"]({name})" in index, name
        assert f"- {name}\n" in site, name


# --- lists that the code has too


def test_the_page_of_optimizers_has_every_one_and_every_role():
    text = text_of("docs/optimizers.md")
    first_cells = re.findall(r"^\| ([^|]*)\|", text, re.M)
    assert set(optimizers.registered()) <= set(re.findall(r"\w+", " ".join(first_cells)))
    section = text[text.index("### Roles") :]
    told = re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`[^|]*)\|", section, re.M)))
    assert sorted(told) == sorted(ROLES)


def test_the_table_of_rules_is_the_codes():
    text = text_of("docs/choosing-a-rule.md")
    rows = re.findall(r"^\| `(\w+)(?:\(a\))?` \|(.*)\|$", text, re.M)
    rows = {
        name: [c.strip() for c in cells.split("|")]
        for name, cells in rows
        if name in {*RULES, "power"}
    }
    assert set(rows) == {*RULES, "power"}
    for name, rule in RULES.items():
        assert rows[name][4] == ("yes" if rule.measures else "no")
    assert len(text.split()) < 1000


def test_labels_of_families_are_the_pages():
    text = text_of("docs/optimizers.md")
    for name, label in (("amsgrad", "amsgrad"), ("adamax", "adamax"), ("lamb", "normalized_adam")):
        row = re.search(rf"^\| {name} \|.*\| (\w+) \|$", text, re.M)
        assert row[1] == FAMILIES[label].label


def test_prose_is_plain():
    """Sentences of the pages for users average at most twenty words."""
    for name in (
        "README.md",
        "docs/choosing-a-rule.md",
        "docs/training-loop.md",
        "docs/limit.md",
        "docs/trainer.md",
        "docs/coming-from.md",
        "docs/optimizers.md",
        "docs/performance.md",
    ):
        text = re.sub(r"^(\||#|    |- \[|!\[).*$", "", prose(text_of(name)), flags=re.M)
        sentences = [s.split() for s in re.split(r"[.:?!]\s+|\n\n", text)]
        lengths = [len(words) for words in sentences if len(words) > 2]
        assert sum(lengths) / len(lengths) < 16, name
