"""--help, --helpshort, --config_help and --version: the modes, the flags, the recipe's fields."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags

import bs_jax
from bs_jax.cli import config
from bs_jax.cli.fields import Field

FLAGS = flags.FLAGS
_HELP, _SHORT = ("help", "h", "?"), ("helpshort",)
_OWN = ("config_help", "version")
_COLUMN = 26  # where the explanation of a flag begins


def asked(argv: Sequence[str]) -> str | None:
    """What the command line asks for: "help", "helpshort", "config_help", "version" or None.

    >>> asked(["main.py", "--mode=train", "-h"]), asked(["main.py", "--", "--help"])
    ('help', None)
    """
    for word in argv[1:]:
        if word == "--":
            break
        name = word.lstrip("-")
        if word.startswith("-") and name in (*_HELP, *_SHORT, *_OWN):
            return "help" if name in _HELP else name
    return None


def without(argv: Sequence[str]) -> list[str]:
    """The command line without what `asked` looks for."""
    return [word for word in argv if not asked(["", word])]


def version() -> str:
    """The version of this package."""
    return f"bs_jax {bs_jax.__version__}"


def flags_text(modes: Mapping[str, str], owners: Mapping[str, Sequence[str]]) -> str:
    """The modes and the flags.

    Args:
        modes: name -> what it does.
        owners: heading -> names of the flags under it.
    """
    program = os.path.basename(sys.argv[0])
    program = f"python {program}" if program.endswith(".py") else program
    parts = [
        f"usage: {program} [--mode=MODE] [--config=FILE] [--config.FIELD=VALUE ...] "
        "[--FLAG=VALUE ...]",
        "Modes, --mode=...\n" + "\n".join(_entry(name, text, 2) for name, text in modes.items()),
    ]
    for heading, names in owners.items():
        entries = [_entry(_spelled(name), _explained(name), 2) for name in names]
        parts.append("\n".join([heading, *entries]))
    return "\n\n".join(parts)


def _spelled(name: str) -> str:
    flag = FLAGS[name]
    if flag.boolean:
        return f"--{name}"
    choices = getattr(flag.parser, "enum_values", None)
    return f"--{name}={'|'.join(choices)}" if choices else f"--{name}=..."


def _explained(name: str) -> str:
    flag = FLAGS[name]
    text = re.sub(r"^<[\w|]+>: ", "", flag.help)  # absl puts the choices of an enum in front
    if name == "config" or flag.default in (None, "", []) or flag.boolean:
        return text
    default = f"{flag.default:g}" if isinstance(flag.default, float) else flag.default
    return f"{text} Default: {default}."


def fields_text(path: str, fields: Iterable[Field]) -> str:
    """The fields of a recipe with their values and comments.

    Args:
        path: of its file, for the heading.
        fields: of `config.fields`.
    """
    entries = [_entry(f"--config.{f.name}={_shell(f.value)}", f.comment, 2, 44) for f in fields]
    return "\n".join([f"Fields of {path}, with the values in force", *entries])


def _shell(value: Any) -> str:
    text = str(tuple(value) if isinstance(value, list) else value)
    return text if text and not set(text) & set("()'\" ;&*?[]#~") else f"'{text}'"


def _entry(name: str, text: str, indent: int, column: int = _COLUMN) -> str:
    """A name and its explanation in two columns, as wide as the terminal."""
    width = max(shutil.get_terminal_size().columns, 60)
    head = " " * indent + name
    lines = textwrap.wrap(text, width - column - 1) or [""]
    if len(head) + 2 > column:
        return "\n".join([head, *(" " * column + line for line in lines)]).rstrip()
    first, *rest = lines
    return "\n".join([head.ljust(column) + first, *(" " * column + line for line in rest)]).rstrip()


def print_help(what: str, modes: Mapping[str, str], owners: Mapping[str, Sequence[str]]) -> None:
    """Print what was asked for.

    Args:
        what: of `asked`.
        modes: name -> what it does.
        owners: heading -> names of the flags under it.

    Raises:
        UserError: ``--config`` names no recipe.
    """
    if what == "version":
        print(version())
        return
    if what != "config_help":
        print(flags_text(modes, owners))
    if what == "helpshort":
        print("\n--config_help lists the fields of the recipe, --helpfull the flags of libraries.")
        return
    if what == "help":
        print()
    print(fields_text(config.path(), config.fields()))
