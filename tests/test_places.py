"""What a MODEL argument means, and what is said of one that means nothing."""

from __future__ import annotations

import socket

import pytest

from sida_ext.places import hub_failure, refuse_mistyped


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of checkpoints that is the current one, and no network."""
    for name in ("demo_model", "other", "owner"):
        (tmp_path / "models" / name).mkdir(parents=True)
    for name in ("demo_model", "other"):
        (tmp_path / "models" / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)

    def refused(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models/demo_modle", r"models/demo_modle does not exist, .*; did you mean models/demo_model\?"),
        ("models/demo_mode", r"did you mean models/demo_model\?"),
        ("./nothing", r"\./nothing does not exist, expected a checkpoint folder or a hub id \(owner/name\)"),
        ("/no/such/folder", "/no/such/folder does not exist"),
        ("~/model", "~/model does not exist"),
        ("one/two/three", "one/two/three does not exist"),
        ("folder/", "folder/ does not exist"),
        ("my model!", "my model! does not exist, .*: Repo id must"),
        ("models/demo_model/config.json", "is a file, expected a checkpoint folder"),
    ],
)
def test_what_is_no_model_is_refused_without_asking_the_hub(here, name, message):
    with pytest.raises(FileNotFoundError, match=message) as error:
        refuse_mistyped(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["models/demo_model", "owner/name", "models/nothing-like-it", "gpt2", "models/owners"])
def test_folders_and_ids_pass(here, name):
    refuse_mistyped(name)


def test_a_page_of_an_error_becomes_a_line():
    error = OSError("We could not connect.\n\n  Check the network.\n" + "word " * 200)
    text = hub_failure("owner/name", error)
    assert text.startswith(
        "owner/name is no folder here, and the hub did not give it (OSError: We could not connect. Check"
    )
    assert "\n" not in text
    assert len(text) < 500
