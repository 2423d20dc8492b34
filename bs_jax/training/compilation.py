"""How programs are compiled: the persistent cache, and what XLA is told on a CPU."""

from __future__ import annotations

import functools
import os
from pathlib import Path

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


def cache_folder() -> Path:
    """Where compiled programs are kept: ``$BS_JAX_CACHE``, or the user's cache folder.

    Raises:
        UserError: it is a URL.
    """
    own = os.environ.get("BS_JAX_CACHE")
    if own:
        return stores.local_path(own, "BS_JAX_CACHE") / "xla"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bs_jax" / "xla"


def enable_cache() -> None:
    """Turn the cache on, unless JAX was told of one already or the folder cannot be written."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home costs time, not the run
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
