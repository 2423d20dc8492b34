"""How programs are compiled: the persistent cache, and what XLA is told on a CPU."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bs_jax.records import stores

# XLA hands convolutions, matrix products and sums to YNNPACK, which takes 1.5 to 3 times as long as
# its own code for many shapes (`benchmarks/conv_forms.py --library=default`). Empty: none of them.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


@functools.cache
def compiler_options(platform: str) -> dict[str, str]:
    """What to compile a training program with; empty where this XLA does not know the options.

    Args:
        platform: "cpu", "gpu" or "tpu".

    Returns:
        For ``jax.jit(compiler_options=...)``. An option that is in ``XLA_FLAGS`` stays as it is
        there.
    """
    if platform != "cpu" or any(name in os.environ.get("XLA_FLAGS", "") for name in _CPU_OPTIONS):
        return {}
    import jax

    try:
        jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS).lower(0.0).compile()
    except Exception:  # XLA's options come and go; what it raises for an unknown one does, too
        return {}
    return dict(_CPU_OPTIONS)


def side_by_side(programs: Sequence[tuple[Any, tuple[Any, ...]]]) -> None:
    """Compile programs at the same time, so that their first calls find them compiled.

    Python traces one after the other; XLA then compiles each on a thread of its own.

    Args:
        programs: jitted functions, each with its arguments or their shapes. Where these are placed
            belongs to them: a call with arguments placed otherwise compiles again.
    """
    lowered = [program.lower(*arguments) for program, arguments in programs]
    failures: list[BaseException] = []

    def compile_one(one: Any) -> None:
        try:
            one.compile()
        except BaseException as error:
            failures.append(error)

    # No executor: it would keep Ctrl-C waiting for XLA, which may have minutes to go and cannot be
    # stopped. So only the end of the process waits for it.
    threads = [threading.Thread(target=compile_one, args=(one,)) for one in lowered]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.5)  # in between Python answers a signal that another thread was given
    if failures:
        raise failures[0]


class Stopwatch:
    """Adds up the seconds that this process spends on making programs, from when it is made.

    Attributes:
        seconds: of tracing, lowering and compiling, or reading compiled programs from the cache.

    >>> watch = Stopwatch()
    >>> watch.add(2.0, now=10.0), watch.add(5.0, now=12.0), watch.seconds  # the first lies within
    (None, None, 5.0)
    """

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        self._lock = threading.Lock()

    def start(self) -> Stopwatch:
        """Listen to what JAX reports, to the end of the process."""
        import jax

        def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            if event.startswith("/jax/core/compile/"):
                self.add(duration_secs, time.monotonic())

        jax.monitoring.register_event_duration_secs_listener(listen)
        return self

    def add(self, duration: float, now: float) -> None:
        """Take in a span that ends now; spans within it were reported before."""
        start = now - duration
        with self._lock:
            while self._spans and self._spans[-1][0] >= start:
                self._spans.pop()
            if self._spans:
                start = max(start, self._spans[-1][1])
            self._spans.append((start, now))

    @property
    def seconds(self) -> float:
        """See `Stopwatch`."""
        return sum(end - start for start, end in self._spans)


@functools.cache
def stopwatch() -> Stopwatch:
    """The one of this process, running from the first call on."""
    return Stopwatch().start()


def cache_folder() -> Path | None:
    """Where compiled programs are kept: ``$BS_JAX_CACHE``, or the user's cache folder.

    Returns:
        The folder; None for a user without a home.

    Raises:
        UserError: it is a URL.
    """
    own = os.environ.get("BS_JAX_CACHE")
    if own:
        return stores.local_path(own, "BS_JAX_CACHE") / "xla"
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # neither $HOME nor an entry in the list of users
        return None
    return Path(base) / "bs_jax" / "xla"


def enable_cache() -> None:
    """Turn the cache on, unless JAX was told of one already or the folder cannot be written."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = cache_folder()
    if folder is None:
        return  # costs time, not the run; so does a home that is read-only
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
