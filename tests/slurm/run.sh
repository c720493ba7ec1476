#!/usr/bin/env bash
# Tests against a real SLURM on this machine: bash tests/slurm/run.sh [PYTEST-ARGUMENT ...]. Needs root and Linux.
#
# Each file has a process of pytest-xdist with a SLURM of its own, so that one computes while SLURM makes the other wait.
# They run in namespaces of their own. When the first process there ends, however it ends, the kernel ends all others
# and takes networks and mounts away, so nothing is left behind.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

skip() {
    echo "test-slurm: SKIPPED: $*" >&2
    exit 0
}

[[ "$(uname)" == Linux && "$(id -u)" == 0 ]] || skip "needs root on Linux, for network namespaces"
namespaces=(--net --mount --uts --pid --fork --mount-proc --kill-child)
unshare "${namespaces[@]}" true 2>/dev/null || skip "this machine allows no namespaces (unshare ${namespaces[*]})"
lacks() { # true where a program is missing (`command -v` with several names asks for any of them)
    local program
    for program in slurmctld slurmd sbatch munged ip; do command -v "$program" >/dev/null || return 0; done
    return 1
}
if lacks; then
    command -v apt-get >/dev/null || skip "no SLURM here, and no apt-get to install it (slurm-wlm, munge, iproute2)"
    log="$(mktemp)"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
        slurm-wlm munge iproute2; } >"$log" 2>&1 || { tail -n 5 "$log" >&2; skip "apt-get could not install SLURM"; }
    rm -f "$log"
fi
export GRPO_KD_NEEDS=dev GRPO_KD_NAMESPACES=1
# shellcheck source-path=SCRIPTDIR source=../../slurm/env.sh
source slurm/env.sh || exit 1
# A /run of its own: `ip netns` keeps its names there.
inside="unshare ${namespaces[*]} bash -c 'mount -t tmpfs tmpfs /run && exec python \"\$@\"' python"
exec python -m pytest -p no:cacheprovider --timeout 2400 --durations 0 --durations-min 5 --dist loadfile \
    --tx "2*popen//python=$inside" tests/slurm "$@"
