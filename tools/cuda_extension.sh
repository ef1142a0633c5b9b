#!/usr/bin/env bash
# Builds the whole extension with CUDA, as `pip install .` does where torch is a CUDA build, for every architecture
# unless TORCH_CUDA_ARCH_LIST chooses; then imports it and runs the tests that it must pass with or without a GPU.
# PYTHON is the interpreter of an environment with a CUDA build of torch; without one, or without nvcc, it says why it
# does nothing and ends well.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")' 2>/dev/null || echo none)
if [[ -z $cuda || $cuda == none ]]; then
  echo "cuda-extension: skipped, the torch of $python is no CUDA build; name another: make cuda-extension CUDA_PYTHON=..."
  exit 0
fi
nvcc=$(command -v nvcc || true)
[[ -n $nvcc ]] || nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
if [[ ! -x $nvcc ]]; then
  echo "cuda-extension: skipped, no nvcc on PATH or in ${CUDA_HOME:-/usr/local/cuda}"
  exit 0
fi
begin=$SECONDS
SIDA_CUDA=on MAX_JOBS=${JOBS:-2} "$python" -m pip install -q --no-build-isolation --force-reinstall --no-deps .
echo "cuda-extension: built for torch with CUDA $cuda and installed in $((SECONDS - begin)) s"
# From another folder: the package that was installed, not the sources.
tests=$PWD/tests
cd "$(mktemp -d)"
"$python" - << 'END'
import sida_ext
from sida_ext import _C
import torch

assert _C.cuda_built, "the extension was built without CUDA"
print(f"imported: {sida_ext.__file__}; torch {torch.__version__}; a GPU here: {torch.cuda.is_available()}")
if not torch.cuda.is_available():
    try:
        sida_ext.from_pretrained("nowhere", device="cuda")
        raise SystemExit('device="cuda" was accepted without a GPU')
    except RuntimeError as error:
        print(f'device="cuda": RuntimeError: {error}')
END
"$python" -P -m pytest -q -p no:cacheprovider "$tests"/test_{cuda,ops,moe_ffn_invariance,switch,stream}.py
