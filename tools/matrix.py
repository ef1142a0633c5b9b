"""`make matrix`: the releases of torch and transformers that really work, by the Python tests; nightly, not CI.

    python tools/matrix.py                                    every pair of PAIRS, an environment for each
    python tools/matrix.py --pair 2.13.0 5.18.0               one pair
    python tools/matrix.py --python PYTHON [TESTS ...]        an environment that is there, as it is

For each pair the tracked sources are copied to build/matrix/PAIR/, with the extension that is built in this tree: there
is one for every torch. The tests run but for those of `make check`. What came out is kept in
bench/results/versions.json and written to docs/versions.md. With TESTS (files or folders) only these run, and the table
says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "bench/results/versions.json"
DOCUMENT = ROOT / "docs/versions.md"

# Oldest and newest of both that pyproject.toml allows, and two between.
PAIRS = (("2.10.0", "5.18.0"), ("2.12.1", "5.20.2"), ("2.13.0", "5.22.2"), ("2.15.0", "5.24.0"))
BUILT = ("_C*.so", "_build_info.json")
OUTCOMES = ("passed", "failed", "skipped")
VERSIONS = "import json, torch, transformers; print(json.dumps([torch.__version__, transformers.__version__]))"


def call(log: Path, *command: str | Path, cwd: Path, environment: dict[str, str]) -> int:
    """The exit status of a command whose output goes to the end of `log`."""
    with open(log, "ab") as out:
        return subprocess.run(
            [str(part) for part in command], cwd=cwd, env=environment, stdout=out, stderr=subprocess.STDOUT
        ).returncode


def prepare(pair: tuple[str, str], folder: Path) -> tuple[Path, Path]:
    """An environment with this pair, and a copy of the sources with the extension of this tree; Python and copy.

    Raises:
        RuntimeError: a step failed; names the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source, place = folder / "source", folder / "environment"
    source.mkdir(exist_ok=True)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    archive = subprocess.run(
        ["tar", "--null", "-T", "-", "-c"], cwd=ROOT, input=tracked, check=True, capture_output=True
    ).stdout
    subprocess.run(["tar", "-x"], cwd=source, input=archive, check=True)
    if not (place / "bin/python").exists():
        venv.create(place, with_pip=True)
    python, log = place / "bin/python", folder / "build.log"
    environment = environment_of(place)
    install: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    tools = ("setuptools>=77", "cmake>=3.24", "ninja>=1.11", "pybind11>=2.12")
    wanted = [*(f"{name}=={release}" for name, release in zip(("torch", "transformers"), pair, strict=True)), *tools]
    if call(log, *install, *wanted, *requirements(), cwd=source, environment=environment):
        raise RuntimeError(f"{' '.join(wanted[:2])} could not be installed; see {log.relative_to(ROOT)}")
    for built in (path for pattern in BUILT for path in (ROOT / "sida_ext").glob(pattern)):
        shutil.copy2(built, source / "sida_ext")
    return python, source


def requirements() -> list[str]:
    """What the package and its tests need besides torch and transformers, by its own metadata."""
    found = []
    for line in importlib.metadata.requires("sida_ext") or []:
        name, _, condition = line.partition(";")
        extra = re.search(r"extra == \W(\w+)", condition)
        if not re.match(r"(torch|transformers)\b", name) and (extra is None or extra[1] == "test"):
            found.append(name.strip())
    return found


def environment_of(place: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"PATH": f"{place / 'bin'}{os.pathsep}{kept['PATH']}", "OMP_WAIT_POLICY": "passive"}


def room_of(case: ElementTree.Element) -> str:
    parts = (case.get("classname") or "").split(".")
    return parts[1] if len(parts) > 2 and not parts[1].startswith("test_") else "the rest"


def outcome_of(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def counted(report: Path) -> dict[str, Any]:
    """Outcomes by room and the names of what failed, from pytest's XML."""
    rooms: dict[str, Counter[str]] = {}
    failed = []
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = outcome_of(case)
        rooms.setdefault(room_of(case), Counter())[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return {"rooms": {name: dict(count) for name, count in sorted(rooms.items())}, "failed": sorted(failed)}


def test(python: Path, source: Path, folder: Path, environment: dict[str, str], tests: list[str]) -> dict[str, Any]:
    report, log = folder / "tests.xml", folder / "tests.log"
    report.unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors", f"--junitxml={report}"]
    call(log, python, "-m", "pytest", *(tests or ["tests"]), *options, cwd=source, environment=environment)
    if not report.exists():
        return {"error": f"pytest wrote no report; see {log.relative_to(ROOT)}"}
    return counted(report) | {"tests": tests or ["tests"]}


def render(record: dict[str, Any]) -> str:
    """The document."""
    lines = [
        "# Releases of torch and transformers",
        "",
        "Made by `make matrix`; do not edit. Outcomes of the Python tests by room: passed / failed / skipped. What is "
        "not in this table was not run.",
        "",
        "torch 2.10 is the first whose stable ABI has what the extension uses; an older one is refused at import. One "
        "build serves all: the extension is not made again for a release.",
        "",
        "Switch Transformers need transformers 5.18 or later, which pyproject.toml asks for; with an older one they "
        "are refused by its name. What the model's own layer does:",
        "",
        "- 5.0 to 5.17: the router returns probabilities, a one-hot mask and probabilities again, in this order, and "
        "is handed tokens without their sentences. Capacity is counted over one token at a time: none is ever dropped.",
        "- from 5.18: mask, probability, logits. Each sentence has its own count, padding included; a token beyond the "
        "capacity of its expert adds nothing, and keeps what the layer was given.",
        "",
        "The experts interface came piece by piece: a family that a release does not have, or does not have on the "
        "interface, is refused by its name.",
        "",
    ]
    rooms = sorted({room for found in record.values() for room in found.get("rooms", {})})
    lines += ["| torch | transformers | " + " | ".join(rooms) + " | tests |", "|---" * (3 + len(rooms)) + "|"]
    for name, found in record.items():
        torch, transformers = name.split(", ")
        if "error" in found:
            lines.append(f"| {torch} | {transformers} | {found['error']}" + " |" * (1 + len(rooms)))
            continue
        cells = [" / ".join(str(found["rooms"].get(room, {}).get(kind, 0)) for kind in OUTCOMES) for room in rooms]
        lines.append(f"| {torch} | {transformers} | {' | '.join(cells)} | {', '.join(found['tests'])} |")
    for name, found in record.items():
        if found.get("failed"):
            lines += ["", f"## What fails with torch and transformers {name}", ""]
            lines += [f"- `{test}`" for test in found["failed"]]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="files or folders of tests; default: all")
    parser.add_argument("--pair", nargs=2, metavar=("TORCH", "TRANSFORMERS"), action="append", help="instead of all")
    parser.add_argument("--python", type=Path, help="test this environment as it is, in this source tree")
    arguments = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    pairs = [tuple(pair) for pair in arguments.pair or PAIRS]
    failed = False
    for pair in [None] if arguments.python else pairs:
        if pair is None:
            environment = dict(os.environ)
            asked = subprocess.run([arguments.python, "-c", VERSIONS], capture_output=True, text=True, check=True)
            name = ", ".join(json.loads(asked.stdout.splitlines()[-1]))
            folder, python, source = ROOT / "build/matrix/given", arguments.python, ROOT
            folder.mkdir(parents=True, exist_ok=True)
        else:
            name, folder = ", ".join(pair), ROOT / "build/matrix" / "-".join(pair)
            print(f"== torch and transformers {name}: environment and build", flush=True)
            try:
                python, source = prepare(pair, folder)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                record[name], failed = {"error": str(error)}, True
                print(error, flush=True)
                continue
            environment = environment_of(folder / "environment")
        print(f"== torch and transformers {name}: tests", flush=True)
        record[name] = found = test(python, source, folder, environment, arguments.tests)
        failed |= bool(found.get("error") or found.get("failed"))
        print(
            {kind: sum(room.get(kind, 0) for room in found.get("rooms", {}).values()) for kind in OUTCOMES}, flush=True
        )
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    DOCUMENT.write_text(render(record))
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
