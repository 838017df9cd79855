#!/usr/bin/env bash
# Run everything that needs a GPU with one command: the kernel tests, the CUDA twin, the kernels against the copy
# bandwidth, and, where timm and onnx are installed, training steps and engines. Needs torch >= 2.11, Triton >= 3.6,
# nvcc, NumPy, OpenCV and pytest; uses no network and installs nothing. Prints one table and writes one JSON file within
# eight minutes: the most informative cases run first, and cases for which no time was left are listed.
#
#     bench/gpu_suite.sh [OUTPUT]             OUTPUT is a folder; default: $OUT or bench/results
#     bench/gpu_suite.sh --dry-run [OUTPUT]   checks the suite itself without a GPU: tiny shapes, Triton interpreted
#                                             (Triton 3.6 interprets only with NumPy below 2.4; a GPU run takes any)
#     FASTFUNDUS_SUITE_SECONDS=1800           allows more time
set -euo pipefail
cd "$(dirname "$0")/.."
dry=()
if [[ ${1:-} == --dry-run ]]; then
  dry=(--dry-run)
  shift
fi
output=${1:-${OUT:-bench/results}}
mkdir -p "$output"
python=${PYTHON:-python3}

budget=${FASTFUNDUS_SUITE_SECONDS:-480}

# Run a command within a share, in percent, of the time left until the table is drawn, and stop it after that.
within() {
  local share=$1 left=$((budget - 10 - SECONDS))
  shift
  timeout "$((left > 0 ? (left * share + 99) / 100 : 1))" "$@"
}

models() {
  if "$python" -c "import timm, onnx" 2>/dev/null; then
    # A case that fails or runs out of time is marked in the table; the other results are kept.
    within 60 "$python" -m bench.gpu.train "${dry[@]}" --output "$output" || echo "not all training was measured"
    within 100 "$python" -m bench.gpu.engine "${dry[@]}" --output "$output" || echo "not all engines were measured"
  else
    echo "training and engines were skipped: timm or onnx is not installed"
  fi
}

rm -f "$output/kernel_tests.xml"
tests=0 kernels=0
if [[ ${#dry[@]} == 0 ]]; then
  # Skipped tests count as failures here: a passing run that tested nothing would be misleading.
  FASTFUNDUS_REQUIRE_GPU=1 within 40 "$python" -m pytest -o addopts= -q -m "kernel and not slow" \
    --junitxml="$output/kernel_tests.xml" tests/kernels tests/engines/test_cuda_sample.py || tests=$?
else
  # The figures of a dry run do not matter, so both halves run at once.
  models > "$output/models.log" 2>&1 &
  TRITON_INTERPRET=1 "$python" -m pytest -o addopts= -q -m kernel \
    -W "ignore:Conversion of an array with ndim:DeprecationWarning" --junitxml="$output/kernel_tests.xml" \
    tests/kernels/test_sample.py -k "one-pixel or minify-2" || tests=$?
fi
# A wrong result fails the suite at the end; training and engines are measured regardless.
TRITON_INTERPRET=$([[ ${#dry[@]} == 0 ]] && echo 0 || echo 1) within 50 \
  "$python" -m bench.gpu.suite "${dry[@]}" --tests "$output/kernel_tests.xml" --output "$output" || kernels=$?
if [[ ${#dry[@]} == 0 ]]; then
  models
else
  wait
  cat "$output/models.log"
  rm "$output/models.log"
fi
"$python" -m bench.gpu.table "$output"
exit "$((tests > 0 ? tests : kernels))"
