"""Checkpoint headers: a folder's, a hub's by ranges, and what is said of damaged ones."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sida_ext.planning.headers import TensorHeader, read_headers
from tests.support.hub import serve_hub

CONFIG = {"model_type": "qwen3_moe", "num_experts": 2}


def write(folder: Path, **tensors: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors or {"a": np.zeros((3, 4), np.float32)}, folder / "model.safetensors")
    return folder


def raw(path: Path, header: bytes, data: int = 0, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(data))


def test_a_folder_of_one_file(tmp_path):
    found = read_headers(write(tmp_path, a=np.zeros((3, 4), np.float32), b=np.zeros(5, np.int8)))
    assert found.tensors == {"a": TensorHeader("F32", (3, 4), 48), "b": TensorHeader("I8", (5,), 5)}
    assert (found.config, found.folder, found.bytes) == (CONFIG, tmp_path, 53)


def test_a_folder_of_shards(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    save_file({"b": np.zeros(2, np.float16)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(read_headers(tmp_path).tensors) == {"a", "b"}
    index["weight_map"]["c"] = "two.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"c is in two\.safetensors, whose header does not name it"):
        read_headers(tmp_path)
    index["weight_map"]["c"] = "three.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"names three\.safetensors, which is not there"):
        read_headers(tmp_path)


ENTRY = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}


@pytest.mark.parametrize(
    ("header", "data", "length", "says"),
    [
        (json.dumps({"a": ENTRY}).encode(), 48, 500, "the header is cut off: it has 500 bytes"),
        (json.dumps({"a": ENTRY}).encode(), 48, 10**12, "header has 1000000000000 bytes, expected at most"),
        (json.dumps({"a": ENTRY}).encode(), 40, None, r"bytes, but its header tells of \d+; copy or download"),
        (b"{not json", 0, None, "the header is not JSON"),
        (b"[1]", 0, None, "the header holds a list"),
        (json.dumps({"a": ENTRY | {"dtype": "F7"}}).encode(), 48, None, "a has dtype 'F7', expected one of"),
        (json.dumps({"a": ENTRY | {"shape": [3, -4]}}).encode(), 48, None, r"a has shape \[3, -4\]"),
        (json.dumps({"a": ENTRY | {"shape": [3, 5]}}).encode(), 48, None, r"a has 48 bytes \(0 to 48\), but .* 60"),
        (json.dumps({"a": ENTRY | {"data_offsets": [0]}}).encode(), 48, None, r"a has data_offsets \[0\]"),
        (json.dumps({"a": 3}).encode(), 0, None, "the entry of a is 3"),
    ],
)
def test_damaged_headers_are_named(tmp_path, header, data, length, says):
    write(tmp_path)
    raw(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(ValueError, match=says) as error:
        read_headers(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)


def test_a_file_without_a_header(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="has 3 bytes, expected a safetensors file"):
        read_headers(tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_headers(tmp_path)
    (tmp_path / "config.json").write_text("{")
    write(tmp_path / "b")
    (tmp_path / "b/config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_headers(tmp_path / "b")
    (tmp_path / "model.bin").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"it holds model\.bin, which is another format"):
        read_headers(tmp_path)
    with pytest.raises(FileNotFoundError, match="is a file, expected a checkpoint folder"):
        read_headers(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_headers(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="does not exist, expected a checkpoint folder or a hub id"):
        read_headers("two/many/parts")


def test_an_unreachable_hub_is_named_at_once(tmp_path):
    # The suite runs with HF_HUB_OFFLINE=1: huggingface_hub refuses before it opens a socket.
    with pytest.raises(ConnectionError, match=r"org/model is no folder here, and the hub could not be asked"):
        read_headers("org/model")


def from_hub(url: str, home: Path, *call: str) -> subprocess.CompletedProcess[str]:
    """Reads headers of ``org/model`` in a process of its own: huggingface_hub reads the endpoint at import."""
    program = (
        "import sys; from sida_ext.planning.headers import read_headers\n"
        "h = read_headers('org/model'); print(len(h.tensors), h.bytes, h.folder, h.config['model_type'])"
    )
    environment = os.environ | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def shards(tmp_path) -> Path:
    """32 MiB in two files, written as holes."""
    folder = write(tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(2):
        header = json.dumps(
            {f"t{number}": {"dtype": "F32", "shape": [4 << 20], "data_offsets": [0, 16 << 20]}}
        ).encode()
        raw(folder / f"model-{number}.safetensors", header)
        os.truncate(folder / f"model-{number}.safetensors", 8 + len(header) + (16 << 20))
        weight_map[f"t{number}"] = f"model-{number}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_a_hub_sends_headers_alone(shards, tmp_path):
    with serve_hub(shards) as hub:
        run = from_hub(hub.url, tmp_path / "home")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["2", str(32 << 20), "None", "qwen3_moe"]
    assert run.stderr == ""
    assert 0 < hub.sent <= (32 << 20) / 100
    whole = [
        name for method, name, part in hub.requests if method == "GET" and name.endswith(".safetensors") and not part
    ]
    assert whole == []


def test_a_hub_with_a_truncated_header(shards, tmp_path):
    (shards / "model-1.safetensors").write_bytes(struct.pack("<Q", 300) + b'{"t1": ')
    with serve_hub(shards) as hub:
        run = from_hub(hub.url, tmp_path / "home")
    assert "ValueError: org/model on the hub: a header is damaged" in run.stderr


def test_a_hub_without_the_model(tmp_path):
    with serve_hub(tmp_path) as hub:
        run = from_hub(hub.url, tmp_path / "home")
    assert "FileNotFoundError: org/model on the hub has no config.json" in run.stderr


def test_a_hub_that_does_not_answer(tmp_path):
    run = from_hub("http://127.0.0.1:9", tmp_path / "home")
    assert "ConnectionError: org/model is no folder here, and the hub could not be asked" in run.stderr
    assert "HF_ENDPOINT" in run.stderr
