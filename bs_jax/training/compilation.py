"""The persistent compilation cache: the second start of the same program takes a second."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where compiled programs are kept: ``$BS_JAX_CACHE``, or the user's cache folder."""
    own = os.environ.get("BS_JAX_CACHE")
    if own:
        return Path(own) / "xla"
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
