"""--mode=explain: every hyperparameter of the recipe before and after scaling."""

from __future__ import annotations

from absl import flags

from bs_jax.cli import config
from bs_jax.recipe import Recipe

FLAGS = flags.FLAGS
FLAG_NAMES = ("format",)


def define_flags() -> None:
    """Define the flag of this mode."""
    flags.DEFINE_enum("format", "text", ("text", "markdown", "json"), "Output of --mode=explain.")


def run() -> int:
    """Print the explanation."""
    from bs_jax.training.resolve import explain_recipe

    explanation = explain_recipe(Recipe.parse(config.plain()))
    render = {
        "text": explanation.to_text,
        "markdown": explanation.to_markdown,
        "json": explanation.to_json,
    }
    print(render[FLAGS.format]())
    return 0
