#!/usr/bin/env bash
# Builds and runs the C++ tests plain, under AddressSanitizer + UBSan and under ThreadSanitizer.
# Builds are kept in build/ and only made again where a source changed.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p build
for sanitizer in "" address thread; do
  folder=build/cpp${sanitizer:+-$sanitizer}
  echo "== C++ tests ${sanitizer:-plain}"
  cmake -S . -B "$folder" -G Ninja -DSIDA_CPP_TESTS=ON -DSIDA_SANITIZE="$sanitizer" > "$folder.log" 2>&1 || {
    cat "$folder.log"
    exit 1
  }
  cmake --build "$folder" -j "${JOBS:-2}" > "$folder.log" 2>&1 || {
    cat "$folder.log"
    exit 1
  }
  # The CUDA kernels' tests are built here and run by tests/test_cuda_kernels.py.
  ctest --test-dir "$folder" --output-on-failure --exclude-regex '^cuda_' -j "${JOBS:-2}"
done
