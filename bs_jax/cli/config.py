"""The flags --config and --optimizer: a recipe, its fields, its sweeps, the data it names."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import tokenize
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from absl import flags

from bs_jax.cli import recipes
from bs_jax.cli.fields import Field, fields_of, nearest
from bs_jax.errors import UserError
from bs_jax.run import ResolvedRun
from bs_jax.schema import choose
from bs_jax.sweep.points import Point

FLAGS = flags.FLAGS
_DEFAULT = "fashion_mnist.py"
_SWEEP = "sweep_"  # how the name of a function begins that makes the points of a sweep


def define_flags() -> None:
    """Define ``--config``."""
    from ml_collections import config_flags

    config_flags.DEFINE_config_file(
        "config",
        str(recipes.folder() / _DEFAULT),
        "The recipe; override a field by --config.batch_size=256.",
    )
    flags.DEFINE_string(
        "optimizer",
        None,
        "Another optimizer than the recipe's, with its hyperparameters at the base batch size: "
        "'sgd(learning_rate=0.1, momentum=0.9)'.",
    )


def plain() -> dict[str, Any]:
    """The recipe with the overrides of the command line, as nested data.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        found = json.loads(FLAGS.config.to_json())
    except OSError as error:  # config_flags keeps its failure to load until the first use
        reason = one_line(error).rpartition("[Errno")[2].partition("] ")[2] or one_line(error)
        raise UserError(
            f"--config: cannot read {path()}: {reason}; give a file, or one of "
            + ", ".join(sorted(file.stem for file in recipes.folder().glob("*.py")))
        ) from error
    _replace_optimizer(found)
    return found


def _replace_optimizer(config: dict[str, Any]) -> None:
    """Put the optimizer of ``--optimizer`` into a recipe, if one is given."""
    if FLAGS.optimizer is None:
        return
    if clash := [field for field in overrides() if field.startswith("optimizer.")]:
        wrong = [field for field in clash if field != "optimizer.decay_mask"]
        if wrong:
            raise UserError(
                f"--optimizer replaces config.{wrong[0]}; give one of them: hyperparameters belong "
                f"into --optimizer={FLAGS.optimizer!r}"
            )
    name, hyperparams = parse_optimizer(FLAGS.optimizer)
    config["optimizer"] |= {"name": name, "hyperparams": hyperparams}


def parse_optimizer(text: str) -> tuple[str, dict[str, float | bool]]:
    """The name and the hyperparameters of an optimizer that is written as a call.

    Args:
        text: e.g. ``sgd(learning_rate=0.1, nesterov=True)``.

    Raises:
        UserError: it is no such call.

    >>> parse_optimizer("sgd(learning_rate=0.1, nesterov=True)")
    ('sgd', {'learning_rate': 0.1, 'nesterov': True})
    """
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError
        found = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        if not all(isinstance(value, int | float) for value in found.values()):
            raise ValueError
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise UserError(
            f"--optimizer={text!r} cannot be read; write its name and its hyperparameters like "
            "'sgd(learning_rate=0.1, momentum=0.9)', numbers or True or False"
        ) from error
    return call.func.id, found


def hint(error: UserError) -> str:
    """What to add to a message about another optimizer whose hyperparameters were not given."""
    name = overrides().get("optimizer.name")
    if name is None or "argument" not in str(error):
        return ""
    return f"; give it together with its own hyperparameters: --optimizer='{name}(...)'"


def overrides() -> dict[str, Any]:
    """The fields that the command line sets, dotted, with their values."""
    from ml_collections import config_flags

    return config_flags.get_override_values(FLAGS["config"])


def points(name: str) -> list[Point]:
    """The points of a sweep of the recipe's file.

    Args:
        name: its function is ``sweep_<name>``.

    Raises:
        UserError: there is no such function.
    """
    module = _module(path())
    known = [name.removeprefix(_SWEEP) for name in vars(module) if name.startswith(_SWEEP)]
    choose("sweep", name, known)
    return getattr(module, _SWEEP + name)()


def path() -> str:
    """The file of the recipe, with a colon and the name of a form where one was given."""
    from ml_collections import config_flags

    return config_flags.get_config_filename(FLAGS["config"])


def fields() -> list[Field]:
    """The fields of the recipe with the overrides of the command line, and their comments.

    Raises:
        UserError: the file cannot be read.
    """
    return fields_of(plain(), _source(path()))


def _source(recipe: str) -> str:
    with tokenize.open(recipe.split(":", 1)[0]) as file:
        return file.read()


def _module(recipe: str) -> ModuleType:
    # What follows a colon is the argument of get_config, the name of a form of the recipe.
    spec = importlib.util.spec_from_file_location("bs_jax_config", recipe.split(":", 1)[0])
    assert spec is not None  # the flag has loaded it before
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_data(runs: Sequence[ResolvedRun]) -> str:
    """Load each data set that runs name, before anything compiles.

    The data is checked against the recipe, and cached for worker processes.

    Returns:
        A description, with the number of examples.

    Raises:
        UserError: the data is missing, damaged, or does not fit the recipe; or a tracker is not
            installed.
    """
    from bs_jax.training import checks, inputs, trackers

    trackers.check(runs)
    loaded = {}
    for run in runs:
        key = inputs.data_key(run.data)
        if key not in loaded:
            loaded[key] = inputs.load_data(run.data)
        data = loaded[key]
        checks.check_data(run, len(data.train), data.image_shape[-1])
    return "; ".join(
        f"{data.description}: {len(data.train):,} to train on, {len(data.eval):,} to evaluate"
        for data in loaded.values()
    )


def portable(words: Sequence[str]) -> list[str]:
    """The flags of this command, as they train the same sweep from any folder.

    Paths of the recipe and of its data are written out. Left out is what the printed commands of a
    sweep say themselves.

    Args:
        words: of the command line, without the program.
    """
    recipe, colon, form = path().partition(":")
    found = [f"--config={os.path.abspath(recipe)}{colon}{form}"]
    data = FLAGS.config.data.name
    kind, _, place = data.partition(":")
    if kind == "folder" and place and not place.startswith("~"):
        found.append(f"--config.data.name=folder:{os.path.abspath(place)}")
    skipped = ("config", "config.data.name", "launcher", "only", "workdir")
    if kind != "folder":
        skipped = ("config", "launcher", "only", "workdir")
    values = iter(words)
    for word in values:
        name, equals, _ = word.lstrip("-").partition("=")
        if not word.startswith("-") or name not in skipped:
            found.append(word)
        elif not equals:
            next(values, None)  # its value is the next word
    return found


def mistake(error: Exception, argv: Sequence[str]) -> str:
    """What is wrong in the command line, in one line, with the nearest fields and flags.

    Args:
        error: of parsing it.
        argv: the command line.
    """
    if isinstance(error, flags.UnrecognizedFlagError):
        return _unknown_flag(error, argv)
    if isinstance(error, AttributeError | KeyError | TypeError) and (line := _unknown_field(argv)):
        return line
    line = one_line(error)
    if group := re.match(r"flag --config\.([\w.]+)=(.*): Failed to parse .* as a ConfigDict", line):
        name, value = group.groups()
        whole = f", or --optimizer='{value}(...)'" if name == "optimizer" else ""
        return f"config.{name} is a group of fields: give --config.{name}.FIELD=...{whole}"
    return line


def _unknown_flag(error: flags.UnrecognizedFlagError, argv: Sequence[str]) -> str:
    name = error.flagname
    said = f"unknown flag --{name}; "
    known = _fields_in(_given(argv))
    if name in known or any(field.endswith(f".{name}") for field in known):
        value = error.flagvalue.partition("=")[2] or "..."
        meant = [f"--config.{field}={value}" for field in nearest(name, known)]
        return f"{said}it is a field of the recipe: give {' or '.join(meant)}"
    near = [f"--{flag}" for flag in nearest(name, [flag for flag in FLAGS if "." not in flag], 2)]
    near += [f"--config.{field}" for field in nearest(name, known, 2)]
    return said + (f"did you mean {' or '.join(near)}?" if near else "--helpshort lists the flags")


def _unknown_field(argv: Sequence[str]) -> str | None:
    """Of the first ``--config.FIELD`` that the recipe does not have."""
    recipe = _given(argv)
    known = _fields_in(recipe)
    for word in argv[1:]:
        match = re.match(r"--?config\.([\w.]+)", word)
        if match and match[1] not in known:
            name, file = match[1], recipe.split(":", 1)[0]
            near = ", ".join(nearest(name, known)) or "none; --config_help lists the fields"
            line = f"{file} has no field {name!r}; nearest: {near}"
            if name.startswith("optimizer.hyperparams."):
                argument = name.rsplit(".", 1)[1]
                line += f"; for another optimizer give --optimizer='NAME({argument}=..., ...)'"
            return line
    return None


def _given(argv: Sequence[str]) -> str:
    """The recipe that a command line names, whether it can be parsed or not."""
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name == "config":
            return value if equals else after
    return str(recipes.folder() / _DEFAULT)


def _fields_in(recipe: str) -> list[str]:
    """The names of a recipe's fields; none where it cannot be loaded, which is told elsewhere."""
    form = recipe.partition(":")[2]
    try:
        values = _module(recipe).get_config(*([form] if form else [])).to_dict()
    except (OSError, UserError):
        return []
    return [field.name for field in fields_of(values, "")]


def one_line(error: Exception) -> str:
    r"""An error's message in one line; for a misspelt config field, the one that was meant.

    >>> one_line(AttributeError("'bach_size'\nDid you mean \"batch_size\" instead?"))
    "config has no field 'bach_size'; did you mean 'batch_size'?"
    """
    text = str(error.args[0]) if error.args else str(error)
    # ml_collections puts the traceback into the message of what a config file raises.
    *_, text = text.rsplit("bs_jax.errors.UserError: ", 1)
    names = re.findall(r"[\w.]+", text.split("Did you mean")[0])
    meant = re.search(r'Did you mean "([^"]*)"', text)
    if meant and names:
        return f"config has no field {names[0]!r}; did you mean {meant[1]!r}?"
    if isinstance(error, AttributeError | KeyError) and names:
        return f"config has no field {names[0]!r}; see the fields in the config file"
    text = re.sub(r"invalid literal for int\(\).*", "give a whole number, in digits", text)
    text = re.sub(r"could not convert string to float.*", "give a number", text)
    return re.sub(r"\s+", " ", text).strip()
