#!/bin/bash
# One run on all hosts of a Cloud TPU slice: every host runs the same command and finds the others.
# Not run yet: no TPU was at hand.
# Usage: TPU=name ZONE=zone WORKDIR=gs://bucket/runs/one docs/cluster/tpu_vm.sh
set -euo pipefail
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command='
  set -e
  cd bs_jax
  .venv/bin/pip install -q -e ".[gcs,tpu]"
  exec .venv/bin/python main.py --mode=train --config.model.dtype=bfloat16 --config.batch_size=1024 --workdir='"$WORKDIR"'
'
