#!/usr/bin/env bash
# What srun starts for each task (steps.sh): a rank of the trainer, a rank of a teacher, or a single process.
#
#   task.sh rank|teacher|one SCRIPT [ARGUMENT ...]
set -uo pipefail
kind="$1" && shift
unset CDPATH
root="$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -n "${GRPO_KD_CONTAINER:-}" ]]; then
    export GRPO_KD_INSIDE=1
    # shellcheck source-path=SCRIPTDIR source=env.sh
    source "$root/slurm/env.sh" || exit 1
else
    cd "$root" || exit 1 # PATH is the batch script's
fi
[[ "$kind" != one ]] || exec python "$@"

# What DeepSpeed and torch.distributed read; addresses and sizes are the batch script's.
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID"
# gloo takes the address that the machine's own name has, which may be loopback: name the device that carries traffic.
if ((WORLD_SIZE > LOCAL_WORLD_SIZE)) && command -v ip >/dev/null; then
    device="${GRPO_KD_INTERFACE:-$(ip -o -4 address | awk -v own="$MASTER_ADDR" 'index($4, own "/") == 1 {print $2; exit}')}"
    device="${device:-$(ip -4 route get "$MASTER_ADDR" | grep -o 'dev [^ ]*' | cut -d' ' -f2)}"
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$device}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$device}"
fi
if [[ "$kind" == teacher ]]; then
    # A preempted job gets TERM in all steps at once, but the trainer needs its teacher until it has left: the server
    # is deaf to signals and lives as long as its standard input: a pipe that it holds both ends of itself. (A process
    # at the other end would outlive it, and SLURM does not report a step's end while somebody has its output open.)
    trap '' TERM USR1
    exec python "$@" 0<> <(:)
fi

# Signals of SLURM reach every process of the step, this one too, which is deaf to them: it waits until Python has
# answered. (`wait` in the background, which a trapped signal ends early, loses the status of a process that ends
# just then: bash 5.2 says -1.)
trap '' TERM USR1 INT
(trap - TERM USR1 INT && exec python "$@") </dev/null
status=$?
# Says who began when ranks fail one after another, and lets the batch script end those that wait for this one.
((status == 0 || status == 75)) || echo "rank $RANK on ${SLURMD_NODENAME:-$HOSTNAME}: exit code $status" >"$GRPO_KD_JOB_FOLDER/failed-$RANK"
exit "$status"
