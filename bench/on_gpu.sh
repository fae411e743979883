#!/usr/bin/env bash
# Ask a GPU all that only a GPU can answer, in one command of less than ten minutes:
#
#     bench/on_gpu.sh [--dry-run] [FOLDER]
#
# First the benchmark alone; then, side by side, the parity tests and the four tools of compute-sanitizer. Every part
# has a time limit, and every result is a file in FOLDER ($OUT, or gpu-results): eight files, of which summary.txt has
# ten lines. The exit code is 0 if all went well, 1 if a part failed, and 2 if something is missing. --dry-run prints
# what is missing and what would run, and starts nothing.
#
# The machine needs Python, CUDA's toolkit and CuPy. It needs no network: packages that it lacks are installed from the
# wheels in the folder $WHEELS (wheels), into a temporary folder. Fill the folder where there is a network, for the
# Python of the machine; optree, numba-cuda, safetensors and platformdirs are what such machines lack most, 8 MiB:
#
#     python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#         --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#         -d wheels optree numba-cuda safetensors platformdirs
#
# Leave out nvidia-nvvm (75 MiB): numba-cuda finds the compiler in the toolkit, by CUDA_HOME, which is set here.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

dry=0
if [ "${1:-}" = --dry-run ]; then
    dry=1
    shift
fi
out=${1:-${OUT:-gpu-results}}
wheels=${WHEELS:-wheels}
python=${PYTHON:-python3}
limit_bench=${LIMIT_BENCH:-220}      # seconds
limit_together=${LIMIT_TOGETHER:-300} # of the parts that run side by side
tools="memcheck racecheck synccheck initcheck"
SECONDS=0

# --- what is needed ---------------------------------------------------------------------------------------------------

if [ -z "${CUDA_HOME:-}" ]; then
    nvcc=$(command -v nvcc || true)
    if [ -n "$nvcc" ]; then CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$nvcc")")"); else CUDA_HOME=/usr/local/cuda; fi
fi
export CUDA_HOME

# The packages that Python does not find. A wheel's name begins with that of its package.
missing() {
    "$python" - "$wheels" <<'PY'
import sys
from importlib.util import find_spec
from pathlib import Path

NEEDED = {
    "numpy": "numpy", "numba": "numba", "numba_cuda": "numba-cuda", "cupy": "cupy-cuda13x", "optree": "optree",
    "platformdirs": "platformdirs", "safetensors": "safetensors", "typing_extensions": "typing-extensions",
    "pytest": "pytest", "xdist": "pytest-xdist", "pytest_benchmark": "pytest-benchmark", "hypothesis": "hypothesis",
}
carried = {path.name.split("-")[0].lower().replace("_", "-") for path in Path(sys.argv[1]).glob("*.whl")}
print(*[name for module, name in NEEDED.items() if find_spec(module) is None and name not in carried])
PY
}

lacking=$(missing)
for tool in compute-sanitizer nvidia-smi; do
    command -v "$tool" >/dev/null || lacking="$lacking $tool"
done
[ -d "$CUDA_HOME/nvvm" ] || lacking="$lacking CUDA_HOME"
lacking=$(echo $lacking)

# --- what runs --------------------------------------------------------------------------------------------------------

# part NAME LIMIT COMMAND...: its output in NAME.txt, its exit code and seconds in the file of its name in $work.
part() {
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    if [ "$dry" = 1 ]; then
        echo "$name, at most $limit s: $*"
        return
    fi
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>&1
    echo "$? $((SECONDS - began))" >"$work/$name"
}

# One part after the other where nothing is started, so that their lines keep their order.
all_parts() {
    part bench "$limit_bench" "$python" bench/gpu.py --json "$out/gpu.json"
    part parity "$limit_together" "$python" -m pytest -q -n 8 --gpu -p no:cacheprovider \
        tests/test_cuda.py tests/test_cuda_batchnorm.py tests/test_cuda_places.py tests/test_cuda_trees.py &
    [ "$dry" = 0 ] || wait
    for tool in $tools; do
        local more=()
        if [ "$tool" = memcheck ]; then more=(--leak-check full); fi
        part "$tool" "$limit_together" compute-sanitizer --tool "$tool" "${more[@]}" --error-exitcode 1 \
            "$python" bench/gpu.py --sanitize &
        [ "$dry" = 0 ] || wait
    done
    wait
}

if [ "$dry" = 1 ]; then
    echo "missing: ${lacking:-nothing}"
    echo "wheels in $wheels: $(find "$wheels" -name '*.whl' 2>/dev/null | wc -l)"
    echo "CUDA_HOME: $CUDA_HOME"
    echo "results in: $out"
    all_parts
    exit
fi
if [ -n "$lacking" ]; then
    echo "bench/on_gpu.sh: missing: $lacking; see the head of this file for what to carry" >&2
    exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" || exit
out=$(cd "$out" && pwd)
if compgen -G "$wheels/*.whl" >/dev/null; then
    timeout 60 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl || exit 2
fi
export PYTHONPATH="$PWD:$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 FASTOPT_CACHE_DIR="$work/kernels"
all_parts

# --- ten lines --------------------------------------------------------------------------------------------------------

failed=
for name in bench parity $tools; do
    read -r code took <"$work/$name"
    if [ "$code" != 0 ]; then failed="$failed $name"; fi
done
result() {
    local code took
    read -r code took <"$work/$1"
    case $code in
        0) echo "$1: passed in $took s: $(tail -n 1 "$out/$1.txt")" ;;
        124 | 137) echo "$1: STOPPED after $took s: $(tail -n 1 "$out/$1.txt")" ;;
        *) echo "$1: FAILED with $code in $took s: $(tail -n 1 "$out/$1.txt")" ;;
    esac
}
{
    echo "device: $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1 | head -n 1)"
    echo "source: $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $("$python" --version)"
    for name in bench parity $tools; do result "$name"; done
    echo "time: $SECONDS s"
    if [ -n "$failed" ]; then echo "failed:$failed"; else echo "all passed"; fi
} | cut -c 1-200 | tee "$out/summary.txt"
[ -z "$failed" ]
