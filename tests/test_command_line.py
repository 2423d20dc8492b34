"""Help, version, wrong flags and fields: what a newcomer types, answered in a line or a page."""

import fcntl
import os
import re
import select
import struct
import sys
import tempfile
import termios
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import commands
from helpers.synthetic_records import write_run

from bs_jax.cli import config, dispatch, fields, help, recipes
from bs_jax.cli import main as cli_main
from bs_jax.errors import UserError
from bs_jax.training import compilation

ROOT = Path(__file__).resolve().parents[1]


def said(*words, code=0, cwd=ROOT):
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder, "errors")
        process = commands.start(*words, recipe=(), cwd=cwd, errors=errors)
        found, out = commands.finish(process)
        told = errors.read_text()
    assert found == code, told
    return out if code == 0 else told


def test_help_lists_every_flag_and_every_field_of_the_recipe_with_its_comment():
    text = said("--help", "--config=imagenette:quick")
    for mode in ("sweep", "train", "report", "explain", "noise_scale"):
        assert f"\n  {mode} " in text
    assert "--workers=..." in text
    assert "\nFlags of --mode=train\n" in text
    source = (recipes.folder() / "imagenette.py").read_text()
    for name, comment in fields.comments(source).items():
        if name in ("name", "title"):
            continue
        assert f"--config.{name}" in text or name in ("scaling", "optimizer")  # sections
        assert not comment or comment.split()[0] in text
    assert "--config.optimizer.name=ranger" in text  # the value in force, of the form given


def test_the_short_help_has_no_fields_and_the_other_has_nothing_else():
    short, long = said("--helpshort"), said("--config_help", "--config.batch_size=128")
    assert "--config.batch_size=64" not in short
    assert "--config_help" in short
    assert "--config.batch_size=128" in long
    assert "--workdir" not in long
    assert max(map(len, (short + long).splitlines())) <= 100


@pytest.mark.parametrize("gone", [True, False])
def test_a_reader_that_has_left_ends_the_program_without_a_word(monkeypatch, gone):
    """``--config_help | head``; a broken pipe anywhere else is a fault."""

    def run():
        raise BrokenPipeError

    read, write = os.pipe()
    monkeypatch.setattr(dispatch, "run", run)
    with os.fdopen(read), os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        if gone:
            os.dup2(os.open(os.devnull, os.O_RDONLY), read)
        with pytest.raises(SystemExit if gone else BrokenPipeError) as ended:
            cli_main.main()
    assert not gone or ended.value.code == 141


def test_the_version_is_the_packages():
    import bs_jax

    assert said("--version").strip() == f"bs_jax {bs_jax.__version__}"


def test_comments_stand_behind_or_above_their_field():
    source = (
        "def get_config():\n"
        "    config.a = 1  # behind\n"
        "    # two lines\n"
        "    # above\n"
        "    config.b.c = (\n"
        "        2\n"
        "    )  # and behind\n"
        "    config.d = '# no comment'\n"
        "    other.e = 3  # of something else\n"
    )
    found = {"a": "behind", "b.c": "two lines above and behind", "d": ""}
    assert fields.comments(source) == found
    got = fields.fields_of({"d": "x", "b": {"c": 2, "extra": {}}, "a": 1}, source)
    assert [field.name for field in got] == ["a", "b.c", "d", "b.extra"]


def test_what_is_asked_for_is_found_anywhere_before_a_double_dash():
    assert help.asked(["main.py", "--mode=train", "--helpshort"]) == "helpshort"
    assert help.asked(["main.py", "--", "--help"]) is None
    assert help.without(["main.py", "--config=x", "--config_help"]) == ["main.py", "--config=x"]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--batch_size=256"], "give --config.batch_size=256"),
        (["--rule=sqrt"], "give --config.scaling.rule=sqrt"),
        (["--worker=2"], "did you mean --workers"),
        (["--config.bach_size=2"], "configs/fashion_mnist.py has no field 'bach_size'; nearest: b"),
        (
            ["--config", "imagenette", "--config.data.nam=x"],
            "has no field 'data.nam'",
        ),
        (["--config.optimizer.hyperparams.momentum=0.9"], "give --optimizer='NAME(momentum=..."),
        (["--mode=explain", "--config.optimizer.name=sgd"], "own hyperparameters: --optimizer='sg"),
        (["--config=nofile.py"], "cannot read nofile.py: No such file"),
        (["--optimizer=sgd(0.1)"], "write its name and its hyperparameters like"),
        (["--optimizer=adam(b1=0.8)", "--config.optimizer.hyperparams.b1=0.9"], "give one of them"),
        (["--mode=train", "--launcher=print"], "--launcher has no effect with --mode=train"),
        (["--restore_from=x"], "--restore_from has no effect with --mode=sweep"),
        (["--mode=explain", "--seeds=1,2"], "--seeds has no effect with --mode=explain"),
        (["--mode=report", "--format=json"], "--format has no effect with --mode=report"),
        (["--ray_cpus=2"], "--ray_cpus has no effect with --launcher=local"),
        (["--launcher=print", "--workers=2"], "--workers has no effect with --launcher=print"),
        (["--budget_minutes=nan"], "--budget_minutes is nan; give a finite number"),
        (["--grace_seconds=inf"], "--grace_seconds is inf; give a finite number"),
        (
            ["--config.optimizer=sgd"],
            "give --config.optimizer.FIELD=..., or --optimizer='sgd(...)'",
        ),
        (["--config.batch_size=1e3"], "--config.batch_size=1e3: give a whole number, in digits"),
        (["--config.bn_decay=high"], "--config.bn_decay=high: give a number"),
    ],
)
def test_a_mistake_in_the_command_is_answered_in_one_line_with_the_right_spelling(words, answer):
    line = said(*words, code=2)
    assert answer in line
    assert line.startswith("error: ")
    assert line.count("\n") == 1


def test_another_optimizer_is_given_by_one_flag():
    text = said("--mode=explain", "--optimizer=sgd(learning_rate=0.1, momentum=0.8)")
    assert "momentum" in text
    assert "b2" not in text
    assert config.parse_optimizer("lion(learning_rate=1e-4, b1=0.9)") == (
        "lion",
        {"learning_rate": 1e-4, "b1": 0.9},
    )
    for wrong in ("sgd", "sgd(*x)", "sgd(**x)", "a.b(c=1)", "sgd(momentum='x')", "(", "sgd(x=y)"):
        with pytest.raises(UserError, match="cannot be read"):
            config.parse_optimizer(wrong)


def test_the_flags_of_printed_commands_name_every_path_in_full(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = types.SimpleNamespace(name="folder:images")
    flags = types.SimpleNamespace(config=types.SimpleNamespace(data=data))
    monkeypatch.setattr(config, "FLAGS", flags)
    monkeypatch.setattr(config, "path", lambda: "recipes/mine.py:quick")
    words = ["--config", "recipes/mine.py:quick", "--sweep=short", "--launcher", "print"]
    words += ["--config.data.name=folder:images", "--workdir=w", "--config.seed=1"]
    assert config.portable(words) == [
        f"--config={tmp_path}/recipes/mine.py:quick",
        f"--config.data.name=folder:{tmp_path}/images",
        "--sweep=short",
        "--config.seed=1",
    ]
    data.name = "fashion_mnist_10k"  # nothing to write out
    assert config.portable(["--config.data.name=fashion_mnist_10k", "--dry_run"]) == [
        f"--config={tmp_path}/recipes/mine.py:quick",
        "--config.data.name=fashion_mnist_10k",
        "--dry_run",
    ]


def test_a_user_without_a_home_has_no_cache_of_programs(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    for name in ("BS_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert compilation.cache_folder() is None


@pytest.mark.parametrize(
    ("words", "done"),
    [
        (["--mode=explain", "--config.batch_size=256"], ""),
        (["--mode=explain", "--config=imagenette", "--config.scaling.rule=noise_aware"], ""),
        (["--dry_run"], ""),
        (["--dry_run"], "b64-s0-c54ae34a7b1b"),
        (["--dry_run", "--config=imagenette", "--sweep=seed"], ""),
        (["--mode=train", "--dry_run"], ""),
    ],
)
def test_tables_fit_a_terminal_of_80_columns(words, done, tmp_path):
    """Of a real terminal; every hyperparameter is there, and no cell is cut.

    Nor is a sentence longer that says what finished runs have told of the time.
    """
    if done:
        folder, generator = tmp_path / "runs" / done, np.random.default_rng(0)
        write_run(folder, "invariant", 64, 0.0, 0.0, 3, generator)
    main, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = commands.start(
        *words, f"--workdir={tmp_path}", recipe=(), output=Path(os.ttyname(terminal)),
        TERM="dumb", COLUMNS="",
    )  # fmt: skip
    found = b""
    while process.poll() is None or select.select([main], [], [], 0)[0]:
        if select.select([main], [], [], 0.05)[0]:
            found += os.read(main, 1 << 16)
    os.close(main)
    os.close(terminal)
    assert process.returncode == 0, found
    lines = re.sub(r"\x1b\[[0-9;]*m", "", found.decode()).replace("\r", "").splitlines()
    assert max(len(line) for line in lines if " points: " not in line) <= 80
    text = " ".join(lines)
    assert "…" not in text
    assert all(name in text for name in ("b1", "b2", "bn"))
    assert ("the other 104 take" in text) == bool(done)
    if words == ["--dry_run"] and not done:  # the last column is whole
        rows = [line.split() for line in lines if line.startswith("invariant ")]
        assert [line.split()[-1] for line in lines if "rate" in line] == ["decay"]
        assert [row[-1] for row in rows] == ["0.974", "0.9487", "0.9", "0.81", "0.6561"]


def test_a_recipe_is_found_by_its_name_from_any_folder(tmp_path):
    assert "--config.optimizer.name=ranger" in said(
        "--config_help", "--config=imagenette", cwd=tmp_path
    )
    (tmp_path / "imagenette").write_text("")  # a file of that name wins
    assert recipes.find(str(tmp_path / "imagenette")) == str(tmp_path / "imagenette")
