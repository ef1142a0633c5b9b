#!/usr/bin/env bash
# A bfloat16 product with the last token of a prompt takes many times as long as with a copy of the same token.
#
# Expected: hidden[:, -1:] of a prompt [1, tokens, width] is contiguous, torch says so, and a product with it (lm_head of
#           transformers with logits_to_keep=1, as in every first step of generate) takes what one token takes.
# Seen:     its stride of the dimension of size 1 is that of the prompt. In bfloat16 on a CPU the product then leaves
#           the path of one token: tens of times slower. .contiguous() and .clone() keep the stride; a 2-D view mends it.
#           float32 is not affected. (A CPU without bfloat16 instructions is slow in both and is left out.)
set -euo pipefail
packages=(torch==2.13.0 numpy)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! grep -qE '^flags.* avx512_bf16' /proc/cpuinfo; then
  echo "this CPU has no avx512_bf16: nothing to see here"
  exit 0
fi
if [[ -z ${FINDINGS_VENV:-} ]]; then
  python3 -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install -q "${packages[@]}"
  FINDINGS_VENV=$work/venv
fi
python=$(cd "$FINDINGS_VENV/bin" && pwd)/python
cd "$work"
"$python" - << 'END'
import time

import torch

print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


def least_ms(x, weight):
    times = []
    with torch.inference_mode():
        for _ in range(4):
            begin = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


prompt, weight = torch.randn(1, 128, 1024), torch.randn(16000, 1024)
slower = {}
for dtype in (torch.float32, torch.bfloat16):
    last = prompt.to(dtype)[:, -1:]
    flat, matrix = last[0], weight.to(dtype)
    assert last.is_contiguous()
    assert torch.equal(last[0], flat)
    view, plain = least_ms(last, matrix), least_ms(flat, matrix)
    slower[dtype] = view / plain
    print(f"{dtype}: strides {last.stride()} {view:.1f} ms, as {tuple(flat.shape)} {plain:.1f} ms")
assert slower[torch.bfloat16] > 5 and slower[torch.float32] < 3, f"behaviour changed: {slower}"
END
