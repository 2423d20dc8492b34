"""The most memory that a piece of code took."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

_PROCESS = Path("/proc/self")


def _resident_kib(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", (_PROCESS / "status").read_text())
    assert found, name
    return int(found[1])


@contextlib.contextmanager
def taking_less_than(mib: float) -> Iterator[None]:
    """Assert that the resident memory grows by less, at its highest; Linux only, else no check.

    ``getrusage`` would not do: it tells the highest point of the process's whole life.
    """
    if not (_PROCESS / "clear_refs").exists():
        yield
        return
    (_PROCESS / "clear_refs").write_text("5")  # the highest point so far is now
    before = _resident_kib("VmRSS")
    yield
    grown = (_resident_kib("VmHWM") - before) / 1024
    assert grown < mib, f"{grown:.0f} MiB"
