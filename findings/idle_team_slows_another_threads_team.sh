#!/usr/bin/env bash
# A thread that has computed in parallel once, and only waits since, slows down what other threads compute.
#
# Expected: a thread that waits costs nothing.
# Seen:     torch's wheels for Linux come with GNU's OpenMP runtime, which keeps a team of threads for every thread that
#           has computed in parallel, as long as that thread lives. While the teams together have more threads than there
#           are processors, no team waits actively any more: every parallel region sends its threads to sleep and wakes
#           them. They do so some thousand times where one team does it hardly ever. omp_pause_resource_all(), called
#           by the thread that waits, ends its team, and the other one waits actively again; torch offers nothing for it.
set -euo pipefail
packages=(torch==2.13.0)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ -z ${FINDINGS_VENV:-} ]]; then
  python3 -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install -q "${packages[@]}"
  FINDINGS_VENV=$work/venv
fi
python=$(cd "$FINDINGS_VENV/bin" && pwd)/python
cd "$work"
unset OMP_WAIT_POLICY OMP_NUM_THREADS GOMP_SPINCOUNT
"$python" - << 'END'
import ctypes
import glob
import os
import queue
import threading
import time

import torch

processors = len(os.sched_getaffinity(0))
print(f"torch {torch.__version__}, {processors} processors, {torch.get_num_threads()} threads in a team")
if processors < 2:
    raise SystemExit("needs two processors")
torch.set_num_threads(processors)
runtime = ctypes.CDLL(glob.glob(os.path.join(os.path.dirname(torch.__file__), "lib", "libgomp*"))[0])
numbers = torch.zeros(1 << 17)
REGIONS = 2000


def sleeps():
    """How often the threads of this process went to sleep while the main thread computed in parallel."""
    def now():
        total = 0
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/status") as file:
                total += sum(int(line.split()[1]) for line in file if line.startswith("voluntary"))
        return total

    numbers.add_(1)
    before, begin = now(), time.perf_counter()
    for _ in range(REGIONS):
        numbers.add_(1)
    return now() - before, (time.perf_counter() - begin) / REGIONS * 1e6


asked, answered = queue.Queue(), queue.Queue()


def other():
    while True:
        asked.get()()
        answered.put(None)


def there(work):
    asked.put(work)
    answered.get()


threading.Thread(target=other, daemon=True).start()
rows = {}
for turn in range(3):
    rows.setdefault("alone", []).append(sleeps())
    there(lambda: numbers.add(1))
    rows.setdefault("beside a team that waits", []).append(sleeps())
    there(lambda: runtime.omp_pause_resource_all(1))
    rows.setdefault("after that team has ended", []).append(sleeps())
best = {}
for name, found in rows.items():
    best[name] = min(count for count, _ in found)
    times = ", ".join(f"{microseconds:.0f}" for _, microseconds in found)
    print(f"{name}: {min(c for c, _ in found)} to {max(c for c, _ in found)} sleeps, {times} us a region")
quiet, loud, again = best.values()
if not (loud > REGIONS / 2 and quiet < loud / 4 and again < loud / 4):
    raise SystemExit("behaviour changed")
END
