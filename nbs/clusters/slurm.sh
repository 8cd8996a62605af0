#!/usr/bin/env bash
# Train on several hosts that Slurm gives us:  sbatch slurm.sh
#
# What must be there on every host: the same environment with the course, `pip install "cxr-course[scale]" "ray[default]"`,
# on a disk that all hosts see; the images and the run folder on such a disk too.
#
#SBATCH --job-name=cxr-course
#SBATCH --nodes=2                 # hosts
#SBATCH --ntasks-per-node=1       # one Ray on each; it starts the workers itself
#SBATCH --cpus-per-task=8
##SBATCH --gpus-per-task=1        # remove one '#' if your hosts have graphics cards
#SBATCH --time=08:00:00           # the job is ended after this; send it again and the run is resumed
#SBATCH --requeue                 # if a host dies, Slurm may start the job anew
#SBATCH --open-mode=append
set -euo pipefail

SHARED=${SHARED:-$HOME/cxr}                      # the shared disk
DATA=${DATA:-$SHARED/chest_xray}
RUN=${RUN:-$SHARED/runs/large}
WORKERS=${WORKERS:-$SLURM_JOB_NUM_NODES}         # processes that share each batch: one a host, or one a graphics card
# shellcheck source=/dev/null
source "$SHARED/venv/bin/activate"
export RAY_USAGE_STATS_ENABLED=0                 # nothing is reported to anybody

# The first host of the job is the head. It listens on the cluster's own network: whoever reaches this port can run
# programs as you, so ask your computing centre that the hosts of a job are closed to strangers.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}'):$((20000 + SLURM_JOB_ID % 10000))

# A killed job has left finished epochs: go on from there.
resume=()
if [ -e "$(dirname "$RUN")/.$(basename "$RUN").partial/state.npz" ]; then resume=(--resume); fi

# Start Ray on all hosts, train from the first, and stop Ray when the training has ended.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
  ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus "$SLURM_CPUS_PER_TASK" \
  --include-dashboard false -- \
  cxr-course launch --address "$address" --workers "$WORKERS" train --data "$DATA" --out "$RUN" "${resume[@]}"
