#!/usr/bin/env bash
# Pictures of a file of prompts by several processes under Open MPI, on the machine where this is
# started and on others:
#   experiments/launch/mpirun.sh -n 8 --hostfile hosts -- --prompts prompts.txt --out /shared/out
# What is before -- goes to mpirun, the rest to `unclip-jax generate`. --out has to be a folder that
# all machines share. Started again, it draws what is missing. Training, from a clone that all
# machines share, goes on from its last checkpoint:
#   PROGRAM=experiments.emoji.train_clip experiments/launch/mpirun.sh -n 8 -- --run /shared/run --fsdp
set -euo pipefail

mpi=()
while [[ $# -gt 0 && $1 != -- ]]; do
  mpi+=("$1")
  shift
done
if [[ $# -lt 2 ]]; then
  echo "usage: $0 [OPTION OF MPIRUN]... -- OPTION [OPTION OF THE PROGRAM]..." >&2
  exit 2
fi
shift

# Process 0 runs where mpirun does; the others have to reach it at a port that is free there.
export COORDINATOR=${COORDINATOR:-$(hostname):$((20000 + RANDOM % 10000))}
export PYTHON=${PYTHON:-python3}
export PROGRAM=${PROGRAM:-unclip_jax generate}

# By hand rather than by --distributed: JAX knows Open MPI 4, but not 5. A process takes the GPU of
# its number on its machine. Python's output is not buffered, to be seen as it comes.
# shellcheck disable=SC2016 # expanded by each process
exec mpirun -x COORDINATOR -x PYTHON -x PROGRAM "${mpi[@]}" bash -c '
  export JAX_LOCAL_DEVICE_IDS=${JAX_LOCAL_DEVICE_IDS:-$OMPI_COMM_WORLD_LOCAL_RANK}
  exec "$PYTHON" -u -m $PROGRAM "$@" --coordinator "$COORDINATOR" \
    --num-processes "$OMPI_COMM_WORLD_SIZE" --process-id "$OMPI_COMM_WORLD_RANK"
' program "$@"
