#!/usr/bin/env bash
# Stage 3: score the newest run's exported student (eval/run_euroeval.py).
#
#   bash slurm/run_stage3_eval.sh [--model DIR ...]      on this machine
#   sbatch slurm/run_stage3_eval.sh [--model DIR ...]    under SLURM, one node as below
#   bash slurm/submit.sh stage3_eval [--model DIR ...]   under SLURM, as slurm/site.env says
#
# Resources and processes only; every setting of the run is in configs/ (arguments are passed on).
#SBATCH --job-name=grpo-kd-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -uo pipefail

# sbatch runs a copy of this file from a spool folder; the repository is then where sbatch was called.
here="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
for here in "$here" "${SLURM_SUBMIT_DIR:-.}"{/slurm,} ""; do [[ -f "$here/steps.sh" ]] && break; done
# shellcheck source-path=SCRIPTDIR source=env.sh
source "${here:?call sbatch in the repository, or slurm/submit.sh anywhere}/env.sh" || exit
alone eval/run_euroeval.py "$@"
