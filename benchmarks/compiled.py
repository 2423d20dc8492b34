"""What XLA makes of a training step for a device that is not here.

`python -m benchmarks.compiled --device=h200 --forms` compiles the trainer's own step for a card
that is described to XLA, on any machine, and counts what an update launches, reads and writes.
Nothing runs and nothing is timed: a form with fewer kernels and bytes is a candidate, which
`python -m benchmarks.gpu` measures on a card. `--transform` counts what scale_by_batch adds to
the steps of `benchmarks.transform_overhead`.

The compiler of a card comes with JAX's plugin for it: `pip install 'bs_jax[trainer,cuda13]'`, and
for a TPU `pip install 'bs_jax[trainer,tpu]'`. Devices: h200, h100, a100; a TPU's topology such as
v5e:2x2; cpu, this machine's own.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import _kernels, _measure, _programs, gpu, transform_overhead
from bs_jax.models import layer_forms
from bs_jax.training import memory

# What XLA asks a card for, in the fields of its GpuDeviceInfoProto; from the cards' data sheets.
_HOPPER = {
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
    "cuda_compute_capability": "{ major: 9 }",
}
CARDS: dict[str, dict[str, Any]] = {
    "h200": _HOPPER
    | {"memory_bandwidth": 4.8e12, "l2_cache_size": 60 * 2**20, "device_memory_size": 141e9},
    "h100": _HOPPER
    | {"memory_bandwidth": 3.35e12, "l2_cache_size": 50 * 2**20, "device_memory_size": 80e9},
    "a100": {
        "core_count": 108,
        "fpus_per_core": 64,
        "clock_rate_ghz": 1.41,
        "shared_memory_per_core": 167936,
        "shared_memory_per_block_optin": 166912,
        "cuda_compute_capability": "{ major: 8 }",
        "memory_bandwidth": 2.04e12,
        "l2_cache_size": 40 * 2**20,
        "device_memory_size": 80e9,
    },
}
_EVERY_CARD = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "shared_memory_per_block": 49152,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="h200", help="h200, h100, a100, cpu, or v5e:2x2")
    parser.add_argument("--devices", type=int, default=1, help="how many cards share a batch")
    parser.add_argument("--model", default="xresnet50")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--batch_sizes", default="64,8,256")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--runs", type=int, default=0, help="side by side in one program")
    parser.add_argument("--forms", action="store_true", help="the step in other forms too")
    parser.add_argument("--transform", action="store_true", help="what scale_by_batch adds")
    parser.add_argument("--only", default="", help="of the others: a pattern of their names")
    parser.add_argument("--json", help="file to write the result to, as it grows")
    flags = parser.parse_args(arguments)
    compiler = target(flags.device, flags.devices)
    result: dict[str, Any] = {
        "settings": {name: value for name, value in vars(flags).items() if name != "json"},
        "environment": _measure.environment(),
        "programs": [],
    }
    print("| program | kernels | GB | cycles | MB held | estimated | seconds to compile |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, lower in transforms(compiler) if flags.transform else forms(flags, compiler):
        if not (name.startswith(gpu.OURS) or re.search(flags.only, name)):
            continue
        row = {"name": name, **count(*lower(), compiler.options)}
        result["programs"].append(row)
        estimated = row["estimated_bytes"]
        print(
            f"| {name} | {row['kernels']} | {row['bytes'] / 1e9:.2f} | {row['cycles'] or ''} | "
            f"{row['held_bytes'] / 1e6:.0f} | {estimated / 1e6:.0f} | "
            f"{row['seconds_to_compile']:.0f} |",
            flush=True,
        )
        if flags.json:
            _measure.write_json(flags.json, result)
    return result


class Compiler(NamedTuple):
    """For what to compile, and how.

    Attributes:
        platform: whose forms of layers to take: "cpu", "gpu" or "tpu".
        devices: that need not be here.
        options: of the compiler.
    """

    platform: str
    devices: Sequence[Any]
    options: Mapping[str, str]


Lower = Callable[[], tuple[Any, int]]  # a lowered program, and the memory it is taken to need


def forms(flags: argparse.Namespace, compiler: Compiler) -> Iterator[tuple[str, Lower]]:
    """The trainer's step at every batch size, and in its other forms."""
    changes: dict[str, Mapping[str, Any]] = {gpu.OURS: {}}
    if flags.forms:
        changes |= gpu.MODEL_FORMS | gpu.RECIPE_FORMS
    for batch_size in (int(size) for size in flags.batch_sizes.split(",")):
        for name, change in changes.items():
            ghost = change.get("overrides", {}).get("ghost_batch_size")
            if ghost and batch_size % ghost:
                continue
            spec = {
                "model": flags.model,
                "image_size": flags.image_size,
                "batch_size": batch_size,
                "dtype": flags.dtype,
                "runs": flags.runs,
                **change,
            }
            yield f"{name}, {batch_size}", functools.partial(_lower_step, spec, compiler)


def _lower_step(spec: Mapping[str, Any], compiler: Compiler) -> tuple[Any, int]:
    overrides = {"parallel": "jit", **spec.get("overrides", {})}
    with layer_forms.use(layer_forms.of(compiler.platform)), _programs.as_asked(spec):
        chunk, shapes = _programs.chunk_and_shapes(
            _programs.run_of({**spec, "overrides": overrides}),
            image_size=spec["image_size"],
            images=4 * spec["batch_size"],
            steps=4,
            devices=compiler.devices,
            runs=spec["runs"],
            counted=spec.get("counted", False),
        )
        return chunk.lower(*shapes), memory.peak_bytes(chunk, *shapes)


def transforms(compiler: Compiler) -> Iterator[tuple[str, Lower]]:
    """Steps of a ResNet-18 and of a small transformer, with and without scale_by_batch."""
    for model in ("resnet18", "gpt"):
        problem = transform_overhead.Problem(
            transform_overhead.parse([f"--model={model}", "--steps=4"])
        )
        for name, case in transform_overhead.CASES.items():
            yield f"{model}, {name}", functools.partial(_lower_transform, problem, case, compiler)


def _lower_transform(
    problem: transform_overhead.Problem, case: transform_overhead.Case, compiler: Compiler
) -> tuple[Any, int]:
    with layer_forms.use(layer_forms.of(compiler.platform)):
        call, arguments = transform_overhead.program(problem, case)
        whole = NamedSharding(Mesh(list(compiler.devices), ("batch",)), PartitionSpec())
        compiled = jax.jit(call, donate_argnums=(0,), in_shardings=whole)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
        return compiled.lower(*shapes), memory.peak_bytes(compiled, *shapes)


def target(device: str, count: int = 1) -> Compiler:
    """The compiler for a device that need not be here.

    Args:
        device: a card of `CARDS`, a TPU's topology, or "cpu".
        count: how many cards; of a TPU all in the topology are taken.

    Raises:
        SystemExit: the plugin that holds the compiler is not installed.
    """
    if device == "cpu":
        return Compiler("cpu", jax.devices("cpu")[:count], {})
    # The plugins ask the driver and the cloud about the machine; there is none.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        if device not in CARDS:
            described = topologies.get_topology_desc(device, "tpu")
            return Compiler("tpu", described.devices, {})
        fields = {"topology": f"1x1x{count}", "target_config": _description(device)}
        described = topologies.get_topology_desc(device, "cuda", **fields)
        # No algorithm can be tried out.
        return Compiler("gpu", described.devices, {"xla_gpu_autotune_level": "0"})
    except (NotImplementedError, RuntimeError) as error:
        needed = f"bs_jax[trainer,{'cuda13' if device in CARDS else 'tpu'}]"
        raise SystemExit(
            f"no compiler for {device} is at hand: pip install '{needed}' ({error})"
        ) from error


def _description(card: str) -> str:
    fields = {**_EVERY_CARD, **CARDS[card]}
    rows = (
        f"{name} {value}" if isinstance(value, str) else f"{name}: {_plain(value)}"
        for name, value in fields.items()
    )
    return (
        f"gpu_device_info {{ {' '.join(rows)} }} platform_name: 'CUDA' "
        "dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 } "
        f"device_description_str: 'NVIDIA {card.upper()}'"
    )


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def count(lowered: Any, estimated: int, options: Mapping[str, str]) -> dict[str, Any]:
    """Compile a program and count what an update launches.

    Args:
        lowered: takes updates in a loop.
        estimated: bytes that it is taken to need.
        options: of the compiler.

    Returns:
        As `_kernels.in_an_update`, with ``held_bytes`` (what the program takes of the device's
        memory), ``estimated_bytes`` and ``seconds_to_compile``.
    """
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=dict(options))
    seconds, held = time.perf_counter() - start, compiled.memory_analysis()
    return {
        **_kernels.in_an_update(compiled.as_text()),
        "held_bytes": held.temp_size_in_bytes
        + held.argument_size_in_bytes
        + held.output_size_in_bytes
        - held.alias_size_in_bytes,
        "estimated_bytes": estimated,
        "seconds_to_compile": seconds,
    }


if __name__ == "__main__":
    main()
