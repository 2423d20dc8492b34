"""Runs trained by somebody else: a shell command for each."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from bs_jax.records import stores
from bs_jax.sweep.cohorts import Schedule


def commands(schedule: Schedule, workdir: Path, program: Sequence[str]) -> Iterator[str]:
    """A shell command for each run, or for each cohort that is vmapped.

    Args:
        schedule: the runs to train.
        workdir: the sweep's folder.
        program: the words of a command that trains the whole sweep.
    """
    while assignment := schedule.next(0):
        only = ",".join(run.run_id for run in assignment.runs)
        yield shlex.join([*program, f"--workdir={stores.text_of(workdir)}", f"--only={only}"])
