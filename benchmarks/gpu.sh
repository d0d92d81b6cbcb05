#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, with what is installed there: no network, no pip, no venv.
#
#   [PYTHON=python3] benchmarks/gpu.sh STAGE [--out DIR] [--device cuda|cpu] [--seconds N]
#
#   build     the library for this GPU alone, into fiak_ext/
#   test      tests of the ops on the device, then those of the package
#   sanitize  small tests under compute-sanitizer's memcheck, racecheck and initcheck
#   time      the ops against others, plans, whole models, and what must hold beside: see benchmarks/gpu.py
#   profile   ncu's counters of the main kernels
#   all       these in turn, each as far as the time goes
#
# Wanted: PYTHON with torch, pybind11, cmake, ninja and pytest, a C++20 compiler, the CUDA toolkit (CUDA_HOME,
# /usr/local/cuda). A stage ends within N seconds (540); started again, also after a kill, it goes on where it was, as
# long as the library is the same. Results are lines of JSON in DIR (build/gpu/results), which may be emptied between
# runs: build/gpu/results keeps a copy, so delete that to begin anew. With --device cpu the same goes through on the
# CPU, with small sizes. FIAK_GPU_BUILD is the build folder (build/gpu). The exit status is 1 if something failed, and
# 0 also where the time was over before the end; what was left out or is left to do is printed.
set -euo pipefail
end=$(date +%s)
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' benchmarks/gpu.sh
  exit 2
}

build=${FIAK_GPU_BUILD:-build/gpu}
stage=${1:-}
out=$build/results device=cuda seconds=540
case $stage in build | test | sanitize | time | profile | all) shift ;; *) usage ;; esac
while [ $# -ge 2 ]; do
  case $1 in
    --out) out=$(cd "$here" && mkdir -p "$2" && cd "$2" && pwd) ;;
    --device) device=$2 ;;
    --seconds) seconds=$2 ;;
    *) usage ;;
  esac
  shift 2
done
if [ $# -gt 0 ] || [[ ! $seconds =~ ^[1-9][0-9]*$ ]] || [[ ! $device =~ ^(cuda|cpu)$ ]]; then usage; fi

export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
PATH=${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}:/usr/local/nvidia/bin:$CUDA_HOME/bin
export PATH
python=$(command -v "${PYTHON:-python3}") || {
  echo "gpu.sh: PYTHON must be a Python (got ${PYTHON:-python3})" >&2
  exit 2
}
# cmake and ninja: beside this Python, as its modules, or the system's
modules=$("$python" - <<'END'
import importlib, importlib.util, sys
if importlib.util.find_spec("torch") is None:
    sys.exit(f"gpu.sh: PYTHON must be a Python with torch (got {sys.executable})")
for module, folder in ("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR"):
    try:
        print(getattr(importlib.import_module(module), folder), end=":")
    except (ImportError, AttributeError):
        pass
END
) || exit 2
PATH=$(dirname "$python"):$modules$PATH
mkdir -p "$build"
build=$(cd "$build" && pwd)

# Held by all processes that a killed run may have left, too.
exec 9>"$build/lock"
if command -v flock >/dev/null && ! flock --wait "$((seconds < 240 ? seconds / 2 : 120))" 9; then
  echo "gpu.sh: another run, or what is left of one, holds $build/lock" >&2
  exit 1
fi

# Compiled code is kept in the build folder; compilers that outlive a killed run would get in the next one's way.
export TORCHINDUCTOR_CACHE_DIR=$build/inductor TRITON_CACHE_DIR=$build/triton TORCHINDUCTOR_COMPILE_THREADS=1
export CCACHE_DISABLE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONUNBUFFERED=1 FIAK_TEST_DEVICE=$device
exec "$python" -m benchmarks.gpu_stages "$stage" --out "$out" --device "$device" --build "$build" \
  --end "$((end + seconds))"
