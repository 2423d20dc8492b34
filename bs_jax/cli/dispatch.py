"""From the command line to a mode: the flags are parsed, and those without effect rejected."""

from __future__ import annotations

import importlib
import math
import sys
from types import ModuleType

from absl import app, flags, logging

from bs_jax.cli import common, config, help, processes, recipes
from bs_jax.errors import UserError

FLAGS = flags.FLAGS
# A module of this package each, with: FLAG_NAMES, the flags that have an effect in it (beside
# --mode and --config); define_flags(), which defines those that are its own; run() -> exit code.
_MODES = {
    "sweep": "train every point of --sweep, then report",
    "train": "one run of the config",
    "report": "the report again, from the records in --workdir",
    "explain": "the hyperparameters before and after scaling",
    "noise_scale": "one run, and its gradient noise scale beside its batch size",
    "critical_batch": "branches of one run: up to which batch size the loss follows",
}
# The command of a sweep with --mode=report behind it reports, that of a run explains: these modes
# pass over the flags of those.
_SAME_COMMAND = {"report": "sweep", "explain": "train"}


def run() -> None:
    """Parse the flags, do what ``--mode`` says and exit; see `bs_jax.cli.main`."""
    app.run(_run, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    """Parse the flags; a misspelt field or a value of the wrong type ends in one line."""
    argv = recipes.found(argv)
    try:
        define_flags()
        asked = help.asked(argv)
        rest = FLAGS(help.without(argv) if asked else argv)
        if asked is None:
            return rest
        help.print_help(asked, _MODES, _owners())
    except BrokenPipeError:  # not a mistake in the flags
        raise
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        print(f"error: {config.mistake(error, argv)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _owners() -> dict[str, list[str]]:
    """Headings of the help, and the flags under each."""
    shared = {
        "Flags": ["mode", "config", "optimizer", *common.FLAG_NAMES],
        "Flags of one run on many processes": processes.FLAG_NAMES,
    }
    taken = {name for names in shared.values() for name in names}
    owners = {heading: list(names) for heading, names in shared.items()}
    for mode in _MODES:
        own = [name for name in _module(mode).FLAG_NAMES if name not in taken]
        taken.update(own)
        if own:
            owners[f"Flags of --mode={mode}"] = own
    return owners


def define_flags() -> None:
    """Define all flags."""
    flags.DEFINE_enum("mode", "sweep", list(_MODES), "What to do.")
    config.define_flags()
    common.define_flags()
    processes.define_flags()
    for mode in _MODES:
        _module(mode).define_flags()


def _module(mode: str) -> ModuleType:
    return importlib.import_module(f"bs_jax.cli.{mode}")


def _run(argv: list[str]) -> int:
    """Do what the flags say; a mistake of the user's ends in one line, not in a traceback."""
    try:
        logging.set_verbosity(logging.WARNING)  # JAX reports every back end that is missing
        if len(argv) > 1:
            raise UserError(
                f"unexpected argument {argv[1]!r}; every setting is a flag (--helpshort)"
            )
        _reject_flags_without_effect()
        _reject_numbers_that_are_none()
        return _module(FLAGS.mode).run()
    except UserError as error:
        print(f"error: {error}{config.hint(error)}", file=sys.stderr)
        return 2


def _reject_flags_without_effect() -> None:
    """Reject flags that have no effect in this mode."""
    users = {mode: set(_module(mode).FLAG_NAMES) for mode in _MODES}
    accepted = users[FLAGS.mode] | users.get(_SAME_COMMAND.get(FLAGS.mode, ""), set())
    for name in sorted(set().union(*users.values()) - accepted):
        if FLAGS[name].value != FLAGS[name].default:
            modes = " or ".join(f"--mode={mode}" for mode in _MODES if name in users[mode])
            raise UserError(
                f"--{name} has no effect with --mode={FLAGS.mode}; leave it out, or use {modes}"
            )


def _reject_numbers_that_are_none() -> None:
    """Reject NaN and infinities, which no comparison would stop; fields of the config have own."""
    for name in sorted(FLAGS):
        value = FLAGS[name].value
        if not name.startswith("config.") and isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} is {value}; give a finite number, or leave it out")
