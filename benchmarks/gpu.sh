#!/usr/bin/env bash
# All that can be known of the CUDA kernels on a machine with a GPU, in under ten minutes and unattended: builds, tests
# every op on the device, repeats small tests under compute-sanitizer, and takes times. Results are in build/gpu/.
# Whatever fails is named at the end and makes the exit status 1; the other stages run all the same.
#
#   benchmarks/gpu.sh            needs an NVIDIA driver, the CUDA toolkit, a C++20 compiler and Python with venv
#   benchmarks/gpu.sh --dry-run  the same stages on the CPU with what is built, small, without compute-sanitizer's checks
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

device=cuda
if [ "${1:-}" = --dry-run ]; then
  device=cpu
elif [ $# -gt 0 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0"
  exit 2
fi
results=build/gpu
mkdir -p "$results"
export PATH="$PWD/.venv/bin:$PATH" FIAK_TEST_DEVICE=$device
failed=()

# stage NAME SECONDS COMMAND...: runs it with a limit, its output in NAME.log and, where it fails, on the screen
stage() {
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" >"$results/$name.log" 2>&1 || status=$?
  if [ "$status" = 0 ]; then
    echo "$name: passed in $((SECONDS - start)) s"
  else
    failed+=("$name")
    echo "$name: FAILED with status $status (124: out of $limit s) after $((SECONDS - start)) s"
    tail -n 40 "$results/$name.log"
  fi
}

find_sanitizer() {
  local place
  for place in "$(command -v compute-sanitizer)" "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" \
    "$(python -c 'import site; print(site.getsitepackages()[0])')/nvidia/cu13/bin/compute-sanitizer"; do
    if [ -x "$place" ]; then
      echo "$place"
      return
    fi
  done
}

if [ "$device" = cuda ]; then
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv | tee "$results/device.csv" || exit 1
  stage build 300 make build CMAKE_ARGS="-DFIAK_CUDA=on ${CMAKE_ARGS:-}"
  stage pytest 60 pip install --requirement requirements-dev.txt
else
  stage build 60 make --dry-run build CMAKE_ARGS="-DFIAK_CUDA=on ${CMAKE_ARGS:-}"
fi

tests=(python -m pytest -q python_tests/test_cuda_device.py)
if [ "$device" = cpu ]; then tests+=(-k "compaction or large_sizes and float32"); fi
stage tests 150 "${tests[@]}"

# Tensors of their own allocation, so that reads beyond one are seen. memcheck and racecheck look at this library's
# kernels only; initcheck must see what torch's kernels write.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
checked=(python -m pytest -q -x python_tests/test_cuda_device.py -k "test_every_feature and float16")
ours=(--kernel-name kernel_substring=fiak_)
if [ "$device" = cuda ]; then
  sanitizer=$(find_sanitizer)
  if [ -z "$sanitizer" ]; then
    stage install-sanitizer 60 pip install 'nvidia-cuda-sanitizer-api==13.*'
    sanitizer=$(find_sanitizer)
  fi
  for tool in memcheck racecheck initcheck; do
    options=(--tool "$tool" --error-exitcode 1 --report-api-errors explicit)
    if [ "$tool" != initcheck ]; then options+=("${ours[@]}"); fi
    stage "$tool" 100 "${sanitizer:-compute-sanitizer}" "${options[@]}" "${checked[@]}"
  done
else
  stage checked 100 "${checked[@]}"
fi
unset PYTORCH_NO_CUDA_MEMORY_CACHING

timing=(python -m benchmarks.gpu --device "$device" --output "$results/times.json")
if [ "$device" = cpu ]; then timing+=(--small); fi
stage times 240 "${timing[@]}"

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}; logs are in $results"
  exit 1
fi
echo "all passed in $SECONDS s; results are in $results"
