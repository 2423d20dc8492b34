"""What this process holds: open files and memory."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_PROCESS = Path("/proc/self")


def open_files() -> dict[str, str]:
    """What is open: number -> path, or a name such as ``pipe:[123]``; Linux only."""
    links = {}
    for entry in (_PROCESS / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # listed, and closed since
            links[entry.name] = os.readlink(entry)
    return links


def resident_mib(name: str = "VmRSS") -> float:
    """Resident memory now, or the highest (``VmHWM``); Linux only."""
    found = re.search(rf"{name}:\s+(\d+) kB", (_PROCESS / "status").read_text())
    assert found, name
    return int(found[1]) / 1024


@contextlib.contextmanager
def taking_less_than(mib: float) -> Iterator[None]:
    """Assert that the resident memory grows by less, at its highest; Linux only, else no check.

    ``getrusage`` would not do: it tells the highest point of the process's whole life.
    """
    if not (_PROCESS / "clear_refs").exists():
        yield
        return
    (_PROCESS / "clear_refs").write_text("5")  # the highest point so far is now
    before = resident_mib()
    yield
    grown = resident_mib("VmHWM") - before
    assert grown < mib, f"{grown:.0f} MiB"
