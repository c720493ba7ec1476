#!/usr/bin/env bash
# Submit a stage with the resources of slurm/site.env; prints the job's id.
#
#   bash slurm/submit.sh stage2_grpo [--config my.yaml ...]
#   SBATCH="--dependency=afterok:17 --hold" bash slurm/submit.sh stage3_eval [...]     with more flags of sbatch
#
# Stages: stage0_pretrain, stage1_sft, stage2_grpo, stage2_ppo, stage3_eval. Stage 2 with GRPO_KD_TEACHER_NODES > 0 is a
# heterogeneous job of two components: first the student's nodes, then the teacher's.
set -uo pipefail
unset CDPATH
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." || exit 1
stage="${1:-}"
script="slurm/run_$stage.sh"
[[ -n "$stage" && -f "$script" ]] || { echo "error: no stage ${stage@Q}; there are $(cd slurm && echo run_stage*.sh)" >&2; exit 2; }
shift

# In a job (salloc, an interactive one) its variables would go into the new one, and be taken for that one's own.
[[ -z "${SLURM_JOB_ID:-}" ]] || for name in "${!SLURM@}" "${!SRUN@}"; do [[ "$name" == SLURM_CONF ]] || unset "$name"; done

site="${GRPO_KD_SITE:-slurm/site.env}"
set +u # a site's file is not written for it
# shellcheck source=/dev/null
if [[ -f "$site" || -n "${GRPO_KD_SITE:-}" ]]; then
    source "$site" || { echo "error: $site: not there, or its last command failed" >&2; exit 2; }
fi
# shellcheck source-path=SCRIPTDIR source=site.env.example
source slurm/site.env.example
set -u

common=(--requeue --open-mode=append --time="$GRPO_KD_TIME")
[[ -z "$GRPO_KD_ACCOUNT" ]] || common+=(--account="$GRPO_KD_ACCOUNT")
# shellcheck disable=SC2206 # lists of flags
common+=($GRPO_KD_SBATCH ${SBATCH:-})

component=()
describe() { # NODES RANKS-PER-NODE GPUS-PER-NODE PARTITION
    component=("${common[@]}" --nodes="$1" --ntasks-per-node="$2" --cpus-per-task="$GRPO_KD_CPUS_PER_RANK"
        --mem="$GRPO_KD_MEM_PER_NODE" --gpus-per-node="$3")
    [[ -z "$4" ]] || component+=(--partition="$4")
}

case "$stage" in
    stage3_eval) describe 1 1 "$((GRPO_KD_GPUS_PER_NODE > 0))" "$GRPO_KD_PARTITION" ;;
    *) describe "$GRPO_KD_STUDENT_NODES" "$GRPO_KD_RANKS_PER_NODE" "$GRPO_KD_GPUS_PER_NODE" "$GRPO_KD_PARTITION" ;;
esac
# Only the first component has a batch script, which gets the signal.
job=("${component[@]}" --signal="B:USR1@$GRPO_KD_SIGNAL_S")
if [[ "$stage" == stage2_* ]] && ((GRPO_KD_TEACHER_NODES > 0)); then
    describe "$GRPO_KD_TEACHER_NODES" "$GRPO_KD_TEACHER_RANKS_PER_NODE" "$GRPO_KD_TEACHER_GPUS_PER_NODE" \
        "${GRPO_KD_TEACHER_PARTITION:-$GRPO_KD_PARTITION}"
    job+=(: "${component[@]}")
fi
id="$(sbatch --parsable "${job[@]}" "$script" "$@")" || exit 1
echo "${id%%;*}"
