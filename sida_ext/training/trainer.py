"""The training loop: steps over traced sentences, early stopping, and a checkpoint from which it goes on exactly."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sida_ext.files import written_whole
from sida_ext.prediction.calibration import fit_temperature
from sida_ext.prediction.network_predictor import NetworkPredictor
from sida_ext.progress import Bar, log, progress_bar
from sida_ext.training.objective import TrainingOptions, predictor_loss
from sida_ext.training.split import SplitPart
from sida_ext.training.traces import Trace

# The first steps of a run are slower than those to come; so many of them are left out of what is said of its length.
WARM_STEPS, TIMED_STEPS = 2, 8
# How long a run goes without leaving a predictor that can be served with.
EARLY_SECONDS = 120.0


def _clock(seconds: float) -> str:
    """``14:05 (in 23 min)``."""
    end = time.localtime(time.time() + seconds)
    day = "" if end.tm_yday == time.localtime().tm_yday else time.strftime("%d %b, ", end)
    left = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return f"{day}{time.strftime('%H:%M', end)} (in {left if seconds < 5400 else f'{seconds / 3600:.1f} h'})"


_FEW = "give more texts: some are trained on, others judge, and a document (a line of a text file) is one or the other"


class Trainer:
    """Trains a predictor in place.

    Args:
        predictor: freshly initialised; overwritten by the checkpoint if there is one.
        train, validation: what is learned from, and what decides when to stop.
        options: see TrainingOptions.
        checkpoint: path of the checkpoint file, without ending.
        save_every: seconds between checkpoints.
        early: folder of the best predictor so far, written after each pass, and before the first one is done every two
            minutes; None: nothing is written.

    Raises:
        ValueError: an empty part, or a checkpoint of other options.
    """

    def __init__(
        self,
        predictor: NetworkPredictor,
        train: SplitPart,
        validation: SplitPart,
        options: TrainingOptions,
        checkpoint: str | os.PathLike[str],
        save_every: float = 30.0,
        early: str | os.PathLike[str] | None = None,
    ) -> None:
        self.predictor, self.train, self.validation, self.options = predictor, train, validation, options
        self.file = Path(checkpoint).with_suffix(".safetensors")
        self.save_every, self.early = save_every, early
        self.rows = [train.shard(number).rows for number in range(len(train))]
        if not any(self.rows):
            raise ValueError(f"no document is left to train on; {_FEW}")
        if not any(True for _ in validation()):
            raise ValueError(
                f"no document was set aside to tell when to stop (each is, with a chance of {options.validation:.0%}); "
                f"{_FEW}"
            )
        self.steps_per_epoch = sum(math.ceil(rows / options.batch_sentences) for rows in self.rows)
        decayed = [p for p in predictor.parameters() if p.dim() > 1]
        others = [p for p in predictor.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=options.learning_rate,
        )
        self.epoch, self.step, self.seconds = 0, 0, 0.0  # step: within the epoch
        self.history: list[dict[str, float]] = []
        self.running_loss = 0.0
        self.best: dict[str, Tensor] = {}
        self._interrupted = False
        self._times: list[float] = []  # when each of the first steps of this process ended
        self._warmup = options.warmup
        if self.file.is_file():
            self._load()

    def run(self, progress: bool = True) -> list[dict[str, float]]:
        """Train until done. Ctrl-C lets the running step end, writes a checkpoint and raises KeyboardInterrupt.

        Returns:
            One entry for each epoch: train_loss, validation_loss, seconds.
        """
        with (
            self._deferred_interrupt(),
            progress_bar("training", self._steps, done=self._number, shown=progress) as bar,
        ):
            while (why := self._ended()) is None:
                self._run_epoch(bar)
                self._stop_if_interrupted()
            bar.finish()
        log.info("training: ended with pass %d of at most %d: %s", self.epoch, self.options.epochs, why)
        return self.history

    @property
    def _steps(self) -> int:
        """Of the whole run, if neither time nor patience ends it."""
        return self.options.epochs * self.steps_per_epoch

    @property
    def _number(self) -> int:
        """Of the step that comes next, over all epochs."""
        return self.epoch * self.steps_per_epoch + self.step

    def plan(self, seconds: float) -> str:
        """What the run will take, where a step takes so many seconds: one sentence, for people."""
        left = self._steps - self._number
        said = f"{self.steps_per_epoch} steps in a pass, at most {self.options.epochs} passes; {seconds:.2f} s a step"
        whole = left * seconds
        limit = None if self.options.seconds is None else max(self.options.seconds - self.seconds, 0.0)
        if limit is not None and limit < whole:
            fit = self._number + int(limit / seconds)
            return (
                f"{said}: {fit} of {self._steps} steps fit in the time given, and the learning rate falls to its end "
                f"in that time; the end is at {_clock(limit)}"
            )
        return f"{said}: the end is at {_clock(whole)}, or earlier when held-out text no longer improves"

    def finish(self) -> NetworkPredictor:
        """The predictor with its best weights, rounded for storage, calibrated on the validation part, in eval mode."""
        self.predictor.load_state_dict(self.best)
        self.predictor.round_weights()
        self.predictor.eval().requires_grad_(False)
        logits, labels = [], []
        for student, trace in self._validate():
            logits.append(student)
            labels.append(trace.top1)
        self.predictor.temperature.copy_(fit_temperature(torch.cat(logits), torch.cat(labels)))
        return self.predictor

    @contextlib.contextmanager
    def _deferred_interrupt(self) -> Iterator[None]:
        """Turn Ctrl-C into a flag that is read between steps: a step that was cut in half could not be resumed."""
        self._interrupted = False
        if threading.current_thread() is not threading.main_thread():
            yield  # Only the main thread receives signals.
            return

        def note(*_: Any) -> None:
            self._interrupted = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _stop_if_interrupted(self) -> None:
        if self._interrupted:
            self._save()
            raise KeyboardInterrupt(
                f"training stopped at step {self.step} of epoch {self.epoch + 1}; run it again to go on"
            )

    def _ended(self) -> str | None:
        """Why the run is over; None while it is not."""
        if self.step != 0:
            return None
        if self.epoch >= self.options.epochs:
            return "all passes are done"
        if self.options.seconds is not None and self.seconds >= self.options.seconds:
            return f"the time given, {self.options.seconds:.0f} s, is over"
        losses = [entry["validation_loss"] for entry in self.history]
        if losses and len(losses) - 1 - losses.index(min(losses)) >= self.options.patience:
            return f"held-out text has not improved for {self.options.patience} passes"
        return None

    def _run_epoch(self, bar: Bar) -> None:
        self.predictor.train()
        saved = last = kept = time.perf_counter()
        for trace in self._batches():
            loss = self._learn(trace)
            self.running_loss += loss
            self.step += 1
            now = time.perf_counter()
            self.seconds, last = self.seconds + now - last, now
            self._say_plan(now)
            bar.advance(note=f"pass {self.epoch + 1}, loss {loss:.4f}")
            self._stop_if_interrupted()
            if not self.best and now - kept > EARLY_SECONDS:
                self._write_early()
                kept = time.perf_counter()
            if now - saved > self.save_every:
                self._save()
                saved = time.perf_counter()
            if self.options.seconds is not None and self.seconds >= self.options.seconds:
                break
        self.predictor.eval()
        total, count = 0.0, 0
        for student, trace in self._validate():
            total += float(predictor_loss(student, trace, self.options)) * student.shape[0]
            count += student.shape[0]
        self.seconds += time.perf_counter() - last
        entry = {
            "train_loss": self.running_loss / self.step,
            "validation_loss": total / count,
            "seconds": self.seconds,
        }
        if all(entry["validation_loss"] < before["validation_loss"] for before in self.history):
            self.best = {name: t.detach().clone() for name, t in self.predictor.state_dict().items()}
            self._write_early()
        self.history.append(entry)
        self.epoch, self.step, self.running_loss = self.epoch + 1, 0, 0.0
        self._save()

    def _say_plan(self, now: float) -> None:
        """Time the first steps of this process, and say once what they mean for the run."""
        self._times.append(now)
        if len(self._times) == WARM_STEPS + TIMED_STEPS + 1:
            step = (self._times[-1] - self._times[WARM_STEPS]) / TIMED_STEPS
            log.info("training: %s", self.plan(step))
            if self.options.seconds is not None:
                # A run of few steps must not spend them all on warming up.
                steps = self._number + int(self.options.seconds / step)
                self._warmup = min(self.options.warmup, max(1, steps // 10))

    def _write_early(self) -> None:
        """Leave the predictor as it is now where it can be served from, its weights not yet rounded nor calibrated."""
        if self.early is not None:
            self.predictor.save_pretrained(self.early)
            log.info("training: the best predictor so far is in %s", os.fspath(self.early))

    def _batches(self) -> Iterator[Trace]:
        """This epoch's batches from the current step on; their order depends on seed and epoch alone."""
        start, passed = self.step, 0
        for number in torch.randperm(len(self.rows), generator=self._generator(0)).tolist():
            first = max(start - passed, 0)
            passed += math.ceil(self.rows[number] / self.options.batch_sentences)
            if start >= passed or not self.rows[number]:
                continue
            shard = self.train.shard(number)
            for rows in self._grouped(shard.length, self._generator(1 + number))[first:]:
                yield shard.select(rows)

    def _generator(self, number: int) -> torch.Generator:
        """One for each shard, so that skipping a shard changes nothing in the next."""
        digest = hashlib.sha256(f"{self.options.seed}:{self.epoch}:{number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def _grouped(self, length: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Batches of rows of similar length, so that little is padding: sorted within pools of 16 batches."""
        size = self.options.batch_sentences
        batches: list[Tensor] = []
        for pool in torch.randperm(length.numel(), generator=generator).split(16 * size):
            batches += pool[length[pool].argsort(stable=True)].split(size)
        return [batches[n] for n in torch.randperm(len(batches), generator=generator).tolist()]

    def _learn(self, trace: Trace) -> float:
        number = self._number
        warm = min(1.0, (number + 1) / max(self._warmup, 1))
        done = number / self._steps
        if self.options.seconds is not None:
            done = max(done, self.seconds / self.options.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = (
                self.options.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1))))
            )
        loss = predictor_loss(trace.logits_of(self.predictor), trace, self.options)
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"the loss is {float(loss.detach())} at step {number}; a lower learning_rate may help")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.predictor.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def _validate(self) -> Iterator[tuple[Tensor, Trace]]:
        for shard in self.validation():
            for rows in torch.arange(shard.rows).split(self.options.batch_sentences):
                trace = shard.select(rows)
                yield trace.logits_of(self.predictor), trace

    def _save(self) -> None:
        tensors = {f"current.{name}": t for name, t in self.predictor.state_dict().items()}
        tensors |= {f"best.{name}": t for name, t in self.best.items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": t for name, t in state.items()}
        state = {
            "options": asdict(self.options),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "running_loss": self.running_loss,
            "history": self.history,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.file, sync=True) as partial:
            save_file(
                {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial, {"state": json.dumps(state)}
            )

    def _load(self) -> None:
        with safe_open(self.file, "pt") as opened:
            state = json.loads((opened.metadata() or {})["state"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if state["options"] != json.loads(json.dumps(asdict(self.options))):
            raise ValueError(
                f"{self.file} was written by a run with other options ({state['options']}); finish that run, or start "
                "again without resuming"
            )
        parts: dict[str, dict[str, Tensor]] = {"current": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = tensor
        self.predictor.load_state_dict(parts["current"])
        self.best = parts["best"]
        optimizer = self.optimizer.state_dict()
        for name, tensor in parts["optimizer"].items():
            number, field = name.split(".", 1)
            optimizer["state"].setdefault(int(number), {})[field] = tensor
        self.optimizer.load_state_dict(optimizer)
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.running_loss, self.history = state["running_loss"], state["history"]
