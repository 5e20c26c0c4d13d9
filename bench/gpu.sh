#!/usr/bin/env bash
# Everything a GPU machine can say in one go (`make gpu`): extension, tests, sanitizer, benches, results file.
# Uses the Python that is there, installs nothing, and needs no network.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
results="${OUT:-bench/results}"

if ! device="$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(0))' 2>/dev/null)"; then
    echo "make gpu: expected a Python whose torch sees a CUDA device, got none." >&2
    exit 1
fi
mkdir -p "$results"
name="$(echo "$device" | tr -cs 'A-Za-z0-9\n' '-' | tr 'A-Z' 'a-z' | sed 's/-*$//')"
echo "== $device"

for package in vector_quantize_pytorch transformers hypothesis pytest_benchmark triton; do
    if ! "$PYTHON" -c "import $package" 2>/dev/null; then
        echo "make gpu: expected $package, against which things are checked and timed, got none." >&2
        exit 1
    fi
done

echo "== extension"
"$PYTHON" setup.py --quiet build_ext --inplace
# the kernels under the name that an installation gives them
ln -sfn ../kernels flexlam_fast/kernels
trap 'rm -f flexlam_fast/kernels' EXIT

echo "== tests"
tests=(fsq fsq_backends fsq_contracts compiled accelerate backend layers flow lam translator sequence cache policy bench)
files=("${tests[@]/#/tests/test_}")
"$PYTHON" -m pytest -q "${files[@]/%/.py}"

echo "== sanitizer"
if sanitizer="$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)"; then
    for tool in memcheck racecheck; do
        "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all "$PYTHON" -m pytest -q -x \
            tests/test_fsq_backends.py tests/test_fsq_contracts.py -k "cuda and (edge or budget or lengths_are)"
    done
else
    echo "compute-sanitizer was not found: the kernels were not checked with it"
fi

echo "== benches"
if compgen -G 'bench/test_*.py' >/dev/null; then
    "$PYTHON" -m pytest bench/ --benchmark-only --write-results --results-dir "$results"
    if "$PYTHON" -c 'import matplotlib' 2>/dev/null; then
        "$PYTHON" bench/report.py --plots-only --results "$results" --plots "${OUT:-docs/bench}"
    else
        echo "matplotlib is not installed: no plot; make bench-report draws it from $results/$name.json"
    fi
else
    echo "none in this version; $results/$name.json was not written"
fi
