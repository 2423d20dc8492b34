"""The faults: each does its harm to a command or its records and says what it did.

A fault takes the bench, a fresh work folder and a random generator; it returns a line for each
injection. What comes after, `Bench.proves` judges.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from .bench import RAMP, SWEEP, TRAIN, Bench

Fault = Callable[[Bench, Path, random.Random], list[str]]


class Skipped(Exception):
    """A fault that this machine does not permit; the message says why."""


def kill_at_a_change(kind: tuple[str, ...]) -> Fault:
    """SIGKILL before a random call that changes a file: any state of the disk a process leaves."""

    def inject(bench: Bench, workdir: Path, rng: random.Random) -> list[str]:
        bench.undisturbed(kind)
        places: dict[str, list[int]] = {}
        for number, what in enumerate(bench.changes[kind], 1):
            places.setdefault(describe_kill(what), []).append(number)
        done = []
        for _ in range(bench.chain):
            # Every place as often as the next, however few calls it has.
            at = rng.choice(places[rng.choice(sorted(places))])
            trap = {"root": str(workdir), "at": at, "log": ""}
            code = bench.run(kind, workdir, trap=trap)
            if code != -signal.SIGKILL:
                break  # a process that goes on makes fewer changes
            last = bench.output(workdir).read_text().strip().splitlines()[-1]
            done.append(last)
        return done

    return inject


def kill_at_a_time(kind: tuple[str, ...], number: signal.Signals = signal.SIGKILL) -> Fault:
    """A signal at a random time: within a step, a compilation, an evaluation, a native write."""

    def inject(bench: Bench, workdir: Path, rng: random.Random) -> list[str]:
        bench.undisturbed(kind)
        done = []
        for _ in range(bench.chain):
            command = bench.start(kind, workdir)
            seconds = rng.uniform(0.15, 0.9) * bench.seconds[kind]
            time.sleep(seconds)
            if command.poll() is not None:
                break
            command.send_signal(number)
            code = command.wait()
            if code == 0:
                break
            # Before the handler is there the signal has its usual effect.
            if code not in (-number, 128 + number):
                raise AssertionError(f"{number.name} ended a process with code {code}")
            done.append(f"{number.name} after {seconds:.2f} s: code {code}")
        return done

    return inject


def kill_at_a_resize(bench: Bench, workdir: Path, rng: random.Random) -> list[str]:
    """SIGKILL at each change, when the first update of the new size is done, or is recorded."""
    bench.undisturbed(RAMP)
    done = []
    kills = [(32, False), (32, True), (64, rng.random() < 0.5)]
    for size, recorded in kills:
        resize = {"batch_size": size, "recorded": recorded}
        code = bench.run(RAMP, workdir, resize=resize)
        said = bench.output(workdir).read_text()
        assert code == -signal.SIGKILL, (code, said)
        done.append(said.strip().splitlines()[-1])
    return done


def _leave_unfinished(bench: Bench, workdir: Path, rng: random.Random) -> None:
    """Leave a run that was killed with two checkpoints on disk."""
    bench.undisturbed(TRAIN)
    renames = [
        number
        for number, what in enumerate(bench.changes[TRAIN], 1)
        if what.startswith("rename checkpoints/") and "default" not in what
    ]
    at = rng.randint(renames[1] + 1, renames[2])
    trap = {"root": str(workdir), "at": at, "log": ""}
    code = bench.run(TRAIN, workdir, trap=trap)
    assert code == -signal.SIGKILL, code


def _damage(path: Path, rng: random.Random) -> str:
    """Cut a file short, or flip one of its bits."""
    content = path.read_bytes()
    if rng.random() < 0.5 or not content:
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
        return f"{path.name} cut short"
    position, bit = rng.randrange(len(content)), rng.randrange(8)
    damaged = bytearray(content)
    damaged[position] ^= 1 << bit
    path.write_bytes(damaged)
    return f"{path.name}: bit {bit} of byte {position} flipped"


def damage_a_checkpoint(bench: Bench, workdir: Path, rng: random.Random) -> list[str]:
    """Truncate a file of the newest checkpoint of a killed run, or flip a bit in it."""
    _leave_unfinished(bench, workdir, rng)
    steps = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    newest = max(steps, key=lambda path: int(path.name))
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    # The arrays lie in few of the files: those half of the time.
    arrays = [path for path in files if path.parent.name == "d"]
    return [_damage(rng.choice(arrays if rng.random() < 0.5 and arrays else files), rng)]


def damage_an_open_record(bench: Bench, workdir: Path, rng: random.Random) -> list[str]:
    """The same to a record of a killed run."""
    _leave_unfinished(bench, workdir, rng)
    name = rng.choice(["config.json", "hparams.json", "metrics.jsonl", "metrics.jsonl"])
    return [_damage(workdir / name, rng)]


def damage_a_finished_record(bench: Bench, workdir: Path, rng: random.Random) -> list[str]:
    """The same to a record of a run that was done."""
    assert bench.run(TRAIN, workdir) == 0
    name = rng.choice(["config.json", "hparams.json", "metrics.jsonl", "summary.json"])
    return [_damage(workdir / name, rng)]


def second_process(bench: Bench, workdir: Path, rng: random.Random) -> list[str]:
    """The same command twice at once."""
    started = []
    for _ in range(2):
        started.append(bench.start(TRAIN, workdir))
        time.sleep(rng.uniform(0, 0.3))
    codes = [command.wait() for command in started]
    assert codes == [0, 0], codes
    return ["two processes at once: codes 0 and 0"]


def jumping_clock(bench: Bench, workdir: Path, rng: random.Random) -> list[str]:
    """A clock that jumps by years while a run is killed and goes on, and files from the future."""
    years = rng.uniform(1, 30) * 365 * 86400
    bench.undisturbed(TRAIN)
    trap = {"root": str(workdir), "at": rng.randint(20, 50), "log": ""}
    code = bench.run(TRAIN, workdir, clock=years, trap=trap)
    assert code == -signal.SIGKILL, code
    for path in workdir.rglob("*"):
        moment = time.time() + rng.choice([-1, 1]) * years
        os.utime(path, (moment, moment))
    return [f"clock and files off by {years / 365 / 86400:.0f} years"]


def _mount(workdir: Path, *options: str) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(workdir)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise Skipped(f"no tmpfs can be mounted here: {reason.strip()}") from None


def _remount(workdir: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(workdir)], check=True)


def full_disk(bench: Bench, workdir: Path, rng: random.Random) -> list[str]:
    """A disk that is full after a random part of what the run writes; then there is room."""
    kilobytes = rng.choice([4, 16, 64, 128, 192, 256])
    _mount(workdir, "-o", f"size={kilobytes}k")
    code = bench.run(TRAIN, workdir)
    said = bench.output(workdir).read_text()
    assert code == 2, (code, said)
    assert "no space left while writing" in said, said
    assert "Traceback" not in said, said
    _remount(workdir, "size=64m")
    return [f"disk full at {kilobytes} KiB: code 2, one line"]


def read_only_workdir(bench: Bench, workdir: Path, rng: random.Random) -> list[str]:
    """A work folder that cannot be written, at the start or after a kill; then it can."""
    _mount(workdir)
    if rng.random() < 0.5:
        _leave_unfinished(bench, workdir, rng)
    _remount(workdir, "ro")
    code = bench.run(TRAIN, workdir)
    said = bench.output(workdir).read_text()
    assert code == 2, (code, said)
    assert "give a --workdir that can be written" in said, said
    _remount(workdir, "rw")
    return ["read-only: code 2, one line"]


def unmount(workdir: Path) -> None:
    """Undo `full_disk` and `read_only_workdir`."""
    if os.path.ismount(workdir):
        subprocess.run(["umount", "-l", str(workdir)], check=True)


def describe_kill(line: str) -> str:
    """What a killed process was at, for the table."""
    what = line.removeprefix("killed before: ")
    for part, name in (
        ("checkpoints", "a checkpoint"),
        ("metrics.jsonl", "the metrics"),
        ("summary.json", "the summary"),
        ("DONE", "the mark DONE"),
        ("results.", "the table"),
        ("report", "the report"),
    ):
        if part in what:
            return name
    return "its start"


ALL: dict[str, tuple[tuple[str, ...], Fault]] = {
    "SIGKILL before a change on disk, one run": (TRAIN, kill_at_a_change(TRAIN)),
    "SIGKILL at a random time, one run": (TRAIN, kill_at_a_time(TRAIN)),
    "SIGKILL before a change on disk, sweep and report": (SWEEP, kill_at_a_change(SWEEP)),
    "SIGKILL at a random time, sweep and report": (SWEEP, kill_at_a_time(SWEEP)),
    "SIGKILL at a change of batch size": (RAMP, kill_at_a_resize),
    "SIGTERM at a random time, one run": (TRAIN, kill_at_a_time(TRAIN, signal.SIGTERM)),
    "checkpoint truncated or a bit flipped": (TRAIN, damage_a_checkpoint),
    "record of an unfinished run truncated or flipped": (TRAIN, damage_an_open_record),
    "record of a finished run truncated or flipped": (TRAIN, damage_a_finished_record),
    "two processes on one run": (TRAIN, second_process),
    "clock jumps by years": (TRAIN, jumping_clock),
    "full disk": (TRAIN, full_disk),
    "read-only work folder": (TRAIN, read_only_workdir),
}
KILLS = tuple(name for name in ALL if name.startswith("SIGKILL"))
