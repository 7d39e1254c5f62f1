#!/usr/bin/env bash
# Builds, tests and measures on a GPU, without a network, within 8 minutes:
#
#     benchmarks/gpu.sh OUTDIR [PART ...]
#
# PART is build, tests, sanitize, or one of `benchmarks/gpu.py`; by default all but sanitize (which takes as long
# as all others): first `smoke`, a minute that shows whether anything works, and `compile`, for which the others
# would wait. Each part writes as it goes and is stopped after its share of the time, with what it has.
# PYTHON names another Python than python3; it needs PyTorch for CUDA, setuptools and CMake, tests need pytest.
# COMPILE=max-autotune has rivals compiled, too, which takes minutes for each network: `latency` alone, then.
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
[ $# -ge 1 ] || set -- build smoke compile tests latency large streams training operators former bottleneck attention trace report

limit() { # seconds of a part; of all but sanitize 480
  case $1 in
    build) echo 80 ;;
    smoke | compile | tests | latency) echo 60 ;;
    training) echo 40 ;;
    *) echo 15 ;;
  esac
}
failed=0
for part in "$@"; do
  # Where it is called alone, or to build before, it may take all of the time; a CPU all it needs.
  seconds=$(limit "$part")
  if [ $# -le 2 ] || [ "$part" = sanitize ] || [ -n "${DEVICE:-}" ]; then seconds=470; fi
  case $part in
    build) command=("$PYTHON" setup.py -q build_ext --inplace) ;;
    tests) command=("$PYTHON" -m pytest -m gpu -p no:cacheprovider --continue-on-collection-errors tests) ;;
    sanitize) command=(bash -c 'for tool in memcheck racecheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 "$0" -m pytest -x -m gpu -p no:cacheprovider \
          -k "graphs_streams_and_devices" tests || exit 1
      done' "$PYTHON") ;;
    *) command=("$PYTHON" benchmarks/gpu.py "$OUT" "$part" ${COMPILE:+--compile "$COMPILE"} ${DEVICE:+--device "$DEVICE" --quick}) ;;
  esac
  echo "== $part, at most $seconds s"
  timeout "$seconds" "${command[@]}" 2>&1 | tee "$OUT/$part.log"
  status=$?
  [ $status -eq 0 ] || { echo "== $part: exit status $status"; failed=1; }
done
exit $failed
