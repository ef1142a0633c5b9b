"""The interface: what OpenAI's client and curl see, errors that name the field, keys, the page's routes."""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import struct
import subprocess
from pathlib import Path

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

import sida_ext
from sida_ext.serving.protocol import _NEUTRAL
from sida_ext.serving.settings import ServerSettings, read_keys
from tests.support.served import served_here
from tests.support.tiny_models import VOCABULARY, tiny_causal, tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
KEYS = {"completions": {"prompt": "hello"}, "chat/completions": {"messages": [{"role": "user", "content": "hi"}]}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "experts.sida"
    model = sida_ext.swap_experts(tiny_causal(), expert_memory="50%", store=store)
    with served_here(model, tiny_tokenizer(), events=0.1) as served:
        yield served


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def greedy(server, text: str, new: int) -> str:
    """What ``generate`` writes, as a stream shows it."""
    served = server.service.model
    ids = torch.tensor([served.tokenizer(text)["input_ids"]])
    done = served.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return served.tokenizer.decode(done[0, ids.shape[1] :])


def events_of(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


# What OpenAI's client sees


def test_a_completion_is_what_generate_writes(server, client):
    done = client.completions.create(model="tiny", prompt="hello world", max_tokens=20, temperature=0)
    assert done.object == "text_completion"
    assert done.choices[0].finish_reason == "length"
    assert greedy(server, "hello world", 20).startswith(done.choices[0].text)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (11, 20)


def test_a_stream_says_the_same_and_ends_with_a_reason_and_done(server, client):
    whole = client.completions.create(model="tiny", prompt="abc", max_tokens=15, temperature=0)
    pieces = list(client.completions.create(model="tiny", prompt="abc", max_tokens=15, temperature=0, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices[0].finish_reason] == ["length"]
    raw = httpx.post(f"{server.url}/v1/completions", json={"prompt": "abc", "max_tokens": 15, "stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert events_of(raw.text)[-1] == "[DONE]"


def test_a_chat_whole_and_streamed(server, client):
    asked = [{"role": "system", "content": "be short"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    whole = client.chat.completions.create(model="tiny", messages=asked, max_completion_tokens=12, temperature=0)
    assert whole.choices[0].message.role == "assistant"
    text = "system: be short\nuser: hi\nassistant:"
    assert greedy(server, text, 12).startswith(whole.choices[0].message.content)
    stream = client.chat.completions.create(
        model="tiny",
        messages=asked,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces = list(stream)
    assert pieces[0].choices[0].delta.role == "assistant"
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert said == whole.choices[0].message.content
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-1].usage == whole.usage


def test_several_prompts_and_several_choices(client):
    done = client.completions.create(model="tiny", prompt=["ab", "cd"], n=2, max_tokens=4, temperature=0)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in done.choices]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    again = client.completions.create(model="tiny", prompt=[[67, 68], [69, 70]], max_tokens=4, temperature=0)
    assert len(again.choices) == 2


def test_a_seed_gives_the_same_text_again_and_choices_of_their_own(client):
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 24, "temperature": 1.3, "top_p": 0.9, "n": 2}
    first, second = (client.completions.create(**asked, seed=7) for _ in range(2))
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert first.choices[0].text != first.choices[1].text
    assert client.completions.create(**asked, seed=8).choices[0].text != first.choices[0].text


def test_a_low_top_p_is_greedy(client):
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 12}
    sampled = client.completions.create(**asked, temperature=1, top_p=1e-6, seed=1)
    assert sampled.choices[0].text == client.completions.create(**asked, temperature=0).choices[0].text


def test_the_text_ends_before_a_stop_string_in_streams_too(client):
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 30, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[4:7]
    expected = text[: text.index(stop)]
    done = client.completions.create(**asked, stop=[stop, "never said"])
    assert (done.choices[0].text, done.choices[0].finish_reason) == (expected, "stop")
    pieces = list(client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == expected
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_logprobs_are_the_models_own(server, client):
    done = client.completions.create(model="tiny", prompt="hello", max_tokens=3, temperature=0, logprobs=4)
    found = done.choices[0].logprobs
    served = server.service.model
    ids = served.tokenizer("hello")["input_ids"]
    with torch.no_grad():
        expected = served.model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    assert found.token_logprobs[0] == pytest.approx(float(expected.max()), abs=1e-5)
    assert len(found.top_logprobs[0]) == 4
    assert len(found.tokens) == len(found.token_logprobs) == 3
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=2,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 2
    assert content[0].logprob == pytest.approx(content[0].top_logprobs[0].logprob)


def test_models_and_embeddings(server, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "sida"
    found = client.embeddings.create(model="tiny", input=["abc", "de"])  # the client asks for base64 by itself
    plain = httpx.post(f"{server.url}/v1/embeddings", json={"input": "abc"}).json()
    vector = found.data[0].embedding
    assert vector == pytest.approx(plain["data"][0]["embedding"])
    assert sum(value * value for value in vector) == pytest.approx(1.0, abs=1e-5)
    raw = httpx.post(f"{server.url}/v1/embeddings", json={"input": "abc", "encoding_format": "base64"}).json()
    packed = base64.b64decode(raw["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(packed) // 4}f", packed)) == pytest.approx(vector)


def test_scores_are_log_likelihoods(server):
    found = httpx.post(f"{server.url}/score", json={"prompt": "abc", "continuations": ["de", "f"]}).json()
    served = server.service.model
    ids, more = (served.tokenizer(text)["input_ids"] for text in ("abc", "de"))
    with torch.no_grad():
        logits = served.model(input_ids=torch.tensor([ids + more])).logits[0].float().log_softmax(-1)
    expected = [float(logits[len(ids) - 1 + place, token]) for place, token in enumerate(more)]
    assert found["data"][0]["token_logprobs"] == pytest.approx(expected, abs=1e-5)
    assert found["data"][0]["logprob"] == pytest.approx(sum(expected), abs=1e-5)


def test_the_bundled_classifier():
    model = sida_ext.from_pretrained(EXAMPLES / "demo_model", expert_memory="auto")
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "demo_model")
    with served_here(model, tokenizer, name="demo_model") as served:
        texts = ["a wonderful and moving film", "dull , lifeless and far too long"]
        found = httpx.post(f"{served.url}/classify", json={"input": texts}, timeout=60).json()
        assert [row["label"] for row in found["data"]] == ["positive", "negative"]
        for text, row in zip(texts, found["data"], strict=True):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float().tolist()
            assert list(row["logits"].values()) == expected
        refused = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 400
        assert "does not generate" in refused.json()["error"]["message"]


# curl


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server):
    def curl(*more: str) -> str:
        return subprocess.run(
            ["curl", "-sS", "-N", *more], capture_output=True, text=True, timeout=60, check=True
        ).stdout

    header = ("-H", "Content-Type: application/json")
    body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 5, "temperature": 0})
    whole = json.loads(curl(f"{server.url}/v1/completions", *header, "-d", body))
    streamed = curl(f"{server.url}/v1/completions", *header, "-d", body.replace("{", '{"stream": true, ', 1))
    pieces = [json.loads(event) for event in events_of(streamed)[:-1]]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole["choices"][0]["text"]
    assert events_of(streamed)[-1] == "[DONE]"
    without = json.loads(curl(f"{server.url}/v1/completions", "-d", body))
    assert "Content-Type: application/json" in without["error"]["message"]
    assert json.loads(curl(f"{server.url}/health"))["status"] == "ok"


# What is wrong is said


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "prompt: Field required"),
        ({"prompt": 3}, 400, "prompt"),
        ({"prompt": ""}, 400, "no token"),
        ({"prompt": []}, 400, "'prompt' is empty"),
        ({"prompt": [VOCABULARY]}, 400, f"the token {VOCABULARY}, expected 0 to {VOCABULARY - 1}"),
        ({"prompt": [-1]}, 400, "the token -1"),
        ({"prompt": [[1, "a"]]}, 400, "prompt"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "the model 'gpt-4' is not served here, only 'tiny'"),
        ({"prompt": "a", "n": 0}, 400, "n: Input should be greater than or equal to 1"),
        ({"prompt": "a", "n": 10**9}, 400, "1000000000 rows, expected at most 64"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1024}, 400, "max_tokens is 1024; beside a prompt of 1 tokens 1023 are possible"),
        ({"prompt": "a", "max_tokens": "9"}, 400, "max_tokens: Input should be a valid integer"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature: Input should be a valid number"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p"),
        ({"prompt": "a", "stop": ["a"] * 5}, 400, "5 stop strings, expected at most 4"),
        ({"prompt": "a", "stop": ""}, 400, "a stop string is empty"),
        ({"prompt": "a", "stream": "yes"}, 400, "stream: Input should be a valid boolean"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"prompt": "a", "logprobs": 21}, 400, "logprobs"),
        ({"prompt": "a", "echo": True}, 400, "the field 'echo' is True and is not supported"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, 400, "the field 'logit_bias'"),
        ({"prompt": "a", "presence_penalty": 0.5}, 400, "the field 'presence_penalty' is 0.5"),
        ({"prompt": "a", "top_k": 5}, 400, "the field 'top_k' is not known here; served: model, "),
        ({"prompt": "A" * 2000}, 400, "the prompt has 2000 tokens; the model's context is 1024"),
    ],
)
def test_a_request_that_cannot_be_served_says_what_is_wrong(server, body, status, message):
    found = httpx.post(f"{server.url}/v1/completions", json=body)
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("field", sorted(_NEUTRAL))
def test_a_field_that_is_not_served_is_named_unless_it_asks_for_nothing(server, field):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 0}
    url = f"{server.url}/v1/chat/completions"
    for value in _NEUTRAL[field]:
        assert httpx.post(url, json={**body, field: value}).status_code == 200, (field, value)
    found = httpx.post(url, json={**body, field: "something"})
    assert found.status_code == 400
    assert f"'{field}'" in found.json()["error"]["message"]
    assert found.json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the body is no JSON"),
        (b'{"prompt": "\xff"}', "the body is no JSON"),
        pytest.param(b'{"seed": ' + b"1" * 5000 + b"}", "the body is no JSON", id="digits"),
        pytest.param(b"[" * 50_000, "the body is no JSON", id="depth"),
        (b"", "expected a JSON body"),
        (b"[1]", "Input should be a valid dictionary"),
    ],
)
def test_a_body_that_is_no_object(server, content, message):
    found = httpx.post(f"{server.url}/v1/completions", content=content, headers={"content-type": "application/json"})
    assert found.status_code == 400
    assert message in found.text


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/vnd.of-ours+json", "text/plain", None]
)
def test_a_body_is_json_where_its_type_says_so(server, kind):
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    header = {} if kind is None else {"content-type": kind}
    found = httpx.post(f"{server.url}/v1/completions", content=body, headers=header)
    if kind is not None and "json" in kind:
        assert found.status_code == 200, found.text
    else:
        assert found.status_code == 400
        assert "send the header Content-Type: application/json" in found.text


def test_a_body_beyond_the_limit_is_413_with_the_number_announced_or_not(server):
    large = json.dumps({"prompt": "a" * (1 << 20)}).encode()
    url, header = f"{server.url}/v1/completions", {"content-type": "application/json"}
    for content in (large, iter([large[:1000], large[1000:]])):
        found = httpx.post(url, content=content, headers=header)
        assert found.status_code == 413
        assert "larger than 1048576 bytes" in found.text


def test_chat_without_a_template_is_a_400(tmp_path):
    model = sida_ext.swap_experts(tiny_causal(), store=tmp_path / "experts.sida")
    with served_here(model, tiny_tokenizer(chat=False)) as served:
        found = httpx.post(f"{served.url}/v1/chat/completions", json=KEYS["chat/completions"])
        assert found.status_code == 400
        assert found.json()["error"]["code"] == "no_chat_template"


@pytest.mark.parametrize("asked", ["0", "-1", "soon", "1e9", "nan"])
def test_a_deadline_that_is_none(server, asked):
    found = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, headers={"x-deadline-seconds": asked})
    assert found.status_code == 400
    assert "expected seconds, more than 0 and at most 600" in found.text


def test_other_urls_and_methods(server):
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["message"] == "there is no /v1/nothing here"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    assert httpx.get(f"{server.url}/docs").status_code == 404
    assert "/v1/completions" in httpx.get(f"{server.url}/openapi.json").json()["paths"]


def test_a_failure_nobody_expected_is_a_500_that_is_counted_and_the_server_goes_on(server, monkeypatch, caplog):
    def broken(*given):
        raise ZeroDivisionError("of the test")

    def counted():
        text = httpx.get(f"{server.url}/metrics").text
        return [
            line
            for line in text.splitlines()
            if line.startswith('sida_server_requests_total{endpoint="/v1/completions",status="500"')
        ]

    before = counted()
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "handlers", [caplog.handler])
    with monkeypatch.context() as patched:
        patched.setattr("sida_ext.serving.server.tokens_of", broken)
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "hello"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "of the test" not in answer.text
    assert len(counted()) == 1
    assert counted() != before
    assert "ZeroDivisionError: of the test" in caplog.text  # the log says why
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "hello", "max_tokens": 2}).status_code == 200


def test_no_answer_names_a_path_of_the_machine(server, tmp_path_factory):
    answers = [
        httpx.get(f"{server.url}{path}").text for path in ("/", "/health", "/metrics", "/v1/models", "/openapi.json")
    ]
    answers.append(httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "n": 10**9}).text)
    for private in (
        str(tmp_path_factory.getbasetemp()),
        str(Path(sida_ext.__file__).parent),
        os.path.expanduser("~") + "/",
    ):
        assert not any(private in answer for answer in answers)


# Keys and origins


def test_keys_are_asked_for_everywhere_but_at_the_page_and_health(tmp_path):
    model = sida_ext.swap_experts(tiny_causal(), store=tmp_path / "experts.sida")
    with served_here(model, tiny_tokenizer(), keys=(b"first", b"second")) as served:
        paths = ["/metrics", "/events", "/v1/models", "/openapi.json", "/nothing"]
        for path in paths:
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "Basic first"},
                {"x-api-key": "first"},
            ):
                found = httpx.get(f"{served.url}{path}", headers=headers)
                assert found.status_code == 401, path
                assert found.headers["www-authenticate"] == "Bearer"
        for path, body in KEYS.items():
            assert httpx.post(f"{served.url}/v1/{path}", json=body).status_code == 401
        assert httpx.get(f"{served.url}/").status_code == 200
        assert httpx.get(f"{served.url}/health").status_code == 200
        for key in ("first", "second"):
            with openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0) as client:
                assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="third", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
                client.models.list()


def test_every_known_key_is_compared(monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda known, key: compared.append(known) or known == key)
    assert ServerSettings(keys=(b"a", b"b", b"c")).knows(b"a")
    assert compared == [b"a", b"b", b"c"]


def test_the_file_of_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# two\nfirst\n\n second \n")
    file.chmod(0o600)
    assert read_keys(file) == (b"first", b"second")
    file.chmod(0o644)
    with pytest.raises(ValueError, match=r"can be read by others \(mode 644\), expected 600"):
        read_keys(file)
    file.chmod(0o600)
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key, expected one a line"):
        read_keys(file)


def test_other_origins_may_call_only_if_asked_for(server, tmp_path):
    origin = {"origin": "https://a.example"}
    assert "access-control-allow-origin" not in httpx.get(f"{server.url}/health", headers=origin).headers
    model = sida_ext.swap_experts(tiny_causal(), store=tmp_path / "experts.sida")
    with served_here(model, tiny_tokenizer(), keys=(b"k",), cors_origins=("https://a.example",)) as served:
        found = httpx.get(f"{served.url}/health", headers=origin)
        assert found.headers["access-control-allow-origin"] == "https://a.example"
        asked = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        assert httpx.options(f"{served.url}/v1/completions", headers=asked).status_code == 200
        other = httpx.get(f"{served.url}/health", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


# What is counted


def totals(url: str) -> dict[tuple[str, ...], float]:
    text = httpx.get(f"{url}/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_requests_tokens_times_and_the_engine(server, client):
    before = totals(server.url)
    done = client.completions.create(model="tiny", prompt="abcd", max_tokens=7, temperature=0)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="abcd", max_tokens=10**6)
    after = totals(server.url)

    def grown(*name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("sida_server_requests_total", "/v1/completions", "200") == 1
    assert grown("sida_server_requests_total", "/v1/completions", "400") == 1
    assert grown("sida_server_request_seconds_count", "/v1/completions") == 2
    assert grown("sida_server_first_token_seconds_count") == 1
    assert grown("sida_server_generated_tokens_total") == 7
    assert grown("sida_server_prompt_tokens_total") == done.usage.prompt_tokens
    assert after[("sida_server_queue",)] == after[("sida_server_running",)] == 0
    assert sum(value for name, value in after.items() if name[0] == "sida_experts_wanted_total") > 0


def test_events_say_what_metrics_say(server):
    server.wait_idle()
    with httpx.stream("GET", f"{server.url}/events", timeout=20) as stream:
        event = json.loads(next(line for line in stream.iter_lines() if line.startswith("data: "))[6:])
    after = totals(server.url)
    assert event["tokens"] == after[("sida_server_generated_tokens_total",)]
    assert event["hits"] == sum(value for name, value in after.items() if name[0] == "sida_hits_total")
    assert event["memory_budget"] == after[("sida_expert_memory_budget_bytes", "tiny")]
    runtime = server.service.model.runtime
    for layer, standing in zip(event["layers"], runtime.standings(), strict=True):
        assert len(layer["places"]) == runtime.header.num_experts
        assert layer["demands"] == standing.demands
        assert set(layer["places"]) <= set("0123")
    resident = sum(layer["places"].count("2") for layer in event["layers"])
    assert 0 < resident <= runtime.slots


def test_the_page_loads_nothing_from_elsewhere(server):
    found = httpx.get(f"{server.url}/")
    assert found.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in found.headers["content-security-policy"]
    assert "http://" not in found.text
    assert "https://" not in found.text
