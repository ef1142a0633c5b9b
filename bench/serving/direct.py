"""Direct calls of a served model, and transformers' own batches, timed in a process of their own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

__all__ = ["NEW_TOKENS", "Direct"]

NEW_TOKENS = 32
MOST_SECONDS = 900.0


class Direct:
    """A process with the model, as the server has it and as it was loaded.

    Args:
        folder: of the model.
        shared: as ``sida serve --shared``. The library's batch is that of a model as it was loaded.
    """

    def __init__(self, folder: str, shared: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs, folder, shared), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Direct:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pipe.close()
        self._process.join(30)

    def ask(self, name: str, texts: Sequence[str]) -> Any:
        """What the function of that name in this module says of the texts.

        Raises:
            RuntimeError: no answer came in time, or the process has failed.
        """
        try:
            self._pipe.send((name, list(texts)))
            if self._pipe.poll(MOST_SECONDS):
                return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"{name}: the process of direct calls has ended") from error
        raise RuntimeError(f"{name}: no answer within {MOST_SECONDS:g} s")


def _answer(pipe: Connection, folder: str, shared: bool) -> None:
    from transformers import AutoTokenizer

    import sida_ext
    from sida_ext.serving.model import ServedModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = sida_ext.from_pretrained(folder, expert_memory="auto")
    untouched = sida_ext.from_pretrained(folder, expert_memory="auto") if shared else model
    for each in (model, untouched):
        if each.can_generate():
            each.generation_config.eos_token_id = None  # every row writes as many tokens
    served = ServedModel(model, tokenizer, "bench", shared=shared)
    functions: dict[str, Callable[..., Any]] = {
        "classify": lambda texts: classify(served, tokenizer, texts),
        "generate": lambda texts: generate(served, tokenizer, texts),
        "library_classify": lambda texts: library_classify(untouched, tokenizer, texts),
        "library_generate": lambda texts: library_generate(untouched, tokenizer, texts),
    }
    while True:
        try:
            name, texts = pipe.recv()
        except EOFError:
            return
        pipe.send(functions[name](texts))


def classify(served: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[list[float], float]:
    """Seconds of each text by itself, and of processors in all."""
    rows = [tokenizer(text)["input_ids"] for text in texts]
    found, cpu = [], time.process_time()
    for row in rows:
        begin = time.perf_counter()
        served.classify([row])
        found.append(time.perf_counter() - begin)
    return found, time.process_time() - cpu


def generate(served: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[list[float], float]:
    """Seconds of each greedy answer without server, the prompt and every step; and of processors in all."""
    rows = [tokenizer(text)["input_ids"] for text in texts]
    found, cpu = [], time.process_time()
    for ids in rows:
        begin = time.perf_counter()
        logits, row = served.start(ids, NEW_TOKENS)
        token = int(logits.argmax())
        for _ in range(NEW_TOKENS - 1):
            token = int(served.step([row], [token])[0].argmax())
        served.drop(row)
        found.append(time.perf_counter() - begin)
    return found, time.process_time() - cpu


def library_classify(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Seconds of transformers' own batches of 16."""
    import torch

    begin = time.perf_counter()
    for start in range(0, len(texts), 16):
        batch = tokenizer(texts[start : start + 16], return_tensors="pt", padding=True)
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return time.perf_counter() - begin


def library_generate(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Seconds of ``generate`` for batches of 16."""
    begin = time.perf_counter()
    for start in range(0, len(texts), 16):
        batch = tokenizer(texts[start : start + 16], return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    return time.perf_counter() - begin
