# shellcheck shell=bash
# Sourced by the scripts beside this file and by the Makefile: go to the repository root and pick a Python environment.
#
#   1. the active environment, where `python` has what pyproject.toml asks for;
#   2. else .venv in the repository, made on first use with the exact versions of constraints.txt.
#
# GRPO_KD_NEEDS=dev asks for the test tools as well. Sets GRPO_KD_ROOT and, for .venv, PATH and VIRTUAL_ENV.
# What is particular to a cluster comes from slurm/site.env (a copy of site.env.example) where there is one. With a
# container, the environment is chosen inside of it (task.sh).
# Defines `launch`, which starts the ranks of a script so that signals reach them, and `alone`, for a single process.

unset CDPATH # `cd` would go elsewhere, and say so on standard output
GRPO_KD_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return 1
cd "$GRPO_KD_ROOT" || return 1

_grpo_kd_site() {
    local file="${GRPO_KD_SITE:-slurm/site.env}" nounset="" init
    [[ $- == *u* ]] && nounset=1
    set +u # neither a site's file nor `module` is written for it
    # shellcheck source=/dev/null
    if [[ -f "$file" || -n "${GRPO_KD_SITE:-}" ]]; then
        source "$file" || { echo "error: $file: not there, or its last command failed" >&2; return 2; }
    fi
    if [[ -n "${GRPO_KD_MODULES:-}" && -z "${GRPO_KD_INSIDE:-}" ]]; then
        # A shell function, which a shell that is no login shell may lack.
        for init in "${MODULESHOME:-}/init/bash" /etc/profile.d/{modules,lmod,z00_lmod}.sh; do
            command -v module >/dev/null && break
            # shellcheck source=/dev/null
            [[ ! -r "$init" ]] || source "$init"
        done
        # shellcheck disable=SC2086 # a list of modules
        module load $GRPO_KD_MODULES || return 1
    fi
    [[ -z "$nounset" ]] || set -u
}

# A Python >= 3.11 that can make environments; 3.11 first: the tested versions are those for 3.11. One with its C
# headers is better, because DeepSpeed builds its operators against them.
_grpo_kd_find_python() {
    local candidate headers
    for headers in True False; do
        for candidate in python3.11 python3 python3.12 python3.13 python; do
            if "$candidate" - "$headers" 2>/dev/null <<'PY'; then
import ensurepip, os, sys, sysconfig, venv

headers = os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
sys.exit(sys.version_info < (3, 11) or (sys.argv[1] == "True" and not headers))
PY
                command -v "$candidate"
                return 0
            fi
        done
    done
    echo "error: no Python >= 3.11 with venv; install one (Debian: apt-get install python3-venv python3-dev)" >&2
    return 1
}

# What .venv was made for: the marker inside it holds the same, and is written last.
_grpo_kd_fingerprint() {
    cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1
}

_grpo_kd_venv_ready() {
    [[ -x .venv/bin/python && -f .venv/grpo-kd-complete ]] &&
        [[ "$(<.venv/grpo-kd-complete)" == "$(_grpo_kd_fingerprint)" ]] &&
        .venv/bin/python -c '' 2>/dev/null # false where the Python that it was made from is gone
}

# Make or mend .venv. One process at a time: jobs of an array may all arrive here at once.
_grpo_kd_make_venv() {
    (
        if command -v flock >/dev/null; then
            exec 9>.venv.lock
            flock 9
        fi
        _grpo_kd_venv_ready && exit 0
        python="$(_grpo_kd_find_python)" || exit 1
        echo "environment: making .venv with $python (once, a few minutes) ..." >&2
        rm -f .venv/grpo-kd-complete
        # An interrupted installation may have left half a package that pip takes for a whole one: start afresh then
        # (pip has kept what it downloaded). An environment for other versions is only mended.
        if [[ -f .venv/grpo-kd-installing ]] || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
            "$python" -m venv --clear .venv || exit 1
        fi
        touch .venv/grpo-kd-installing
        # Through a file, not a pipe, so that a failure of either side is seen.
        .venv/bin/python slurm/requirements.py dev >.venv/requirements.txt || exit 1
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            -c constraints.txt -r .venv/requirements.txt || exit 1
        rm -f .venv/grpo-kd-installing
        _grpo_kd_fingerprint >.venv/grpo-kd-complete.new && mv .venv/grpo-kd-complete.new .venv/grpo-kd-complete
    ) || {
        echo "error: .venv could not be made; see above, then start again" >&2
        return 1
    }
}

_grpo_kd_choose() {
    local lack
    if ! command -v python >/dev/null; then
        lack="no python on PATH"
    elif lack="$(python slurm/requirements.py "${GRPO_KD_NEEDS:-run}" --check 2>&1)"; then
        [[ -n "${GRPO_KD_INSIDE:-}" ]] || echo "environment: $(command -v python)" >&2
        return 0
    fi
    _grpo_kd_venv_ready || _grpo_kd_make_venv || return 1
    # What `activate` does, without its prompt.
    export VIRTUAL_ENV="$GRPO_KD_ROOT/.venv" PATH="$GRPO_KD_ROOT/.venv/bin:$PATH"
    unset PYTHONHOME
    hash -r
    [[ -n "${GRPO_KD_INSIDE:-}" ]] || echo "environment: $GRPO_KD_ROOT/.venv (active one passed over: ${lack%%$'\n'*})" >&2
}

_grpo_kd_free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Trainer processes of the launcher with this process id: its runner starts a second process, that one the ranks.
_grpo_kd_ranks() { # PID
    local launch
    for launch in $(pgrep -P "$1"); do
        pgrep -P "$launch"
    done
}

# In a batch job srun starts the processes (steps.sh). Not in an interactive one: it is itself a step.
_grpo_kd_in_batch_job() {
    [[ -n "${SLURM_JOB_ID:-}" && "${ENVIRONMENT:-}" == BATCH ]] && command -v srun >/dev/null || return 1
    # shellcheck source=/dev/null
    source "$GRPO_KD_ROOT/slurm/steps.sh"
}

# alone SCRIPT [ARGUMENT ...]: one Python process, with its exit status.
alone() {
    if _grpo_kd_in_batch_job; then
        run_alone "$@"
        return
    fi
    exec python "$@"
}

# launch SCRIPT [ARGUMENT ...]: the script's ranks on the devices of this job or machine, with their exit status. Outside
# of a batch job that is `deepspeed SCRIPT ARGUMENT ...`.
#
# The launcher by itself takes number of processes from CUDA_VISIBLE_DEVICES or from what the machine has (without a
# GPU: one for each NUMA node), and its port is fixed, so that two runs on one machine would meet: we name a free one.
# It also dies of SIGTERM alone and leaves the ranks running, and what its second half sends them it follows with
# SIGKILL after 30 s. So a signal is given here to the ranks themselves, once; they write their checkpoint, take their
# teacher down and leave, and the launcher passes their exit status on.
launch() {
    if _grpo_kd_in_batch_job; then
        run_steps "$@"
        return
    fi
    local port interrupted status flags=(--no_local_rank --log_level critical) # a failing rank speaks for itself
    port="$(_grpo_kd_free_port)" || return 1
    flags+=(--master_port "$port")
    # A SLURM that hands out GPUs without saying which. (Set and empty is a user's way of saying none.)
    [[ -n "${SLURM_GPUS_ON_NODE:-}" && -z "${CUDA_VISIBLE_DEVICES+set}" ]] && flags+=(--num_gpus "$SLURM_GPUS_ON_NODE")
    trap 'interrupted=1; _grpo_kd_forward INT "$!"' INT
    # SLURM's USR1 (time limit ahead) and a closed terminal ask for the same as TERM: checkpoint and leave.
    trap 'interrupted=1; _grpo_kd_forward TERM "$!"' TERM USR1 HUP
    # Without a GPU (NVIDIA, AMD, WSL), DeepSpeed would say so twice before our first line, and look for those that a
    # login shell may name all the same.
    if ! compgen -G "/dev/nvidia*" >/dev/null && [[ ! -e /dev/kfd && ! -e /dev/dxg ]]; then
        export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
        unset CUDA_VISIBLE_DEVICES
    elif [[ "${CUDA_VISIBLE_DEVICES:-}" == *[!0-9,]* ]]; then
        echo "error: CUDA_VISIBLE_DEVICES = $CUDA_VISIBLE_DEVICES: DeepSpeed's launcher takes numbers alone; give those," \
            "or start it by torchrun --standalone --nproc_per_node RANKS $*" >&2
        return 2
    fi
    set -m # a process group of its own, so that Ctrl-C in a terminal arrives once, through us
    deepspeed "${flags[@]}" "$@" </dev/null &
    set +m
    interrupted=1
    while [[ -n "$interrupted" ]]; do # a trapped signal ends `wait` early
        interrupted=""
        wait "$!"
        status=$?
    done
    trap - INT TERM USR1 HUP
    return "$status"
}

_grpo_kd_forward() { # SIGNAL RUNNER
    local ranks
    [[ -n "$2" ]] || exit 1 # nothing started yet
    ranks="$(_grpo_kd_ranks "$2")"
    if [[ -n "$ranks" ]]; then
        # shellcheck disable=SC2086 # a list of process ids
        kill "-$1" $ranks 2>/dev/null
    else
        kill -TERM -- "-$2" 2>/dev/null # no rank yet: the launcher's own group
    fi
    return 0
}

_grpo_kd_site || return
[[ -n "${GRPO_KD_CONTAINER:-}" && -z "${GRPO_KD_INSIDE:-}" ]] || _grpo_kd_choose
