#!/usr/bin/env bash
# Stages 1, 2 and 3 in a row: warm-up, reinforcement learning from it, and its evaluation.
#
#   bash slurm/run_pipeline.sh [--config my.yaml --name my-run ...]    as SLURM jobs; without SLURM, here
#
# Each job starts when the one before has succeeded; if one fails, those after it are cancelled. Arguments go to stages 1
# and 2 (--algo ppo chooses PPO). Stage 1 is the run NAME-sft, and its export is the student that stage 2 starts from.
# GRPO_KD_LOCAL=1 stays on this machine.
set -uo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh" || exit

# shellcheck disable=SC2086 # a prefix of several words
settings="$(${GRPO_KD_CONTAINER:-} bash slurm/task.sh one training/run/job.py training/main.py "$@")" || exit
{ read -r folder && read -r name; } <<<"$settings"
warm="${folder%/*}/$name-sft"
stage1=(stage1_sft "$@" --name "$name-sft" --sft.output "$warm/export")
stage2=(stage2_grpo "$@" --student.path "$warm/export")
stage3=(stage3_eval --model "$folder/export")

if [[ -n "${GRPO_KD_LOCAL:-}" ]] || ! command -v sbatch >/dev/null; then
    for stage in stage1 stage2 stage3; do
        declare -n line="$stage"
        echo "pipeline: ${line[0]}" >&2
        bash "slurm/run_${line[0]}.sh" "${line[@]:1}" || exit
    done
    exit 0
fi

# An invalid dependency would leave a job pending for ever. Whatever else goes wrong here, no part of a chain stays.
jobs=()
trap '((${#jobs[@]} == 3 || ${#jobs[@]} == 0)) || scancel "${jobs[@]}"' EXIT
after() { echo "--kill-on-invalid-dep=yes --dependency=afterok:${jobs[-1]}"; }
id="$(bash slurm/submit.sh "${stage1[@]}")" || exit && jobs+=("$id")
id="$(SBATCH="${SBATCH:-} $(after)" bash slurm/submit.sh "${stage2[@]}")" || exit && jobs+=("$id")
id="$(SBATCH="${SBATCH:-} $(after)" bash slurm/submit.sh "${stage3[@]}")" || exit && jobs+=("$id")
echo "jobs ${jobs[*]}: stages 1, 2, 3"
echo "watch: squeue -j $(IFS=, && echo "${jobs[*]}"); tail -F slurm-*-{$(IFS=, && echo "${jobs[*]}")}.out; ls $folder"
