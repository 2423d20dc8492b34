"""A process with everything imported that forks one child a command: a start without its price.

`Zygote` starts the process and gives it commands. A child is ``python main.py ...`` in all but
that its imports are done. A request may ask for a trap, which kills the child by SIGKILL at its
n-th call that changes a file below a folder, before the call; or for one that kills it at a change
of its batch size.

Between the two go lines of JSON: requests on the process's standard input, answers on its output.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod")


class Command:
    """A command that was started; what `subprocess.Popen` would tell of it.

    Attributes:
        pid: its process id, which is that of its process group too.
        output: the file with what it wrote, standard error included unless it has a file.
        returncode: its exit code, negative for a signal; ``None`` while it was not seen to end.
    """

    def __init__(self, zygote: Zygote, pid: int, output: Path) -> None:
        self._zygote, self.pid, self.output = zygote, pid, output
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, ``None`` if it has not ended."""
        return self._ended(0)

    def wait(self, seconds: float = 120) -> int:
        """Wait for its end; its exit code."""
        deadline = time.monotonic() + seconds
        while (code := self._ended(0.2)) is None:
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(f"process {self.pid} did not end within {seconds} seconds")
        return code

    def communicate(self, timeout: float = 120) -> tuple[str, None]:
        """Wait for its end; what it wrote."""
        self.wait(timeout)
        return self.output.read_text(), None

    def send_signal(self, number: int) -> None:
        """Signal it, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def _ended(self, seconds: float) -> int | None:
        if self.returncode is None:
            self._zygote.pump(seconds, self.pid)
            self.returncode = self._zygote.ended.pop(self.pid, None)
        return self.returncode


class Zygote:
    """The process, seen from outside.

    Args:
        environment: of the imports, which read what is JAX's; each command has its own.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self.ended: dict[int, int] = {}
        self._buffer, self._pids = b"", []
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def close(self) -> None:
        """End it and every command that is left."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def start(
        self,
        flags: Sequence[str],
        output: Path,
        *,
        errors: Path | None = None,
        cwd: Path = ROOT,
        environment: dict[str, str] | None = None,
        trap: dict[str, object] | None = None,
        resize: dict[str, object] | None = None,
        clock: float = 0.0,
    ) -> Command:
        """Start ``python main.py`` with flags.

        Args:
            flags: of the command line.
            output: what it writes is added to this file, or goes to this terminal.
            errors: the same for its standard error; ``None``: ``output`` too.
            cwd: its working directory.
            environment: its variables; ``None``: this process's.
            trap: ``root``, ``at`` and ``log``: kill it before change ``at`` below ``root``, and
                log the changes.
            resize: ``batch_size`` and ``recorded``: kill it after the first updates of this size,
                before or after they are recorded.
            clock: seconds by which its wall clock jumps forth and back.
        """
        request = {
            "argv": [str(ROOT / "main.py"), *flags],
            "output": str(output),
            "errors": str(errors or output),
            "cwd": str(cwd),
            "environment": dict(os.environ) if environment is None else environment,
            "trap": trap,
            "resize": resize,
            "clock": clock,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        while not self._pids:
            self.pump(10)
        return Command(self, self._pids.pop(), output)

    def pump(self, seconds: float, pid: int | None = None) -> None:
        """Read answers, waiting for one unless the end of a process is known."""
        assert self._process.stdout is not None
        seconds = 0 if pid in self.ended else seconds
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return
        read = os.read(self._process.stdout.fileno(), 1 << 16)
        if not read:
            raise RuntimeError("the zygote ended")
        *lines, self._buffer = (self._buffer + read).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            if "pid" in answer:
                self._pids.append(answer["pid"])
            else:
                self.ended[answer["ended"]] = answer["code"]


def changes(root: str, on_change) -> None:
    """Call ``on_change("what path")`` before every call of Python's that changes files in root."""

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & _WRITING:
                return
        elif event in _CHANGES:
            path = args[0]
        else:
            return
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(root):
            on_change(f"{event.removeprefix('os.')} {os.path.relpath(path, root)}")

    sys.addaudithook(hook)


def _become(request: dict) -> None:
    """Turn this forked child into the command that a request names."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    null = os.open(os.devnull, os.O_RDONLY)
    appending = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY
    out, errors = (os.open(request[name], appending) for name in ("output", "errors"))
    for source, target in ((null, 0), (out, 1), (errors, 2)):
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    trap = request["trap"]
    if trap:
        seen = 0
        log = os.open(trap["log"], appending) if trap["log"] else None

        def count(what: str) -> None:
            nonlocal seen
            seen += 1
            if log is not None:
                os.write(log, f"{what}\n".encode())
            if seen == trap["at"]:
                os.write(1, f"killed before: {what}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

        changes(trap["root"], count)
    if request["resize"]:
        _die_at_a_resize(**request["resize"])
    if request["clock"]:
        _jumping_clock(request["clock"])
    sys.argv = request["argv"]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
    sys.stdout.flush()
    sys.stderr.flush()
    import atexit

    atexit._run_exitfuncs()
    os._exit(code)


def _die_at_a_resize(batch_size: int, recorded: bool) -> None:
    """Die once the first updates of a batch size are done: before or after they are recorded."""
    from bs_jax.training.session import Session

    record = Session.record

    def dying(session, chunk, *rest):
        new = chunk.batch_size == batch_size
        if recorded or not new:
            record(session, chunk, *rest)
        if new:
            when = "after" if recorded else "before"
            os.write(1, f"killed {when} the first record of batch size {batch_size}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    Session.record = dying


def _jumping_clock(seconds: float) -> None:
    """Let the wall clock jump forth and back at every call."""
    real, calls = time.time, iter(range(1 << 60))
    time.time = lambda: real() + (seconds if next(calls) % 2 else -seconds)


def main() -> None:
    """Serve until the input ends; then kill whatever is left."""
    warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
    sys.path[0] = str(ROOT)  # as of main.py
    import matplotlib.figure  # noqa: F401
    import ml_collections.config_flags  # noqa: F401
    import orbax.checkpoint  # noqa: F401

    import bs_jax.cli.dispatch
    import bs_jax.training.train  # noqa: F401

    gc.collect()
    gc.freeze()  # no child looks for garbage among what is imported
    children: set[int] = set()
    buffer = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.005 if children else None)
        if ready:
            read = os.read(0, 1 << 16)
            if not read:
                break
            buffer += read
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            child = os.fork()
            if child == 0:
                os.setpgid(0, 0)  # a group of its own, as at a terminal
                _become(json.loads(line))
            children.add(child)
            os.setpgid(child, child)  # by whoever comes first
            print(json.dumps({"pid": child}), flush=True)
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.discard(child)
                answer = {"ended": child, "code": os.waitstatus_to_exitcode(status)}
                print(json.dumps(answer), flush=True)
    for child in children:
        os.killpg(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
