#!/usr/bin/env bash
# A safetensors tensor of type F4 can be read whole, and no slice of it can.
#
# Expected: get_slice(name)[1:3] gives two rows, as for every other type.
# Seen:     get_tensor gives [4, 16] pairs; get_slice says shape [4, 32] and every slice raises RuntimeError, [:] too. The
#           same bytes stored as U8 can be sliced.
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
import json
import struct

import safetensors
import torch
from safetensors import safe_open

print(f"torch {torch.__version__}, safetensors {safetensors.__version__}")
data = bytes(range(64))
header = json.dumps(
    {
        "four_bits": {"dtype": "F4", "shape": [4, 32], "data_offsets": [0, 64]},
        "bytes": {"dtype": "U8", "shape": [4, 16], "data_offsets": [64, 128]},
    }
).encode()
header += b" " * (-len(header) % 8)
with open("both.safetensors", "wb") as file:
    file.write(struct.pack("<Q", len(header)) + header + data + data)
with safe_open("both.safetensors", "pt") as file:
    whole = file.get_tensor("four_bits")
    print(f"get_tensor: {whole.dtype} {tuple(whole.shape)}")
    print(f"get_slice of the bytes: {tuple(file.get_slice('bytes')[1:3].shape)}")
    piece = file.get_slice("four_bits")
    raised = []
    for wanted in (slice(1, 3), slice(None)):
        try:
            piece[wanted]
        except RuntimeError as error:
            raised.append(str(error))
            print(f"get_slice {piece.get_dtype()} {piece.get_shape()} at {wanted}: RuntimeError: {error}")
assert tuple(whole.shape) == (4, 16), whole.shape
assert len(raised) == 2, "behaviour changed: a slice of F4 can be read"
END
