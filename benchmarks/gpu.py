"""All that is measured on a GPU, by one command: `python -m benchmarks.gpu --json=F`.

bfloat16, channels last, updates by the dozen as one donated program, the data on the device.
Every program is a process: all compile side by side, then they are timed by turns, one at a time.
What has not compiled when a part's time is up is ended and named in the result, which is written
as it grows. Parts (`--parts`):

- steps: xresnet50 at 128 px, batches 64, 8 and 256, against PyTorch in autocast: eager,
  torch.compile in three modes, and CUDA graphs of the whole step captured by hand; beside it what
  the card's measured peak and bandwidth would allow, and where our step's time goes by kernels
- forms: our step in other forms, under other XLA flags, and with what the published recipe adds,
  in ratio to the step as it is
- runs: images/s of 4, 16 and 64 runs vmapped, in ratio to one run after another
- transform: what scale_by_batch costs beside plain optax (`benchmarks.transform_overhead`)

Goals: 1.2 times PyTorch's quickest form at batches 64 and 256, 2 times at 8.

`--tiny` runs it at a size for a CPU, to see that it works; PyTorch is left out
where it is not installed (`pip install 'bs_jax[bench]'`).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _kernels, _measure, _workers, train_step

PARTS = ("steps", "forms", "runs", "transform")
OURS = "ours"
_CLOCK_SHARE = 0.22  # of the time, left for turns when compiling must end
_RECIPE_EXAMPLES = 5 * 9469  # five epochs of Imagenette's training set
_TORCH_FORMS = (
    "eager",
    "compile",
    "reduce-overhead",
    "max-autotune",
    "graph",
    "graph of compile",
)
# They read from disk what torch.compile's default mode has left there.
_READ_THE_CACHE = ("reduce-overhead", "graph of compile")

# Our step otherwise: what to change of a worker's spec. See `bs_jax.models.layer_forms`.
MODEL_FORMS: dict[str, dict[str, Any]] = {
    "XLA's plain forms": {"forms": {"one_pass_statistics": False, "fused_activation": False}},
    "statistics in two passes": {"forms": {"one_pass_statistics": False}},
    "activation by itself": {"forms": {"fused_activation": False}},
    "1x1 as products": {"forms": {"pointwise_products": True}},
    "XLA's max pool": {"forms": {"native_max_pool": True}},
    "length as an argument": {"counted": True},
}
_GRAPH_ALL = (
    "--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE,+CONDITIONAL"
    " --xla_gpu_graph_min_graph_size=1"
)
# Tried at the smallest batch, where the card waits for launches,
LAUNCH_FLAGS: dict[str, str] = {
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "convolutions in command buffers": "--xla_gpu_enable_command_buffer=+CONVOLUTION",
    "the loop as a command buffer": _GRAPH_ALL,
    "concurrent command buffers": (
        f"{_GRAPH_ALL} --xla_gpu_command_buffer_scheduling_mode=CONCURRENT"
    ),
    "loop unrolled twice": (
        "--xla_gpu_enable_while_loop_unrolling=WHILE_LOOP_UNROLLING_DOUBLE_BUFFER"
    ),
}
# and at the first batch size.
KERNEL_FLAGS: dict[str, str] = {
    "the loop as a command buffer": _GRAPH_ALL,
    "no Triton products": "--xla_gpu_enable_triton_gemm=false",
    "convolutions fused": "--xla_gpu_experimental_enable_conv_fusion=true",
    "fusions tuned": "--xla_gpu_experimental_enable_fusion_autotuner=true",
    "latency hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
}
# What the published recipe adds to the step, at all but the smallest batch.
RECIPE_FORMS: dict[str, dict[str, Any]] = {
    "ghost batches of 16": {"overrides": {"ghost_batch_size": 16}},
    "ghost batches, every sum by itself": {
        "overrides": {"ghost_batch_size": 16},
        "forms": {"sums_by_rows": False},
    },
    "random resized crops": {"overrides": {"data.crop_area": (0.35, 1.0)}},
    "Ranger": {"overrides": {"optimizer.name": "ranger"}},
}


@dataclasses.dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        model: the network of steps and forms.
        image_size: pixels.
        batch_sizes: the most important first: they compile and are timed in this order.
        steps: updates a turn.
        rounds: turns of each program.
        matmul: rows and columns of the peak's product.
        copied_floats: of the bandwidth's copy.
        torch_forms: of `torch_training.FORMS`.
        runs: (model, image size, batch size, numbers of runs side by side, updates a turn).
        transform: further arguments of `benchmarks.transform_overhead`, a run of it each.
    """

    model: str = "xresnet50"
    image_size: int = 128
    batch_sizes: tuple[int, ...] = (64, 8, 256)
    steps: int = 20
    rounds: int = 7
    matmul: int = 8192
    copied_floats: int = 2**28
    torch_forms: tuple[str, ...] = _TORCH_FORMS
    runs: tuple[tuple[str, int, int, tuple[int, ...], int], ...] = (
        ("resnet8_patch", 28, 16, (4, 16, 64), 100),
        ("resnet8_patch", 28, 64, (4, 16, 64), 100),
        ("xresnet50", 128, 8, (4, 16), 10),
        ("xresnet50", 128, 64, (4,), 10),
    )
    transform: tuple[tuple[str, ...], ...] = (
        ("--model=resnet18", "--steps=20", "--rounds=20"),
        ("--model=gpt", "--steps=20", "--rounds=20"),
    )


TINY = Size(
    model="xresnet10_small",
    image_size=16,
    batch_sizes=(4,),
    steps=2,
    rounds=2,
    matmul=64,
    copied_floats=4096,
    torch_forms=("eager",),
    runs=(("resnet4_patch", 8, 4, (2,), 2),),
    transform=(("--model=resnet4_patch", "--image_size=8", "--batch_size=4", "--rounds=2"),),
)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a size for a CPU, to see that it runs")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in which order")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--against", choices=("torch", "nothing"), default="torch")
    parser.add_argument("--batch_sizes", help="of steps and forms, e.g. 64,8")
    parser.add_argument("--budget_seconds", type=float, default=470.0, help="for everything")
    parser.add_argument(
        "--compile_seconds", type=float, default=170.0, help="for a part's programs"
    )
    parser.add_argument("--logs", help="folder for what the programs write; default: thrown away")
    parser.add_argument("--json", help="file to write the result to, as it grows")
    flags = parser.parse_args(arguments)
    parts = flags.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts has {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    # Many processes share the card: none may take its memory beforehand.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    size = TINY if flags.tiny else Size()
    if flags.batch_sizes:
        chosen = tuple(int(number) for number in flags.batch_sizes.split(","))
        size = dataclasses.replace(size, batch_sizes=chosen)
    if jax.default_backend() == "cpu" and not flags.tiny:
        raise SystemExit("no GPU is at hand; --tiny shows on a CPU that everything runs")
    if flags.against == "torch" and importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed: no peer (pip install 'bs_jax[bench]')")
        flags.against = "nothing"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(size, flags, Path(flags.logs or folder))
        for part in parts:
            getattr(bench, part)()
        bench.save()
    return bench.result


class Bench:
    """The parts, and the result that they add to.

    Attributes:
        result: what the JSON file holds.
    """

    def __init__(self, size: Size, flags: argparse.Namespace, logs: Path) -> None:
        self._size, self._flags, self._logs = size, flags, logs
        self._end = time.monotonic() + flags.budget_seconds
        self.result: dict[str, Any] = {
            "environment": _measure.environment(),
            "dtype": flags.dtype,
            "bytes_per_second": copy_bandwidth(size.copied_floats),
            "peak_flops_per_second": train_step.matmul_peak(size.matmul, flags.dtype),
        }
        print(
            f"{self.result['environment']['device']}: "
            f"{self.result['peak_flops_per_second'] / 1e12:.0f} TFLOP/s in a large product, "
            f"{self.result['bytes_per_second'] / 1e12:.2f} TB/s in a copy"
        )
        self.save()

    def _until(self) -> float:
        """When compiling must end, so that there is time left for the clock."""
        return min(
            self._end - _CLOCK_SHARE * self._flags.budget_seconds,
            time.monotonic() + self._flags.compile_seconds,
        )

    def save(self) -> None:
        """Write what there is."""
        if self._flags.json:
            _measure.write_json(self._flags.json, self.result)

    def _ours(self, batch_size: int, **others: Any) -> dict[str, Any]:
        size = self._size
        return {
            "kind": "ours",
            "model": size.model,
            "image_size": size.image_size,
            "batch_size": batch_size,
            "dtype": self._flags.dtype,
            "steps": size.steps,
            **others,
        }

    def steps(self) -> None:
        """Our step against PyTorch's, at every batch size."""
        specs = {}
        for number, batch_size in enumerate(self._size.batch_sizes):
            ours = self._ours(batch_size)
            if self._flags.logs:
                ours["keep"] = str(self._logs / f"trace{batch_size}")
            specs[f"{OURS}, {batch_size}"] = ours
            if self._flags.against == "torch":
                device = "cpu" if self._flags.tiny else "cuda"
                for form in self._size.torch_forms:
                    peer = {**ours, "kind": "torch", "form": form, "device": device}
                    peer["after"] = form in _READ_THE_CACHE
                    if "max-autotune" in form:  # hundreds of kernels to compile and to try
                        peer |= {"last": True, "nice": 5 * (number + 1)}
                        peer["environment"] = {"TORCHINDUCTOR_COMPILE_THREADS": "8"}
                    specs[f"torch {form}, {batch_size}"] = peer
        found = self.result["steps"] = []
        for row in self._measured("steps", specs, self._size.batch_sizes, describe=True):
            found.append(self._step(row))
            self.save()

    def _step(self, row: dict[str, Any]) -> dict[str, Any]:
        batch_size, programs = row["batch_size"], row["programs"]
        flops = 2 * train_step.multiply_adds(self._size.model, self._size.image_size, batch_size)
        peak, bandwidth = self.result["peak_flops_per_second"], self.result["bytes_per_second"]
        row |= {"model": self._size.model, "image_size": self._size.image_size}
        row["roofline"] = {
            "flops_per_step": flops,
            "seconds_by_arithmetic": flops / peak,
            "bytes_per_step": (moved := row["about_ours"].get("bytes_per_step", 0.0)),
            "seconds_by_memory": moved / bandwidth,
        }
        if OURS in programs:
            seconds = programs[OURS]["seconds"]
            row["images_per_second"] = batch_size / seconds
            row["share_of_peak"] = flops / seconds / peak
            row["recipe_minutes"] = _RECIPE_EXAMPLES / row["images_per_second"] / 60
            peers = {n: one["ratio"] for n, one in programs.items() if _trains_the_same(n)}
            if peers:
                best = min(peers, key=lambda name: peers[name])
                row["quickest_torch"], row["ratio_torch_over_ours"] = best, peers[best]
        self._tell_step(row)
        return row

    def _tell_step(self, row: Mapping[str, Any]) -> None:
        print(f"\n{row['model']}, {row['image_size']} px, batch {row['batch_size']}")
        _tell(row)
        limits = row["roofline"]
        bound = max(limits["seconds_by_arithmetic"], limits["seconds_by_memory"])
        if "images_per_second" in row:
            print(
                f"{row['images_per_second']:.0f} images/s, {row['share_of_peak']:.0%} of peak; the "
                f"roofline allows {1e3 * bound:.2f} ms a step; five epochs of the recipe: "
                f"{row['recipe_minutes']:.1f} minutes"
            )
        if "quickest_torch" in row:
            print(f"{row['quickest_torch']} / ours = {row['ratio_torch_over_ours']:.2f}")
        if kernels := row["about_ours"].get("kernels"):
            print(_kernels.table(kernels))

    def forms(self) -> None:
        """Our step in other forms, at every batch size."""
        specs = {}
        sizes = self._size.batch_sizes
        for number, batch_size in enumerate(sizes):
            specs[f"{OURS}, {batch_size}"] = self._ours(batch_size)
            changes = dict(MODEL_FORMS)
            if batch_size > min(sizes):
                changes |= RECIPE_FORMS
            flags = LAUNCH_FLAGS if batch_size == min(sizes) else {}
            flags = flags | (KERNEL_FLAGS if number == 0 else {})
            changes |= {name: {"xla_flags": words, "nice": 5} for name, words in flags.items()}
            for name, change in changes.items():
                specs[f"{name}, {batch_size}"] = self._ours(batch_size, **change)
        found = self.result["forms"] = []
        for row in self._measured("forms", specs, self._size.batch_sizes, most_rounds=5):
            print(f"\n{self._size.model} in other forms, batch {row['batch_size']}")
            _tell(row)
            found.append(row)
            self.save()

    def runs(self) -> None:
        """Runs side by side in one program against one run after another."""
        specs = {}
        for number, (model, image_size, batch_size, counts, steps) in enumerate(self._size.runs):
            for count in (0, *counts):
                name = f"{count} vmapped" if count else OURS
                specs[f"{name}, {number}"] = self._ours(
                    batch_size, model=model, image_size=image_size, steps=steps, runs=count
                )
        found = self.result["runs"] = []
        for row in self._measured("runs", specs, range(len(self._size.runs)), by_step=False):
            model, image_size, batch_size, _, steps = self._size.runs[row.pop("batch_size")]
            row |= {"model": model, "image_size": image_size, "batch_size": batch_size}
            row["images_per_second"] = {
                name: max(1, _count(name)) * batch_size * steps / one["seconds"]
                for name, one in row["programs"].items()
            }
            print(f"\n{model}, {image_size} px, batch {batch_size}: images/s of all runs together")
            for name, rate in row["images_per_second"].items():
                label = "one after another" if name == OURS else name
                seconds = row["seconds_to_first_turn"][name]
                print(f"{label:18s} {rate:12,.0f}   (first turn after {seconds:.0f} s)")
            for name, why in row["not_measured"].items():
                print(f"{name}: {why}")
            found.append(row)
            self.save()

    def transform(self) -> None:
        """What scale_by_batch costs."""
        found = self.result["transform"] = []
        for number, settings in enumerate(self._size.transform):
            path = self._logs / f"transform{number}.json"
            command = [sys.executable, "-m", "benchmarks.transform_overhead", *settings]
            until = self._until()
            try:
                done = subprocess.run(
                    [*command, f"--json={path}"],
                    cwd=_workers.ROOT,
                    timeout=max(1.0, until - time.monotonic()),
                    capture_output=True,
                    text=True,
                    check=False,
                )
                print(done.stdout or done.stderr[-300:])
            except subprocess.TimeoutExpired as late:
                found.append(
                    {"settings": settings, "not_measured": f"not done in {late.timeout:.0f} s"}
                )
            else:
                words = {"settings": settings}
                failed = {**words, "not_measured": done.stderr[-300:]}
                found.append(_measure.read_json(path) if done.returncode == 0 else failed)
            self.save()

    def _measured(
        self,
        part: str,
        specs: Mapping[str, Mapping[str, Any]],
        groups: Iterable[int],
        *,
        most_rounds: int = 1000,
        describe: bool = False,
        by_step: bool = True,
    ) -> Iterable[dict[str, Any]]:
        """A row a group (the number behind a program's name): ratios to `OURS`, and who failed."""
        for wave in _waves(specs, list(groups)):
            chosen = {n: s for n, s in specs.items() if _group(n) in wave}
            with _workers.crew(chosen, self._logs / part) as crew:
                # Ours compiles first and alone: XLA tries algorithms by the clock.
                own = [name for name in chosen if _plain(name) == OURS]
                others = [name for name in chosen if name not in own]
                crew.start(own)
                crew.wait(own, self._until())
                until = self._until()
                after = [name for name in others if chosen[name].get("after")]
                last = [name for name in others if chosen[name].get("last")]
                crew.start(name for name in others if name not in after)
                crew.wait([n for n in others if n not in (*after, *last)], until)
                crew.start(after)
                crew.wait(after, until)
                crew.wait(last, until)
                for group in wave:
                    able = [name for name in crew.able if _group(name) == group]
                    times = crew.turns(min(most_rounds, self._size.rounds), self._end, able)
                    if by_step:
                        times = {
                            n: [t / chosen[n]["steps"] for t in row] for n, row in times.items()
                        }
                    row: dict[str, Any] = {"batch_size": group, "programs": {}, "about_ours": {}}
                    own = f"{OURS}, {group}"
                    if own in times:
                        rows = _measure.summary(times, against=own) if times[own] else {}
                        row["programs"] = {_plain(name): one for name, one in rows.items()}
                        if describe:
                            about = crew.workers[own].ask("describe", time.monotonic() + 60)
                            row["about_ours"] = about or {"failed": crew.failures.get(own)}
                    row["seconds_to_first_turn"] = {
                        _plain(n): w.ready["seconds_to_first_turn"]
                        for n, w in crew.workers.items()
                        if _group(n) == group and w.ready
                    }
                    row["not_measured"] = {
                        _plain(n): why for n, why in crew.failures.items() if _group(n) == group
                    }
                    yield row


def _group(name: str) -> int:
    return int(name.rsplit(", ", 1)[1])


def _plain(name: str) -> str:
    return name.rsplit(", ", 1)[0]


def _count(name: str) -> int:
    return int(name.split()[0]) if name[0].isdigit() else 0


def _trains_the_same(name: str) -> bool:
    return name.startswith("torch ") and not name.endswith("bfloat16 weights")


def _waves(specs: Mapping[str, Mapping[str, Any]], groups: list[int]) -> list[list[int]]:
    """Groups of programs that fit in the card's memory together."""
    budget = 0.85 * _card_bytes()
    waves: list[list[int]] = [[]]
    used = 0.0
    for group in groups:
        needed = sum(_bytes(spec) for name, spec in specs.items() if _group(name) == group)
        if waves[-1] and used + needed > budget:
            waves.append([])
            used = 0.0
        waves[-1].append(group)
        used += needed
    return waves


def _bytes(spec: Mapping[str, Any]) -> float:
    """About what a program takes of the card: an xresnet50 at 128 px and less."""
    pixels = max(1, spec.get("runs", 0)) * spec["batch_size"] * spec["image_size"] ** 2
    return 1.2e9 + 1.3e3 * pixels


def _card_bytes() -> float:
    try:
        query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        free = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        return 2**20 * float(free.splitlines()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return float("inf")


def copy_bandwidth(floats: int) -> float:
    """Bytes a second, read and written, of adding one to a long array."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(add(jnp.zeros(floats)))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        x = jax.block_until_ready(add(x))
        times.append(time.perf_counter() - start)
    return 2 * 4 * floats / min(times)


def _tell(row: Mapping[str, Any]) -> None:
    if row["programs"]:
        print(_measure.table(row["programs"]))
    for name, why in row["not_measured"].items():
        print(f"{name}: {why}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so end the workers too
    main()
