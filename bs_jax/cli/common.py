"""Flags that several modes share: where the records go, and when to stop."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from bs_jax.records import stores

FLAGS = flags.FLAGS
FLAG_NAMES = ("workdir", "dry_run", "grace_seconds")


def define_flags() -> None:
    """Define the flags of this module."""
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the records, or gs://BUCKET/PATH, s3://BUCKET/PATH; default: "
        "runs/<config>-<sweep>, or runs/<config>-<mode>/<run>.",
    )
    flags.DEFINE_bool("dry_run", False, "Print the hyperparameters of every run; train nothing.")
    flags.DEFINE_float(
        "grace_seconds",
        20.0,
        "After SIGTERM: save and exit with code 143; after so long exit in any case.",
        lower_bound=0.0,
    )


def workdir(default: str) -> Path:
    """The folder of ``--workdir``.

    Args:
        default: where the flag is not given.
    """
    return stores.to_path(FLAGS.workdir or default)
