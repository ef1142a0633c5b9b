"""The documents point at what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            found = page.parent / path if path else page
            assert found.exists(), f"{page.name}: {target}"
            if anchor:
                titles = re.findall(r"(?m)^#+ (.*)$", found.read_text())
                known = [re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles]
                assert anchor in known, f"{page.name}: {target}"


def test_the_architecture_names_files_and_functions_that_are_there():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    named = re.findall(r"`((?:sida_ext|csrc|tests)/[\w/.]+?)(?::(\w+))?`", text)
    assert len([function for _, function in named if function]) >= 16
    for path, function in named:
        assert (ROOT / path).exists(), path
        if function:
            assert re.search(rf"\b{function}\b", (ROOT / path).read_text()), f"{path}:{function}"


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_that_are_named_can_be_found(page):
    for name in re.findall(r"`python -m (bench|examples)((?:\.\w+)+)", page.read_text()):
        module = ROOT / (name[0] + name[1]).replace(".", "/")
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), name
