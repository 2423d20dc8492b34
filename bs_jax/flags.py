"""Flags about where and how runs are trained; what is trained is the config's business."""

from __future__ import annotations

from absl import flags

FLAGS = flags.FLAGS


def define_run_flags() -> None:
    """Define the flags of this module."""
    flags.DEFINE_float(
        "grace_seconds",
        20.0,
        "After SIGTERM: save and exit with code 143; after so long exit in any case.",
        lower_bound=0.0,
    )
    flags.DEFINE_enum(
        "distributed",
        "auto",
        ("auto", "off"),
        "Train one run on the processes of a Slurm, Open MPI, Kubernetes or Cloud TPU job.",
    )
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0 of a run on many.")
    flags.DEFINE_integer("num_processes", None, "Processes that train one run together.")
    flags.DEFINE_integer("process_id", None, "This one's number, from 0.")


def join_processes() -> bool:
    """Join the processes of one run, if the flags or the cluster say so."""
    from bs_jax.training import distributed

    return distributed.initialize(
        FLAGS.distributed, FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id
    )
