"""Writes the records of a made-up sweep, with plausible numbers, for tests of the offline rooms."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BASE = 64
EXAMPLES = 24_000
# What each rule does to the final accuracy at a factor k, in the manner of real short trainings.
EFFECTS = {
    "none": lambda k: -0.03 * abs(math.log2(k)) * (1.5 if k > 1 else 0.6),
    "linear": lambda k: 0.005 * math.log2(k) if k > 1 else -0.016 * -math.log2(k),
    "sqrt": lambda k: -0.011 * math.log2(k) if k > 1 else 0.004 * -math.log2(k),
    "noise_aware": lambda k: -0.0025 * math.log2(k),
    "invariant": lambda k: 0.0005 * math.log2(k),
}


class Run(NamedTuple):
    """A run as the records know it: its JSON form."""

    run_id: str
    config: dict[str, Any]
    hparams: dict[str, Any]


def write_records(
    workdir: Path,
    arms: Sequence[str] = tuple(EFFECTS),
    batch_sizes: Sequence[int] = (16, 32, 64, 128, 256),
    seeds: int = 3,
    sd: float = 0.004,
    effects: Mapping[str, Any] = EFFECTS,
    offsets: Sequence[float] = (1.0,),
    rows: int = 47,
    **changes: Any,
) -> Path:
    """Write sweep.json and all run folders; points at k = 1 and offset 1 share a run.

    Args:
        workdir: where to.
        arms, batch_sizes, seeds, offsets: the points.
        sd: of the final accuracy over seeds.
        effects: arm -> function of k -> shift of the final accuracy.
        rows: of train metrics a run.
        changes: replace entries of sweep.json.
    """
    generator = np.random.default_rng(0)
    points, written = [], set()
    for arm in arms:
        for batch_size in batch_sizes:
            for offset in offsets:
                for seed in range(seeds):
                    shared = batch_size == BASE and offset == 1
                    run_id = f"b{batch_size}-s{seed}" + ("" if shared else f"-{arm}-{offset}")
                    run_id = run_id.replace("/", "-")
                    points.append(
                        {"arm": arm, "batch_size": batch_size, "offset": offset}
                        | {"seed": seed, "run_id": run_id}
                    )
                    if run_id not in written:
                        written.add(run_id)
                        shift = 0.0 if shared else effects[arm](batch_size / BASE)
                        write_run(
                            workdir / "runs" / run_id, arm, batch_size, shift, sd, rows, generator
                        )
    sweep = {
        "name": "rules",
        "config_name": "fashion_mnist",
        "title": "Does the batch size stop mattering?",
        "command": "python main.py",
        "base_batch_size": BASE,
        "train_examples": 8000,
        "accuracy_metric": "eval/accuracy",
        "loss_metric": "eval/loss",
        "curve_metric": "train/loss",
        "margin": 0.01,
        "data": "Fashion-MNIST 10k part: 8,000 to train on, 2,000 to evaluate",
        "model": "resnet_8_16_32",
        "warnings": [],
        "points": points,
    }
    (workdir / "sweep.json").write_text(json.dumps(sweep | changes))
    return workdir


def write_run(
    folder: Path,
    arm: str,
    batch_size: int,
    shift: float,
    sd: float,
    rows: int,
    generator: np.random.Generator,
) -> None:
    """Write one finished run whose accuracy is .82 + shift + noise."""
    folder.mkdir(parents=True)
    k = batch_size / BASE
    accuracy = 0.82 + shift + sd * generator.standard_normal()
    examples = np.linspace(EXAMPLES / rows, EXAMPLES, rows).astype(int)
    # Every row ends with a whole batch.
    examples = np.maximum(examples // batch_size, 1) * batch_size
    level = 0.42 - 2.2 * shift + 0.008 * generator.standard_normal()
    losses = level + 1.9 * np.exp(-examples / (2500 * (1 + 6 * abs(shift))))
    losses = losses * (1 + 0.02 * generator.standard_normal(rows))
    lines = [
        {
            "step": int(seen // batch_size),
            "examples": int(seen),
            "train/loss": float(loss),
            "train/accuracy": float(1 - loss / 2.4),
            "optim/learning_rate": 2e-3 * k,
        }
        for seen, loss in zip(examples, losses, strict=True)
    ]
    final = {
        "eval/accuracy": accuracy,
        "eval/smoothed_accuracy": accuracy - 0.05,
        "eval/loss": 0.50 - 3.5 * shift + 0.9 * (0.82 - accuracy),
    }
    lines.append({"step": lines[-1]["step"], "examples": EXAMPLES, **final})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = {"learning_rate": 2e-3, "b1": 0.9, "b2": 0.99, "weight_decay": 0.1, "eps": 1e-8}
    scaled: dict[str, Any] = base | {"b1": 0.9**k, "b2": 0.99**k, "learning_rate": 2e-3 * k}
    if arm == "noise_aware" and k != 1:
        scaled |= {"learning_rate": None, "weight_decay": None, "eps": None}
    hparams = {"rule": arm, "batch_size": batch_size, "base_batch_size": BASE, "k": k}
    write_json(folder / "hparams.json", {**hparams, "base": base, "scaled": scaled, "rows": []})
    write_json(folder / "config.json", {"batch_size": batch_size})
    write_json(
        folder / "summary.json",
        {
            "status": "done",
            "final": final,
            "step": lines[-1]["step"],
            "examples": EXAMPLES,
            "diverged_at_step": None,
            "git_revision": "0123456789abcdef0123456789abcdef01234567",
            "versions": {"python": "3.12.3", "jax": "0.10.2", "optax": "0.2.8"},
            "device": "cpu (2 devices)",
            "wall_time_seconds": 4.2,
            "started_at": "2026-01-02T03:04:05+00:00",
            "finished_at": "2026-01-02T03:04:09+00:00",
        },
    )
    (folder / "DONE").touch()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content))


def edit_json(path: Path, **changes: Any) -> None:
    """Replace top-level entries of a JSON file."""
    write_json(path, json.loads(path.read_text()) | changes)


def diverge(folder: Path) -> None:
    """Turn a finished run into one that diverged half way."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:-1]
    kept = [json.loads(line) for line in lines[: len(lines) // 2]]
    kept.append(kept[-1] | {"examples": kept[-1]["examples"] + 512, "train/loss": None})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    edit_json(folder / "summary.json", status="diverged", final={}, diverged_at_step=99)
