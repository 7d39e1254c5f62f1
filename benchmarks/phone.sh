#!/usr/bin/env bash
# For somebody with a 64-bit Arm processor under Linux, a Raspberry Pi as well as a server: builds, tests and
# measures beside the other runtimes that can be installed there, and leaves one file to send.
#
#     benchmarks/phone.sh [OUTDIR]     # needs a C++ compiler and Python >= 3.10; an hour or two, 2 GB on disk
#
# PYTHON names another Python than python3, NETWORKS others than those below. A part that fails does not stop
# the others.
set -uo pipefail
cd "$(dirname "$0")/.."
networks=${NETWORKS:-mobile_former_26m,mobile_former_214m,dmf_xxs,iformer_t,iformer_m,mobilenet_v3_large}
mkdir -p "${1:-build/phone}"
out=$(cd "${1:-build/phone}" && pwd)
python=$out/venv/bin/python
# The last PyTorch whose build for Arm on the package index is for CPUs alone.
torch=torch==2.10.0
failed=0

part() { # its name, and a command
  echo "== $1"
  "${@:2}" > >(tee "$out/$1.log") 2>&1
  local status=$?
  test $status -eq 0 || { echo "== $1: exit status $status"; failed=1; }
  return $status
}

machine() {
  uname -srm
  lscpu || cat /proc/cpuinfo
  head -1 /proc/meminfo
  tail -n +1 /sys/devices/system/cpu/cpu*/cpufreq/{scaling_governor,cpuinfo_max_freq} 2> /dev/null
  return 0
}

build() {
  "${PYTHON:-python3}" -m venv "$out/venv" &&
    "$python" -m pip install -q $torch setuptools wheel cmake ninja numpy pytest hypothesis expecttest safetensors &&
    "$python" -m pip install -q -e . --no-build-isolation &&
    "$python" -m mfkernels info
}

runtimes() {
  local runtime
  for runtime in "onnx onnxruntime onnxscript" "openvino nncf" "ncnn pnnx" "ai-edge-litert litert-torch"; do
    # Word by word; none of them may bring another PyTorch.
    "$python" -m pip install -q -c <(echo $torch) $runtime && echo "has $runtime" || echo "cannot have $runtime"
  done
}

part machine machine
part build build || { echo "== nothing else runs without it"; exit 1; }
part runtimes runtimes
part tests "$python" -m pytest -p no:cacheprovider tests/test_contract.py tests/test_released_data.py tests/test_deploy.py \
  tests/test_deploy_dmf_iformer.py -k "(test_chosen_shapes and float32) or test_operator_cpu or test_same_numbers"
part networks "$python" -m mfkernels bench --networks "$networks" --output "$out/networks"
part sizes "$python" -m mfkernels bench --networks mobile_former_214m,mobilenet_v3_large --sizes 384,640 --output "$out/sizes"
part profile "$python" -m mfkernels bench --profile --networks mobile_former_214m,dmf_xxs,iformer_m --output "$out/profile"
tar -czf "$out/arm-report.tar.gz" --exclude=venv --exclude=arm-report.tar.gz -C "$out" .
echo "== send $out/arm-report.tar.gz"
exit $failed
