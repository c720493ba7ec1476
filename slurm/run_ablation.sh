#!/usr/bin/env bash
# The ablation (configs/ablation.yaml): every variant with every seed on the embedded demo, then the table and the plot.
#
#   bash slurm/run_ablation.sh [--jobs 2] [--seeds 0 1 2] [--only grpo-minillm reverse-kl] [--steps 100] [--runs_dir DIR]
#   sbatch --array=0-109 slurm/run_ablation.sh         one run a task; afterwards the line above makes the table
#
# Finished runs are not started again. Other arguments go to each run (--demo_size tiny).
#SBATCH --job-name=grpo-kd-ablation
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=06:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A-%a.out
#SBATCH --signal=B:USR1@180
set -uo pipefail

# sbatch runs a copy of this file from a spool folder; the repository is then where sbatch was called.
here="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
for here in "$here" "${SLURM_SUBMIT_DIR:-.}"{/slurm,} ""; do [[ -f "$here/steps.sh" ]] && break; done
# shellcheck source-path=SCRIPTDIR source=env.sh
source "${here:?call sbatch in the repository, or slurm/submit.sh anywhere}/env.sh" || exit
alone eval/run_experiment.py configs/ablation.yaml "$@"
