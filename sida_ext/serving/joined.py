"""One step of many rows through a transformers model, each row with the bits that it has alone.

The new tokens run through the model as one batch of one token each, so that embeddings, norms, dense matrices and,
above all, the experts are shared. What would mix rows of different lengths, attention, is computed over each row's own
keys and values by the very function that the model uses alone; a matrix product whose kernel depends on the number of
rows is computed row by row (:mod:`sida_ext.serving.row_exact`). Outside of such a step the model is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import MoEModelOutput

from sida_ext.prediction.cache_names import cache_argument, cache_of
from sida_ext.serving.attention import SwitchedAttention
from sida_ext.serving.packed import PackedEncoder
from sida_ext.serving.row_exact import RowExact, attention_joins
from sida_ext.serving.rows import KvPool, Part, Place
from sida_ext.serving.shared import attend_shared, is_long

__all__ = ["JoinedModel", "Row", "joins"]


@dataclass(eq=False)
class Row:
    """A generation's place in the pools; ``cross`` for an encoder-decoder."""

    own: Place
    cross: Place | None = None


Started = tuple[Tensor, Row]  # the last logits of a prompt, and the place of its row


def joins(model: nn.Module) -> str | None:
    """None if rows of this model can be joined, else why not."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"its layers are {', '.join(sorted(kinds))}; only full attention can be joined"
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        return f"its attention looks back {text.sliding_window} tokens; only full attention can be joined"
    if any(getattr(module, "is_causal", None) is None for module in _attentions(model)) or not _attentions(model):
        return "its attention does not go through transformers' attention interface"
    return None


def _attentions(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")
    ]


class JoinedModel:
    """Runs rows of one model together; used by one thread.

    Args:
        model: a causal language model or an encoder-decoder for which :func:`joins` is None.
        shared: its rows share every call (:mod:`sida_ext.serving.shared`).
    """

    def __init__(self, model: Any, shared: bool = False) -> None:
        self.model = model
        self.shared = shared
        self.seq2seq = bool(model.config.is_encoder_decoder)
        self._cache_argument = cache_argument(model)
        self._own: KvPool | None = None
        self._cross: KvPool | None = None
        self.attention = SwitchedAttention(model)
        self.implementation = self.attention.implementation
        packs = shared and self.seq2seq and PackedEncoder.fits(model.get_encoder())
        self.packed = PackedEncoder(model.get_encoder(), self.attention) if packs else None
        self._bias: dict[int, Tensor] = {}  # length -> position bias of its last token, for Switch and T5
        self.split_products = 0

    @property
    def cache_bytes(self) -> int:
        """Memory of the rows' keys and values."""
        return sum(pool.bytes for pool in (self._own, self._cross) if pool is not None)

    def take(self, cache: Cache, spare: int) -> Row:
        """Keep the cache of a prompt that the model computed alone; ``spare``: tokens that may yet come."""
        if isinstance(cache, EncoderDecoderCache):
            own, cross = _states(cache.self_attention_cache), _states(cache.cross_attention_cache)
            self._own = self._own or KvPool(len(own))
            self._cross = self._cross or KvPool(len(cross))
            return Row(self._own.put(own, spare), self._cross.put(cross, 0))
        states = _states(cache)
        self._own = self._own or KvPool(len(states))
        return Row(self._own.put(states, spare))

    @property
    def starts_together(self) -> bool:
        """Whether several prompts can be computed together: causal attention needs no mask of its own, texts of an
        encoder are packed."""
        if self.seq2seq:
            return self.packed is not None
        return self.shared or self.implementation == "sdpa"

    def _products(self, lengths: Sequence[int], left: bool = False) -> AbstractContextManager[RowExact | None]:
        """What keeps the bits of matrix products in a step; nothing where the model's own kernels do."""
        return nullcontext() if self.shared else RowExact(lengths, left)

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], spare: Sequence[int]) -> list[Started]:
        """Compute prompts of similar length together, padded on the left; the last logits and the place of each."""
        lengths = list(map(len, prompts))
        longest = max(lengths)
        given = torch.zeros(len(prompts), longest, dtype=torch.long)
        positions = torch.zeros_like(given)
        for row, prompt in enumerate(prompts):
            given[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            positions[row, longest - len(prompt) :] = torch.arange(len(prompt))
        attended = 0
        spans = torch.tensor([(row, longest - length, longest, 0) for row, length in enumerate(lengths)])

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
        ) -> tuple[Tensor, None]:
            nonlocal attended
            attended += 1
            if self.shared and not is_long(longest, longest):
                return attend_shared(module, query, key, value, spans, longest > 1, options), None
            alone = self.attention.alone(module)
            output = query.new_zeros(query.shape[0], longest, query.shape[1], value.shape[3])
            for row, length in enumerate(lengths):
                own = (slice(row, row + 1), slice(None), slice(longest - length, None))
                found = alone(module, query[own].clone(), key[own].clone(), value[own].clone(), None, **options)[0]
                output[row, longest - length :] = found[0]
            return output, None

        with self.attention.switched(attend), self._products(lengths, left=True) as exact:
            output = self.model(input_ids=given, position_ids=positions, use_cache=True, logits_to_keep=1)
        states = _states(cache_of(output))
        _check_attended(attended, len(states))
        self.split_products += exact.split if exact is not None else 0
        self._own = self._own or KvPool(len(states))
        found = []
        for row, length in enumerate(lengths):
            own = [
                (keys[row : row + 1, :, longest - length :], values[row : row + 1, :, longest - length :])
                for keys, values in states
            ]
            found.append((output.logits[row, -1].clone(), Row(self._own.put(own, spare[row]))))
        return found

    @torch.no_grad()
    def start_encoded(self, prompts: Sequence[Sequence[int]], spare: Sequence[int], first: int) -> list[Started]:
        """The same for an encoder-decoder with a packed encoder, whose prompts may be of any lengths: encode them, and
        compute the decoder's ``first`` token."""
        assert self.packed is not None
        lengths = list(map(len, prompts))
        hidden, packing = self.packed.hidden(prompts)
        encoded = torch.tensor([(row, 0, length, 0) for row, length in enumerate(lengths)])
        written = torch.tensor([(row, 0, 1, 0) for row in range(len(lengths))])

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
        ) -> tuple[Tensor, None]:
            bias = options.pop("position_bias", None)
            spans = written if key.shape[2] == 1 else encoded
            return attend_shared(module, query, key, value, spans, False, options, bias), None

        with self.attention.switched(attend):
            output = self.model(
                encoder_outputs=MoEModelOutput(last_hidden_state=packing.rows(hidden)),
                decoder_input_ids=torch.full((len(prompts), 1), first),
                use_cache=True,
            )
        cache = cache_of(output)
        own, cross = _states(cache.self_attention_cache), _states(cache.cross_attention_cache)
        self._own = self._own or KvPool(len(own))
        self._cross = self._cross or KvPool(len(cross))
        found = []
        for row, length in enumerate(lengths):
            kept = [(keys[row : row + 1], values[row : row + 1]) for keys, values in own]
            seen = [(keys[row : row + 1, :, :length], values[row : row + 1, :, :length]) for keys, values in cross]
            found.append(
                (output.logits[row, -1].clone(), Row(self._own.put(kept, spare[row]), self._cross.put(seen, 0)))
            )
        return found

    def drop(self, row: Row) -> None:
        """The row is over."""
        assert self._own is not None
        self._own.release(row.own)
        if row.cross is not None:
            assert self._cross is not None
            self._cross.release(row.cross)

    @torch.no_grad()
    def step(self, rows: Sequence[Row], tokens: Sequence[int]) -> Tensor:
        """The logits [B, vocabulary] after each row's next token. A step that raises has changed no row."""
        assert self._own is not None
        for row in rows:
            self._own.make_room(row.own)
        step = _Step(self, rows)
        given, cached = torch.tensor(tokens)[:, None], {self._cache_argument: step.cache}
        with self.attention.switched(step.attend), self._products([1] * len(rows)) as exact:
            if self.seq2seq:
                # Only its presence tells the decoder that there is an encoder: keys and values are in the pool.
                encoded = torch.zeros(len(rows), 1, self.model.config.d_model, dtype=self.model.dtype)
                output = self.model(
                    decoder_input_ids=given,
                    encoder_outputs=MoEModelOutput(last_hidden_state=encoded),
                    use_cache=True,
                    **cached,
                )
            else:
                positions = torch.tensor([row.own.length for row in rows])[:, None]
                output = self.model(input_ids=given, position_ids=positions, use_cache=True, **cached)
        _check_attended(step.attended, self._own.layers)
        self.split_products += exact.split if exact is not None else 0
        for row in rows:
            row.own.length += 1
        return output.logits[:, -1]

    def position_bias(self, module: Any, length: int) -> Tensor:
        """[1, heads, 1, length]: the learned bias of the last of ``length`` tokens."""
        if length not in self._bias:
            if len(self._bias) >= 4096:
                self._bias.clear()
            self._bias[length] = module.compute_bias(1, length, past_seen_tokens=length - 1)
        return self._bias[length]


def _check_attended(attended: int, layers: int) -> None:
    if attended != layers:
        raise RuntimeError(
            f"{attended} of {layers} attention layers came through transformers' interface; serve this model with "
            "--rows 1"
        )


def _states(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    for layer in cache.layers:
        if type(layer) is not DynamicLayer:
            raise RuntimeError(f"a cache layer is {type(layer).__name__}, expected DynamicLayer; serve with --rows 1")
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def _spans(part: Part, new: int, columns: int) -> Tensor:
    """All keys of the rows of a slab, ``new`` tokens among them; the last key's bias is in the last of the columns."""
    ends = part.lengths + new
    first = (columns - ends).clamp(min=0)
    return torch.stack([part.slots, torch.zeros_like(ends), ends, first], dim=1)


class _OwnCache(DynamicCache):
    """Stands for the rows' caches in a step: hands new keys and values on to the pool."""

    def __init__(self, step: _Step) -> None:
        super().__init__()
        self.step = step

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.step.append(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.step.longest


class _Stub:
    """Keys and values of a cross attention's layer: only their shape is looked at."""

    def __init__(self, like: Tensor) -> None:
        self.keys = self.values = like


class _Step:
    def __init__(self, joined: JoinedModel, rows: Sequence[Row]) -> None:
        self.joined = joined
        self.count = len(rows)
        self.longest = max(row.own.length for row in rows)
        self.appended = -1  # the layer whose own attention comes next
        self.attended = 0
        self.rows = rows
        self.own: list[Part] = []
        self.cross: list[Part] = []
        self.own_spans: list[Tensor] = []  # of each part; see sida_ext.ops.attention
        self.cross_spans: list[Tensor] = []
        self.learned: Any = None  # the module that computes the position bias
        own = _OwnCache(self)
        self.cache: Any = own
        if joined.seq2seq:
            cross = DynamicCache()
            layers = joined._cross.layers if joined._cross is not None else 0
            cross.layers = [_Stub(torch.zeros(1, 1, 1, 1)) for _ in range(layers)]  # type: ignore[misc]
            self.cache = EncoderDecoderCache(own, DynamicCache())
            self.cache.cross_attention_cache = cross
            self.cache.is_updated = dict.fromkeys(range(layers), True)

    def _plan(self) -> None:
        joined = self.joined
        assert joined._own is not None
        self.own = joined._own.parts([row.own for row in self.rows])
        if joined._cross is not None:
            self.cross = joined._cross.parts([row.cross for row in self.rows if row.cross is not None])

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        if not self.own:
            self._plan()
        assert self.joined._own is not None
        for part in self.own:
            self.joined._own.append(part, layer, keys, values, len(self.own) == 1)
        self.appended = layer

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, None]:
        own = self.appended == module.layer_idx
        self.appended = -1
        pool = self.joined._own if own else self.joined._cross
        parts = self.own if own else self.cross
        if pool is None or not parts:
            raise RuntimeError(f"{type(module).__name__}: attention without keys in a joined step")
        self.attended += own
        bias = options.pop("position_bias", None)
        if bias is not None and getattr(module, "has_relative_attention_bias", False) and own:
            self.learned = module
        if self.joined.shared:
            return self._attend_shared(module, query, pool, own, bias is not None and own, options), None
        alone = self.joined.attention.alone(module)
        if not parts[0].groups:
            together = self.count > 1 and self._together(module, alone, query, pool, bias is not None, options)
            for part in parts:
                part.group(together)
        whole = len(parts) == 1 and len(parts[0].groups) == 1
        output: Tensor | None = None
        for part in parts:
            for group in part.groups:
                length = group.length + 1 if own else group.length
                keys, values = pool.read(part, group, module.layer_idx, length)
                if bias is not None:
                    options["position_bias"] = self._bias(own, length, bias, query)
                index = None if whole and group.rows == list(range(self.count)) else torch.tensor(group.rows)
                chosen = query if index is None else query[index]
                found, _ = alone(module, chosen, keys, values, None, **options)
                if index is None:
                    return found, None
                if output is None:
                    output = found.new_empty((self.count, *found.shape[1:]))
                output[index] = found
        assert output is not None
        return output, None

    def _attend_shared(
        self, module: Any, query: Tensor, pool: KvPool, own: bool, biased: bool, options: dict[str, Any]
    ) -> Tensor:
        """One call for the rows of each slab. A row's bias is the end of that of the longest."""
        bias = self.joined.position_bias(self.learned, self.longest + 1) if biased else None
        if own and not self.own_spans:
            self.own_spans = [_spans(part, 1, self.longest + 1 if biased else 0) for part in self.own]
        if not own and not self.cross_spans:
            self.cross_spans = [_spans(part, 0, 0) for part in self.cross]
        parts, spans = (self.own, self.own_spans) if own else (self.cross, self.cross_spans)
        if len(parts) == 1:
            keys, values = pool.slab(parts[0], module.layer_idx)
            return attend_shared(module, query, keys, values, spans[0], False, options, bias)
        output: Tensor | None = None
        for part, places in zip(parts, spans, strict=True):
            keys, values = pool.slab(part, module.layer_idx)
            found = attend_shared(module, query[part.rows], keys, values, places, False, options, bias)
            if output is None:
                output = found.new_empty((self.count, *found.shape[1:]))
            output[part.rows] = found
        assert output is not None
        return output

    def _together(
        self, module: Any, alone: Callable[..., Any], query: Tensor, pool: KvPool, biased: bool, options: dict[str, Any]
    ) -> bool:
        heads, dim = query.shape[1], query.shape[3]
        kv_heads, value_dim = pool.shapes(module.layer_idx)

        def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
            given = {**options, "position_bias": bias} if biased else options
            return alone(module, query, keys, values, None, **given)[0]

        key = (self.joined.implementation, type(module), query.dtype, heads, kv_heads, dim, value_dim, biased)
        return attention_joins(key, attend, query.dtype, (heads, kv_heads, dim, value_dim))

    def _bias(self, own: bool, length: int, given: Tensor, query: Tensor) -> Tensor:
        if own and self.learned is not None:
            return self.joined.position_bias(self.learned, length)
        return torch.zeros((1, query.shape[1], 1, length), dtype=query.dtype)
