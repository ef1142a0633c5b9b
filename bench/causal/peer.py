"""ik_llama.cpp on the shapes of a checkpoint: what people would run instead on a CPU.

In an environment of its own, which needs no torch:

    python -m venv PEER && PEER/bin/pip install ik-llama-cpp-python==0.1.5 gguf numpy
    PEER/bin/python -m bench.causal.peer write CHECKPOINT FILE.gguf --kind Q4_0
    PEER/bin/python -m bench.causal.peer run FILE.gguf --prompt 128 --steps 64

The file has the checkpoint's own weights, rounded by the gguf package: how often a token wants the experts of the one
before depends on them, and decides what a run from disk costs. Random blocks do not do: uniformly random codes of Q4_0
have a mean below zero, by which deep layers send all tokens to the same experts.
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

KINDS = ("Q4_0", "Q8_0")
FIRST_TOKEN = 3
# Names in the checkpoint of what each layer of the file has beside its experts.
MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
VECTORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
EXPERTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


class _Checkpoint:
    """A folder of safetensors files in bfloat16, one matrix for each expert. Read by hand: numpy has no bfloat16."""

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, tuple[np.memmap, int, list[int]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            data = np.memmap(path, dtype=np.uint8, mode="r")
            size = int(data[:8].view(np.uint64)[0])
            for name, entry in json.loads(data[8 : 8 + size].tobytes()).items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] != "BF16":
                    raise SystemExit(f"{path}: {name} is {entry['dtype']}, expected BF16")
                self._where[name] = (data, 8 + size + entry["data_offsets"][0], entry["shape"])

    def __call__(self, name: str) -> np.ndarray:
        """A weight in float32."""
        data, begin, shape = self._where[f"{name}.weight"]
        bits = data[begin : begin + 2 * int(np.prod(shape))].view(np.uint16)
        return (bits.astype(np.uint32) << 16).view(np.float32).reshape(shape)


class _Writer:
    def __init__(self, checkpoint: Path, path: Path, kind: str) -> None:
        import gguf

        config = json.loads((checkpoint / "config.json").read_text())
        # transformers 5 saves the number of experts by the name that its families share.
        self.config = {"num_experts": config.get("num_local_experts"), **config}
        self.weights = _Checkpoint(checkpoint)
        self.file = gguf.GGUFWriter(str(path), "qwen3moe")
        self.type, self.round = gguf.GGMLQuantizationType[kind], gguf.quants.quantize

    def facts(self) -> None:
        config, file = self.config, self.file
        file.add_name("for speed")
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

    def matrix(self, name: str, *sources: str) -> None:
        """A rounded matrix, or one of several that stand one behind the other."""
        rounded = [self.round(self.weights(source), self.type) for source in sources]
        blocks = np.stack(rounded) if len(rounded) > 1 else rounded[0]
        self.file.add_tensor(f"{name}.weight", blocks, raw_dtype=self.type)

    def plain(self, name: str, source: str) -> None:
        self.file.add_tensor(f"{name}.weight", self.weights(source))

    def write(self) -> None:
        self.facts()
        self.matrix("token_embd", "model.embed_tokens")
        self.matrix("output", "lm_head")
        self.plain("output_norm", "model.norm")
        for number in range(self.config["num_hidden_layers"]):
            block, layer = f"blk.{number}.", f"model.layers.{number}."
            for name, source in VECTORS.items():
                self.plain(block + name, layer + source)
            for name, source in MATRICES.items():
                self.matrix(block + name, layer + source)
            self.plain(f"{block}ffn_gate_inp", f"{layer}mlp.gate")
            for name, source in EXPERTS.items():
                experts = range(self.config["num_experts"])
                self.matrix(f"{block}ffn_{name}_exps", *(f"{layer}mlp.experts.{each}.{source}" for each in experts))
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
    write = commands.add_parser("write", help="a GGUF file of a checkpoint's weights")
    write.add_argument("checkpoint", type=Path, help="folder that bench.causal.checkpoint wrote")
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
        _Writer(arguments.checkpoint, arguments.file, arguments.kind).write()
    else:
        print(json.dumps(run(arguments)))


if __name__ == "__main__":
    main()
