"""Many faults one after another, each judged, and the table of them."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from .bench import Bench
from .faults import ALL, KILLS, Skipped, describe_kill, unmount


@dataclasses.dataclass
class Result:
    """Of one kind of fault: injections, runs that they were done to, what went wrong."""

    name: str
    injections: list[str] = dataclasses.field(default_factory=list)
    judged: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    skipped: str = ""


def run_campaign(
    folder: Path,
    kills: int,
    others: int,
    seed: int,
    *,
    chain: int = 3,
    kinds: Iterable[str] = tuple(ALL),
    say: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Inject faults until there are enough of each kind.

    Args:
        folder: to work in.
        kills: SIGKILLs in all, spread evenly over their kinds.
        others: injections of each other kind.
        seed: of what is done when.
        chain: kills of one run.
        kinds: which ones.
        say: told of each.

    Returns:
        A result a kind.
    """
    kinds = list(kinds)
    kill_kinds = [name for name in kinds if name in KILLS]
    results = []
    with Bench(folder, chain) as bench:
        for name in kinds:
            kind, inject = ALL[name]
            result = Result(name)
            results.append(result)
            wanted = -(-kills // len(kill_kinds)) if name in KILLS else others
            rng = random.Random(f"{seed} {name}")
            while len(result.injections) < wanted and not result.skipped:
                workdir = folder / f"fault-{len(results)}-{result.judged}"
                try:
                    done = inject(bench, workdir, rng)
                    wrong = bench.proves(kind, workdir)
                except Skipped as reason:
                    result.skipped = str(reason)
                    continue
                except (AssertionError, TimeoutError) as error:
                    done, wrong = [], f"{type(error).__name__}: {error}"
                finally:
                    unmount(workdir)
                result.injections += done
                result.judged += 1
                if wrong:
                    result.failures.append(f"{workdir.name} ({'; '.join(done)}): {wrong}")
                    if len(result.failures) > 5:
                        break
                say(f"{name}: {'; '.join(done) or 'over before it was hit'}: {wrong or 'as new'}")
    return results


def table(results: Iterable[Result]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| fault | injected | runs judged | same command finished, bit-equal |",
        "|---|--:|--:|---|",
    ]
    for result in results:
        verdict = result.skipped or f"{result.judged - len(result.failures)} of {result.judged}"
        lines.append(f"| {result.name} | {len(result.injections)} | {result.judged} | {verdict} |")
    places = collections.Counter(
        describe_kill(line)
        for result in results
        for line in result.injections
        if line.startswith("killed before: ")
    )
    shown = ", ".join(f"{name} {count}" for name, count in places.most_common())
    lines.append("")
    lines.append(f"Killed while at: {shown}.")
    return "\n".join(lines)
