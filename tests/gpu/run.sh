#!/usr/bin/env bash
# Everything again on a CUDA GPU: the tests of this folder, then speed, memory and MFU; a Markdown page of both.
#
#   bash tests/gpu/run.sh [PAGE.md]                         on CUDA; under 8 minutes on an H100
#   bash tests/gpu/run.sh [PAGE.md] --device cpu --tiny     a dry run: every line but the kernels, no number means anything
#
# PAGE.md is $OUT/gpu.md where OUT is set, else ./gpu.md. Exit code 1 if a test or a measurement failed.
# GRPO_KD_GPU_PARTS picks some of "forward sampling", teacher, actor, demo, bench (comma between), in that order: "bench"
# alone leaves the tests out. GRPO_KD_GPU_SECONDS (460 on CUDA) is for all of it; what it does not suffice for is a line.
# Python is the active environment where it has all that pyproject.toml asks for, else .venv (slurm/env.sh).
set -uo pipefail

GRPO_KD_NEEDS=gpu
here="$(pwd)"
page="${OUT:+$OUT/gpu.md}"
page="${page:-$here/gpu.md}"
if [[ $# -gt 0 && "$1" != --* ]]; then
    page="$1"
    shift
fi
[[ "$page" == /* ]] || page="$here/$page"

# shellcheck source=slurm/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../slurm/env.sh" || exit 1

device=cuda
for ((i = 1; i <= $#; i++)); do
    [[ "${!i}" == --device ]] && { j=$((i + 1)) && device="${!j:-cuda}"; }
done
seconds="${GRPO_KD_GPU_SECONDS:-460}" limit=180
if [[ "$device" == cpu ]]; then
    export GRPO_KD_GPU_DRY_RUN=1
    seconds="${GRPO_KD_GPU_SECONDS:-3600}" limit=900
elif ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: no CUDA device; a dry run: bash tests/gpu/run.sh PAGE.md --device cpu --tiny" >&2
    exit 1
fi
[[ "$seconds" =~ ^[0-9]+$ ]] || {
    echo "error: GRPO_KD_GPU_SECONDS = '$seconds': not whole seconds; set it to a number like 240" >&2
    exit 2
}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

mkdir -p "$(dirname "$page")" && : >"$page" || exit 1
log="$page.log"
: >"$log"
status=0

# Parts with a time limit each; one that hangs is a failed line.
results="$(mktemp)"
IFS=, read -r -a parts <<<"${GRPO_KD_GPU_PARTS:-forward sampling,teacher,actor,demo,bench}"
for part in "${parts[@]}"; do
    [[ "$part" != bench ]] || continue
    left=$((seconds - SECONDS - 10))
    if ((left < 10)); then
        echo "- tests (${part// /, }): no time left" >>"$page"
        status=1
        continue
    fi
    files=()
    for name in $part; do files+=("tests/gpu/test_gpu_$name.py"); done
    timeout --kill-after 10 "$((left < limit ? left : limit))" python -m pytest -m gpu -q -rA -p no:cacheprovider "${files[@]}" >"$results" 2>&1
    code=$?
    cat "$results" >>"$log"
    {
        echo "- tests (${part// /, }): $(grep -E '[0-9]+ (passed|failed|error|skipped)' "$results" | tail -1 | tr -d '=')" \
            "exit code $code"
        grep -E '^(FAILED|ERROR|SKIPPED)' "$results" | cut -c1-300 | sed 's/^/  - /'
    } >>"$page"
    [[ $code == 0 ]] || status=1
done
rm -f "$results"
{ echo "# On a GPU"; echo; cat "$page"; echo; } >"$page.new" && mv "$page.new" "$page"
cat "$page"

left=$((seconds - SECONDS - 10))
if [[ " ${parts[*]} " == *" bench "* ]]; then
    if ((left > 20)); then
        python tests/gpu/bench_gpu.py --out "$page" --seconds "$left" "$@" 2>>"$log" || status=1
    else
        echo "- bench: no time left" | tee -a "$page"
        status=1
    fi
fi
echo "written: $page (log: $log)"
exit "$status"
