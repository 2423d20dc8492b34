"""--mode=explain: every hyperparameter of the recipe before and after scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from absl import flags

from bs_jax.cli import config
from bs_jax.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from bs_jax.scaling.explain import Explanation

FLAGS = flags.FLAGS
FLAG_NAMES = ("format",)


def define_flags() -> None:
    """Define the flag of this mode."""
    flags.DEFINE_enum("format", "text", ("text", "markdown", "json"), "Output of --mode=explain.")


def run() -> int:
    """Print the explanation."""
    from rich.console import Console

    from bs_jax.training.resolve import explain_recipe

    explanation = explain_recipe(Recipe.parse(config.plain()))
    render = {
        "text": explanation.to_text,
        "markdown": explanation.to_markdown,
        "json": explanation.to_json,
    }
    console = Console()
    if FLAGS.format == "text" and console.is_terminal:
        _show(explanation, console)
    else:
        print(render[FLAGS.format]())
    return 0


def _show(explanation: Explanation, console: Console) -> None:
    """Print the explanation as a table that fits the terminal, its sources below it."""
    from bs_jax.cli.tables import table

    names = ("hyperparameter", "base", "new", "kept", "formula")
    rows = [
        ["" if row[name] is None else _text(row[name]) for name in names]
        for row in explanation.rows
    ]
    sources = dict.fromkeys(row["source"] for row in explanation.rows if row["source"])
    console.print(explanation.title, markup=False, highlight=False)
    console.print(table(names, rows))
    lines = [*(f"source: {source}" for source in sources)]
    lines += [f"warning: {warning}" for warning in explanation.warnings]
    console.print("\n".join(lines), markup=False, highlight=False)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)
