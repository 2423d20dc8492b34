"""The flag --config: a recipe, its fields, its sweeps and the data it names."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from absl import flags

from bs_jax.cli import recipes
from bs_jax.errors import UserError
from bs_jax.records.run_folder import Run
from bs_jax.sweep.points import Point

FLAGS = flags.FLAGS
_SWEEP = "sweep_"  # how the name of a function begins that makes the points of a sweep


def define_flags() -> None:
    """Define ``--config``."""
    from ml_collections import config_flags

    config_flags.DEFINE_config_file(
        "config",
        str(recipes.folder() / "fashion_mnist.py"),
        "The recipe; override a field by --config.batch_size=256.",
    )


def plain() -> dict[str, Any]:
    """The recipe with the overrides of the command line, as nested data of the right form.

    Raises:
        UserError: the file cannot be read, or a field holds another kind of value.
    """
    from bs_jax.training.form import check_form

    try:
        found = json.loads(FLAGS.config.to_json())
    except OSError as error:  # config_flags keeps its failure to load until the first use
        raise UserError(f"--config: {one_line(error)}") from error
    check_form(found)
    return found


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
    from bs_jax.training import validate

    module = _module()
    known = [name.removeprefix(_SWEEP) for name in vars(module) if name.startswith(_SWEEP)]
    validate.choose("sweep", name, known)
    return getattr(module, _SWEEP + name)()


def _module() -> ModuleType:
    from ml_collections import config_flags

    # What follows a colon is the argument of get_config, the name of a form of the recipe.
    path = config_flags.get_config_filename(FLAGS["config"]).split(":", 1)[0]
    spec = importlib.util.spec_from_file_location("bs_jax_config", path)
    assert spec is not None  # the flag has loaded it before
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_data(runs: Iterable[Run]) -> str:
    """Load each data set that runs name, before anything compiles.

    The data is checked against the recipe, and cached for worker processes.

    Returns:
        A description, with the number of examples.

    Raises:
        UserError: the data is missing, damaged, or does not fit the recipe.
    """
    from bs_jax.training import inputs, validate

    loaded = {}
    for run in runs:
        key = inputs.data_key(run.config)
        if key not in loaded:
            loaded[key] = inputs.load_data(run.config)
        data = loaded[key]
        validate.check_data(run.config, len(data.train), data.image_shape[-1])
    return "; ".join(
        f"{data.description}: {len(data.train):,} to train on, {len(data.eval):,} to evaluate"
        for data in loaded.values()
    )


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
    return re.sub(r"\s+", " ", text).strip()
