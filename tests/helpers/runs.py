"""Runs that are scheduled and shown, and never trained."""

import dataclasses

from helpers.training import tiny_config

from bs_jax.sweep.points import resolve


def fake_run(name, cohort, examples=100):
    """A run at the base batch size; runs of one cohort share a compiled program.

    Args:
        name: its id.
        cohort: a number.
        examples: its length.
    """
    run = resolve(tiny_config(train_examples=examples, **{"data.image_size": cohort}))
    return dataclasses.replace(run, run_id=name)
