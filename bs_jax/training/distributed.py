"""One run on many processes: joining them, and what they must agree on.

Every process runs the same program in the same order. Process 0 reads and writes the records and
tells the others what it found, so no shared file system is needed for them. All functions here
that exchange something must be called by all processes; with one process they cost nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bs_jax.errors import UserError

_HEARTBEAT_SECONDS = 60  # silence after which a process counts as lost
_SHUTDOWN_SECONDS = 20
_GOOGLE = "0x1ae0"  # as vendor of a PCI device
EXIT_LOST = 75  # "try again": another process of the run was lost
Tree = TypeVar("Tree")


def initialize(
    mode: str = "auto",
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Join the processes of one run, from what is given or from what the cluster says.

    Call it before anything asks JAX for its devices.

    Args:
        mode: "auto" joins where addresses are given or `cluster_of` finds a cluster; "off" never.
        coordinator_address: HOST:PORT of process 0, the same in all processes.
        num_processes: how many processes there are.
        process_id: this one's number, from 0.
        environment: variables that tell of a cluster; by default those of this process.

    Returns:
        Whether the processes were joined.

    Raises:
        UserError: incomplete or impossible numbers, or no answer from the others.
    """
    environment = os.environ if environment is None else environment
    given = (coordinator_address, num_processes, process_id)
    if mode == "off":
        if any(value is not None for value in given):
            raise UserError(
                "--distributed=off excludes --coordinator_address, --num_processes "
                "and --process_id; leave one or the other out"
            )
        return False
    explicit = any(value is not None for value in given)
    if explicit:
        _check(coordinator_address, num_processes, process_id)
    cluster = None if explicit else cluster_of(environment)
    if not explicit and cluster is None:
        return False
    import jax

    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            # Given numbers are all that counts: no look-up in whatever cluster this may be.
            cluster_detection_method="deactivate" if explicit else None,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot join the processes of this run ({cluster or coordinator_address}: {reason}); "
            "give --coordinator_address, --num_processes and --process_id, or --distributed=off"
        ) from error
    _check_local_devices()
    return True


def _check(address: str | None, count: int | None, number: int | None) -> None:
    if address is None or count is None or number is None:
        raise UserError(
            "--coordinator_address, --num_processes and --process_id go together; "
            f"given: {address}, {count}, {number}"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator_address is {address!r}; give HOST:PORT of process 0")
    if count < 1 or not 0 <= number < count:
        raise UserError(
            f"--process_id is {number} of --num_processes {count}; number the processes from 0 "
            f"to {max(count - 1, 0)}"
        )


def cluster_of(environment: Mapping[str, str]) -> str | None:
    """The kind of cluster whose processes belong to one run, or None.

    Args:
        environment: variables of the process.

    >>> cluster_of({"SLURM_STEP_NUM_TASKS": "4"})
    'Slurm'
    >>> cluster_of({"SLURM_STEP_NUM_TASKS": "1"}) is None  # a task of an array stands alone
    True
    """
    if _count(environment, "SLURM_STEP_NUM_TASKS") > 1:
        return "Slurm"
    if _count(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    platforms = (environment.get("JAX_PLATFORMS") or "tpu").split(",")
    if "tpu" in platforms and _on_tpu_slice(environment):
        return "Cloud TPU"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "this is a pod of an indexed Kubernetes job; to join its pods to one run install "
                "'jax[k8s]' or give --coordinator_address, --num_processes and --process_id; "
                "for a run of its own give --distributed=off"
            )
        return "Kubernetes"
    return None


def _on_tpu_slice(environment: Mapping[str, str]) -> bool:
    """Whether this host may be one of several of a TPU, by what JAX itself goes by.

    On Kubernetes variables name the hosts. On a TPU VM the metadata server does, which JAX asks.
    """
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return "," in hosts or _count(environment, "MEGASCALE_NUM_SLICES") > 1
    asks = "TPU_SKIP_MDS_QUERY" not in environment
    return asks and importlib.util.find_spec("libtpu") is not None and has_tpu()


def has_tpu(root: Path = Path("/")) -> bool:
    """Whether TPU chips are attached.

    Up to v4 they are /dev/accel*, since v5 VFIO groups of Google's devices.

    Args:
        root: of the file system.
    """
    if any(root.glob("dev/accel*")):
        return True
    groups = [path.name for path in root.glob("dev/vfio/[0-9]*")]
    vendors = [
        vendor
        for group in groups
        for vendor in root.glob(f"sys/kernel/iommu_groups/{group}/devices/*/vendor")
    ]
    return any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)


def _count(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else 0


def _check_local_devices() -> None:
    import jax

    counts = [0] * jax.process_count()
    for device in jax.devices():
        counts[device.process_index] += 1
    if len(set(counts)) > 1:
        raise UserError(
            f"the processes have {', '.join(map(str, counts))} devices; a batch is split evenly, "
            "so give each process as many"
        )


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """End this process at once on an error: the others must not wait for it, nor it for them."""
    try:
        yield
    except UserError as error:
        _leave(f"error: {error}", 2)
    except Exception as error:
        traceback.print_exc()
        _leave(
            f"error: {type(error).__name__} in process {_process_index()}; most likely another "
            "process of this run was lost: give all of them the same commands again",
            EXIT_LOST,
        )


def _leave(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    if is_first():
        time.sleep(1)  # it holds the coordinator: let the others end in their own words
    os._exit(code)


def _process_index() -> int:
    import jax

    return jax.process_index()


def shutdown() -> None:
    """Part from the other processes once all have come here; each goes on alone."""
    if process_count() > 1:
        import jax

        jax.distributed.shutdown()


def process_count() -> int:
    """How many processes train together."""
    import jax

    # Asked in this order, a process that leaves training to others claims no accelerator.
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process reads and writes the records."""
    return process_count() == 1 or _process_index() == 0


def on_first(action: Callable[[], Any]) -> Any:
    """Do something in process 0 alone; all get its result, or its error, of whatever type there.

    Args:
        action: returns what JSON can hold.

    >>> on_first(lambda: [1, 2])
    [1, 2]
    """
    if process_count() == 1:
        return action()
    told: dict[str, Any] = {}
    failure: Exception | None = None
    if is_first():
        try:
            told["result"] = action()
        except UserError as error:
            told["error"] = str(error)
        except Exception as error:  # the others must not wait for what never comes
            failure, told["failure"] = error, f"process 0: {type(error).__name__}: {error}"
    told = json.loads(_broadcast(json.dumps(told).encode()))
    if "error" in told:
        raise UserError(told["error"])
    if "failure" in told:
        raise failure or RuntimeError(told["failure"])
    return told["result"]


def arrays_of_first(tree: Tree) -> Tree:
    """Process 0's arrays in all processes, bit for bit.

    Args:
        tree: of numpy arrays, of the same structure, shapes and dtypes everywhere.

    Returns:
        The tree of process 0.
    """
    if process_count() == 1:
        return tree
    import jax

    leaves, structure = jax.tree.flatten(tree)
    leaves = [np.asarray(leaf) for leaf in leaves]
    content = _broadcast(b"".join(leaf.tobytes() for leaf in leaves))
    found, start = [], 0
    for leaf in leaves:
        part = content[start : start + leaf.nbytes]
        found.append(np.frombuffer(part, leaf.dtype).reshape(leaf.shape).copy())
        start += leaf.nbytes
    return jax.tree.unflatten(structure, found)


def any_process(flag: bool) -> bool:
    """Whether any process says so.

    >>> any_process(True)
    True
    """
    if process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag, np.int32))))


def check_same(what: str, value: str) -> None:
    """Refuse to train where the processes were not given the same.

    Args:
        what: name of it.
        value: of this process.

    Raises:
        UserError: in every process whose value is not that of process 0, and in process 0.
    """
    wrong = value != on_first(lambda: value)
    if any_process(wrong):
        here = "this process differs from process 0" if wrong else "another process differs"
        raise UserError(f"all processes of a run need the same {what}, but {here}")


def _broadcast(content: bytes) -> bytes:
    """Process 0's bytes in all processes."""
    from jax.experimental import multihost_utils

    # As whole words, since the sum behind the broadcast keeps those as they are.
    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(content), np.uint32)))
    words = np.zeros(-(-length // 4), np.uint32)
    if is_first():
        words.view(np.uint8)[:length] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(words)).tobytes()[:length]
