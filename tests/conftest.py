"""Options, fixtures and the reasons for which tests are skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import SwitchTransformersEncoderModel

from tests.support.reference import build, small_config

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--check", action="store_true", help="run the tests marked check too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    check = config.getoption("--check")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow, as `make nightly` does"))
        if "check" in item.keywords and not check:
            item.add_marker(pytest.mark.skip(reason="long: run with --check, as `make check` does"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or leaves anything in the user's store cache."""
    monkeypatch.setenv("SIDA_CACHE", str(tmp_path_factory.getbasetemp() / "store-cache"))


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder with two MoE layers of eight experts, saved as transformers does. Nobody writes into it; a module
    that needs another model has a ``folder`` of its own."""
    path = tmp_path_factory.mktemp("encoder")
    build(SwitchTransformersEncoderModel, small_config()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on more threads, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
