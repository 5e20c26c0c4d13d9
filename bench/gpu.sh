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

echo "== extension"
"$PYTHON" setup.py --quiet build_ext --inplace

echo "== tests"
"$PYTHON" -m pytest -q tests

echo "== sanitizer: nothing to check, this version has no CUDA or Triton kernels"

echo "== benches"
if compgen -G 'bench/test_*.py' >/dev/null; then
    "$PYTHON" -m pytest bench/ --benchmark-only --write-results --results-dir "$results"
else
    echo "none in this version; $results/$name.json was not written"
fi
