#!/usr/bin/env bash
# Stage 0: continued pre-training of the student on raw text (training/pretrain.py).
#
#   bash slurm/run_stage0_pretrain.sh [--steps 5 ...]      on this machine
#   sbatch slurm/run_stage0_pretrain.sh [--steps 5 ...]    under SLURM, one node as below
#   bash slurm/submit.sh stage0_pretrain [--steps 5 ...]   under SLURM, as slurm/site.env says
#
# Resources and processes only; every setting of the run is in configs/ (arguments are passed on).
#SBATCH --job-name=grpo-kd-pretrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --mem=240G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
#SBATCH --signal=B:USR1@180
set -uo pipefail

# sbatch runs a copy of this file from a spool folder; the repository is then where sbatch was called.
here="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
for here in "$here" "${SLURM_SUBMIT_DIR:-.}"{/slurm,} ""; do [[ -f "$here/steps.sh" ]] && break; done
# shellcheck source-path=SCRIPTDIR source=env.sh
source "${here:?call sbatch in the repository, or slurm/submit.sh anywhere}/env.sh" || exit
launch training/pretrain.py "$@"
