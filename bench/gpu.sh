#!/usr/bin/env bash
# What a GPU machine can say (`make gpu`): extension, tests, sanitizer, benches, results file. Uses the Python that is
# there, installs nothing, needs no network. `STAGES="tests benches" make gpu` runs some of it; a stage that fails does
# not keep the next from running, and the exit status tells in the end. With OUT set, results and logs go there.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
STAGES="${STAGES:-extension tests parity sanitizer benches profile}"
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
        cache policy sessions sampling graphs ways ops_linear ops_sampling ops_paged ops_paged_contracts ops_translate
        ops_attention accelerate_qwen plain ranges profile bench ops_linear_contracts native_decode steady fsq_prefix
        fsq_refusals fsq_compile accelerate_left accelerate_undo accelerate_backend accelerate_copies accelerate_compile
        accelerate_imports sequence_layout sequence_rope policy_weights policy_refusals accelerate_qwen_options
        accelerate_qwen_left accelerate_qwen_weights accelerate_qwen_record accelerate_qwen_copies profile_timeline
        profile_shell native_block native_tiles engine engine_cuda ops_rows ops_rows_contracts ops_rotary ops_loss
        ops_draws ops_patches ops_flow_loss ops_varlen ops_varlen_packages packing train_loader data_resident step
        train_fast repeat originals accelerate_states accelerate_replaced accelerate_others accelerate_qwen_others)
    local files=("${names[@]/#/tests/test_}")
    "$PYTHON" -m pytest -q "${files[@]/%/.py}"
}

parity() {
    for dtype in float32 bfloat16 float16; do
        "$PYTHON" bench/parity.py --preset dmlab --way fused --device cuda --dtype "$dtype" --batch 8 \
            --decisions "$([ "$dtype" = bfloat16 ] && echo 300 || echo 40)" || return 1
    done
    "$PYTHON" bench/steady.py --preset dmlab --device cuda --dtype bfloat16 || return 1
    # the persistent kernel; BLOCKS=100000 takes a quarter of an hour
    "$PYTHON" bench/parity.py --preset dmlab --way cuda --device cuda --dtype bfloat16 --batch 8 --decisions 40 &&
        "$PYTHON" bench/blocks.py --blocks "${BLOCKS:-2000}" && "$PYTHON" bench/blocks.py --blocks 200 --batch 8
}

sanitizer() {
    local program
    if ! program="$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)"; then
        echo "compute-sanitizer was not found: the kernels were not checked with it"
        return 0
    fi
    local ours=() name
    for name in $(sed -n 's/^def \([a-z0-9_]*_kernel\)(.*/\1/p' kernels/*.py | sort -u) forward_kernel backward_kernel; do
        ours+=(--kernel-name "kernel_substring=$name")
    done
    # without torch's allocator, which would hide what is read or written beyond a tensor; only our own kernels
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$tool" --error-exitcode 9 --target-processes all \
            "${ours[@]}" $([ "$tool" = memcheck ] && echo "--report-api-errors no") \
            "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/test_fsq_backends.py tests/test_fsq_contracts.py \
            tests/test_ways.py -k "(cuda and (edge or budget or lengths_are)) or (fused_is and not dtype2)" || return 1
    done
    # training's kernels, forward and backward, on odd sizes
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$tool" --error-exitcode 9 --target-processes all \
            "${ours[@]}" $([ "$tool" = memcheck ] && echo "--report-api-errors no") \
            "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/test_ops_rows.py tests/test_ops_rotary.py \
            tests/test_ops_loss.py tests/test_ops_flow_loss.py -k "within and float32 and triton" || return 1
    done
    # the persistent kernel on a small model: every phase, one session and several
    for tool in memcheck racecheck synccheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$tool" --error-exitcode 9 --target-processes all \
            --kernel-name kernel_substring=block_kernel $([ "$tool" = memcheck ] && echo "--report-api-errors no") \
            "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/test_engine_cuda.py -k small_model || return 1
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

profile() {
    OUT="$results/profile" PYTHON="$PYTHON" bash bench/profile.sh gaps
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
