"""The entry of ``python main.py`` and of the command ``bs-jax``."""

from __future__ import annotations

import os
import select
import signal
import sys

# Import names of what the extra `trainer` installs.
_TRAINER = frozenset(
    {
        "PIL",
        "absl",
        "flax",
        "matplotlib",
        "ml_collections",
        "orbax",
        "pyarrow",
        "rich",
        "tensorboardX",
    }
)


def main() -> None:
    """Parse the command line, do what ``--mode`` says and end the process.

    The exit code is 0 when all is done, 1 if some runs failed, 2 for a mistake in the flags or the
    config, 128 + n after signal n, and 75 if another process of a joined run was lost.
    """
    try:
        from bs_jax.cli import dispatch

        dispatch.run()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _TRAINER:
            raise
        print(
            f"error: the trainer needs the package {error.name}, which is not installed; run "
            "pip install 'bs_jax[trainer]' (in a checkout: pip install -e '.[trainer]')",
            file=sys.stderr,
        )
        sys.exit(2)
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        sys.exit(128 + signal.SIGPIPE)


def _reader_is_gone() -> bool:
    """Whether nobody reads the output any more (``| head``); if so it is sent nowhere from now."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone
