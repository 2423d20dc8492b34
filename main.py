"""Train, sweep, report or explain: ``python main.py --helpshort`` lists the flags."""

import sys

from absl import app, flags, logging

from bs_jax.cli import modes as cli
from bs_jax.errors import UserError


def main(argv: list[str]) -> int:
    """Run the chosen mode; a user's mistake ends in one line, not in a traceback."""
    try:
        logging.set_verbosity(logging.WARNING)  # JAX tells of every back end that it has not
        if len(argv) > 1:
            raise UserError(
                f"unexpected argument {argv[1]!r}; every setting is a flag (--helpshort)"
            )
        return cli.run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(argv: list[str]) -> list[str]:
    """Parse the flags; a misspelt field or a value of the wrong type ends in one line."""
    try:
        cli.define_flags()
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        print(f"error: {cli.one_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
