#!/usr/bin/env bash
# Pictures of a file of prompts under Slurm, a process for each GPU:
#   sbatch --nodes 2 experiments/launch/slurm.sh --prompts prompts.txt --out /shared/out
# All arguments go to `unclip-jax generate`. --out has to be a folder that all nodes share. Training,
# from a clone that all nodes share, goes on from its last checkpoint:
#   PROGRAM=experiments.emoji.train_clip sbatch experiments/launch/slurm.sh --run /shared/run --fsdp
#SBATCH --job-name=unclip-jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# A job that was preempted is queued again: it draws what is missing.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# Slurm tells each task its number, and JAX gives it the GPU of that number: all tasks of a node have
# to see all of its GPUs, so none is bound to one (--gpus-per-task would do that).
# As one task dies the others are ended, and not left to wait for it.
read -ra program <<<"${PROGRAM:-unclip_jax generate}"
exec srun --kill-on-bad-exit=1 --label \
  "${PYTHON:-python3}" -u -m "${program[@]}" --distributed "$@"
