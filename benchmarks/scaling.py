"""How the cost of a step grows: with devices, runs side by side, batch and image size.

python -m benchmarks.scaling --json=F

On a CPU the devices are threads of it, so two of them share what one has to itself with more
threads; the figure says what spreading costs. On accelerators it is the scaling.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from benchmarks import _measure, _programs


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--image_size", type=int, default=32, help="pixels")
    parser.add_argument("--batch_size", type=int, default=32, help="examples a step")
    parser.add_argument("--steps", type=int, default=10, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--devices", type=int, default=2, help="the most devices")
    parser.add_argument("--runs", type=int, default=4, help="the most runs side by side")
    parser.add_argument("--json", help="file to write the result to")
    flags = parser.parse_args(arguments)
    available = _programs.request_devices(flags.devices)
    base = {"image_size": flags.image_size, "batch_size": flags.batch_size}
    doubled = {name: {**base, name: 2 * value} for name, value in base.items()}
    programs = {"base": _program(flags, **base)}
    for name, sizes in doubled.items():
        programs[f"{name} {sizes[name]}"] = _program(flags, **sizes)
    runs = 2
    while runs <= flags.runs:
        programs[f"{runs} runs vmapped"] = _program(flags, **base, runs=runs)
        runs *= 2
    if available > 1:
        programs[f"{available} devices"] = _program(flags, **base, devices=available)
    times = _measure.interleave(programs, rounds=flags.rounds)
    rows = _measure.summary(
        {name: [t / flags.steps for t in turns] for name, turns in times.items()}, against="base"
    )
    print(f"{flags.model}, {flags.image_size} px, batch {flags.batch_size}: time a step")
    print(_measure.table(rows))
    result = {
        **{k: getattr(flags, k) for k in ("model", "image_size", "batch_size", "steps")},
        "programs": rows,
        "environment": _measure.environment(),
    }
    if flags.json:
        _measure.write_json(flags.json, result)
    return result


def _program(
    flags: argparse.Namespace, image_size: int, batch_size: int, **spread: int
) -> Callable[[], Any]:
    run = _programs.make_run(flags.model, image_size, batch_size)
    data = _programs.make_images(4 * batch_size, image_size)
    return _programs.train_chunks(run, data, flags.steps, **spread)


if __name__ == "__main__":
    main()
