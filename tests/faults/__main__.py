"""``python -m tests.faults --kills=100``: inject faults, judge each, print the table.

Exit code 0 if after every fault the same command finished as if nothing had happened.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from .campaign import run_campaign, table
from .faults import ALL


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="at least so many SIGKILLs")
    parser.add_argument("--others", type=int, default=10, help="of each other fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(ALL), help="these alone")
    arguments = parser.parse_args()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="bs_jax-faults-"))
    try:
        results = run_campaign(
            folder,
            arguments.kills,
            arguments.others,
            arguments.seed,
            kinds=arguments.kind or ALL,
            say=print,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(results))
    print(f"seed {arguments.seed}, {time.monotonic() - began:.0f} seconds")
    return int(any(result.failures for result in results))


if __name__ == "__main__":
    sys.exit(main())
