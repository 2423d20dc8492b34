"""A process with everything imported that forks one child a command: a start without its price.

Requests are lines of JSON on standard input, answers lines of JSON on standard output. A child is
``python main.py ...`` in all but that its imports are done. A request may ask for a trap, which
kills the child by SIGKILL at its n-th call that changes a file below a folder, before the call; or
for one that kills it at a change of its batch size.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod")


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
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    trap = request.get("trap")
    if trap:
        seen = 0
        log = os.open(trap["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND) if trap["log"] else None

        def count(what: str) -> None:
            nonlocal seen
            seen += 1
            if log is not None:
                os.write(log, f"{what}\n".encode())
            if seen == trap["at"]:
                os.write(1, f"killed before: {what}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

        changes(trap["root"], count)
    if request.get("resize"):
        _die_at_a_resize(**request["resize"])
    if request.get("clock"):
        _jumping_clock(request["clock"])
    sys.argv = ["main.py", *request["flags"]]
    code = 0
    try:
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
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
    sys.path.insert(0, str(ROOT))
    import flax.linen  # noqa: F401
    import jax  # noqa: F401
    import ml_collections.config_flags  # noqa: F401
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401

    children: set[int] = set()
    buffer = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.005)
        if ready:
            read = os.read(0, 1 << 16)
            if not read:
                break
            buffer += read
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            child = os.fork()
            if child == 0:
                _become(json.loads(line))
            children.add(child)
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
