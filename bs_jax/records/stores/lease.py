"""Holds a folder of an object store for one process, which has no lock that the system releases.

Holders are numbered: each creates the object ``LOCK/NUMBER`` one above the last, which of many
who try succeeds for one. The holder renews its object while it works; when it ends it marks it
released. One that has not been renewed for as long as it says, seen by the clock of the one who
waits, is stale, and the next number may be taken. A holder that finds a higher number stops.
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
from bs_jax.records.stores import storage

_FOLDER = "LOCK"
_SECONDS = 30.0
_RENEWALS = 3  # in the life of a lease
_PATIENCE = 2  # of one who waits for a holder that lives, in lives of a lease
_POLLS = 10  # of one who waits, in the life of a lease
_MAX_POLL_SECONDS = 1.0


def lease_seconds() -> float:
    """How long a lease lasts that is not renewed: ``$BS_JAX_LEASE_SECONDS``, or 30.

    Raises:
        UserError: it is no positive number.
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
    """A folder held by this process. Use `held`.

    Args:
        folder: of an object store.
        seconds: that it lasts without renewal.
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
        """Wait until the folder is free, or its holder stale, and take it.

        Raises:
            UserError: its holder is seen to live on for the time of two leases.
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
                self._number = number  # taken, though the answer that said so was lost
                return
            if number == 0 or holder["released"] or stale or _is_dead(holder):
                self._renewed = _now()
                try:
                    storage.create(self._path(number + 1), self._body())
                except FileExistsError:
                    continue  # another was faster
                self._number = number + 1
                for old in self._numbers():
                    if old < number:
                        storage.unlink(self._path(old))
                return
            if lives and _now() - began > _PATIENCE * self._seconds:
                raise UserError(
                    f"another process ({_name(holder)}) is training in {self._folder}; "
                    "wait for it, or give this one another --workdir"
                )
            time.sleep(min(float(holder["seconds"]) / _POLLS, _MAX_POLL_SECONDS))

    def check(self) -> None:
        """Return if the folder is still held; call it before every write.

        Raises:
            UserError: another process has taken it, as this one was silent for too long.
            StoreError: that cannot be found out.
        """
        if self._successor is None and _now() - self._renewed > self._seconds:
            self._renew()
        if self._successor is not None:
            raise UserError(
                f"another process ({_name(self._successor)}) has taken over {self._folder} after "
                f"this one was silent for {self._seconds:g} seconds; this one stops"
            )

    def renew_until_released(self) -> None:
        """Renew in time until `release`; what fails is tried again."""
        while not self._ended.wait(self._seconds / _RENEWALS) and self._successor is None:
            with contextlib.suppress(OSError):
                self._renew()

    def release(self) -> None:
        """Let the next one have the folder at once."""
        self._ended.set()
        with self._one, contextlib.suppress(OSError):
            if self._successor is None:
                storage.write_bytes(self._path(self._number), self._body(released=True))

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
            storage.write_bytes(self._path(self._number), self._body())
            self._renewed = began

    def _body(self, *, released: bool = False) -> bytes:
        content = {**self._owner, "renewals": self._renewals, "released": released}
        return json.dumps(content, indent=1).encode()

    def _path(self, number: int) -> Path:
        return self._folder / _FOLDER / f"{number:06d}"

    def _numbers(self) -> list[int]:
        found = storage.names(self._folder / _FOLDER)
        return sorted(int(name) for name in found if name.isdecimal())

    def _last(self) -> tuple[int, bytes]:
        """Number and content of the newest holder's object; 0 where there was none."""
        number = max(self._numbers(), default=0)
        if number == 0:
            return 0, b""
        try:
            return number, storage.read_bytes(self._path(number))
        except FileNotFoundError:  # deleted by hand, or its store is slow to show it
            return number, b""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Lease]:
    """Hold a folder of an object store.

    Args:
        folder: to hold.

    Yields:
        The lease; call its `check` before every write.

    Raises:
        UserError: another process holds it.
    """
    lease = Lease(folder, lease_seconds())
    lease.acquire()
    threading.Thread(target=lease.renew_until_released, daemon=True).start()
    try:
        yield lease
    finally:
        lease.release()


def _now() -> float:
    """Seconds that also pass while the machine sleeps, whatever is done to its calendar."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _parse(content: bytes) -> dict[str, Any]:
    """A holder's object, whatever is in it."""
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
    """What no other process has: the boot, the pid's namespace, the pid, its start; on Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [boot, os.readlink("/proc/self/ns/pid"), pid, _started(pid)]
    except (OSError, ValueError, IndexError):
        return None


def _started(pid: int) -> int:
    """When a process began, in ticks since the boot; -1 once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended: no need to wait for it."""
    told = holder["process"]
    if not isinstance(told, list) or len(told) != 4 or not isinstance(told[2], int):
        return False
    here = _process_name(told[2])
    return here is not None and here[:3] == told[:3] and here[3] != told[3]
