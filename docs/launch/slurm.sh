#!/bin/bash
#SBATCH --job-name=gspo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1         # one process per node, which drives all of its GPUs
#SBATCH --gpus-per-node=8           # of the node, not per task: see JAX_LOCAL_DEVICE_IDS below
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@180           # to the tasks, 180 to 240 s before the end: save, then exit 75
#SBATCH --requeue
#SBATCH --open-mode=append          # a requeued job goes on writing to the same log
#SBATCH --output=%x-%j.log
#
# sbatch docs/launch/slurm.sh CONFIG.yaml [section.key=value ...]
#
# The whole job in one command; every run of it continues where the last one stopped. JAX finds the
# other processes through srun's variables, so that no address has to be given.
set -euo pipefail

RUNS=${RUNS:-$PWD/runs}             # a file system that all nodes see
LAUNCH=${LAUNCH:-gspo-jax}          # or: apptainer exec --nv image.sif gspo-jax

# Under Slurm JAX gives each process the one GPU that has its number on the node. A process that is
# alone on its node wants all of them.
gpus=${SLURM_GPUS_ON_NODE:-0}
if ((gpus > 1 && ${SLURM_NTASKS_PER_NODE:-1} == 1)); then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

# Where one process dies the others are of no use: srun ends them all, and its exit code is the
# highest of theirs. Slurm's SIGTERM comes to this script and to the tasks: they save, and it waits.
# It must not pass the signal on, because a second one ends them at once. srun is in the background,
# because bash looks at signals between commands alone.
trap : TERM USR1
srun --kill-on-bad-exit=1 $LAUNCH train "$@" run.dir="$RUNS" run.resume=auto &
step=$!
code=0
wait $step || code=$?
while kill -0 $step 2>/dev/null; do # a signal has ended `wait`, not srun
  code=0
  wait $step || code=$?
done

if ((code == 75)); then # saved, and asked to stop: the same job again, when there is room
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
