#!/usr/bin/env bash
# Pictures of a file of prompts on all machines of a Cloud TPU slice:
#   TPU=my-v5e-16 ZONE=us-west4-a experiments/launch/tpu_vm.sh \
#     --prompts gs://my-bucket/prompts.txt --out gs://my-bucket/out
# All arguments go to `unclip-jax generate`. The machines share no disk: prompts, pictures and models
# are in a bucket. unclip_jax is installed on them before, from a clone on each:
#   gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "pip install '.[tpu,gcs]'"
set -euo pipefail

: "${TPU:?the name of the TPU}" "${ZONE:?its zone}"

# Each machine has a process, which has all chips of the machine.
devices=${DEVICES:-4}
# printf quotes the arguments for the shells at the other end.
arguments=$(printf ' %q' --devices "$devices" "$@")
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all \
  --command "${PYTHON:-python3} -u -m unclip_jax generate --distributed$arguments"
