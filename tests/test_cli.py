"""The sida command, run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import sida_ext
from sida_ext.cli import _on_device, main, read_texts, table_advice
from sida_ext.info import collect, show
from sida_ext.serving.token_batches import TokenBatch
from tests.support.predictors import ByToken
from tests.support.reference import build, small_config

WORDS = ["the", "film", "is", "good", "bad", "and", "not", "very", "a", "plot", "with", "no", "end"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small classifier with a tokenizer of whole words."""
    path = tmp_path_factory.mktemp("classifier")
    build(sida_ext.SwitchTransformersForSequenceClassification, small_config()).save_pretrained(path)
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def untokenized(folder, tmp_path_factory) -> Path:
    """The same classifier without its tokenizer."""
    path = tmp_path_factory.mktemp("untokenized")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, path)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    random = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(60):
        words = torch.randint(0, len(WORDS), (int(torch.randint(1, 12, (1,), generator=random)),), generator=random)
        lines.append(json.dumps({"text": " ".join(WORDS[i] for i in words)}))
    path.write_text("\n".join(lines) + "\n")
    return path


def sida(*arguments: object, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """`path`: PYTHONPATH of the command."""
    command = [sys.executable, "-m", "sida_ext.cli", *map(str, arguments)]
    environment = os.environ | ({"PYTHONPATH": path} if path is not None else {})
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_help_names_every_command():
    done = sida("--help")
    assert done.returncode == 0
    for command in ("pack", "train", "run", "plan", "info"):
        assert command in done.stdout


def test_pack_then_run(folder, texts, tmp_path):
    store, out, trace = tmp_path / "experts.sida", tmp_path / "out.jsonl", tmp_path / "trace.json"
    packed = sida("pack", folder, "-o", store, "--dtype", "float32")
    assert packed.returncode == 0, packed.stderr
    assert "16 experts in 2 MoE layers, float32" in packed.stdout
    done = sida("run", folder, texts, "--store", store, "--expert-memory", "30%", "-o", out, "--trace", trace)
    assert done.returncode == 0, done.stderr
    assert "hit rate" in done.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] for row in rows] == read_texts([texts])
    reference = sida_ext.SwitchTransformersForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for row in rows[:5]:
        with torch.no_grad():
            logits = reference(tokenizer(row["text"], return_tensors="pt").input_ids).logits[0]
        torch.testing.assert_close(torch.tensor(row["logits"]), logits, rtol=0, atol=1e-4)
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"copy", "compute"} <= {event.get("cat") for event in events}


@pytest.fixture
def sida_here(monkeypatch, capsys):
    """The command in this process, which saves the start of another: exit status, output, errors."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["sida", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, exit.value.code or 0, out, err)

    return call


def test_low_bit_copies_are_named_in_what_is_printed(folder, texts, sida_here):
    options = ("run", folder, texts, "--expert-dtype", "float32", "--expert-memory", "30%")
    done = sida_here(*options, "--on-miss", "low_bit", "--max-low-bit", "0.4")
    assert done.returncode == 0, done.stderr
    found = re.search(r"4-bit copies \(64\.0 KiB\) served (\d+) of (\d+) choices, .*, at most 40\.0%", done.stdout)
    assert found, done.stdout
    assert 0 <= int(found[1]) <= 0.4 * int(found[2])
    said = " ".join(done.stderr.split())  # its lines are as long as the console was when the package was imported
    assert "int4 copies of all 16 experts stay in memory, 64.0 KiB beside expert_memory" in said
    assert "4-bit copies" not in sida_here(*options).stdout
    refused = sida_here(*options, "--on-miss", "drop")
    assert refused.returncode == 1
    assert "on_miss is 'drop', expected one of wait, low_bit" in refused.stderr


@pytest.mark.parametrize(("dtype", "least", "most"), [("int4", 6.0, 9.5), ("mxfp4", 9.0, 13.0)])
def test_pack_says_how_far_it_moved_the_weights(folder, tmp_path, sida_here, dtype, least, most):
    done = sida_here("pack", folder, "-o", tmp_path / "experts.sida", "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    moved = re.findall(r"(\S+): weights moved by ([\d.]+) %", done.stdout)
    assert len(moved) == 2
    assert all(name.endswith(".mlp") and least < float(percent) < most for name, percent in moved)


def test_batches_by_tokens_give_the_same_answers_in_the_same_order(folder, texts, tmp_path, sida_here):
    rows = []
    for number, options in enumerate((["--batch-size", 7], ["--max-tokens", 50])):
        out = tmp_path / f"{number}.jsonl"
        done = sida_here("run", folder, texts, "--expert-dtype", "float32", "-o", out, *options)
        assert done.returncode == 0, done.stderr
        assert re.search(r"\d+ batches, [\d.]+% of their tokens padding", done.stdout)
        rows.append([json.loads(line) for line in out.read_text().splitlines()])
        assert [row["text"] for row in rows[-1]] == read_texts([texts])
    for first, second in zip(*rows, strict=True):
        torch.testing.assert_close(torch.tensor(first["logits"]), torch.tensor(second["logits"]), rtol=0, atol=1e-4)


def test_the_order_says_what_it_saved(folder, texts, sida_here, monkeypatch):
    monkeypatch.setattr("sida_ext.prediction.protocol.find_predictor", lambda name, model: ByToken(1))
    done = sida_here("run", folder, texts, "--predictor", "x", "--order", "overlap", "--expert-memory", "30%")
    assert done.returncode == 0, done.stderr
    assert re.search(r"order overlap: .* to read, .* in the given order, .*%\) saved", done.stdout)


def test_errors_of_run_are_one_line_and_close_the_runtime(folder, untokenized, texts, tmp_path, sida_here, monkeypatch):
    closed = []
    close = sida_ext.Runtime.close
    monkeypatch.setattr(sida_ext.Runtime, "close", lambda runtime: (closed.append(runtime), close(runtime)))
    for arguments, message in (
        ([untokenized, texts], "tokenizer"),
        ([folder, texts, "--predictor", "nowhere"], "neither a folder"),
        ([folder, texts, "--order", "overlap"], "order='overlap' needs a predictor"),
    ):
        closed.clear()
        done = sida_here("run", *arguments)
        assert (done.returncode, len(closed)) == (1, 1), done.stderr
        assert message in done.stderr
    for arguments, message in (
        (["--batch-size", 2, "--max-tokens", 9], "are both given"),
        (["--trace", tmp_path / "x.png"], "expected a name for JSON"),
        (["--host-memory", "1GiB"], "host_memory"),
        (["--device", "meta"], "device is 'meta', expected 'cpu', 'cuda' or 'cuda:N'"),
    ):
        done = sida_here("run", folder, texts, *arguments)
        assert done.returncode == 1
        assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_batches_go_where_the_model_computes():
    batch = TokenBatch([(0, torch.tensor([3, 4, 5])), (1, torch.tensor([6]))], 0)
    moved = _on_device(batch, torch.device("meta"))
    assert {name: tensor.device.type for name, tensor in moved.items()} == dict.fromkeys(
        ("input_ids", "attention_mask"), "meta"
    )
    assert (moved.positions, moved.lengths) == ((0, 1), (3, 1))


@pytest.mark.gpu
def test_run_on_a_gpu_gives_the_cpus_answers(folder, texts, tmp_path, sida_here):
    rows = []
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.jsonl"
        done = sida_here("run", folder, texts, "--device", device, "--expert-dtype", "float32", "-o", out)
        assert done.returncode == 0, done.stderr
        rows.append(torch.tensor([json.loads(line)["logits"] for line in out.read_text().splitlines()]))
    torch.testing.assert_close(*rows, rtol=0, atol=1e-3)


def test_train_says_when_the_token_table_is_better():
    def held_out(table: float, ours: float) -> dict:
        return {"token_table": {"mean_top3": table}, "predictor": {"mean_top3": ours}}

    assert table_advice(held_out(0.8, 0.8), Path("out")) is None
    advice = table_advice(held_out(0.532, 0.5), Path("out"))
    assert advice is not None
    assert "top-3 53.2%" in advice
    assert "--predictor out/token_table" in advice


def test_train_then_run_and_plan(folder, texts, tmp_path):
    out = tmp_path / "predictor"
    done = sida("train", folder, texts, "-o", out, "--epochs", 1, "--expert-memory", "50%")
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout
    assert json.loads((out / "report.json").read_text())["held_out"]["predictor"]["tokens"] > 0
    ran = sida("run", folder, texts, "--predictor", out, "--routing", "predicted", "--batch-size", 4)
    assert ran.returncode == 0, ran.stderr
    planned = sida("plan", folder, texts, "--predictor", out)
    assert planned.returncode == 0, planned.stderr
    for name in ("OPT", "next_use", "lru", "lfu", "fifo", "90%"):
        assert name in planned.stdout


@pytest.mark.parametrize("count", [1, 3])
def test_too_little_text_is_told_before_anything_is_trained(folder, tmp_path, sida_here, count):
    text = tmp_path / "few.txt"
    text.write_text("the film is good\n" * count)
    done = sida_here("train", folder, text, "-o", tmp_path / "predictor", "--expert-memory", "50%")
    assert done.returncode == 1
    assert re.search(r"no document (is left to train on|was set aside)", " ".join(done.stderr.split()))
    assert "give more texts" in " ".join(done.stderr.split())
    assert "share" not in done.stderr
    assert not (tmp_path / "predictor" / "report.json").exists()


def test_a_mistyped_folder_is_told_at_once(folder, texts, sida_here):
    wrong = folder.with_name(folder.name[:-1] + "x")
    for command in (["run", wrong, texts], ["serve", wrong, "--port", 0], ["plan", wrong]):
        done = sida_here(*command)
        assert done.returncode == 1
        assert f"did you mean {folder}?" in done.stderr.replace("\n", "")


def test_an_installed_predictor_of_somebody_else_is_named_on_the_command_line(folder, texts, tmp_path):
    """A package beside ours, as pip leaves it: its entry point is all that we know of it."""
    package = tmp_path / "somebody_else-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody-else\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[sida_ext.predictors]\npopular = custom_predictor:make\n")
    examples = Path(__file__).resolve().parent.parent / "examples"
    path = os.pathsep.join([str(tmp_path), str(examples), str(examples.parent)])
    given = ("run", folder, texts, "--batch-size", 4, "--routing", "predicted", "--expert-memory", "50%")
    ran = sida(*given, "--predictor", "popular", path=path)
    assert ran.returncode == 0, ran.stderr
    unknown = sida(*given, "--predictor", "unpopular", path=path)
    assert unknown.returncode == 1
    assert re.search(
        r"neither a folder with a predictor nor an entry point .*popular", unknown.stderr.replace("\n", " ")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no-such-model", "{texts}"], "is no folder"),
        (["run", "{folder}", "no-such-file.txt"], "no-such-file.txt"),
        (["run", "{folder}", "{texts}", "--expert-memory", "12"], "smallest that works"),
        (["run", "{folder}", "{texts}", "--predictor", "nowhere"], "nowhere"),
        (["run", "{folder}", "{texts}", "--routing", "wild"], "routing is 'wild'"),
        (["run", "{folder}", "{texts}", "--routing", "confident"], "routing='confident' needs a predictor"),
        (["pack", "{folder}", "-o", "{tmp}/x.sida", "--dtype", "int1"], "dtype is 'int1'"),
        (["pack", "{texts}", "-o", "{tmp}/x.sida"], "is a file, expected a checkpoint folder"),
    ],
)
def test_errors_are_one_line_and_status_1(folder, texts, tmp_path, arguments, message):
    done = sida(*(a.format(folder=folder, texts=texts, tmp=tmp_path) for a in arguments))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert message in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_info_lists_the_devices(monkeypatch):
    def facts(number):
        return SimpleNamespace(name=f"Card {number}", major=9, minor=0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(collect(measure=False)["devices"]) == ["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", facts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: ((number + 1) << 30, 8 << 30))
    devices = collect(measure=False)["devices"]
    assert list(devices) == ["cpu", "cuda:0", "cuda:1"]
    assert devices["cuda:1"] == "Card 1, compute capability 9.0, 8.00 GiB, 2.00 GiB free"


def test_texts_that_cannot_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"words": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2 is '\{\"words\": 1\}', expected a JSON object with a 'text'"):
        read_texts([tmp_path / "a.jsonl"])
    (tmp_path / "b.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl:1: 'text' is int"):
        read_texts([tmp_path / "b.jsonl"])
    (tmp_path / "c.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="no text in"):
        read_texts([tmp_path / "c.txt"])
    (tmp_path / "d.txt").write_text("one\n\n two \n")
    assert read_texts([tmp_path / "d.txt"]) == ["one", "two"]


def test_names_in_brackets_are_printed_as_they_are(capsys, tmp_path):
    """rich reads [bold] as a command, and a text in brackets as one that it does not know."""
    show({"versions [a]": {"path [/b]": "[red]folder[/]"}})
    printed = capsys.readouterr().out
    for text in ("versions [a]", "path [/b]", "[red]folder[/]"):
        assert text in printed
    cli = sida("pack", tmp_path / "[bold]nothing[/bold]", "-o", tmp_path / "x")
    assert cli.returncode == 1
    assert "[bold]nothing[/bold]" in cli.stderr.replace("\n", "")


def test_messages_of_the_package_are_lines_of_the_command(folder, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("SIDA_CACHE", str(tmp_path / "cache"))  # where nothing is packed yet
    done = sida("run", folder, texts, "--expert-memory", "50%", "-o", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "packing" in done.stderr
    assert "as bfloat16 into" in done.stderr.replace("\n", " ")


def test_help_loads_neither_torch_nor_transformers():
    """What takes seconds to import is imported by the commands that need it."""
    for arguments in (["--help"], ["run", "--help"], ["nonsense"]):
        done = subprocess.run(
            [sys.executable, "-m", "sida_ext.cli", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
            timeout=60,
        )
        loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
        assert "typer" in loaded
        assert not loaded & {"torch", "transformers", "matplotlib", "numpy", "sida_ext._C"}
