"""A small GPT whose batch size may change: plain optax, flax nnx, and text that every machine has.

    python examples/language_model.py                    # the recipe, at its own batch size of 16
    python examples/language_model.py --batch_size=32    # twice the batch; everything else follows
    python examples/language_model.py --batch_size=64 --ramp        # up to 64, as the noise allows
    python examples/language_model.py --batch_size=64 --rule=sqrt

The text is the source code of Python's standard library, so nothing is downloaded. It differs a
little between Python versions: compare losses only where the printed digest is the same. A run
takes about two minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import bs_jax
from bs_jax.scaling import BatchRamp, resolve_rule

CONTEXT, VOCABULARY = 64, 1024
BASE_BATCH_SIZE, EXAMPLES = 16, 10_240  # sequences in an update, and in the whole training
BASE_UPDATES = EXAMPLES // BASE_BATCH_SIZE
MODULES = """
    inspect typing pydoc tarfile doctest argparse pickletools datetime subprocess
    difflib locale enum mailbox ipaddress pickle pdb ast optparse dataclasses threading shutil
    configparser imaplib ssl statistics smtplib platform traceback os functools socket codecs
    ftplib bdb random ntpath tempfile pstats trace dis fractions plistlib uuid socketserver
    contextlib tokenize webbrowser calendar pkgutil pprint gzip modulefinder heapq mimetypes
"""
HELD_OUT = MODULES.split()[5::10]  # whole modules, for validation


class Text(NamedTuple):
    """Sequences of ``CONTEXT + 1`` tokens: (number, CONTEXT + 1), int32."""

    train: np.ndarray
    validation: np.ndarray
    digest: str  # of the text, which differs between Python versions


def load_text(vocabulary: int = VOCABULARY) -> Text:
    """Read the modules and encode them by byte pairs that the training part teaches."""
    held_out, training = _read(HELD_OUT), _read(sorted(set(MODULES.split()) - set(HELD_OUT)))
    tokens = [np.frombuffer(part, np.uint8).astype(np.int32) for part in (training, held_out)]
    sample = tokens[0][: 2**19]
    for new in range(256, vocabulary):
        pairs, counts = np.unique(sample[:-1] * vocabulary + sample[1:], return_counts=True)
        pair = divmod(int(pairs[np.argmax(counts)]), vocabulary)
        sample = _merge(sample, pair, new)
        tokens = [_merge(part, pair, new) for part in tokens]
    cut = [part[: len(part) // (CONTEXT + 1) * (CONTEXT + 1)] for part in tokens]
    sequences = [part.reshape(-1, CONTEXT + 1) for part in cut]
    return Text(*sequences, digest=hashlib.sha256(training + held_out).hexdigest()[:12])


def _read(modules: Iterable[str]) -> bytes:
    library = Path(sysconfig.get_path("stdlib"))
    return b"\n".join((library / f"{name}.py").read_bytes() for name in modules)


def _merge(tokens: np.ndarray, pair: tuple[int, int], new: int) -> np.ndarray:
    at = np.flatnonzero((tokens[:-1] == pair[0]) & (tokens[1:] == pair[1]))
    if pair[0] == pair[1] and len(at):  # of a run like "aaa" every second place begins a pair
        starts = np.maximum.accumulate(np.where(np.diff(at, prepend=-2) > 1, at, 0))
        at = at[(at - starts) % 2 == 0]
    tokens = tokens.copy()
    tokens[at] = new
    return np.delete(tokens, at + 1)


class Block(nnx.Module):
    """Attention and a feed-forward layer, each behind a layer norm and beside a residual."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = self.qkv(self.norms[0](x)).reshape(*x.shape[:2], 3, self.heads, -1)
        attended = jax.nn.dot_product_attention(*jnp.unstack(qkv, axis=2), is_causal=True)
        x = x + self.out(attended.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class GPT(nnx.Module):
    """A pre-LN transformer: tokens (batch, length) -> logits (batch, length, vocabulary)."""

    def __init__(self, *, width: int = 128, layers: int = 2, heads: int = 4,
                 vocabulary: int = VOCABULARY, rngs: nnx.Rngs):  # fmt: skip
        small = nnx.initializers.normal(0.02)
        self.tokens = nnx.Embed(vocabulary, width, embedding_init=small, rngs=rngs)
        self.places = nnx.Embed(CONTEXT, width, embedding_init=small, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, kernel_init=small, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.places(jnp.arange(tokens.shape[1]))[None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def mean_loss(model: GPT, sequences: jax.Array) -> jax.Array:
    """Cross-entropy of the next token, in nats, a mean over all tokens."""
    logits = model(sequences[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, sequences[:, 1:]).mean()


def learning_rate(updates: int = BASE_UPDATES, peak: float = 2e-3) -> optax.Schedule:
    """Warm-up over a tenth, then a cosine to zero; in updates of the base batch size."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, updates // 10, updates)


def matrices(params: Any) -> Any:
    """Weight decay is for matrices."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def make_optimizer(batch_size: int, base_batch_size: int, rule: Any, schedule: Any) -> Any:
    """The recipe of the base batch size, scaled: clipping and AdamW by the same rule."""
    scale = functools.partial(
        bs_jax.scale_by_batch, batch_size=batch_size, base_batch_size=base_batch_size, rule=rule
    )
    return optax.chain(
        scale(optax.clip_by_global_norm)(1.0),
        scale(optax.adamw)(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask=matrices),
    )


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=BASE_BATCH_SIZE, help="sequences")
    parser.add_argument("--base_batch_size", type=int, default=BASE_BATCH_SIZE,
                        help="sequences in an update that the recipe was tuned at")  # fmt: skip
    parser.add_argument("--rule", default="invariant", help=f"one of {', '.join(bs_jax.RULES)}")
    parser.add_argument("--guard", action=argparse.BooleanOptionalAction, default=True,
                        help="let steps grow only up to the measured noise scale")  # fmt: skip
    parser.add_argument("--ramp", action="store_true", help="start at the base batch size and"
                        " grow up to --batch_size as the measured noise scale allows")  # fmt: skip
    parser.add_argument("--microbatches", type=int, default=2, help="parts of a base-size batch")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of examples")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="sequences to train on")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="tokens; 256: bytes")
    flags = parser.parse_args(arguments)

    text = load_text(flags.vocabulary)
    if flags.examples > len(text.train):
        parser.error(f"--examples={flags.examples}: the text has {len(text.train)} sequences")
    order = np.random.default_rng(flags.seed).permutation(len(text.train))
    model = GPT(vocabulary=flags.vocabulary, rngs=nnx.Rngs(flags.seed))
    graph, params = nnx.split(model)
    ramp = None
    if flags.ramp:
        ramp = BatchRamp(
            batch_size=flags.base_batch_size,
            largest=flags.batch_size,
            multiple_of=max(1, flags.base_batch_size // flags.microbatches),
        )
    size = ramp.batch_size if ramp else flags.batch_size
    rule = resolve_rule(flags.rule).replace(guard=flags.guard)
    tx = make_optimizer(size, flags.base_batch_size, rule, learning_rate())
    opt_state = jax.jit(tx.init)(params)  # in one program, not one for each operation

    @jax.jit  # one program for each size of a batch
    def update(params, opt_state, batch):
        loss_and_grad = bs_jax.value_grad_and_stats(
            lambda params, batch: mean_loss(nnx.merge(graph, params), batch),
            microbatches=max(2, flags.microbatches * len(batch) // flags.base_batch_size),
        )
        loss, grads, stats = loss_and_grad(params, batch)
        changed = {"batch_size": len(batch)} if ramp else {}
        updates, opt_state = tx.update(grads, opt_state, params, microbatch=stats, **changed)
        return optax.apply_updates(params, updates), opt_state, loss

    print(f"text {text.digest}: {len(text.train)} sequences to train on, of {CONTEXT} tokens")
    start = time.perf_counter()
    done = shown = updates = 0
    while done + size <= flags.examples:
        batch = text.train[order[done : done + size]]
        params, opt_state, loss = update(params, opt_state, batch)
        done, updates = done + size, updates + 1
        if ramp:
            size = ramp.next_batch_size(bs_jax.noise_scale_estimate(opt_state))
        if done >= shown:
            shown += 1024
            seconds = time.perf_counter() - start
            print(f"{done:6d} sequences, batch {len(batch)}: loss {loss:.3f}, {seconds:.0f} s")
    evaluate = jax.jit(lambda params, batch: mean_loss(nnx.merge(graph, params), batch))
    final = float(np.mean([evaluate(params, x) for x in np.split(text.validation[:512], 8)]))
    print(f"validation loss {final:.4f} nats a token after {updates} updates")
    return final


if __name__ == "__main__":
    main()
