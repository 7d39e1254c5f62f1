#!/usr/bin/env bash
# Builds the library for 64-bit Arm with a cross compiler and runs tests of it in emulation, on a processor
# that has everything and on one without SVE. All that it needs is made under build/arm: a folder with
# Debian's Python for arm64, and in it PyTorch, what the tests need and the package.
#
#   emulate.sh [quick]   # quick: a part of the tests, in ten minutes
#   emulate.sh rivals    # makes the folder with Debian's Python, and other runtimes beside it, alone
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin
repository=$PWD arm=$PWD/build/arm
root=$arm/root
site=$root/usr/local/lib/python3.11/dist-packages
for_arm=(--only-binary=:all: --python-version 311 --platform manylinux_2_28_aarch64
  --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64)

check_programs() {
  local missing=""
  for needed in aarch64-linux-gnu-g++:g++-aarch64-linux-gnu qemu-aarch64-static:qemu-user-static \
    debootstrap:debootstrap fakeroot:fakeroot dpkg:dpkg; do
    command -v "${needed%:*}" > /dev/null || missing+=" ${needed#*:}"
  done
  test -z "$missing" || { echo "mfkernels: emulation of Arm needs$missing: apt-get install$missing" >&2; exit 1; }
}

# Does a step where no earlier run has finished it.
once() {
  test ! -e "$arm/$1.done" || return 0
  echo "== $1 (once)"
  "$1"
  touch "$arm/$1.done"
}

tools() {
  "${PYTHON:-python3}" -m venv "$arm/tools"
  "$arm/tools/bin/pip" install -q --disable-pip-version-check cmake ninja
}

# Neither a container nor root's rights: packages are unpacked and none is set up. From the mirror that apt
# uses, where that is one of Debian's.
debian() {
  local mirrors archives=$arm/debian/var/cache/apt/archives
  mapfile -t mirrors < <(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' 'Origin: Debian' || true)
  rm -rf "$arm/debian" "$root"
  fakeroot debootstrap --arch=arm64 --download-only --variant=minbase \
    --include=python3.11,libpython3.11-dev,libstdc++6 bookworm "$arm/debian" "${mirrors[@]:0:1}" > "$arm/debian.log"
  for package in "$archives"/*.deb; do dpkg -x "$package" "$root"; done
  # Python's configuration, for the cross compiler, which is not to see the rest of that folder.
  mkdir -p "$arm/include"
  ln -sfn "$root/usr/include/aarch64-linux-gnu" "$arm/include/aarch64-linux-gnu"
}

# PyTorch 2.10.0 for Arm is a CPU build; later ones on the package index are builds for CUDA, of gigabytes.
# Its requirements are named, since pip would take them for this machine's processor.
wheels() {
  local pip=("$arm/tools/bin/pip" --disable-pip-version-check -q)
  "${pip[@]}" download "${for_arm[@]}" -d "$arm/wheels" --no-deps torch==2.10.0
  "${pip[@]}" download "${for_arm[@]}" -d "$arm/wheels" filelock fsspec jinja2 networkx sympy typing-extensions \
    numpy pytest hypothesis expecttest safetensors
  "${pip[@]}" install "${for_arm[@]}" --target "$site" --upgrade --no-deps --no-index --no-compile "$arm"/wheels/*.whl
}

# For benchmarks/arm_counts.
rivals() {
  "$arm/tools/bin/pip" install -q --disable-pip-version-check "${for_arm[@]}" --target "$arm/rivals" --upgrade \
    --no-compile numpy onnxruntime ncnn ai-edge-litert
}

# Ninja builds again what has changed; the Python sources are copied each time.
package() {
  local bin=$arm/tools/bin
  "$bin/cmake" -S . -B "$arm/cmake" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" \
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$arm/lib" -DMFK_TORCH_INCLUDE="$site/torch/include" \
    -DMFK_TORCH_LIB="$site/torch/lib" -DMFK_TORCH_VERSION=2.10.0 -DMFK_CUDA="no: cross-built" \
    -DMFK_PYTHON_INCLUDE="$root/usr/include/python3.11;$arm/include" \
    -DMFK_EXT_SUFFIX=.cpython-311-aarch64-linux-gnu.so > "$arm/cmake.log"
  "$bin/cmake" --build "$arm/cmake" --parallel "${MAX_JOBS:-$(nproc)}"
  rm -rf "$site/mfkernels"
  cp -r mfkernels "$site"
  rm -f "$site"/mfkernels/*.so
  cp "$arm"/lib/*.so "$site/mfkernels"
}

# Of a processor and arguments: Python on it. Not in the repository, whose own package is for this machine.
emulated() {
  (cd "$arm" && QEMU_CPU=$1 OMP_NUM_THREADS=1 qemu-aarch64-static -L "$root" "$root/usr/bin/python3.11" "${@:2}")
}

files=(contract released_data deploy deploy_dmf_iformer deploy_maps int8)
files=("${files[@]/#/$repository/tests/test_}")
networks="(test_same_numbers and (mobile_former_26m or dmf_xxs or iformer_t))"
quick="(test_chosen_shapes and float32 and same) or (test_integers_are_exact and float32 and same) or \
  test_operator_cpu or $networks or test_pointwise or test_dense_conv or test_largest_sums or \
  test_convolutions_in_bfloat16"
all="test_chosen_shapes or test_integers_are_exact or test_not_finite or (test_released_data and not triton) or \
  test_same_numbers or test_int8 or bfloat16"

run_tests() {
  emulated "$1" -m pytest -c "$repository/pyproject.toml" --rootdir "$repository" -p no:cacheprovider --durations=10 \
    "${files[@]/%/.py}" -k "$2" > "$arm/$1.log" 2>&1
}

check_programs
mkdir -p "$arm"
once tools
once debian
if test "${1-}" = rivals; then once rivals && exit; fi
once wheels
package
emulated max -m mfkernels info
which=$all
test "${1-}" != quick || which=$quick
# Side by side: they take one core each.
run_tests max "$which" & first=$!
# Not cortex-a72: importing PyTorch 2.10.0 itself stops there with an illegal instruction.
run_tests neoverse-n1 "$which" & second=$!
status=0
wait $first || status=1
wait $second || status=1
tail -n 15 "$arm/max.log" "$arm/neoverse-n1.log"
exit $status
