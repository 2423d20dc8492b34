"""Runs commands through the zygote and holds what they leave against an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from .zygote import Command, Zygote

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
        chain: kills of one run, each of the process that went on from the last.
    """

    def __init__(self, folder: Path, chain: int = 3) -> None:
        self.folder, self.chain = folder, chain
        folder.mkdir(parents=True, exist_ok=True)
        self._wanted: dict[tuple[str, ...], dict] = {}
        self.seconds: dict[tuple[str, ...], float] = {}
        self.changes: dict[tuple[str, ...], list[str]] = {}

    def __enter__(self) -> Bench:
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **os.environ,
            "JAX_PLATFORMS": "cpu",
        }
        self._zygote = Zygote(environment)
        return self

    def __exit__(self, *failure: object) -> None:
        self._zygote.close()

    def start(self, kind: tuple[str, ...], workdir: Path, *more: str, **request: Any) -> Command:
        """Start the command of a kind on a work folder."""
        flags = [f"--config={RECIPE}", *kind, f"--workdir={workdir}", *more]
        return self._zygote.start(flags, self.output(workdir), **request)

    def output(self, workdir: Path) -> Path:
        """What the commands on a work folder wrote, one after another."""
        return self.folder / f"{workdir.name}.out"

    def run(self, kind: tuple[str, ...], workdir: Path, *more: str, **request: Any) -> int:
        """Do a command to its end; its exit code, negative for a signal."""
        return self.start(kind, workdir, *more, **request).wait()

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
