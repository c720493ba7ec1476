#!/usr/bin/env bash
# Brings together the wheels that a bare GPU machine with torch 2.11 and transformers 5 lacks (x86-64, Python 3.12).
#
#   bash tests/gpu/prepare_wheels.sh [DIR]      from the project's root; DIR is .whl unless given
#
# Versions are those of constraints.txt, except the packages that the machine has (torch, transformers, numpy, ...).
# --no-deps: the list below is complete for the machine's package list. About 28 MiB. DIR must be ignored by git:
#   echo /.whl/ >> .git/info/exclude
set -euo pipefail
dir="${1:-.whl}"
names=(babel py3langid rapidfuzz megatron-core pydantic pydantic-core deepspeed nltk typeshed-client datasets countryinfo
    jsonargparse multiprocess dill hjson typing-extensions docstring-parser defusedxml rouge-score annotated-types
    typing-inspection)
wanted=()
for name in "${names[@]}"; do
    # constraints.txt writes some names with underscores or capitals.
    line="$(grep -i -E "^${name//-/[-_.]}==" constraints.txt | head -1 | sed 's/ *[;#].*//')" || true
    wanted+=("${line:-$name}")
done
mkdir -p "$dir"
platforms=()
for one in manylinux_2_39 manylinux_2_35 manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${one}_x86_64")
done
for one in "${wanted[@]}"; do
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" -d "$dir" "$one" ||
        # Pure Python without a wheel (deepspeed, rouge-score, ...): build one here.
        DS_BUILD_OPS=0 python3 -m pip wheel -q --no-deps --no-binary "${one%%==*}" -w "$dir" "$one"
done
du -sh "$dir" && ls "$dir"
