#!/usr/bin/env bash
# Pictures of a file of prompts on all machines of a Cloud TPU slice:
#   TPU=my-v5e-16 ZONE=us-west4-a experiments/launch/tpu_vm.sh \
#     --prompts gs://my-bucket/prompts.txt --out gs://my-bucket/out
# All arguments go to `unclip-jax generate`. The machines share no disk: prompts, pictures and models
# are in a bucket. unclip_jax is installed on them before, from a clone on each:
#   gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "pip install '.[tpu,gcs]'"
# Training, from the clone in the home folder of each machine (CLONE), with a disk that all mount for
# --run, goes on from its last checkpoint:
#   PROGRAM=experiments.emoji.train_clip TPU=my-v5e-16 ZONE=us-west4-a CLONE=unclip_jax \
#     experiments/launch/tpu_vm.sh --run /mnt/shared/run --tfds gs://my-bucket/coco --fsdp
set -euo pipefail

: "${TPU:?the name of the TPU}" "${ZONE:?its zone}"

program=${PROGRAM:-unclip_jax generate}
# Each machine has a process, which has all chips of the machine; training takes all by itself.
if [[ $program == 'unclip_jax generate' ]]; then
  set -- --devices "${DEVICES:-4}" "$@"
fi
# printf quotes the arguments for the shells at the other end.
arguments=${*:+$(printf ' %q' "$@")}
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all \
  --command "cd ${CLONE:-.} && ${PYTHON:-python3} -u -m $program --distributed$arguments"
