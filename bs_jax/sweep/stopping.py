"""SIGTERM and SIGINT: asked politely, a process saves its state; asked too long ago, it ends."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

GRACE_SECONDS = 20.0  # Kubernetes, Slurm and spot machines kill 30 seconds after their SIGTERM
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A signal asked to stop; everything is saved.

    Args:
        signal_number: the signal, for the exit code 128 + n.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class StopRequest:
    """Notes the first SIGTERM or SIGINT instead of dying of it. A context manager.

    While a program compiles, or a long chunk or an evaluation runs, Python code that could look at
    a signal does not run. So a thread waits for it as well, and ends the process with the same
    exit code when the grace is over: what is on disk is whole at any moment, and the last
    checkpoint is gone on from. A second signal has its usual effect at once.

    Args:
        grace_seconds: from the signal to the end, come what may.
        before_exit: called before such an end.

    Attributes:
        number: of the signal that came, or None.
    """

    def __init__(
        self,
        grace_seconds: float = GRACE_SECONDS,
        before_exit: Callable[[], None] = lambda: None,
    ) -> None:
        self._grace_seconds, self._before_exit = grace_seconds, before_exit
        self._handlers: dict[int, Any] = {}
        self.number: int | None = None

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python gives signals to the main thread alone
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            self._handlers[number] = signal.signal(number, self._note)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *failure: Any) -> None:
        if not self._handlers:
            return
        self._restore()
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._writer, b"\0")
        self._watcher.join()
        os.close(self._reader)
        os.close(self._writer)

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _watch(self) -> None:
        number = os.read(self._reader, 1)[0]
        if number not in _SIGNALS:
            return  # the context was left
        self.number = number
        left, _, _ = select.select([self._reader], [], [], self._grace_seconds)
        if left:
            return
        self._before_exit()
        print(
            f"not at a point to save after {self._grace_seconds:g} seconds; the last checkpoint is "
            "kept: give the same command again to go on",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + number)
