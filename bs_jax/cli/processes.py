"""One run on many processes: the flags that join them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from absl import flags

FLAGS = flags.FLAGS
FLAG_NAMES = ("distributed", "coordinator_address", "num_processes", "process_id")


def define_flags() -> None:
    """Define the flags of this module."""
    flags.DEFINE_enum(
        "distributed",
        "auto",
        ("auto", "off"),
        "auto: train one run on all processes of a Slurm, Open MPI, Kubernetes or Cloud TPU job.",
    )
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0 of a run on many.")
    flags.DEFINE_integer("num_processes", None, "Processes that train one run together.")
    flags.DEFINE_integer("process_id", None, "This one's number, from 0.")


def together(action: Callable[[], int]) -> int:
    """Do something after joining the other processes, if the flags or the cluster say so.

    Args:
        action: returns an exit code. Only process 0 prints to standard output in it.

    Returns:
        The exit code.
    """
    from bs_jax.training import distributed

    joined = distributed.initialize(
        FLAGS.distributed, FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id
    )
    if not joined:
        return action()
    if not distributed.is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    with distributed.ending_together():
        return action()
