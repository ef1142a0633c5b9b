"""device="cuda": what it says where there is no GPU, and the same answers as transformers and the CPU.

Most of it runs on two sites: a GPU, where there is one, and everywhere the two-tier engine over a recording CUDA
runtime (emulated.py), with torch's tensors on the CPU. Only what needs torch's own CUDA is left to the GPU alone.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import sida_ext
from sida_ext import _C, ops
from sida_ext.experts.cuda import host_slots, resolve_device
from sida_ext.experts.quantise import quantise
from tests.support import emulated
from tests.support.native_build import build, tests_folder

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


@pytest.mark.parametrize(
    ("device", "current", "checked"), [("cuda", 3, 3), ("cuda", 0, 0), ("cuda:1", 3, 1), ("cuda", None, 0)]
)
def test_the_device_that_is_used_is_the_one_that_is_checked(monkeypatch, device, current, checked) -> None:
    """ "cuda" is torch's current device; where torch sees none, device 0 is asked for, to say what is missing."""
    asked: list[int] = []
    monkeypatch.setattr(_C, "cuda_built", True)
    monkeypatch.setattr(_C, "check_cuda_device", asked.append, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: current is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    if current is None:
        with pytest.raises(RuntimeError, match=r"torch\.cuda\.is_available\(\) is False"):
            resolve_device(device)
    else:
        assert resolve_device(device) == torch.device("cuda", checked)
    assert asked == [checked]


def test_the_pool_takes_all_experts_or_half_of_the_free_memory(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("sida_ext.experts.cuda.available_memory", lambda: 1000)
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


# From here on: on a GPU, or on the recording runtime.


class Site:
    """Where a test computes. `device` is what sida_ext is told, `tensors` is where torch's tensors are."""

    def __init__(self, device: str, tensors: str, devices: int, host: emulated.Emulated | None = None) -> None:
        self.device, self.tensors, self.devices, self.host = device, tensors, devices, host

    def swap(self, whole, device: str | None = None, **options):
        options = {"expert_memory": "50%", "expert_dtype": "float32", **options}
        return sida_ext.swap_experts(copy.deepcopy(whole), device=device or self.device, **options)

    def batch(self, seed: int = 1, rows: int = 3, device: int = 0) -> dict[str, torch.Tensor]:
        return batch(self.tensors if self.host else f"{self.tensors}:{device}", seed, rows)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A stream of its own for the calling thread (the recording gives each thread one), and its end."""
        if self.host is not None:
            yield
            return
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


@pytest.fixture(scope="session")
def emulated_module():
    folder = tests_folder()
    options = emulated.BUILD_OPTIONS if folder == "cpp" else ()  # the extension's own folder has them
    return emulated.load(build(folder, ["sida_emulated_cuda"], "-DSIDA_CPP_TESTS=ON", *options) / "tests/cuda")


@pytest.fixture(params=["recording", pytest.param("gpu", marks=pytest.mark.gpu)])
def site(request, monkeypatch) -> Iterator[Site]:
    if request.param == "gpu":
        yield Site("cuda", "cuda", torch.cuda.device_count())
        return
    host = emulated.Emulated(request.getfixturevalue("emulated_module"), monkeypatch, devices=2)
    yield Site("cuda", "cpu", 2, host)
    assert host.end() == []


class Everything:
    """Names every expert for every token in turn."""

    def predict(self, input_ids, attention_mask=None, top_k=1):
        index = (input_ids[:, :, None, None] + torch.arange(top_k)) % TINY["num_experts"]
        return sida_ext.HashTable(index.int(), torch.full(index.shape, 0.5))


def logits_of(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("memory", ["100%", "50%", "10%"])
@pytest.mark.parametrize("host_memory", [None, "30%"])
def test_the_logits_are_those_of_transformers(whole, site, memory, host_memory) -> None:
    model = site.swap(whole, expert_memory=memory, host_memory=host_memory)
    for seed in range(3):
        found = logits_of(model, site.batch(seed))
        torch.testing.assert_close(found.cpu(), logits_of(whole, batch(seed=seed)), rtol=1e-3, atol=1e-3)
    stats = model.sida.stats()
    assert stats.hits + stats.late + stats.misses == stats.unique > 0
    assert stats.peak_slots <= model.sida.slots
    host = model.sida.host_stats()
    assert host.loads > 0
    assert stats.loads > 0
    # Two layers of eight experts.
    record, experts = model.sida.header.record_bytes, 16
    held = experts if host_memory is None else int(0.3 * experts)
    assert held * record <= model.sida.host_memory <= held * record + (2 << 20)
    model.sida.reset_stats()
    assert model.sida.stats().loads == model.sida.host_stats().loads == 0
    model.sida.close()


def test_budget_and_pool_do_not_change_the_bits(whole, site) -> None:
    found = []
    for memory, host_memory in (("100%", None), ("7%", "7%"), ("30%", "60%")):
        model = site.swap(whole, expert_memory=memory, host_memory=host_memory)
        found.append(logits_of(model, site.batch()))
        model.sida.close()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.fixture
def saved(whole, tmp_path, expert_dtype):
    """A checkpoint, and the logits that the CPU computes from it with experts in `expert_dtype`."""
    whole.save_pretrained(tmp_path / "model")
    on_cpu = sida_ext.from_pretrained(tmp_path / "model", expert_dtype=expert_dtype, expert_memory="40%")
    logits = logits_of(on_cpu, batch())
    on_cpu.sida.close()
    return tmp_path / "model", logits


# `saved` comes before `site`, which takes the CPU's op away.
@pytest.mark.parametrize("expert_dtype", ["float32", "bfloat16", "float16", "int8", "int4", "mxfp4"])
def test_from_pretrained_and_every_expert_dtype(saved, site, expert_dtype) -> None:
    folder, expected = saved
    options = {"expert_dtype": expert_dtype, "expert_memory": "40%", "host_memory": "80%"}
    model = sida_ext.from_pretrained(folder, device=site.device, **options)
    torch.testing.assert_close(logits_of(model, site.batch()).cpu(), expected, rtol=1e-3, atol=1e-3)
    model.sida.close()


def test_generate_and_a_changing_budget(whole, site) -> None:
    model = site.swap(whole, expert_memory="100%")
    ids = batch()["input_ids"]
    expected = whole.generate(ids, max_new_tokens=6, do_sample=False)
    for budget in ("100%", "10%", "60%"):
        model.sida.set_budget(budget)
        found = model.generate(ids.to(site.tensors), max_new_tokens=6, do_sample=False)
        assert torch.equal(found.cpu(), expected)
        assert model.sida.stats().peak_slots <= 16
    assert model.sida.slots == 9  # of 16
    model.sida.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(whole, site, dtype) -> None:
    name = {torch.bfloat16: "bfloat16", torch.float16: "float16"}[dtype]
    model = site.swap(whole, expert_dtype=name)
    with torch.autocast(site.tensors, dtype):
        found, expected = logits_of(model, site.batch()), logits_of(whole, batch())
    assert found.dtype == dtype
    model.sida.close()
    # Half precision rounds anew in each layer, and a token whose two best experts are nearly equal may change sides.
    close = torch.isclose(found.float().cpu(), expected.float().cpu(), rtol=0.1, atol=0.1).all(-1)
    assert close.float().mean() >= 0.8, close


@pytest.mark.parametrize("routing", ["router", "confident", "predicted"])
def test_stream(whole, site, routing) -> None:
    if site.host is not None:
        site.host.indices_on_host = routing == "predicted"  # as those of a hash table on a GPU machine
    model = site.swap(whole, routing=routing, predictor=Everything())
    batches = [site.batch(seed) for seed in range(4)]
    found = [output.logits for output in sida_ext.stream(model, batches)]
    if routing == "router":
        for inputs, logits in zip(batches, found, strict=True):
            assert torch.equal(logits, logits_of(model, inputs))
        assert model.sida.stats().useful_prefetches > 0
    else:
        again = [output.logits for output in sida_ext.stream(model, batches)]
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert all(torch.isfinite(logits).all() for logits in found)
    model.sida.close()


def test_a_trace_tells_of_copies_and_layers(whole, site) -> None:
    model = site.swap(whole, expert_memory="25%")
    model.sida.start_trace()
    list(sida_ext.stream(model, [site.batch(seed) for seed in range(3)], Everything()))
    events = model.sida.take_trace()
    lanes = {event.row for event in events if event.kind == "copy"}
    assert lanes
    assert lanes <= {"lane 0", "lane 1"}  # copies to the device, not the pool's reads
    assert 0 < sum(event.kind == "copy" for event in events) <= model.sida.stats().loads
    assert {"compute", "predict"} <= {event.kind for event in events}
    model.sida.close()


def test_other_streams_and_threads(whole, site) -> None:
    model = site.swap(whole, expert_memory="25%")
    expected = logits_of(model, site.batch())
    found: list[torch.Tensor] = []

    def compute() -> None:
        with site.stream():
            found.append(logits_of(model, site.batch()))

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(torch.equal(one, expected) for one in found)
    model.sida.close()


def test_torch_compile(whole, site) -> None:
    model = site.swap(whole)
    expected = logits_of(model, site.batch())
    # Without a GPU the graph is what matters: the op must be opaque to it. Its code is other tests' business.
    compiled = torch.compile(model, backend="inductor" if site.host is None else "aot_eager")
    found = logits_of(compiled, site.batch())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    model.sida.close()


def test_several_devices(whole, site) -> None:
    """One runtime for each device, and the caller's current device is left alone."""
    if site.devices < 2:
        pytest.skip("needs two CUDA devices")
    models = [site.swap(whole, device=f"cuda:{number}") for number in range(2)]
    found = [logits_of(model, site.batch(device=number)).cpu() for number, model in enumerate(models)]
    if site.host is None:
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    models[0].sida.close()
    torch.testing.assert_close(logits_of(models[1], site.batch(device=1)).cpu(), found[1], rtol=0, atol=0)
    models[1].sida.close()
    with pytest.raises(ValueError, match=rf"device is cuda:{site.devices}, but CUDA finds {site.devices} devices"):
        site.swap(whole, device=f"cuda:{site.devices}")


def test_the_end_of_a_runtime(whole, site) -> None:
    model = site.swap(whole)
    logits_of(model, site.batch())
    model.sida.close()
    model.sida.close()
    assert model.sida.closed
    with pytest.raises(RuntimeError):
        logits_of(model, site.batch())
    with pytest.raises(ValueError, match="host_memory is 1; the smallest that works"):
        site.swap(whole, host_memory=1)
    with pytest.raises(ValueError, match="pin is 'maybe', expected one of require, try"):
        site.swap(whole, pin="maybe")


# On the recording runtime alone: failures that nobody can order from a GPU.


@pytest.fixture
def recording(site) -> Iterator[emulated.Emulated]:
    if site.host is None:
        pytest.skip("a GPU does not fail on demand")
    return site.host


def test_a_pool_that_cannot_be_pinned(whole, site, recording, caplog) -> None:
    recording.machine.fail("host_register", 2)
    with pytest.raises(OSError, match=r"cannot pin \d+ bytes of host memory, 16 experts of \d+ bytes.*pin='try'"):
        site.swap(whole)
    recording.machine.fail("host_register", 2)
    recording.machine.set_pinned_only(False)
    model = site.swap(whole, pin="try")
    torch.testing.assert_close(logits_of(model, site.batch()), logits_of(whole, batch()), rtol=1e-3, atol=1e-3)
    assert "cannot pin" in caplog.text
    assert "copies to the GPU are slower" in caplog.text
    model.sida.close()


def test_a_failed_copy_is_raised_with_its_expert(whole, site, recording) -> None:
    model = site.swap(whole, expert_memory="100%")
    recording.machine.fail("copy_to_device", 700)
    with pytest.raises(RuntimeError, match=r"copying an expert failed|copying a layer's slot numbers failed"):
        logits_of(model, site.batch())
    model.sida.close()


def test_blocking_is_asked_for_by_an_environment_variable(whole, site, recording, monkeypatch) -> None:
    names = ("event_synchronize", "kernel")

    def waits_and_kernels() -> list[int]:
        before = [recording.machine.calls(name) for name in names]
        model = site.swap(whole, expert_memory="100%")
        logits_of(model, site.batch())
        model.sida.close()
        return [recording.machine.calls(name) - count for name, count in zip(names, before, strict=True)]

    plain, _ = waits_and_kernels()
    monkeypatch.setenv("SIDA_CUDA_BLOCKING", "1")
    blocking, kernels = waits_and_kernels()
    assert kernels > 0
    # How many waits the lanes need besides differs by a few from run to run.
    assert abs(blocking - kernels - plain) < kernels
    monkeypatch.setenv("SIDA_CUDA_BLOCKING", "yes")
    with pytest.raises(ValueError, match="SIDA_CUDA_BLOCKING is 'yes', expected 0 or 1"):
        site.swap(whole)


# On a GPU alone: torch's own CUDA.


def swapped(whole, device: str = "cuda", **options):
    options = {"expert_memory": "50%", "expert_dtype": "float32", **options}
    return sida_ext.swap_experts(copy.deepcopy(whole), device=device, **options)


@pytest.mark.gpu
def test_a_model_beside_the_current_device(whole) -> None:
    """Inputs on cuda:1 while cuda:0 is current: the ops go to the inputs' device and leave the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    model = swapped(whole, device="cuda:1")
    with torch.cuda.device(0):
        found = logits_of(model, batch("cuda:1"))
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(found.cpu(), logits_of(whole, batch()), rtol=1e-3, atol=1e-3)
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


def _four_bits(dtype: str, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of standard deviation 1 / sqrt(columns) and their factors."""
    *rows, columns = shape
    found = quantise(torch.randn(*shape).flatten(0, -2) / columns**0.5, dtype)
    return found.values.unflatten(0, rows), found.scale.unflatten(0, rows)


# One tile of few tokens and several of many; columns that end within a group; the fp32 path and the tensor cores.
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 150])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["int4", "mxfp4"])
def test_four_bit_weights_give_the_cpus_results(dtype, x_dtype, tokens) -> None:
    torch.manual_seed(tokens)
    d_model, d_ff, experts, top_k = 200, 72, 3, 2
    wi, wi_scale = _four_bits(dtype, experts, 2 * d_ff, d_model)
    wo, wo_scale = _four_bits(dtype, experts, d_model, d_ff)
    x = torch.randn(tokens, d_model).to(x_dtype)
    index = torch.randint(experts, (tokens, top_k), dtype=torch.int)
    layer = [x, index, torch.rand(tokens, top_k), wi, wo, torch.arange(experts, dtype=torch.int), wi_scale, wo_scale]
    biases = {"wi_bias": torch.randn(experts, 2 * d_ff), "wo_bias": torch.randn(experts, d_model)}
    expected = ops.moe_ffn(*layer, activation="swiglu_oai", **biases)
    on_gpu = {name: bias.cuda() for name, bias in biases.items()}
    found = ops.moe_ffn(*(t.cuda() for t in layer), activation="swiglu_oai", **on_gpu)
    # The tensor cores' hidden values are rounded once to x's type.
    bound = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}[x_dtype]
    torch.testing.assert_close(found.cpu(), expected, rtol=bound, atol=bound)

    matrix = [x.view(1, tokens, d_model), wi[0], wi_scale[0], biases["wi_bias"][0]]
    product = ops.linear(*(t.cuda() for t in matrix))
    torch.testing.assert_close(product.cpu(), ops.linear(*matrix), rtol=bound / 2, atol=bound / 10)


@pytest.mark.gpu
def test_linear_takes_every_type_of_weights() -> None:
    x = torch.randn(5, 64)
    for weight, scale in (
        (torch.randn(40, 64), None),
        (torch.randn(40, 64).bfloat16(), None),
        (torch.randn(40, 64).half(), None),
        (torch.randint(-127, 128, (40, 64), dtype=torch.int8), torch.rand(40) / 100),
    ):
        found = ops.linear(x.cuda(), weight.cuda(), None if scale is None else scale.cuda())
        torch.testing.assert_close(found.cpu(), ops.linear(x, weight, scale), rtol=1e-4, atol=1e-4)


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
