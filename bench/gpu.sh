#!/usr/bin/env bash
# What a GPU machine can say (`make gpu`): extension, tests, sanitizer, benches, results file. Uses the Python that is
# there, installs nothing, needs no network. `STAGES="tests benches" make gpu` runs some of it; a stage that fails does
# not keep the next from running, and the exit status tells in the end. With OUT set, results and logs go there.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
STAGES="${STAGES:-extension tests sanitizer benches}"
results="${OUT:-bench/results}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=""

if ! device="$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(0))' 2>/dev/null)"; then
    echo "make gpu: expected a Python whose torch sees a CUDA device, got none." >&2
    exit 1
fi
for package in vector_quantize_pytorch transformers hypothesis pytest_benchmark triton; do
    if ! why="$("$PYTHON" -c "import $package" 2>&1)"; then
        echo "make gpu: expected $package, against which things are checked and timed: ${why##*$'\n'}" >&2
        exit 1
    fi
done
mkdir -p "$results"
# the kernels under the name that an installation gives them
[ -e flexlam_fast/kernels ] || trap 'rm -f flexlam_fast/kernels' EXIT
ln -sfn ../kernels flexlam_fast/kernels

extension() {
    "$PYTHON" setup.py --quiet build_ext --inplace
}

tests() {
    local names=(fsq fsq_backends fsq_contracts compiled accelerate backend deadline layers flow lam translator sequence
        cache policy bench)
    local files=("${names[@]/#/tests/test_}")
    "$PYTHON" -m pytest -q "${files[@]/%/.py}"
}

sanitizer() {
    local program
    if ! program="$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)"; then
        echo "compute-sanitizer was not found: the kernels were not checked with it"
        return 0
    fi
    # without torch's allocator, which would hide what is read or written beyond a tensor; only our own kernels
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$tool" --error-exitcode 9 --target-processes all \
            --kernel-name kernel_substring=forward_kernel --kernel-name kernel_substring=backward_kernel \
            --kernel-name kernel_substring=lookup_kernel $([ "$tool" = memcheck ] && echo "--report-api-errors no") \
            "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/test_fsq_backends.py tests/test_fsq_contracts.py \
            -k "cuda and (edge or budget or lengths_are)" || return 1
    done
}

benches() {
    "$PYTHON" -m pytest bench/ --benchmark-only --write-results --results-dir "$results" \
        --compile-seconds "${COMPILE_SECONDS:-20}" || return 1
    if "$PYTHON" -c 'import matplotlib' 2>/dev/null; then
        "$PYTHON" bench/report.py --plots-only --results "$results" --plots "${OUT:-docs/bench}"
    else
        echo "matplotlib is not installed: no plot; make bench-report draws it from $results"
    fi
}

echo "== $device"
for stage in $STAGES; do
    echo "== $stage"
    began=$SECONDS
    "$stage" || failed="$failed $stage"
    echo "== $stage took $((SECONDS - began)) s"
done
if [ -n "$failed" ]; then
    echo "make gpu: these failed:$failed" >&2
    exit 1
fi
