"""ik_llama.cpp on the shapes of a checkpoint: what people would run instead on a CPU.

In an environment of its own, which needs no torch:

    python -m venv PEER && PEER/bin/pip install ik-llama-cpp-python==0.1.5 gguf numpy
    PEER/bin/python -m bench.causal.peer write CHECKPOINT/config.json FILE.gguf --kind Q4_0
    PEER/bin/python -m bench.causal.peer run FILE.gguf --prompt 128 --steps 64

The weights in the file are random blocks, not the checkpoint's: times are to be compared, not texts.
``bench.causal.decode --ways ours peer`` runs it beside sida_ext.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {"Q4_0": 18, "Q8_0": 34}  # bytes of a block of 32 weights: a float16 factor, then the weights
SPREAD = {"Q4_0": 4.6, "Q8_0": 74.0}  # standard deviation of uniformly random codes
FIRST_TOKEN = 3


def random_blocks(
    kind: str, rows: int, columns: int, deviation: float, random_numbers: np.random.Generator
) -> np.ndarray:
    """Bytes of a matrix of that standard deviation, [rows, bytes of a row]."""
    count = rows * columns // 32
    blocks = random_numbers.integers(0, 256, (count, KINDS[kind]), dtype=np.uint8)
    factors = deviation / SPREAD[kind] * random_numbers.uniform(0.8, 1.2, count)
    blocks[:, :2] = factors.astype(np.float16).view(np.uint8).reshape(count, 2)
    return blocks.reshape(rows, -1)


class _Writer:
    def __init__(self, config: dict[str, Any], path: Path, kind: str) -> None:
        import gguf

        # transformers 5 saves the number of experts by the name that its families share.
        self.config, self.kind = {"num_experts": config.get("num_local_experts"), **config}, kind
        self.file = gguf.GGUFWriter(str(path), "qwen3moe")
        self.type = gguf.GGMLQuantizationType[kind]
        self.random = np.random.default_rng(0)

    def facts(self) -> None:
        config, file = self.config, self.file
        file.add_name("random weights")
        file.add_context_length(config["max_position_embeddings"])
        file.add_embedding_length(config["hidden_size"])
        file.add_block_count(config["num_hidden_layers"])
        file.add_feed_forward_length(config["intermediate_size"])
        file.add_head_count(config["num_attention_heads"])
        file.add_head_count_kv(config["num_key_value_heads"])
        file.add_key_length(config["head_dim"])
        file.add_value_length(config["head_dim"])
        file.add_rope_freq_base(1e6)
        file.add_layer_norm_rms_eps(config["rms_norm_eps"])
        file.add_expert_count(config["num_experts"])
        file.add_expert_used_count(config["num_experts_per_tok"])
        file.add_expert_feed_forward_length(config["moe_intermediate_size"])
        words = config["vocab_size"]
        file.add_tokenizer_model("gpt2")
        file.add_tokenizer_pre("default")
        file.add_token_list([f"t{number}" for number in range(words)])
        file.add_token_types([1] * words)
        file.add_token_merges(["t 1"])
        file.add_bos_token_id(config["bos_token_id"])
        file.add_eos_token_id(config["eos_token_id"])

    def matrix(self, name: str, rows: int, columns: int, deviation: float = 0.02) -> None:
        self.file.add_tensor(name, random_blocks(self.kind, rows, columns, deviation, self.random), raw_dtype=self.type)

    def ones(self, name: str, size: int) -> None:
        self.file.add_tensor(name, np.ones(size, dtype=np.float32))

    def write(self) -> None:
        config = self.config
        width, inner, experts = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
        head, queries = config["head_dim"], config["num_attention_heads"] * config["head_dim"]
        keys = config["num_key_value_heads"] * head
        self.facts()
        self.matrix("token_embd.weight", config["vocab_size"], width, 1.0)
        self.matrix("output.weight", config["vocab_size"], width)
        self.ones("output_norm.weight", width)
        # Made once; each layer has them anew in the file.
        fused = {
            name: random_blocks(self.kind, experts * rows, columns, 0.01, self.random).reshape(experts, rows, -1)
            for name, rows, columns in (("gate", inner, width), ("up", inner, width), ("down", width, inner))
        }
        for number in range(config["num_hidden_layers"]):
            place = f"blk.{number}."
            for name, size in (("attn_norm", width), ("ffn_norm", width), ("attn_q_norm", head), ("attn_k_norm", head)):
                self.ones(f"{place}{name}.weight", size)
            for name, rows, columns in (
                ("attn_q", queries, width),
                ("attn_k", keys, width),
                ("attn_v", keys, width),
                ("attn_output", width, queries),
            ):
                self.matrix(f"{place}{name}.weight", rows, columns)
            router = self.random.standard_normal((experts, width), dtype=np.float32) * 0.05
            self.file.add_tensor(f"{place}ffn_gate_inp.weight", router)
            for name, blocks in fused.items():
                self.file.add_tensor(f"{place}ffn_{name}_exps.weight", blocks, raw_dtype=self.type)
        self.file.write_header_to_file()
        self.file.write_kv_data_to_file()
        self.file.write_tensors_to_file()
        self.file.close()


class _Llama:
    """A model of the peer's, one sequence."""

    def __init__(self, path: Path, threads: int, mapped: bool, context: int) -> None:
        from ik_llama_cpp import _ctypes_api as api
        from ik_llama_cpp._internals import make_batch_range

        self.api, self.batch_of = api, make_batch_range
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        # Read whole where it fits, so that no page is fetched while the clock runs.
        parameters.use_mmap, parameters.n_gpu_layers = mapped, 0
        self.model = api.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise SystemExit(f"{path} was not loaded")
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = context, threads, threads
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit(f"{path}: no context of {context} tokens")
        self.position = 0

    def decode(self, tokens: list[int]) -> float:
        """Seconds of one step."""
        batch = self.batch_of(tokens, pos_start=self.position, logits_last=True)
        begin = time.perf_counter()
        if self.api.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode failed at {self.position} + {len(tokens)} tokens")
        self.api.llama_get_logits_ith(self.context, -1)
        elapsed = time.perf_counter() - begin
        self.api.llama_batch_free(batch)
        self.position += len(tokens)
        return elapsed

    def forget(self) -> None:
        self.api.llama_kv_cache_clear(self.context)
        self.position = 0


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.group:
        from bench.engine.memory_group import MemoryGroup

        MemoryGroup().enter()
    begin = time.perf_counter()
    llama = _Llama(arguments.file, arguments.threads, arguments.mapped, 4096)
    result: dict[str, Any] = {"way": "peer", "file": arguments.file.name, "load_seconds": time.perf_counter() - begin}
    print(json.dumps({"loaded": True}), flush=True)
    numbers = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [numbers.randrange(FIRST_TOKEN, 32000) for _ in range(count)]

    result["prompt_seconds"] = []
    for _ in range(arguments.prompts):
        llama.forget()
        result["prompt_seconds"].append(llama.decode(tokens(arguments.prompt)))
    llama.forget()
    llama.decode(tokens(16))
    first = [llama.decode(tokens(1)) for _ in range(arguments.warm)]
    timed = [llama.decode(tokens(1)) for _ in range(arguments.steps)]
    return result | {
        "first_tokens_per_second": len(first) / sum(first) if first else None,
        "tokens_per_second": len(timed) / sum(timed),
        "median_step_ms": statistics.median(timed) * 1e3,
        "slowest_step_ms": max(timed) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="a GGUF file of random weights")
    write.add_argument("config", type=Path, help="config.json of a checkpoint that bench.causal.checkpoint wrote")
    write.add_argument("file", type=Path)
    write.add_argument("--kind", choices=KINDS, default="Q4_0")
    measured = commands.add_parser("run", help="prompts and decode steps of random tokens")
    measured.add_argument("file", type=Path)
    measured.add_argument("--prompt", type=int, default=128)
    measured.add_argument("--prompts", type=int, default=2)
    measured.add_argument("--warm", type=int, default=16)
    measured.add_argument("--steps", type=int, default=32)
    measured.add_argument("--threads", type=int, default=2)
    measured.add_argument("--mapped", action="store_true", help="map the file instead of reading it whole")
    measured.add_argument("--group", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.command == "write":
        _Writer(json.loads(arguments.config.read_text()), arguments.file, arguments.kind).write()
    else:
        print(json.dumps(run(arguments)))


if __name__ == "__main__":
    main()
