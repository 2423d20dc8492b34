"""Times of the convolution's forms against XLA's own: `python -m benchmarks.conv_forms --json=F`.

A time is one forward and backward pass (gradients of images and kernel) in microseconds an image:
the median over rounds in which the forms take turns, so that a disturbance meets all of them. Each
is taken twice: in a `lax.scan`, as a training loop runs it, and alone. On CPU that differs: inside
a loop XLA falls back to a plain loop nest for its own convolution, tens of times slower.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bs_jax.models.conv import FORMS, choose_form


class Case(NamedTuple):
    """One convolution: square images and kernels."""

    examples: int
    size: int
    channels: int
    features: int
    kernel_size: int = 3
    strides: int = 1
    groups: int = 1


CASES = {
    "small": [
        Case(8, 28, 1, 16, kernel_size=4, strides=4),
        Case(8, 7, 16, 16),
        Case(8, 7, 16, 32, strides=2),
        Case(8, 7, 16, 32, kernel_size=1, strides=2),
        Case(8, 4, 32, 32),
        Case(8, 2, 64, 64),
        Case(64, 7, 16, 16),
        Case(64, 4, 32, 32),
        Case(64, 2, 64, 64),
        Case(64, 28, 16, 16),
    ],
    "large": [
        Case(32, 64, 3, 64, kernel_size=7, strides=2),
        Case(32, 64, 3, 32, strides=2),
        Case(32, 32, 32, 32),
        Case(32, 32, 32, 64),
        Case(32, 32, 64, 64),
        Case(32, 16, 64, 64),
        Case(32, 16, 64, 128, strides=2),
        Case(32, 16, 64, 256, kernel_size=1),
        Case(32, 16, 256, 64, kernel_size=1),
        Case(32, 8, 128, 128),
        Case(32, 8, 512, 128, kernel_size=1),
        Case(32, 4, 256, 256),
        Case(32, 4, 256, 512, strides=2),
        Case(32, 2, 512, 512),
        Case(32, 2, 2048, 512, kernel_size=1),
        Case(32, 16, 128, 128, groups=32),
        Case(32, 8, 256, 256, groups=32),
    ],
}


def _program(form: Callable[..., jax.Array], case: Case, repeats: int) -> Callable[[], Any]:
    """A compiled function of `repeats` passes in a scan; of one pass alone where that is 0."""
    pad = (case.kernel_size - 1) // 2 if case.kernel_size != case.strides else 0
    draw = np.random.default_rng(0)
    images = jnp.asarray(
        draw.standard_normal((case.examples, case.size, case.size, case.channels)), jnp.float32
    )
    kernel_shape = (case.kernel_size,) * 2 + (case.channels // case.groups, case.features)
    kernel = jnp.asarray(0.1 * draw.standard_normal(kernel_shape), jnp.float32)

    def apply(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return form(images, kernel, (case.strides,) * 2, ((pad, pad),) * 2, case.groups)

    def one_pass(carry: Any, _: None = None) -> tuple[Any, None]:
        images, kernel = carry
        outputs, pullback = jax.vjp(apply, images, kernel)
        slopes = pullback(outputs)
        # The next pass needs this one's gradients: none can be left out or hoisted.
        return (images + 1e-9 * slopes[0], kernel + 1e-9 * slopes[1]), None

    @jax.jit
    def passes(carry: Any) -> Any:
        return lax.scan(one_pass, carry, None, length=repeats) if repeats else one_pass(carry)

    def run() -> Any:
        return jax.block_until_ready(passes((images, kernel)))

    run()
    return run


def measure(case: Case, rounds: int, in_loop: bool, seconds: float = 0.05) -> dict[str, Any]:
    """Times of all forms for a case.

    Args:
        case: the convolution.
        rounds: how often the forms take turns.
        in_loop: the passes run in a scan; else each is a call of its own.
        seconds: aimed at for one turn of a form in a loop.

    Returns:
        The case's fields, microseconds an image by form, and which one the library would choose.
    """
    programs, repeats = {}, {}
    for name, form in FORMS.items():
        repeats[name] = 1
        programs[name] = _program(form, case, 1 if in_loop else 0)
        if in_loop:
            start = time.perf_counter()
            programs[name]()
            repeats[name] = max(1, min(50, int(seconds / (time.perf_counter() - start))))
            programs[name] = _program(form, case, repeats[name])
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            times[name].append(1e6 * elapsed / repeats[name] / case.examples)
    medians = {name: statistics.median(values) for name, values in times.items()}
    chosen = choose_form(jax.default_backend())
    return {
        **case._asdict(),
        "in_loop": in_loop,
        "microseconds_an_image": medians,
        "chosen": chosen,
        "xla_over_chosen": medians["xla"] / medians[chosen],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--cases", choices=[*CASES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    cases = [c for group in CASES.values() for c in group]
    if arguments.cases != "all":
        cases = CASES[arguments.cases]
    rows = []
    for case in cases:
        for in_loop in (True, False):
            row = measure(case, arguments.rounds, in_loop)
            rows.append(row)
            times = "  ".join(
                f"{name} {t:8.1f}" for name, t in row["microseconds_an_image"].items()
            )
            where = "in loop" if in_loop else "alone  "
            shape = " ".join(f"{name[0]}{value}" for name, value in case._asdict().items())
            print(f"{shape:32s} {where} {times}  ratio {row['xla_over_chosen']:6.2f}", flush=True)
    if arguments.json:
        record = {
            "rows": rows,
            "jax": jax.__version__,
            "device": str(jax.devices()[0]),
            "cores": len(os.sched_getaffinity(0)),
            "machine": platform.machine(),
        }
        with open(arguments.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
