"""Where an update's time goes: a profiler's trace read beside the compiled program's text.

Every kernel in the trace carries the name of its instruction; the program's text says what that
instruction computes, for which layer, and how large its operands and results are.
"""

from __future__ import annotations

import collections
import functools
import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<result>\(.*?\)|\S+) (?P<opcode>[a-z][\w\-]*)\("
    r"(?P<operands>[^)]*)\)"
)
_NAMES_ALONE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("all-reduce-done", "copy-done", "async-done"),
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One instruction of a compiled program.

    Attributes:
        group: what it does, in words.
        bytes: of its operands and results.
    """

    group: str
    bytes: int


def instructions(program: str) -> dict[str, Instruction]:
    """The instructions of a compiled program's text, by name.

    Example:
        >>> parameter = "  %a = f32[2,2]{1,0} parameter(0)"
        >>> product = '  %dot.1 = f32[2,2]{1,0} dot(%a, %a), metadata={op_name="jit(f)/dot"}'
        >>> instructions(chr(10).join([parameter, product]))["dot.1"]
        Instruction(group='matrix product', bytes=48)
    """
    found, sizes = {}, {}
    for line in program.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        result = sizes[match["name"]] = _bytes(match["result"])
        names = re.findall(r"%?([\w.\-]+)(?:,|$)", match["operands"])
        moved = result + sum(sizes.get(name, 0) for name in names)
        found[match["name"]] = Instruction(_group(match["opcode"], line), moved)
    return found


def in_an_update(program: str) -> dict[str, Any]:
    """What one pass of a program's longest loop launches, by the compiled program's text.

    Args:
        program: the text of a program that takes updates in a loop.

    Returns:
        ``kernels``: instructions that are not mere names for what others computed, those of a loop
        within as often as it turns; ``bytes``: of their operands and results; ``cycles``: the sum
        of what a TPU's compiler estimates for most of them, 0 where none does; ``groups``: name ->
        the same, the most bytes first.
    """
    known = instructions(program)
    computations: dict[str, list[tuple[str, str, str]]] = {}
    current: list[tuple[str, str, str]] = []
    for line in program.splitlines():
        if start := re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[start[1]] = []
        elif match := _INSTRUCTION.match(line):
            current.append((match["name"], match["opcode"], line))

    @functools.cache
    def within(computation: str) -> dict[str, collections.Counter[str]]:
        groups: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for name, opcode, line in computations[computation]:
            if opcode in ("call", "while"):
                turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                called = re.search(r"(?:to_apply|body)=%?([\w.\-]+)", line)
                times = int(turns[1]) if turns else 1
                for group, row in within(called[1]).items() if called else ():
                    groups[group].update({what: times * number for what, number in row.items()})
            elif opcode not in _NAMES_ALONE:
                found = re.search(r'"estimated_cycles":"(\d{1,15})"', line)  # longer: not known
                cycles = {"cycles": int(found[1])} if found else {}
                groups[known[name].group].update(
                    {"kernels": 1, "bytes": known[name].bytes, **cycles}
                )
        return groups

    def total(groups: Mapping[str, Mapping[str, int]], what: str) -> int:
        return sum(row.get(what, 0) for row in groups.values())

    loops = [within(body) for body in re.findall(r"\bbody=%?([\w.\-]+)", program)]
    longest = max(loops, key=lambda groups: total(groups, "kernels"), default={})
    return {
        **{what: total(longest, what) for what in ("kernels", "bytes", "cycles")},
        "groups": dict(sorted(longest.items(), key=lambda item: -item[1]["bytes"])),
    }


def _bytes(shape: str) -> int:
    total = 0
    for kind, dimensions in _ARRAY.findall(shape):
        size = _BYTES.get(kind, 4)
        for dimension in filter(None, dimensions.split(",")):
            size *= int(dimension)
        total += size
    return total


def _group(opcode: str, line: str) -> str:
    target = re.search(r'custom_call_target="([^"]*)"', line)
    name = re.search(r'op_name="([^"]*)"', line)
    path = name[1] if name else ""
    backward = "transpose(" in path
    called = target[1].lower() if target else ""
    if "conv" in called or opcode == "convolution":
        kinds = {"backwardinput": "images' gradient", "backwardfilter": "kernels' gradient"}
        kind = next((words for part, words in kinds.items() if part in called), "")
        return "convolution" + (f", {kind}" if kind else ", backward" if backward else ", forward")
    if opcode.startswith(("all-", "reduce-scatter", "collective")):
        return "sums over devices"
    triton_product = re.search(r"__triton\w*gemm", line)
    if "gemm" in called or "cublas" in called or triton_product or opcode == "dot":
        return "matrix product"
    if opcode in ("copy", "transpose", "copy-start") or path.endswith("/transpose"):
        return "copies and transpositions"
    scopes = path.split("/")
    if not any("jvp(" in scope for scope in scopes):
        return "optimizer, augmentation and the rest"
    way = "backward" if backward else "forward"
    if any("norm" in scope.lower() for scope in scopes):
        return f"normalisation, {way}"
    if any(re.search(r"conv(?!ert)", scope, re.IGNORECASE) for scope in scopes):
        return "convolutions' casts and pads"
    return f"activation, shortcut and pools, {way}"


def _library_group(kernel: str) -> str:
    """What a kernel does that the program's text does not name, by its name."""
    name = kernel.lower()
    if any(part in name for part in ("conv", "fprop", "dgrad", "wgrad", "cudnn")):
        return "convolution, unnamed"
    if any(part in name for part in ("gemm", "cutlass", "nvjet", "cublas")):
        return "matrix product"
    return "copies and fills" if name.startswith("mem") else "not in the program's text"


def by_group(folder: Path, program: str, steps: int) -> dict[str, Any]:
    """Time, kernels and bytes of each group in one update.

    Args:
        folder: of a trace of `steps` updates.
        program: the compiled program's text.
        steps: updates in the trace.

    Returns:
        ``groups``: name -> ``seconds``, ``kernels``, ``bytes``, ``bytes_per_second``, the longest
        first; ``seconds``: of all kernels; ``kernels``: how many; ``longest``: the twelve longest
        instructions. Bytes are those of operands and results, an upper bound where a kernel reads
        a part.
    """
    known = instructions(program)
    # A kernel that a graph launched carries its own name alone: its instruction's, rewritten.
    known |= {re.sub(r"\W", "_", name): one for name, one in known.items()}
    rows: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    longest: collections.Counter[str] = collections.Counter()
    for name, seconds in _events(folder):
        one = known.get(name) or Instruction(_library_group(name), 0)
        rows[one.group].update(seconds=seconds / steps, kernels=1 / steps, bytes=one.bytes / steps)  # pyright: ignore[reportCallIssue]
        longest[name] += seconds / steps  # pyright: ignore[reportArgumentType]
    ordered = sorted(rows.items(), key=lambda item: -item[1]["seconds"])
    groups: dict[str, Mapping[str, float]] = {
        name: {**row, "bytes_per_second": row["bytes"] / row["seconds"] if row["seconds"] else 0.0}
        for name, row in ordered
    }
    return {
        "seconds": sum(row["seconds"] for row in groups.values()),
        "kernels": sum(row["kernels"] for row in groups.values()),
        "groups": groups,
        "longest": [
            {"name": name, "group": known[name].group if name in known else "", "seconds": seconds}
            for name, seconds in longest.most_common(12)
        ],
    }


def trace_file(folder: Path) -> Path:
    """The newest trace below a folder."""
    return max(folder.rglob("perfetto_trace.json.gz"), key=lambda found: found.stat().st_mtime)


def _events(folder: Path) -> list[tuple[str, float]]:
    """(instruction, seconds) of every kernel in a trace: of the device, if it has a track."""
    events = json.loads(gzip.decompress(trace_file(folder).read_bytes()))["traceEvents"]
    processes, threads = {}, {}
    for event in events:
        name = str(event.get("args", {}).get("name", ""))
        if event.get("name") == "process_name":
            processes[event["pid"]] = name
        elif event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = name
    # On a card: its streams, not the host's nor a summary's account of the same kernels.
    streams = {
        (pid, tid)
        for (pid, tid), name in threads.items()
        if "gpu" in processes.get(pid, "").lower() and name.lower().startswith("stream")
    }
    found = []
    for event in events:
        if streams and (event.get("pid"), event.get("tid")) not in streams:
            continue
        name = event.get("args", {}).get("hlo_op")
        if name is None and streams and event.get("ph") == "X":
            name = event["name"]
        # A loop's time is that of the kernels within it.
        if name is not None and not str(name).startswith(("while", "call", "conditional")):
            found.append((str(name), event.get("dur", 0) * 1e-6))
    return found


def table(kernels: Mapping[str, Any]) -> str:
    """Groups as a Markdown table, times in ms."""
    lines = ["| kernels | ms | share | number | GB/s |", "| --- | --- | --- | --- | --- |"]
    whole = kernels["seconds"] or 1.0
    for name, row in kernels["groups"].items():
        lines.append(
            f"| {name} | {1e3 * row['seconds']:.3f} | {row['seconds'] / whole:.0%} | "
            f"{row['kernels']:.0f} | {row['bytes_per_second'] / 1e9:.0f} |"
        )
    lines.append(f"| all | {1e3 * kernels['seconds']:.3f} | | {kernels['kernels']:.0f} | |")
    return "\n".join(lines)
