#!/usr/bin/env bash
# What Nsight and CUPTI see of a decision on a GPU; docs/profiling.md reads it. One part: bench/profile.sh gaps
#   ranges   Nsight Systems without graphs: which stage, code and layer the kernels belong to
#   graph    Nsight Systems with graphs: every node of the replay
#   kernels  Nsight Compute: our kernels of one decision at budget 2, which has every kind and shape of launch
#   gaps     CUPTI: how busy the device is in a replay; fails on a gap over MOST_GAP_US (5)
# A part that fails does not keep the next from running; the exit status tells in the end.
# Reports go to OUT (out/profile). BUDGET (16), BATCH (1), DECISIONS (10), LAUNCHES (150) and PYTHON choose what runs.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
out="${OUT:-out/profile}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
size=(--device cuda --batch "${BATCH:-1}")
decide=("${size[@]}" --budget "${BUDGET:-16}" --decisions "${DECISIONS:-10}")

fail() {
    echo "bench/profile.sh: $1" >&2
    exit 1
}

tool() { # NAME PRODUCT: its path
    command -v "$1" || ls "/usr/local/cuda/bin/$1" 2>/dev/null || fail "expected $1, which comes with $2, got none."
}

timeline() { # NAME OPTION...
    local name="$1"
    shift
    "$nsys" profile --trace=cuda,nvtx --sample=none --cpuctxsw=none --cuda-graph-trace=node \
        --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true --output="$out/$name" \
        "$PYTHON" bench/profile_decide.py "${decide[@]}" "$@"
    "$nsys" stats --force-export=true --report cuda_gpu_kern_sum,nvtx_gpu_proj_sum \
        "$out/$name.nsys-rep" >"$out/$name.txt"
    echo "== $out/$name.nsys-rep, in figures $out/$name.txt"
}

ranges() { timeline ranges --no-graphs --level 2; }

graph() { timeline graph --graphs; }

gaps() {
    "$PYTHON" bench/profile_decide.py "${decide[@]}" --gaps --most-gap-us "${MOST_GAP_US:-5}" \
        --trace "$out/replay.json" | tee "$out/gaps.txt"
}

kernels() {
    local ours
    ours="$(sed -n 's/^def \([a-z0-9_]*_kernel\)(.*/\1/p' kernels/*.py | sort -u | paste -sd '|' -)"
    "$ncu" --clock-control none --profile-from-start off --graph-profiling node --kernel-name "regex:^($ours)\$" --set full \
        --launch-count "${LAUNCHES:-150}" --force-overwrite --export "$out/kernels" \
        "$PYTHON" bench/profile_decide.py "${size[@]}" --budget 2 --decisions 1 --level 0
    echo "== $out/kernels.ncu-rep"
}

parts=("$@")
[ $# -gt 0 ] || parts=(ranges graph kernels gaps)
for part in "${parts[@]}"; do
    case "$part" in
        ranges | graph) nsys="$(tool nsys "Nsight Systems")" ;;
        kernels) ncu="$(tool ncu "Nsight Compute")" ;;
        gaps) ;;
        *) fail "expected ranges, graph, kernels or gaps, got $part." ;;
    esac
done
"$PYTHON" -c 'import torch; torch.cuda.get_device_name(0)' 2>/dev/null ||
    fail "expected a Python whose torch sees a CUDA device, got none."
if ! "$PYTHON" -c 'import flexlam_fast.kernels' 2>/dev/null; then # the name that an installation gives them
    ln -sfn ../kernels flexlam_fast/kernels
    trap 'rm -f flexlam_fast/kernels' EXIT
fi
mkdir -p "$out"
if [ ${#parts[@]} -eq 1 ]; then
    echo "== ${parts[0]}"
    "${parts[0]}"
    exit
fi
failed=""
for part in "${parts[@]}"; do
    bash bench/profile.sh "$part" || failed="$failed $part"
done
[ -z "$failed" ] || fail "these failed:$failed"
