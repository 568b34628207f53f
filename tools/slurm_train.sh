#!/usr/bin/env bash
# Train under SLURM over as many jobs as it takes: sbatch tools/slurm_train.sh kathleen/compressive_transformer [a.b=c ...]
# Two minutes before the time limit SLURM sends SIGUSR1; the run is saved, and the job puts itself into the queue again.
#SBATCH --job-name=ct_audio
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
srun ct-audio train "$@"
status=$?
if [ "$status" -eq $((128 + 10)) ]; then # SIGUSR1: saved, and not finished
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
