"""Programs in processes of their own: they compile side by side and are timed by turns.

A worker builds one program, says that it is ready and then does a turn whenever it is told to. So
compilers get all cores at once, a program that does not compile in time costs nothing but itself,
and on the clock only one program computes at a time.

    specs = {"ours": {"kind": "ours", ...}, "eager": {"kind": "torch", ...}}
    with _workers.crew(specs, logs) as crew:
        crew.start(specs)
        crew.wait(specs, until=time.monotonic() + 150)
        times = crew.turns(rounds=7, until=time.monotonic() + 60)
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]
_TURN_SECONDS = 60.0  # a turn that takes longer is a program that hangs
_NO_ANSWER = "no answer in the time it had"


class Program(Protocol):
    """What a worker runs."""

    def run(self) -> None:
        """Do one turn's work and wait for the device."""

    def describe(self) -> dict[str, Any]:
        """What is known of the program besides its time."""
        ...


class Worker:
    """A process that holds one program."""

    def __init__(self, name: str, spec: Mapping[str, Any], log: Path) -> None:
        self.name = name
        self.ready: dict[str, Any] | None = None
        self.failure: str | None = None
        self.started = time.monotonic()
        environment = dict(os.environ, OMP_NUM_THREADS="1", **spec.get("environment", {}))
        environment["PYTHONPATH"] = os.pathsep.join(
            part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part
        )
        if flags := spec.get("xla_flags"):
            environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks._workers", json.dumps(dict(spec))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=ROOT,
                start_new_session=True,  # so that a compiler's own processes end with it
            )
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put({"error": f"the process ended: {self._last_words()}"})

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line]
        return lines[-1][:300] if lines else "without a word"

    def receive(self, until: float) -> dict[str, Any] | None:
        """The next answer, or None where it failed or did not come in time (see `failure`)."""
        if self.failure:
            return None
        try:
            answer = self._answers.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            answer = {"error": _NO_ANSWER}
        if "error" in answer:
            self.failure = answer["error"]
            self.stop()
            return None
        return answer

    def ask(self, request: str, until: float) -> dict[str, Any] | None:
        """Send a request and wait for its answer, as `receive`."""
        if self.failure:
            return None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its last words say why
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        return self.receive(until)

    def stop(self) -> None:
        """End the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Crew:
    """Workers that are timed against each other."""

    def __init__(self, specs: Mapping[str, Mapping[str, Any]], logs: Path) -> None:
        self._specs, self._logs = specs, logs
        self.workers: dict[str, Worker] = {}

    def start(self, names: Iterable[str]) -> None:
        """Let workers begin to compile, side by side."""
        for name in names:
            safe = "".join(letter if letter.isalnum() else "_" for letter in name)
            self.workers[name] = Worker(name, self._specs[name], self._logs / f"{safe}.log")

    def wait(self, names: Iterable[str], until: float) -> None:
        """Wait for workers that were started; who is not ready in time is ended."""
        for name in names:
            worker = self.workers[name]
            worker.ready = worker.receive(until)
            if worker.failure == _NO_ANSWER:
                waited = time.monotonic() - worker.started
                worker.failure = f"not compiled in the {waited:.0f} s that it had"

    def stop(self) -> None:
        """End all of them."""
        for worker in self.workers.values():
            worker.stop()

    @property
    def able(self) -> list[str]:
        """Names of those that are ready and have not failed."""
        return [
            name for name, worker in self.workers.items() if worker.ready and not worker.failure
        ]

    @property
    def failures(self) -> dict[str, str]:
        """What became of the others."""
        return {name: w.failure for name, w in self.workers.items() if w.failure}

    def turns(self, rounds: int, until: float, names: list[str] | None = None) -> dict[str, Any]:
        """Seconds of each program's turns, one at a time, in an order that changes by round.

        Whoever fails is left out, and so is a round that the time cut short.
        """
        wanted = self.able if names is None else names
        times: dict[str, list[float]] = {name: [] for name in wanted}
        draw = random.Random(0)
        for _ in range(rounds):
            order = [name for name in wanted if not self.workers[name].failure]
            draw.shuffle(order)  # nobody always follows the same other one
            for name in order:
                if time.monotonic() > until:
                    break
                if answer := self.workers[name].ask("turn", time.monotonic() + _TURN_SECONDS):
                    times[name].append(answer["seconds"])
        times = {n: t for n, t in times.items() if t and not self.workers[n].failure}
        complete = min((len(turns) for turns in times.values()), default=0)
        return {name: turns[:complete] for name, turns in times.items()}


@contextlib.contextmanager
def crew(specs: Mapping[str, Mapping[str, Any]], logs: Path) -> Iterator[Crew]:
    """Workers for these specs, which start where told to; all are ended with the context.

    Args:
        specs: name -> ``kind`` ("ours" or "torch"), that kind's own settings, and maybe
            ``environment`` and ``xla_flags`` of its process, and ``nice``: to let others compile
            first.
        logs: folder for what the processes write.
    """
    logs.mkdir(parents=True, exist_ok=True)
    found = Crew(specs, logs)
    try:
        yield found
    finally:
        found.stop()


def build(spec: Mapping[str, Any]) -> Program:
    """The program that a spec asks for."""
    if spec["kind"] == "ours":
        from benchmarks import _programs

        return _programs.Training(spec)
    from benchmarks import torch_training

    return torch_training.Training(spec)


def serve(spec: Mapping[str, Any]) -> None:
    """Be a worker: answers go to the standard output, which nothing else may write to."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    os.nice(spec.get("nice", 0))
    try:
        start = time.perf_counter()
        program = build(spec)
        program.run()
        first = time.perf_counter() - start
        program.run()
        answer({"seconds_to_first_turn": first})
        for line in sys.stdin:
            if line.strip() == "turn":
                start = time.perf_counter()
                program.run()
                answer({"seconds": time.perf_counter() - start})
            else:
                answer(program.describe())
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {str(error).strip()[:300]}"})
        raise


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
