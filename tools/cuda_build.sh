#!/usr/bin/env bash
# Compiles the CUDA sources for every architecture that is shipped, warnings and spilled registers as errors: kernels,
# the table over the CUDA runtime, the two-tier engine and the tests that want a GPU. Sources that were compiled before,
# by their content, are not compiled again; without nvcc it says so and ends well.
#
# With --is-current it only answers, by its exit status, whether these sources were compiled.
#
# What the assembler says of each kernel is kept in build/cuda/ptxas.log and checked (tools/sass_report.py --ptxas).
set -euo pipefail
cd "$(dirname "$0")/.."
nvcc=$(command -v nvcc || true)
[[ -n $nvcc ]] || nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
if [[ ! -x $nvcc ]]; then
  [[ ${1:-} != --is-current ]] || exit 1
  echo "cuda-build: skipped, no nvcc on PATH or in ${CUDA_HOME:-/usr/local/cuda}"
  exit 0
fi
build=build/cuda
mkdir -p "$build"
targets=(sida_cuda_kernels sida_cuda_shapes sida_cuda_runtime sida_cuda_serving cuda_gpu_kernels_test cuda_gpu_route_test)
sources=(csrc/base csrc/device csrc/experts csrc/kernels csrc/serving tests/cuda CMakeLists.txt tools/cuda_build.sh)
content=$({ "$nvcc" --version; find "${sources[@]}" -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum; } | sha256sum)
if [[ ${1:-} == --is-current ]]; then
  [[ $(cat "$build/compiled" 2>/dev/null) == "$content" ]]
  exit
fi
if [[ $(cat "$build/compiled" 2>/dev/null) == "$content" ]]; then
  echo "cuda-build: these sources were compiled before"
else
  begin=$SECONDS
  # Objects whose reports are lost are made again.
  [[ -e $build/ptxas.log ]] || rm -rf "$build/csrc/kernels/cuda"
  # A toolkit that CMake's own search does not find is given by name.
  cmake -S . -B "$build" -G Ninja -DSIDA_CUDA=ON -DSIDA_CPP_TESTS=ON -DCMAKE_CUDA_COMPILER="$nvcc" \
    > "$build/configure.log" 2>&1 || {
    cat "$build/configure.log"
    exit 1
  }
  # A kernel's newest report stands; what is not compiled again keeps its older one, also after a build that failed.
  cmake --build "$build" -j "${JOBS:-2}" --target "${targets[@]}" 2>&1 | tee -a "$build/ptxas.log" > "$build/build.log" || {
    cat "$build/build.log"
    exit 1
  }
  printf '%s\n' "$content" > "$build/compiled"
  echo "cuda-build: compiled in $((SECONDS - begin)) s"
fi
"${PYTHON:-python3}" tools/sass_report.py --ptxas "$build/ptxas.log"
