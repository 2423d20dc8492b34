"""Runs commands through the zygote and holds what they leave against an undisturbed run."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECIPE = HERE / "recipe.py"
TRAIN = ("--mode=train",)
SWEEP = ("--sweep=tiny", "--run_axis=vmap")
# 16, 32 and 64 examples an update, as the measured noise allows; a checkpoint at each change.
RAMP = (
    "--mode=train",
    "--config.batch_size=64",
    "--config.scaling.rule=noise_aware",
    "--config.batch_ramp.kind=noise",
    "--config.batch_ramp.share=50.0",
    "--config.checkpoint_every_examples=32",
)


class Bench:
    """A folder to work in, a zygote, and the undisturbed outcome of each kind of command.

    A context manager: at its end no process is left.

    Args:
        folder: to work in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._buffer, self._ended = b"", {}
        self._pids: list[int] = []
        self._wanted: dict[tuple[str, ...], dict] = {}
        self.seconds: dict[tuple[str, ...], float] = {}
        self.changes: dict[tuple[str, ...], list[str]] = {}

    def __enter__(self) -> Bench:
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": os.environ.get(
                "JAX_COMPILATION_CACHE_DIR", str(self.folder / "cache")
            ),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu",
        }
        self._zygote = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        return self

    def __exit__(self, *failure: object) -> None:
        assert self._zygote.stdin is not None
        self._zygote.stdin.close()
        self._zygote.wait(30)
        assert self._zygote.stdout is not None
        self._zygote.stdout.close()

    def start(self, kind: tuple[str, ...], workdir: Path, *more: str, **request: object) -> int:
        """Start the command of a kind on a work folder; its process id."""
        request |= {
            "flags": [f"--config={RECIPE}", *kind, f"--workdir={workdir}", *more],
            "output": str(self.output(workdir)),
        }
        assert self._zygote.stdin is not None
        self._zygote.stdin.write(json.dumps(request).encode() + b"\n")
        self._zygote.stdin.flush()
        while not self._pids:
            self._pump(10)
        return self._pids.pop()

    def output(self, workdir: Path) -> Path:
        """What the commands on a work folder wrote, one after another."""
        return self.folder / f"{workdir.name}.out"

    def wait(self, pid: int, seconds: float = 120) -> int:
        """Wait for a command; its exit code, negative for a signal."""
        deadline = time.monotonic() + seconds
        while pid not in self._ended:
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                raise TimeoutError(f"process {pid} did not end within {seconds} seconds")
            self._pump(0.2)
        return self._ended.pop(pid)

    def running(self, pid: int) -> bool:
        """Whether a command has not ended yet."""
        self._pump(0)
        return pid not in self._ended

    def run(self, kind: tuple[str, ...], workdir: Path, *more: str, **request: object) -> int:
        """Do a command to its end."""
        return self.wait(self.start(kind, workdir, *more, **request))

    def _pump(self, seconds: float) -> None:
        assert self._zygote.stdout is not None
        if not select.select([self._zygote.stdout], [], [], seconds)[0]:
            return
        read = os.read(self._zygote.stdout.fileno(), 1 << 16)
        if not read:
            raise RuntimeError("the zygote ended")
        *lines, self._buffer = (self._buffer + read).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            if "pid" in answer:
                self._pids.append(answer["pid"])
            else:
                self._ended[answer["ended"]] = answer["code"]

    def undisturbed(self, kind: tuple[str, ...]) -> dict:
        """What the command leaves if nothing happens to it; timed and its changes listed once."""
        if kind not in self._wanted:
            for name in ("first", "again"):  # the second time with everything compiled
                workdir = self.folder / f"undisturbed-{len(self._wanted)}-{name}"
                log = self.folder / f"{workdir.name}.changes"
                began = time.monotonic()
                trap = {"root": str(workdir), "at": -1, "log": str(log)}
                code = self.run(kind, workdir, trap=trap)
                if code != 0:
                    raise RuntimeError(self.output(workdir).read_text())
                self.seconds[kind] = time.monotonic() - began
                self.changes[kind] = log.read_text().splitlines()
            self._wanted[kind] = outcome(workdir)
        return self._wanted[kind]

    def proves(self, kind: tuple[str, ...], workdir: Path, *more: str) -> str:
        """Give the same command again; "" if all is as if nothing had happened, else what is wrong.

        It must end with code 0, and leave each run once, with the same metrics to the bit.
        """
        output = self.output(workdir)
        before = len(output.read_text()) if output.exists() else 0
        code = self.run(kind, workdir, *more)
        said = output.read_text()[before:]
        if code != 0:
            return f"exit code {code}: {said[-400:]}"
        if "Traceback" in said:
            return f"it told a traceback: {said[:400]}"
        wanted, found = self.undisturbed(kind), outcome(workdir)
        wrong = [name for name in {*wanted, *found} if wanted.get(name) != found.get(name)]
        if wrong:
            return f"another outcome: {', '.join(sorted(wrong))}"
        shutil.rmtree(workdir, ignore_errors=True)
        return ""


def outcome(workdir: Path) -> dict[str, object]:
    """All that must not depend on what happened on the way: finished runs, metrics, the table."""
    found: dict[str, object] = {}
    for done in sorted(workdir.rglob("DONE")):
        run = done.parent
        name = str(run.relative_to(workdir))
        summary = json.loads((run / "summary.json").read_text())
        found[f"{name}: metrics"] = (run / "metrics.jsonl").read_bytes()
        found[f"{name}: summary"] = [
            summary[field] for field in ("run_id", "status", "final", "step", "examples")
        ]
    for path in workdir.glob("runs/*"):
        found.setdefault(f"runs/{path.name}: metrics", None)  # a folder that is not done
    table = workdir / "report" / "results.csv"
    if table.exists():
        found["table"] = table.read_text()
    return found
