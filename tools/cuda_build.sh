#!/usr/bin/env bash
# Compiles the CUDA sources for every architecture that is shipped, warnings as errors. Sources that were compiled before,
# by their content, are not compiled again; without nvcc it says so and ends well.
set -euo pipefail
cd "$(dirname "$0")/.."
nvcc=$(command -v nvcc || true)
[[ -n $nvcc ]] || nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
if [[ ! -x $nvcc ]]; then
  echo "cuda-build: skipped, no nvcc on PATH or in ${CUDA_HOME:-/usr/local/cuda}"
  exit 0
fi
build=build/cuda
mkdir -p "$build"
sources=(csrc/base csrc/device csrc/kernels csrc/serving CMakeLists.txt)
content=$({ "$nvcc" --version; find "${sources[@]}" -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum; } | sha256sum)
if [[ $(cat "$build/compiled" 2>/dev/null) == "$content" ]]; then
  echo "cuda-build: these sources were compiled before"
  exit 0
fi
begin=$SECONDS
cmake -S . -B "$build" -G Ninja -DSIDA_CUDA=ON -DCMAKE_CUDA_COMPILER="$nvcc" > "$build/configure.log" 2>&1 || {
  cat "$build/configure.log"
  exit 1
}
cmake --build "$build" -j "${JOBS:-2}" --target sida_cuda_kernels sida_cuda_shapes sida_cuda_runtime
printf '%s\n' "$content" > "$build/compiled"
echo "cuda-build: compiled in $((SECONDS - begin)) s"
