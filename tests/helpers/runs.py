"""Runs that are scheduled and shown, and never trained."""

from helpers.training import tiny_config

from bs_jax.records.run_folder import Run


def fake_run(name, cohort, examples=100):
    """A run at the base batch size; runs of one cohort share a compiled program.

    Args:
        name: its id.
        cohort: a number.
        examples: its length.
    """
    config = tiny_config(train_examples=examples, **{"data.image_size": cohort})
    config["scaling"] = {"rule": "fixed"}
    return Run(name, config | {"micro_batch_size": 16}, {"k": 1.0, "rule": "none"})
