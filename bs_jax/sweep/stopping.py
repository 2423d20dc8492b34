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
    a signal does not run. So a thread waits for it as well. It answers at once, and when the grace
    is over, or at a second signal, it ends the process with the same exit code. What is on disk is
    whole at any moment, and the next start resumes from the last checkpoint.

    Args:
        grace_seconds: from the signal to the end, whatever the process is doing.
        before_exit: called before such an end.
        answer: called with a line for the user when the first signal comes.

    Attributes:
        number: of the signal that came, or None.
    """

    def __init__(
        self,
        grace_seconds: float = GRACE_SECONDS,
        before_exit: Callable[[], None] = lambda: None,
        answer: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._grace_seconds, self._before_exit = grace_seconds, before_exit
        self._answer = answer
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
        self._answer(
            f"{signal.Signals(number).name}: stopping at the next point to save, after at most "
            f"{self._grace_seconds:g} s; once more to stop at once"
        )
        left, _, _ = select.select([self._reader], [], [], self._grace_seconds)
        if left and os.read(self._reader, 1)[0] not in _SIGNALS:
            return  # the context was left
        self._before_exit()
        reason = (
            "stopped at once"
            if left
            else f"not at a point to save after {self._grace_seconds:g} seconds"
        )
        print(
            f"{reason}; the last checkpoint is kept: give the same command again to go on",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + number)
