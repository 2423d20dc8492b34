"""Where records lie: on a disk, or in an object store (``gs://``, ``s3://``).

This is the only door: other packages import names from here, never a module inside. A path is a
`pathlib.Path`, or for a URL an `etils.epath.Path` (see `to_path`); names are joined alike. The
functions below do on both what the caller asks for.

Inside: `files` reads and writes, `errors` turns failures into messages, `lock` and `lease` let one
process write in a folder at a time, `archives` stores checkpoints, `folders` reads many run
folders quickly.
"""

from bs_jax.records.stores.archives import checkpoint_folders
from bs_jax.records.stores.errors import StoreError, disk_errors, store_errors
from bs_jax.records.stores.files import (
    GrowingFile,
    Outbox,
    check_writable,
    each,
    exists,
    is_remote,
    local_path,
    make_folder,
    names,
    read_bytes,
    rename,
    text_of,
    to_path,
    unlink,
    write_bytes,
)
from bs_jax.records.stores.folders import Folders, Stamp, open_folders
from bs_jax.records.stores.lock import hold

__all__ = [
    "Folders",
    "GrowingFile",
    "Outbox",
    "Stamp",
    "StoreError",
    "check_writable",
    "checkpoint_folders",
    "disk_errors",
    "each",
    "exists",
    "hold",
    "is_remote",
    "local_path",
    "make_folder",
    "names",
    "open_folders",
    "read_bytes",
    "rename",
    "store_errors",
    "text_of",
    "to_path",
    "unlink",
    "write_bytes",
]
