"""Seconds a train step, ours against PyTorch's, on this machine.

python -m benchmarks.train_step --model=xresnet50 --image_size=64 --batch_size=32 --against=torch

Ours is the compiled chunk that the trainer runs, with its gather, normalisation, schedule and
metrics; PyTorch's the same network, loss and AdamW (fused) on the same images. Both keep the
images on the device and use as many threads; they take turns. `ratio_torch_over_ours` is above 1
where ours is quicker than PyTorch's quickest eager form (of the two memory formats).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _measure, _programs
from bs_jax.errors import UserError


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="xresnet50")
    parser.add_argument("--image_size", type=int, default=64, help="pixels")
    parser.add_argument("--batch_size", type=int, default=32, help="examples a step")
    parser.add_argument("--against", choices=("torch", "nothing"), default="nothing")
    parser.add_argument("--compiled", action="store_true", help="PyTorch through its compiler too")
    parser.add_argument(
        "--torch_form", action="append", default=[], help="a further one, see torch_training"
    )
    parser.add_argument("--steps", type=int, default=2, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--matmul", type=int, default=2048, help="size of the peak's product")
    parser.add_argument("--json", help="file to write the result to")
    flags = parser.parse_args(arguments)
    try:
        result = measure(flags)
    except UserError as error:
        parser.error(str(error))
    print(_measure.table(result["programs"]))
    print("ours: {images_per_second:.1f} images/s, {share_of_peak:.0%} of peak".format(**result))
    for name in ("ratio_torch_over_ours", "ratio_torch_compiled_over_ours"):
        if name in result:
            print(f"{name} = {result[name]:.3f}")
    if flags.json:
        _measure.write_json(flags.json, result)
    return result


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """All that the JSON file holds."""
    data = _programs.make_images(4 * flags.batch_size, flags.image_size)
    run = _programs.make_run(
        flags.model, flags.image_size, flags.batch_size, **{"model.dtype": flags.dtype}
    )
    programs = {"ours": _programs.train_chunks(run, data, flags.steps)}
    start = time.perf_counter()
    jax.block_until_ready(programs["ours"]())
    first_call = time.perf_counter() - start
    if flags.against == "torch":
        programs |= torch_programs(flags)
    times = _measure.interleave(programs, rounds=flags.rounds, warmup=2)
    times = {name: [t / flags.steps for t in turns] for name, turns in times.items()}
    rows = _measure.summary(times, against="ours")
    flops = 2 * multiply_adds(flags.model, flags.image_size, flags.batch_size)
    peak = matmul_peak(flags.matmul, flags.dtype)
    seconds = rows["ours"]["seconds"]
    result = {
        **{k: getattr(flags, k) for k in ("model", "image_size", "batch_size", "dtype", "steps")},
        "programs": rows,
        "first_call_seconds": first_call,
        "images_per_second": flags.batch_size / seconds,
        "flops_per_step": flops,
        "flops_per_second": flops / seconds,
        "peak_flops_per_second": peak,
        "share_of_peak": flops / seconds / peak,
        "environment": _measure.environment(),
    }
    eager = [row["ratio"] for name, row in rows.items() if name.startswith("torch eager")]
    if eager:
        result["ratio_torch_over_ours"] = min(eager)
    if "torch compiled" in rows:
        result["ratio_torch_compiled_over_ours"] = rows["torch compiled"]["ratio"]
    return result


def multiply_adds(model: str, image_size: int, batch_size: int) -> int:
    """Multiply-adds of a step: of the forward pass, three times (He et al.'s way of counting)."""
    from bs_jax import models
    from bs_jax.models import costs

    module = models.create(model, num_classes=_programs.CLASSES)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda images: module.init(jax.random.key(0), images, train=False), images
    )
    forward = costs.count_multiply_adds(
        lambda v, images: module.apply(v, images, train=False), variables, images
    )
    return 3 * batch_size * forward


def matmul_peak(size: int, dtype: str) -> float:
    """Multiplications and additions a second in a large matrix product, at best."""
    # Random numbers: a card multiplies ones and zeros quicker than what training gives it.
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def torch_programs(flags: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """PyTorch's training by name: eager in both memory formats, and the forms asked for."""
    from benchmarks import torch_training

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    wanted = {"channels last": "eager", "channels first": "eager" + torch_training.CHANNELS_FIRST}
    found = {f"torch eager, {order}": form for order, form in wanted.items()}
    if flags.compiled:
        found["torch compiled"] = "compile"
    found |= {f"torch {form}": form for form in flags.torch_form}
    return {
        name: torch_training.Training({**vars(flags), "form": form, "device": device}).run
        for name, form in found.items()
    }


if __name__ == "__main__":
    main()
