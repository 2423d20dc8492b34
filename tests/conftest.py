"""Two CPU devices (or BS_JAX_TEST_DEVICES), quick compiles, the same examples every time."""

import atexit
import gc
import importlib.metadata
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests run side by side, a process a core: threads of NumPy and PyTorch would wait for a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "BS_JAX_TEST_CACHE" not in os.environ:  # the parallel workers and subprocesses inherit it
    os.environ["BS_JAX_TEST_CACHE"] = tempfile.mkdtemp(prefix="bs_jax-tests-")
    atexit.register(shutil.rmtree, os.environ["BS_JAX_TEST_CACHE"], ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["BS_JAX_TEST_CACHE"]
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # Tests run each program for moments: less optimisation is less time in all.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        + " --xla_cpu_parallel_codegen_split_count=1"
    )
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # The older emitters, gone later, compile in two thirds of the newer ones' time.
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", int(os.environ.get("BS_JAX_TEST_DEVICES", "2")))
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=50, database=None
)
hypothesis.settings.load_profile("repeatable")

# Doctests import every module; this one has none, needs an extra and takes seconds to import.
collect_ignore = ["helpers/torch_xresnet.py"]


def pytest_collection_finish(session):
    """Collect garbage seldom: what was imported is never garbage, and traced programs hardly are.

    The usual thresholds walk through all of it again and again, a tenth of the time of a test.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def store(monkeypatch):
    """An object store with a server of its own."""
    from helpers import fake_gcs

    with fake_gcs.connected(monkeypatch) as served:
        yield served


@pytest.fixture
def root(store):
    """A folder in it."""
    from bs_jax.records import stores

    return stores.to_path(f"{store.url}/some/folder")
