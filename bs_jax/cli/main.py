"""The program behind ``python main.py`` and the command ``bs-jax``."""

from __future__ import annotations

import sys

# Import names of what the extra `trainer` installs.
_TRAINER = frozenset(
    {
        "PIL",
        "absl",
        "flax",
        "matplotlib",
        "ml_collections",
        "orbax",
        "pyarrow",
        "rich",
        "tensorboardX",
    }
)


def main() -> None:
    """Parse the command line and run the chosen mode; ends the process with its exit code."""
    try:
        from absl import app

        app.run(_run, flags_parser=_parse)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _TRAINER:
            raise
        print(
            f"error: the trainer needs the package {error.name}, which is not installed; run "
            "pip install 'bs_jax[trainer]' (in a checkout: pip install -e '.[trainer]')",
            file=sys.stderr,
        )
        sys.exit(2)


def _run(argv: list[str]) -> int:
    """Run the chosen mode; a user's mistake ends in one line, not in a traceback."""
    from absl import logging

    from bs_jax.cli import modes
    from bs_jax.errors import UserError

    try:
        logging.set_verbosity(logging.WARNING)  # JAX tells of every back end that it has not
        if len(argv) > 1:
            raise UserError(
                f"unexpected argument {argv[1]!r}; every setting is a flag (--helpshort)"
            )
        return modes.run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> list[str]:
    """Parse the flags; a misspelt field or a value of the wrong type ends in one line."""
    from absl import flags

    from bs_jax.cli import modes, recipes

    try:
        modes.define_flags()
        return flags.FLAGS(recipes.found(argv))
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        print(f"error: {modes.one_line(error)}", file=sys.stderr)
        sys.exit(2)
