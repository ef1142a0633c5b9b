"""tools/: how `make gpu-check` runs its parts, and what `make matrix` makes of pytest's reports."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tools import gpu_check, matrix


@pytest.fixture
def check(tmp_path, monkeypatch) -> gpu_check.Check:
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    return gpu_check.Check(True, time.monotonic() + 60, dict(os.environ))


def is_running(process: str) -> bool:
    """False for one that is gone or waits to be collected."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_command_that_fails_says_its_status_its_last_words_and_where_the_rest_is(check):
    with pytest.raises(gpu_check.PartError, match=r"status 3: first / no card \(part\.log\)"):
        check.run("part", 30, sys.executable, "-c", "print('first'); print('no card'); exit(3)")
    log = check.run("part", 30, sys.executable, "-c", "print('no card'); exit(77)", accept=(gpu_check.NO_DEVICE,))
    assert gpu_check.last_lines(log) == "no card"


def test_a_command_that_takes_too_long_is_ended_with_its_children(check, tmp_path):
    program = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "print(child.pid, flush=True); time.sleep(600)"
    )
    process, log = check.start("long", sys.executable, "-c", program)
    while not (child := log.read_text().strip()):
        time.sleep(0.05)
    with pytest.raises(gpu_check.PartError, match="ended after 1 s; last"):
        check.finish(process, log, 0.1)
    deadline = time.monotonic() + 30
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def test_no_part_outlives_the_time_of_all(check):
    check.deadline = time.monotonic() + 1
    with pytest.raises(gpu_check.PartError, match="ended after 1 s"):
        check.run("long", 600, sys.executable, "-c", "import time; time.sleep(600)")


def test_reports_are_counted_by_room_and_failures_named(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.models.test_switch" name="a"/>'
        '<testcase classname="tests.models.test_switch" name="b"><failure message="no"/></testcase>'
        '<testcase classname="tests.models.test_seam" name="c"><skipped/></testcase>'
        '<testcase classname="tests.test_cli" name="d"><error/></testcase></testsuite></testsuites>'
    )
    found = matrix.counted(report)
    assert found == {
        "rooms": {"models": {"passed": 1, "failed": 1, "skipped": 1}, "the rest": {"failed": 1}},
        "failed": ["tests.models.test_switch::b", "tests.test_cli::d"],
    }
    text = matrix.render({"2.6.0, 5.0.0": {"error": "pip failed"}, "2.13.0, 5.24.0": found | {"tests": ["tests"]}})
    assert "| torch | transformers | models | the rest | tests |" in text
    assert "| 2.6.0 | 5.0.0 | pip failed | | |" in text
    assert "| 2.13.0 | 5.24.0 | 1 / 1 / 1 | 0 / 1 / 0 | tests |" in text
    assert "- `tests.models.test_switch::b`" in text
