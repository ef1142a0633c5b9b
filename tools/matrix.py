"""`make matrix`: the releases of torch and transformers that really work, by the Python tests; nightly, not CI.

    python tools/matrix.py                                    every pair of PAIRS, an environment and a build for each
    python tools/matrix.py --pair 2.13.0 5.17.0               one pair
    python tools/matrix.py --python PYTHON [TESTS ...]        an environment that is there, as it is

For each pair the tracked sources are copied to build/matrix/PAIR/, the extension is built there against that torch, and
the tests run but for those of `make check`. What came out is kept in bench/results/versions.json and written to
docs/versions.md. With TESTS (files or folders) only these run, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
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
PAIRS = (("2.6.0", "5.18.0"), ("2.10.0", "5.20.2"), ("2.13.0", "5.22.2"), ("2.15.0", "5.24.0"))
OUTCOMES = ("passed", "failed", "skipped")
VERSIONS = "import json, torch, transformers; print(json.dumps([torch.__version__, transformers.__version__]))"


def call(log: Path, *command: str | Path, cwd: Path, environment: dict[str, str]) -> int:
    """The exit status of a command whose output goes to the end of `log`."""
    with open(log, "ab") as out:
        return subprocess.run(
            [str(part) for part in command], cwd=cwd, env=environment, stdout=out, stderr=subprocess.STDOUT
        ).returncode


def prepare(pair: tuple[str, str], folder: Path) -> tuple[Path, Path]:
    """An environment with this pair and the extension built in a copy of the sources; its Python, and the copy.

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
    tools = ("setuptools>=77", "cmake>=3.24", "ninja>=1.11", "pybind11>=2.12", "wheel")
    for command in (
        [*install, f"torch=={pair[0]}", f"transformers=={pair[1]}", *tools],
        [*install, "--no-build-isolation", "-e", ".[test]"],
    ):
        if call(log, *command, cwd=source, environment=environment):
            raise RuntimeError(f"{' '.join(map(str, command[6:]))} failed; see {log.relative_to(ROOT)}")
    return python, source


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
        "Switch Transformers need transformers 5.18 or later, which pyproject.toml asks for. Up to 5.17 the model's "
        "router returns its results in another order and is handed tokens without their sentences, so that no capacity "
        "holds; results of this package and of the model's own layers differ there. The experts interface came piece "
        "by piece: a family that a release does not have, or does not have on the interface, is refused by its name.",
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
