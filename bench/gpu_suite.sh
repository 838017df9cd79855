#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: the kernel tests, the CUDA twin, and what the kernels reach of the
# copy bandwidth; training steps and engines, where timm and onnx are installed. Needs torch >= 2.11, Triton >= 3.6, nvcc,
# NumPy, OpenCV and pytest; no network, no installation. Ends with one table, and one JSON of all of it, inside eight
# minutes: the most telling cases come first, and those for which no time was left are named.
#
#     bench/gpu_suite.sh [OUTPUT]         OUTPUT is a folder, default $OUT or bench/results
#     bench/gpu_suite.sh --dry-run [OUTPUT]   tiny shapes, Triton interpreted, no GPU: does the suite itself work?
#                                       (Triton 3.6 interprets with NumPy below 2.4 only; on a GPU it takes any)
#     FASTFUNDUS_SUITE_SECONDS=1800       gives it more time
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

# A share, in percent, of the time that is left before the table is drawn; what does not end in it is stopped.
within() {
  local share=$1 left=$((budget - 10 - SECONDS))
  shift
  timeout "$((left > 0 ? (left * share + 99) / 100 : 1))" "$@"
}

models() {
  if "$python" -c "import timm, onnx" 2>/dev/null; then
    # What does not end well, or in time, says so in the table, and the rest stands.
    within 60 "$python" -m bench.gpu_train "${dry[@]}" --output "$output" || echo "not all training was measured"
    within 100 "$python" -m bench.gpu_engine "${dry[@]}" --output "$output" || echo "not all engines were measured"
  else
    echo "training and engines are left out: timm or onnx is not installed"
  fi
}

rm -f "$output/kernel_tests.xml"
tests=0 kernels=0
if [[ ${#dry[@]} == 0 ]]; then
  # A skip is a failure here: a green run that tested nothing would be worse than a red one.
  FASTFUNDUS_REQUIRE_GPU=1 within 40 "$python" -m pytest -o addopts= -q -m "kernel and not slow" \
    --junitxml="$output/kernel_tests.xml" tests/kernels tests/engines/test_cuda_sample.py || tests=$?
else
  # Nothing is measured in earnest: both halves at once.
  models > "$output/models.log" 2>&1 &
  TRITON_INTERPRET=1 "$python" -m pytest -o addopts= -q -m kernel \
    -W "ignore:Conversion of an array with ndim:DeprecationWarning" --junitxml="$output/kernel_tests.xml" \
    tests/kernels/test_sample.py -k "one-pixel or minify-2" || tests=$?
fi
# A case that is wrong fails the suite at its end; training and engines are measured all the same.
TRITON_INTERPRET=$([[ ${#dry[@]} == 0 ]] && echo 0 || echo 1) within 50 \
  "$python" -m bench.gpu_suite "${dry[@]}" --tests "$output/kernel_tests.xml" --output "$output" || kernels=$?
if [[ ${#dry[@]} == 0 ]]; then
  models
else
  wait
  cat "$output/models.log"
  rm "$output/models.log"
fi
"$python" -m bench.gpu_table "$output"
exit "$((tests > 0 ? tests : kernels))"
