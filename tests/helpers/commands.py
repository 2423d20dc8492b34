"""Real commands of main.py on a tiny recipe, in one process or in several that train one run."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from faults.zygote import Command, Zygote

ROOT = Path(__file__).resolve().parents[2]
_NUMBERS = itertools.count()
TINY = (
    "--config.data.name=synthetic:3x192",
    "--config.data.image_size=8",
    "--config.model.name=resnet2_patch",
    "--config.batch_size=16",
    "--config.base_batch_size=16",
    "--config.ghost_batch_size=4",
    "--config.train_examples=768",
    "--config.eval_every_examples=64",
    "--config.log_every_examples=64",
    "--config.checkpoint_every_examples=64",
    "--config.data.mean=(0.4,0.4,0.4)",
    "--config.data.std=(0.3,0.3,0.3)",
)


@functools.cache
def _forked() -> tuple[Zygote, Path]:
    """The process that all commands of this one are forked from, and a folder for their output.

    The imports of a command take longer than most commands themselves.
    """
    zygote, folder = Zygote(), tempfile.TemporaryDirectory(prefix="bs_jax-commands-")
    atexit.register(folder.cleanup)
    atexit.register(zygote.close)
    return zygote, Path(folder.name)


def start(
    *flags: str,
    devices: int = 1,
    recipe: Sequence[str] = TINY,
    cwd: Path = ROOT,
    output: Path | None = None,
    errors: Path | None = None,
    **environment: str,
) -> Command:
    """Start ``python main.py`` with the tiny recipe, or another, and more flags.

    Args:
        *flags: further flags.
        devices: CPU devices that it sees.
        recipe: flags before those.
        cwd: its working directory.
        output: a file or terminal that it writes to in place of one of its own.
        errors: the same for its standard error alone.
        **environment: variables beside this process's.
    """
    zygote, folder = _forked()
    devices_flag = f" --xla_force_host_platform_device_count={devices}"
    variables = {
        **os.environ,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + devices_flag,
        **environment,
    }
    return zygote.start(
        [*recipe, *flags],
        output or folder / f"{next(_NUMBERS)}.out",
        errors=errors,
        cwd=cwd,
        environment=variables,
    )


def finish(process: Command, seconds: float = 300) -> tuple[int, str]:
    """Wait for a command; its exit code and output."""
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode is not None
    return process.returncode, out


def run(
    *flags: str, devices: int = 1, recipe: Sequence[str] = TINY, **environment: str
) -> tuple[int, str]:
    """Do one command to its end."""
    return finish(start(*flags, devices=devices, recipe=recipe, **environment))


@contextlib.contextmanager
def joined(
    count: int, *flags: str, devices: int = 1, recipe: Sequence[str] = TINY
) -> Iterator[list[Command]]:
    """Processes that train one run; those still alive at the end are killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        start(
            *flags,
            f"--coordinator_address={address}",
            f"--num_processes={count}",
            f"--process_id={number}",
            devices=devices,
            recipe=recipe,
        )
        for number in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> bool:
    """Wait until something holds; whether it did in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False


def lines(path: Path) -> int:
    """Lines in a file; 0 if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes().count(b"\n")
    return 0
