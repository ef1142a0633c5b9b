#!/usr/bin/env bash
# A row that safetensors' get_slice reads keeps the whole tensor alive, and pickles it.
#
# Expected: get_slice(name)[3:4] is one row: 4 KiB of memory, 4 KiB in a pickle (a queue between processes, torch.save).
# Seen:     the row is a view of the whole tensor: its storage has 4 MiB, and so has its pickle.
set -euo pipefail
packages=(torch==2.13.0 safetensors==0.8.0 numpy)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ -z ${FINDINGS_VENV:-} ]]; then
  python3 -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install -q "${packages[@]}"
  FINDINGS_VENV=$work/venv
fi
python=$(cd "$FINDINGS_VENV/bin" && pwd)/python
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
"$python" - << 'END'
import pickle

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save_file

print(f"torch {torch.__version__}, safetensors {safetensors.__version__}")
save_file({"weight": torch.zeros(1024, 1024)}, "weight.safetensors")
with safe_open("weight.safetensors", "pt") as file:
    row = file.get_slice("weight")[3:4]
stored, pickled = row.untyped_storage().nbytes(), len(pickle.dumps(row))
print(f"row {tuple(row.shape)}: {row.numel() * 4} bytes; its storage: {stored}; pickled: {pickled}")
assert stored == 4 << 20, f"behaviour changed: the row's storage has {stored} bytes"
assert pickled > 4 << 20, f"behaviour changed: the row's pickle has {pickled} bytes"
END
