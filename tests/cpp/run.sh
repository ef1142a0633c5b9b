#!/usr/bin/env bash
# Builds and runs the C++ tests.
#
#   run.sh quick    what `make test` has of them: the engine, both tiers, the kernels of this machine's instruction sets
#   run.sh check    the rest: emulated instruction sets, planted bugs, the CUDA kernels on the CPU (built here, run by
#                   tests/kernels/test_cuda_kernels.py), then all but those under AddressSanitizer + UBSan and
#                   under ThreadSanitizer
#   run.sh          both
#   run.sh program NAME ARGUMENTS...   one program, with arguments
#
# Kernels and engine are compiled once: the tests are built in the folder that the extension was built in, if there is
# one. Builds are kept in build/ and only made again where a source changed.
set -euo pipefail
cd "$(dirname "$0")/../.."
jobs=${JOBS:-2}
wish=${1:-all}
case $wish in
  quick | check | all | program) ;;
  *)
    echo "run.sh: '$wish' is not one of quick, check, all, program" >&2
    exit 2
    ;;
esac
mkdir -p build
plain=build/cpp
[[ ! -e build/extension ]] || plain=$(readlink -f build/extension)

# configure FOLDER [SANITIZER]
configure() {
  cmake -S . -B "$1" -G Ninja -DSIDA_CPP_TESTS=ON -DSIDA_SANITIZE="${2:-}" > build/configure.log 2>&1 || {
    cat build/configure.log
    exit 1
  }
}

# step WHAT COMMAND...: a heading, the command with its own progress, how long it took.
step() {
  local what=$1 begin=$SECONDS
  shift
  echo "== $what"
  "$@"
  echo "== $what: $((SECONDS - begin)) s"
}

configure "$plain"
if [[ $wish == program ]]; then
  cmake --build "$plain" -j "$jobs" --target "$2"
  exec "$plain/$2" "${@:3}"
fi
if [[ $wish != check ]]; then
  step "C++ tests: building" cmake --build "$plain" -j "$jobs" --target sida_quick_tests
  step "C++ tests: running" ctest --test-dir "$plain" --output-on-failure --label-regex '^quick$' -j "$jobs"
fi
if [[ $wish != quick ]]; then
  step "C++ tests of make check: building" cmake --build "$plain" -j "$jobs"
  step "C++ tests of make check: running" \
    ctest --test-dir "$plain" --output-on-failure --label-exclude '^quick$' --exclude-regex '^cuda_' -j "$jobs"
  for sanitizer in address thread; do
    configure "build/cpp-$sanitizer" "$sanitizer"
    step "C++ tests, $sanitizer sanitizer: building" cmake --build "build/cpp-$sanitizer" -j "$jobs"
    step "C++ tests, $sanitizer sanitizer: running" ctest --test-dir "build/cpp-$sanitizer" --output-on-failure -j "$jobs"
  done
fi
