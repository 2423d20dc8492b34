"""Times of the convolution's forms on a CPU, and whether the library chooses the quickest.

python -m benchmarks.conv_forms --cases=large --json=F

Forward pass and both gradients in each form, in a `lax.scan` as a training loop runs it;
the forms take turns. `chosen_over_best` is 1 where the library's choice is the quickest form.
`--library=default` compiles as XLA does by itself, not as the trainer has it compile
(`bs_jax.training.compilation.compiler_options`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import _measure
from bs_jax.models.cpu import conv as conv_cpu
from bs_jax.models.cpu.conv import IMAGE_GRADIENTS
from bs_jax.models.cpu.forms import FORMS, Settings
from bs_jax.training import compilation


class Case(NamedTuple):
    """One convolution: square images and kernels."""

    examples: int
    size: int
    channels: int
    features: int
    kernel_size: int = 3
    strides: int = 1

    @property
    def settings(self) -> Settings:
        """Strides, and the padding that the networks use."""
        pad = 0 if self.kernel_size == self.strides else (self.kernel_size - 1) // 2
        return Settings((self.strides,) * 2, ((pad, pad), (pad, pad)))


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
        Case(32, 16, 64, 64),
        Case(32, 16, 64, 128, strides=2),
        Case(32, 16, 64, 256, kernel_size=1),
        Case(32, 16, 256, 64, kernel_size=1),
        Case(32, 8, 128, 128),
        Case(32, 8, 512, 128, kernel_size=1),
        Case(32, 8, 128, 256, strides=2),
        Case(32, 4, 256, 256),
        Case(32, 4, 256, 512, strides=2),
        Case(32, 2, 512, 512),
        Case(32, 2, 2048, 512, kernel_size=1),
    ],
}
_REPEATS = 3  # passes in a scan


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", choices=[*CASES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--library", choices=("trainer", "default"), default="trainer")
    parser.add_argument("--json", help="file to write the results to")
    flags = parser.parse_args(arguments)
    groups = CASES if flags.cases == "all" else [flags.cases]
    rows = []
    for case in (case for group in groups for case in CASES[group]):
        for row in measure(case, flags.rounds, flags.library):
            rows.append(row)
            times = "  ".join(f"{n} {us:8.0f}" for n, us in row["microseconds"].items())
            shape = " ".join(f"{name[0]}{value}" for name, value in case._asdict().items())
            print(
                f"{shape:28s} {row['pass']:15s} {times}  chosen {row['chosen']} "
                f"{row['chosen_over_best']:.2f}",
                flush=True,
            )
    result = {"rows": rows, "library": flags.library, "environment": _measure.environment()}
    if flags.json:
        _measure.write_json(flags.json, result)
    return result


def measure(case: Case, rounds: int, library: str) -> list[dict[str, Any]]:
    """Times of all forms of the three passes."""
    draw = np.random.default_rng(0)

    def array(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(np.float32(scale * draw.standard_normal(shape)))

    images = array(case.examples, case.size, case.size, case.channels)
    window = case.kernel_size, case.kernel_size, case.channels, case.features
    kernel = array(*window, scale=0.1)
    settings, size = case.settings, kernel.shape[:2]
    slopes = jax.jit(partial(FORMS["taps"].forward, settings))(images, kernel)
    passes: dict[str, tuple[str, dict[str, Callable[..., jax.Array]], tuple[jax.Array, ...]]] = {
        "forward": (
            conv_cpu.choose_forward(images.shape, kernel.shape, settings),
            {name: partial(form.forward, settings) for name, form in FORMS.items()},
            (images, kernel),
        ),
        "image gradient": (
            conv_cpu.choose_image_gradient(slopes.shape, kernel.shape),
            {
                name: lambda slopes, kernel, f=form: f(settings, images.shape[1:3], kernel, slopes)
                for name, form in IMAGE_GRADIENTS.items()
            },
            (slopes, kernel),
        ),
        "kernel gradient": (
            conv_cpu.choose_kernel_gradient(images.shape, kernel.shape, settings),
            {
                name: lambda images, slopes, f=form: f.kernel_gradient(
                    settings, images, size, slopes
                )
                for name, form in FORMS.items()
            },
            (images, slopes),
        ),
    }
    options = compilation.compiler_options("cpu") if library == "trainer" else {}
    rows = []
    for name, (chosen, forms, operands) in passes.items():
        programs = {form: _program(apply, *operands, options) for form, apply in forms.items()}
        times = _measure.interleave(programs, rounds=rounds)
        # The least of a form's times: what else runs on the machine can only add to them.
        best = {form: 1e6 * min(turns) / _REPEATS for form, turns in times.items()}
        rows.append(
            {
                **case._asdict(),
                "pass": name,
                "microseconds": best,
                "chosen": chosen,
                "chosen_over_best": best[chosen] / min(best.values()),
            }
        )
    return rows


def _program(
    function: Callable[..., jax.Array], first: jax.Array, second: jax.Array, options: dict
) -> Callable[[], Any]:
    """A compiled call of several passes in a scan, none of which can be left out or hoisted."""
    result = jax.eval_shape(function, first, second)

    def one_pass(carry: Any, _: None) -> tuple[Any, None]:
        first, second, _ = carry
        found = function(first, second)
        changed = first.at[(0,) * first.ndim].add(1e-9 * found[(0,) * found.ndim])
        return (changed, second, found), None

    def passes(first: jax.Array, second: jax.Array) -> jax.Array:
        start = (first, second, jnp.zeros(result.shape, result.dtype))
        return lax.scan(one_pass, start, None, length=_REPEATS)[0][2]

    compiled = jax.jit(passes, compiler_options=dict(options))
    return lambda: compiled(first, second)


if __name__ == "__main__":
    main()
