"""PyTorch's training of the networks in `torch_models`, in every form that is quick.

Forms, all with channels last, bfloat16 autocast where asked for, AdamW fused, the data on the
device and, on a card, cuDNN's own choice of algorithms by trial:

- eager; eager, channels first
- compile; reduce-overhead; max-autotune: `torch.compile` in its default mode and these
- graph: the whole eager step, optimizer included, captured by hand as one CUDA graph
- graph of compile; graph of max-autotune: the same of a compiled network (for max-autotune without
  the graphs of its own)
- graph of compile, bfloat16 weights: weights, optimizer and all in bfloat16, which trains another
  thing than ours; how quick it could be
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks import _programs, torch_models

_MODES = {
    "eager": None,
    "compile": "default",
    "reduce-overhead": "reduce-overhead",
    "max-autotune": "max-autotune",
    "graph": None,
    "graph of compile": "default",
    "graph of max-autotune": "max-autotune-no-cudagraphs",
}
CHANNELS_FIRST, NARROW = ", channels first", ", bfloat16 weights"
FORMS = (*_MODES, "eager" + CHANNELS_FIRST, "graph of compile" + NARROW)


class Training:
    """`steps` updates a turn, as a PyTorch training loop would take them.

    Args:
        spec: ``form``, ``model``, ``image_size``, ``batch_size``, ``dtype``, ``steps``.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        form = spec["form"]
        if form not in FORMS:
            raise ValueError(f"no PyTorch form {form!r}; choose from {', '.join(FORMS)}")
        base = form.removesuffix(CHANNELS_FIRST).removesuffix(NARROW)
        self._steps, self._batch_size = spec["steps"], spec["batch_size"]
        self._card = torch.cuda.is_available() and spec.get("device", "cuda") == "cuda"
        if base.startswith("graph") and not self._card:
            raise RuntimeError("CUDA graphs need a card")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if not self._card:
            torch.set_num_threads(cores or 1)
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(0)
        device = "cuda" if self._card else "cpu"
        self._memory = (
            torch.contiguous_format if form.endswith(CHANNELS_FIRST) else torch.channels_last
        )
        weights = torch.bfloat16 if form.endswith(NARROW) else torch.float32
        model = torch_models.create(spec["model"], _programs.CLASSES)
        model = model.to(device, weights, memory_format=self._memory)
        mode = _MODES[base]
        self._forward = model if mode is None else torch.compile(model, mode=mode)
        self._autocast = spec["dtype"] == "bfloat16" and weights == torch.float32
        self._weights = weights
        self._captured = base.startswith("graph")
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=2e-3,
            betas=(0.9, 0.99),
            weight_decay=0.1,
            fused=True,
            capturable=self._captured,
        )
        data = _programs.make_images(4 * self._batch_size, spec["image_size"])
        images = torch.from_numpy(data.images).to(device).permute(0, 3, 1, 2)
        self._images = images.contiguous(memory_format=self._memory)
        self._labels = torch.from_numpy(data.labels.astype(np.int64)).to(device)
        self._graph: Any = None
        if self._captured:
            self._capture()

    def run(self) -> None:
        """Take a turn's updates."""
        for number in range(self._steps):
            start = number * self._batch_size % len(self._labels)
            chosen = slice(start, start + self._batch_size)
            if self._graph is not None:
                self._batch.copy_(self._images[chosen])
                self._answers.copy_(self._labels[chosen])
                self._graph.replay()
            else:
                self._step(self._images[chosen], self._labels[chosen])
        if self._card:
            torch.cuda.synchronize()

    def _step(self, batch: torch.Tensor, labels: torch.Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        device = "cuda" if self._card else "cpu"
        images = ((batch.float() / 255 - 0.5) / 0.25).to(self._weights)
        # Inside a graph a cached cast of a weight would be another graph's memory.
        with torch.autocast(
            device, torch.bfloat16, enabled=self._autocast, cache_enabled=not self._captured
        ):
            logits = self._forward(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        self._optimizer.step()

    def _capture(self) -> None:
        self._batch = self._images[: self._batch_size].clone(memory_format=self._memory)
        self._answers = self._labels[: self._batch_size].clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            side
        ):  # compiles, chooses algorithms and fills the optimizer's state
            for _ in range(3):
                self._step(self._batch, self._answers)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(self._batch, self._answers)
        self._graph = graph

    def describe(self) -> dict[str, Any]:
        """Largest amount of the card's memory that was in use."""
        return {"peak_bytes": torch.cuda.max_memory_allocated() if self._card else None}
