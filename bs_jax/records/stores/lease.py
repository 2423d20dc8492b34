"""Holds a folder of an object store for one process by a lease that must be renewed.

An object store has no lock that the system releases when a process dies. So every holder creates
the object ``LOCK/NUMBER``, with the number after the last one; if several processes try at once,
one succeeds. The holder renews its object while it works, and marks it released when it ends. A
second process waits. If the lease is not renewed for 30 s (by the second process's own clock), it
takes over with the next number. A holder that finds a higher number than its own stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bs_jax.errors import UserError
from bs_jax.records.stores import files

_FOLDER = "LOCK"
_SECONDS = 30.0
_RENEWALS = 3  # in the time that a lease lasts
_PATIENCE = 2  # leases to wait for a holder that is alive
_POLLS = 10  # of a waiting process, in the time that a lease lasts
_MAX_POLL_SECONDS = 1.0


def lease_seconds() -> float:
    """How long a lease lasts without renewal, in seconds: ``$BS_JAX_LEASE_SECONDS``, or 30.

    Raises:
        UserError: the variable is not a positive number.
    """
    given = os.environ.get("BS_JAX_LEASE_SECONDS", "")
    try:
        seconds = float(given or _SECONDS)
        if not 0 < seconds < 86400:
            raise ValueError
    except ValueError:
        raise UserError(
            f"BS_JAX_LEASE_SECONDS is {given!r}; use a number of seconds, such as 30"
        ) from None
    return seconds


class Lease:
    """A lease on a folder for this process. Use `held`.

    Args:
        folder: a folder of an object store.
        seconds: how long the lease lasts without renewal.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._number = 0
        self._owner = {
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process_name(os.getpid()),
            "seconds": seconds,
        }
        self._renewals = 0
        self._renewed = _now()
        self._successor: dict[str, Any] | None = None
        self._one = threading.Lock()
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Wait until the folder is free or its lease has expired, and take it.

        Raises:
            UserError: the holder keeps renewing for the time of two leases.
        """
        began = since = _now()
        seen: tuple[int, bytes] | None = None
        lives = False
        while True:
            last = self._last()
            if last != seen:
                lives = lives or seen is not None
                seen, since = last, _now()
            number, content = last
            holder = _parse(content)
            stale = _now() - since > float(holder["seconds"])
            if holder["owner"] == self._owner["owner"]:
                self._number = number  # ours, though the store's answer that said so was lost
                return
            if number == 0 or holder["released"] or stale or _is_dead(holder):
                self._renewed = _now()
                try:
                    files.create(self._path(number + 1), self._body())
                except FileExistsError:
                    continue  # another process was faster
                self._number = number + 1
                for old in self._numbers():
                    if old < number:
                        files.unlink(self._path(old))
                return
            if lives and _now() - began > _PATIENCE * self._seconds:
                raise UserError(
                    f"another process ({_name(holder)}) is training in {self._folder}; "
                    "wait for it, or give this one another --workdir"
                )
            time.sleep(min(float(holder["seconds"]) / _POLLS, _MAX_POLL_SECONDS))

    def check(self) -> None:
        """Return if this process still holds the folder; call it before every write.

        Raises:
            UserError: this process did not renew in time and another took over.
            StoreError: the store cannot be asked.
        """
        if self._successor is None and _now() - self._renewed > self._seconds:
            self._renew()
        if self._successor is not None:
            raise UserError(
                f"another process ({_name(self._successor)}) has taken over {self._folder}: "
                f"this one did not renew its lease for {self._seconds:g} seconds; this one stops"
            )

    def renew_until_released(self) -> None:
        """Renew in time until `release`; try again after a failure."""
        while not self._ended.wait(self._seconds / _RENEWALS) and self._successor is None:
            with contextlib.suppress(OSError):
                self._renew()

    def release(self) -> None:
        """Let the next process have the folder at once."""
        self._ended.set()
        with self._one, contextlib.suppress(OSError):
            if self._successor is None:
                files.write_bytes(self._path(self._number), self._body(released=True))

    def _renew(self) -> None:
        with self._one:
            if self._ended.is_set():
                return
            began = _now()
            number, content = self._last()
            if number != self._number or _parse(content)["owner"] != self._owner["owner"]:
                self._successor = _parse(content)
                return
            self._renewals += 1
            files.write_bytes(self._path(self._number), self._body())
            self._renewed = began

    def _body(self, *, released: bool = False) -> bytes:
        content = {**self._owner, "renewals": self._renewals, "released": released}
        return json.dumps(content, indent=1).encode()

    def _path(self, number: int) -> Path:
        return self._folder / _FOLDER / f"{number:06d}"

    def _numbers(self) -> list[int]:
        found = files.names(self._folder / _FOLDER)
        return sorted(int(name) for name in found if name.isdecimal())

    def _last(self) -> tuple[int, bytes]:
        """Number and content of the newest lease; number 0 if there is none."""
        number = max(self._numbers(), default=0)
        if number == 0:
            return 0, b""
        try:
            return number, files.read_bytes(self._path(number))
        except FileNotFoundError:  # deleted by hand, or the store is slow to show it
            return number, b""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Lease]:
    """Hold a folder of an object store.

    Args:
        folder: the folder.

    Yields:
        The lease; call its `check` before every write.

    Raises:
        UserError: another process holds the folder.
    """
    lease = Lease(folder, lease_seconds())
    lease.acquire()
    threading.Thread(target=lease.renew_until_released, daemon=True).start()
    try:
        yield lease
    finally:
        lease.release()


def _now() -> float:
    """Seconds on a clock that runs while the machine sleeps and that nobody can set."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _parse(content: bytes) -> dict[str, Any]:
    """The content of a lease, with defaults for anything missing or of another type."""
    found: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(content)
    found = found if isinstance(found, dict) else {}
    seconds = found.get("seconds")
    usable = isinstance(seconds, int | float) and 0 < seconds < 86400
    return {
        "owner": found.get("owner"),
        "host": found.get("host"),
        "pid": found.get("pid"),
        "process": found.get("process"),
        "seconds": seconds if usable else _SECONDS,
        "released": found.get("released") is True,
    }


def _name(holder: dict[str, Any]) -> str:
    return f"{str(holder['host'])[:80]}, process {str(holder['pid'])[:20]}"


def _process_name(pid: int) -> list[Any] | None:
    """What identifies a process, on Linux: boot, namespace of the pid, pid, start."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [boot, os.readlink("/proc/self/ns/pid"), pid, _started(pid)]
    except (OSError, ValueError, IndexError):
        return None


def _started(pid: int) -> int:
    """When a process started, in ticks since the boot; -1 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine and has ended, so nobody need wait."""
    told = holder["process"]
    if not isinstance(told, list) or len(told) != 4 or not isinstance(told[2], int):
        return False
    here = _process_name(told[2])
    return here is not None and here[:3] == told[:3] and here[3] != told[3]
