"""Print what a rule does to a recipe, without training: python -m bs_jax.scaling."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from bs_jax.errors import UserError
from bs_jax.scaling.explain import explain
from bs_jax.scaling.optimizers import Recipe, registered
from bs_jax.scaling.rules import RULES


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Split the command line into our own flags and the optimizer's hyperparameters."""
    parser = argparse.ArgumentParser(
        prog="python -m bs_jax.scaling",
        description="Scale a recipe's hyperparameters from one batch size to another.",
        epilog="Every further --name=value is a hyperparameter of the optimizer or of --roles.",
    )
    parser.add_argument("--optimizer", required=True, help=f"one of {', '.join(registered())}")
    parser.add_argument("--batch_size", type=int, required=True, help="examples per update")
    parser.add_argument("--base_batch_size", type=int, required=True, help="tuned at")
    parser.add_argument(
        "--rule",
        help=f"{', '.join(RULES)}, power(a); by default the one whose numbers alone"
        " are right in a plain optimizer: sqrt, or linear for SGD, Lion and the like",
    )
    parser.add_argument("--noise_scale", type=float, help="gradient noise scale in examples")
    parser.add_argument("--train_examples", type=int, help="length of training in examples")
    parser.add_argument("--roles", default="", help="e.g. bn_decay=decay,ema_decay=decay")
    parser.add_argument("--format", default="text", choices=("text", "markdown", "json"))
    known, rest = parser.parse_known_args(argv)
    return known, dict(_hyperparameter(argument) for argument in rest)


def plain_rule(optimizer: str) -> str:
    """Return the rule whose numbers alone are right, in a plain optimizer, where noise dominates.

    Example:
        >>> plain_rule("adamw"), plain_rule("sgd")
        ('sqrt', 'linear')
    """
    family = Recipe.of(optimizer).family
    low, high = (0.5, 0.5) if family is None else family.lr_powers
    return "sqrt" if low <= 0.5 <= high else "linear"


# What PyTorch calls otherwise than optax.
_PYTORCH = {
    "lr": "--learning_rate=...",
    "betas": "--b1=... --b2=...",
    "alpha": "--decay=...",
}


def _hyperparameter(argument: str) -> tuple[str, Any]:
    name, separator, value = argument.removeprefix("--").partition("=")
    if argument.startswith("--") and name in _PYTORCH:
        raise UserError(f"--{name}: optax's name for it is {_PYTORCH[name]}")
    if not argument.startswith("--") or not separator:
        raise UserError(f"{argument!r}: write hyperparameters as --name=value, e.g. --b2=0.99")
    words = {"True": True, "False": False, "None": None}
    if value in words:
        return name, words[value]
    try:
        return name, float(value)
    except ValueError as error:
        raise UserError(f"--{name}={value}: give a number, e.g. --{name}=0.1") from error


def _roles(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    for name, separator, role in pairs:
        if not (name and separator and role):
            raise UserError(f"--roles={text}: write name=role, e.g. bn_decay=decay,ema=decay")
    return {name: role for name, _, role in pairs}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        flags, hyperparams = parse(sys.argv[1:] if argv is None else argv)
        table = explain(
            flags.optimizer,
            batch_size=flags.batch_size,
            base_batch_size=flags.base_batch_size,
            rule=flags.rule or plain_rule(flags.optimizer),
            noise_scale=flags.noise_scale,
            roles=_roles(flags.roles),
            train_examples=flags.train_examples,
            **hyperparams,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    printers = {"text": table.to_text, "markdown": table.to_markdown, "json": table.to_json}
    print(printers[flags.format]())
    return 0


if __name__ == "__main__":
    sys.exit(main())
