#!/usr/bin/env bash
# hasattr and getattr with a default raise on some transformers configs.
#
# Expected: hasattr(config, "head_dim") is True or False, and getattr(config, "head_dim", None) has a value.
# Seen:     both raise on a Gemma 4 text config: the error for attributes that differ by layer is a RuntimeError, and only
#           an AttributeError is what hasattr and a default catch.
set -euo pipefail
packages=(torch==2.13.0 transformers==5.24.0)
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
import torch
import transformers

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
config = transformers.Gemma4TextConfig()
raised = []
for what, call in (("hasattr", lambda: hasattr(config, "head_dim")), ("getattr", lambda: getattr(config, "head_dim", None))):
    try:
        print(f"{what}: {call()}")
    except RuntimeError as error:
        raised.append(what)
        print(f"{what}: {type(error).__name__}, an AttributeError: {isinstance(error, AttributeError)}")
assert raised == ["hasattr", "getattr"], f"behaviour changed: {raised}"
END
