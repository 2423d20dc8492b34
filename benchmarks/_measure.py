"""Times of programs that take turns, so that a disturbance meets all of them, and how to tell them.

times = interleave({"plain": run_plain, "ours": run_ours}, rounds=20)
print(table(summary(times, against="plain")))
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("bs_jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch")


def interleave(
    programs: Mapping[str, Callable[[], Any]], *, rounds: int = 10, warmup: int = 2
) -> dict[str, list[float]]:
    """Time programs in rounds, each once a round, in an order that changes from round to round.

    Args:
        programs: name -> a call that does the work; JAX arrays that it returns are waited for.
        rounds: timed calls of each.
        warmup: calls of each before, which compile.

    Returns:
        name -> seconds of each call, in order of rounds.
    """
    _warm_up(programs, warmup)
    times: dict[str, list[float]] = {name: [] for name in programs}
    order, draw = list(programs), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)  # nobody always runs in the caches that the same other one left
        for name in order:
            start = time.perf_counter()
            _wait(programs[name]())
            times[name].append(time.perf_counter() - start)
    return times


def _warm_up(programs: Mapping[str, Callable[[], Any]], calls: int) -> None:
    import jax

    if jax.default_backend() != "cpu" and calls:
        # Compilers for a card leave most cores idle: let the programs compile side by side.
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lambda run: _wait(run()), programs.values()))
    for run in programs.values():
        for _ in range(calls):
            _wait(run())


def _wait(result: Any) -> None:
    if result is not None:
        import jax

        jax.block_until_ready(result)


def summary(times: Mapping[str, Sequence[float]], against: str = "plain") -> dict[str, Any]:
    """Medians, and ratios to one of the programs with an interval.

    A ratio is the median over rounds of the ratio within a round: what slows a round slows both.
    Its interval is the distribution-free one of a median, from the order statistics (sign test).

    Args:
        times: of `interleave`.
        against: the program that ratios are taken to.

    Returns:
        name -> ``seconds`` (median), ``ratio``, ``ratio_low``, ``ratio_high`` (95 %; fewer than six
        rounds give less), ``rounds``.
    """
    found = {}
    for name, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(seconds, times[against], strict=True))
        low, high = _median_interval(len(ratios))
        found[name] = {
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "ratio_low": ratios[low],
            "ratio_high": ratios[high],
            "rounds": len(ratios),
        }
    return found


def _median_interval(count: int, confidence: float = 0.95) -> tuple[int, int]:
    """Ranks of the order statistics that enclose the median with the given confidence."""
    below, rank = 0.0, 0
    while rank < count // 2:
        below += math.comb(count, rank) / 2**count
        if 2 * below > 1 - confidence:
            break
        rank += 1
    rank = max(rank - 1, 0)
    return rank, count - 1 - rank


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A summary as a Markdown table."""
    lines = ["| program | ms | ratio | 95 % interval |", "| --- | --- | --- | --- |"]
    for name, row in rows.items():
        interval = f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
        lines.append(f"| {name} | {1e3 * row['seconds']:.1f} | {row['ratio']:.3f} | {interval} |")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """What a time depends on: processor, cores, device, versions."""
    import jax

    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": cores,
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def read_json(path: str | os.PathLike[str]) -> Any:
    """What `write_json` wrote."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a result, with its folder."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
