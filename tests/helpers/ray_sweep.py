"""A sweep on a local Ray cluster of a head and nodes, one of which is removed on the way.

``python ray_sweep.py WORKDIR REMOVE`` prints what came of it as JSON. A process of its own, so that
nothing of Ray is left in the tests'.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def main(workdir: Path, remove: bool) -> None:
    from faults import recipe
    from ray.cluster_utils import Cluster

    from bs_jax.sweep import plan as sweep
    from bs_jax.sweep import ray_cluster
    from bs_jax.sweep.cohorts import Schedule
    from bs_jax.sweep.progress import Display

    config = json.loads(recipe.get_config().to_json())
    config["train_examples"] = 384
    planned = sweep.plan_sweep("tiny", config, recipe.sweep_tiny())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    events = []

    class Listening(Display):
        def event(self, worker, event):
            events.append(event)
            super().event(worker, event)

    def remove_one():
        while not any(event["event"] == "progress" for event in events):
            time.sleep(0.01)
        cluster.remove_node(nodes[0], allow_graceful=False)

    if remove:
        threading.Thread(target=remove_one, daemon=True).start()
    try:
        with Display(planned.runs, 0, quiet=True) as display:
            display.__class__ = Listening
            failures = ray_cluster.train_on_ray(
                Schedule(planned.runs), workdir, display, address=cluster.address
            )
    finally:
        cluster.shutdown()
    print(
        json.dumps(
            {
                "failures": failures,
                "planned": [run.run_id for run in planned.runs],
                "finished": [e["run_id"] for e in events if e["event"] == "run_finished"],
                "nodes": len(cluster.list_all_nodes()),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "remove")
