"""device="cuda": what it says where there is no GPU, and, with one, the same answers as transformers and the CPU."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import sida_ext
from sida_ext import _C, ops
from sida_ext.cuda import host_slots, resolve_device

TINY = {
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_experts": 8,
    "vocab_size": 100,
    "decoder_start_token_id": 0,
}


@pytest.fixture(scope="module")
def whole() -> SwitchTransformersForConditionalGeneration:
    torch.manual_seed(0)
    return SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**TINY)).eval()


def batch(device: str = "cpu", seed: int = 1, rows: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    ids = torch.randint(1, 100, (rows, 12))
    return {"input_ids": ids.to(device), "decoder_input_ids": ids[:, :5].to(device)}


@pytest.mark.skipif(_C.cuda_built, reason="this build has CUDA")
def test_a_build_without_cuda_says_how_to_get_it(whole) -> None:
    with pytest.raises(RuntimeError, match=r"device is 'cuda', but this build of sida_ext has no CUDA.*SIDA_CUDA=on"):
        sida_ext.swap_experts(copy.deepcopy(whole), device="cuda")
    with pytest.raises(RuntimeError, match="has no CUDA"):
        sida_ext.from_pretrained("nowhere", device="cuda:1")


@pytest.mark.skipif(
    not _C.cuda_built or torch.cuda.is_available(), reason="needs a CUDA build on a machine without GPU"
)
def test_a_machine_without_a_gpu_says_what_is_missing(whole) -> None:
    with pytest.raises(RuntimeError, match=r"CUDA cannot be used on this machine.*driver"):
        sida_ext.swap_experts(copy.deepcopy(whole), device="cuda")


def test_devices_are_checked() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="expected 'cpu', 'cuda' or 'cuda:N'"):
        resolve_device("meta")
    with pytest.raises(ValueError, match="the CPU computes from expert_memory alone"):
        resolve_device("cpu", "1GiB")


def test_the_pool_takes_all_experts_or_half_of_the_free_memory(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("sida_ext.cuda.available_memory", lambda: 1000)
    assert host_slots(None, 10, 50, said.append) == 50
    assert not said
    assert host_slots(None, 10, 51, said.append) == 50
    assert "holds 50 of 51 experts" in said[0]
    assert host_slots(95, 10, 51) == 9
    assert host_slots("50%", 10, 40) == 20
    with pytest.raises(ValueError, match="the smallest that works is one expert"):
        host_slots(9, 10, 51)
    with pytest.raises(ValueError, match="holds no expert"):
        host_slots(None, 501, 51)


# From here on: on a GPU.


def swapped(whole, device: str = "cuda", **options):
    options = {"expert_memory": "50%", "expert_dtype": "float32", **options}
    return sida_ext.swap_experts(copy.deepcopy(whole), device=device, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["100%", "50%", "10%"])
@pytest.mark.parametrize("host_memory", [None, "30%"])
def test_the_logits_are_those_of_transformers(whole, memory, host_memory) -> None:
    model = swapped(whole, expert_memory=memory, host_memory=host_memory)
    for seed in range(3):
        with torch.no_grad():
            expected = whole(**batch(seed=seed)).logits
            found = model(**batch("cuda", seed=seed)).logits
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
    stats = model.sida.stats()
    assert stats.hits + stats.late + stats.misses == stats.unique > 0
    assert stats.peak_slots <= model.sida.slots
    assert model.sida.host_stats().loads > 0
    model.sida.close()


@pytest.mark.gpu
def test_generate_and_a_changing_budget(whole) -> None:
    model = swapped(whole, expert_memory="100%")
    ids = batch()["input_ids"]
    expected = whole.generate(ids, max_new_tokens=6, do_sample=False)
    for budget in ("100%", "10%", "60%"):
        model.sida.set_budget(budget)
        assert torch.equal(model.generate(ids.cuda(), max_new_tokens=6, do_sample=False).cpu(), expected)
    model.sida.close()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(whole, dtype) -> None:
    name = {torch.bfloat16: "bfloat16", torch.float16: "float16"}[dtype]
    model = swapped(whole, expert_dtype=name)
    with torch.no_grad(), torch.autocast("cuda", dtype):
        found = model(**batch("cuda")).logits
    assert torch.isfinite(found).all()
    model.sida.close()


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ["router", "predicted"])
def test_stream(whole, routing) -> None:
    class Everything:
        """Names every expert for every token in turn."""

        def predict(self, input_ids, attention_mask=None, top_k=1):
            index = (input_ids[:, :, None, None] + torch.arange(top_k)) % TINY["num_experts"]
            return sida_ext.HashTable(index.int(), torch.full(index.shape, 0.5))

    model = swapped(whole, routing=routing, predictor=Everything())
    batches = [batch("cuda", seed=seed) for seed in range(4)]
    found = [output.logits for output in sida_ext.stream(model, batches)]
    if routing == "router":
        for inputs, logits in zip(batches, found, strict=True):
            with torch.no_grad():
                assert torch.equal(logits, model(**inputs).logits)
    assert all(torch.isfinite(logits).all() for logits in found)
    model.sida.close()


@pytest.mark.gpu
def test_other_streams_and_threads(whole) -> None:
    model = swapped(whole, expert_memory="25%")
    with torch.no_grad():
        expected = model(**batch("cuda")).logits
    found: list[torch.Tensor] = []

    def compute() -> None:
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            found.append(model(**batch("cuda")).logits)
        stream.synchronize()

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(torch.equal(one, expected) for one in found)
    model.sida.close()


@pytest.mark.gpu
def test_torch_compile(whole) -> None:
    model = swapped(whole)
    with torch.no_grad():
        expected = model(**batch("cuda")).logits
        found = torch.compile(model)(**batch("cuda")).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    model.sida.close()


@pytest.mark.gpu
def test_several_devices(whole) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    models = [swapped(whole, device=f"cuda:{number}") for number in range(2)]
    with torch.no_grad():
        found = [model(**batch(f"cuda:{number}")).logits.cpu() for number, model in enumerate(models)]
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    for model in models:
        model.sida.close()


@pytest.mark.gpu
def test_moves_are_refused_and_casts_are_not(whole) -> None:
    model = swapped(whole)
    with pytest.raises(RuntimeError, match="experts are computed on cuda:0 and cannot move to cpu"):
        model.to("cpu")
    model.half().float().to("cuda:0")
    with pytest.raises(ValueError, match=r"computed on a CUDA device"):
        ops.moe_layer(torch.zeros(1, 64), torch.zeros(1, 1, dtype=torch.int), torch.ones(1, 1), _handle(model))
    model.sida.close()


def _handle(model) -> int:
    return next(module.handle for module in model.modules() if hasattr(module, "handle"))


@pytest.mark.gpu
def test_wrong_values_are_raised() -> None:
    x, gate = torch.randn(4, 64, device="cuda"), torch.ones(4, 1, device="cuda")
    wi, wo = torch.randn(2, 128, 64, device="cuda"), torch.randn(2, 64, 128, device="cuda")
    slots = torch.tensor([0, 1, -1], device="cuda", dtype=torch.int)
    good = torch.tensor([[0], [1], [0], [-1]], device="cuda", dtype=torch.int)
    expected = ops.moe_ffn(*(t.cpu() for t in (x, good, gate, wi, wo, slots)))
    torch.testing.assert_close(ops.moe_ffn(x, good, gate, wi, wo, slots).cpu(), expected, rtol=1e-4, atol=1e-4)
    for bad, error, message in ((7, IndexError, "out of range"), (2, ValueError, "not resident")):
        index = good.clone()
        index[2] = bad
        out = ops.moe_ffn(x, index, gate, wi, wo, slots)
        torch.cuda.synchronize()
        assert not out[2].any()
        with pytest.raises(error, match=message):
            ops.moe_ffn(x, good, gate, wi, wo, slots)
    ops.moe_ffn(x, good, gate, wi, wo, slots)


@pytest.mark.gpu
def test_ops_are_captured_into_a_graph_and_layers_are_refused(whole) -> None:
    x, gate = torch.randn(4, 64, device="cuda"), torch.ones(4, 1, device="cuda")
    wi, wo = torch.randn(2, 128, 64, device="cuda"), torch.randn(2, 64, 128, device="cuda")
    slots = torch.tensor([0, 1], device="cuda", dtype=torch.int)
    logits = torch.randn(1, 4, 2, device="cuda")

    def layer() -> torch.Tensor:
        index, _ = ops.route_top1(logits, 4)
        return ops.moe_ffn(x, index.view(4, 1), gate, wi, wo, slots)

    expected = layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layer()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)

    model = swapped(whole)
    index = torch.zeros(4, 1, device="cuda", dtype=torch.int)
    with pytest.raises(ValueError, match="captured into a CUDA graph"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            ops.moe_layer(x, index, gate, _handle(model))
    model.sida.close()
