"""`rung serve` as clients see it: the openai package, `rung generate`, and requests that are none."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import example
from processes import inside, start
from rung.data.tokenize import tokenize_records
from rung.models.packing import pack_separately
from rung.models.slot_batch import SlotBatch
from rung.models.slot_layer import SlotLayer
from rung.runs.load import open_reward_model, open_target
from rung.serving import engine_model
from rung.serving.catalog import model_names, open_models
from rung.serving.engine import Engine
from rung.types import Message, Record, Source
from rung.web import header_timeout
from serving_clients import MALFORMED, MESSAGES, NO_REQUESTS, client, post, served, trained_run, wait_until


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, questions: Path) -> Path:
    return trained_run(tmp_path_factory.mktemp("served"), tiny_base, questions)


@pytest.fixture(scope="module")
def base(run: Path) -> Iterator[tuple[int, Engine, Path]]:
    """Port, engine and target of a server."""
    with served(run) as (port, engine):
        yield port, engine, run


def test_answers_are_those_of_the_model(base: tuple[int, Engine, Path]) -> None:
    port, _, target = base
    name = target.name
    expected = open_target(target).answer("What is the capital of France?", max_new_tokens=24)
    options: Any = {"model": name, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    whole = client(port).chat.completions.create(**options)
    assert whole.choices[0].message.content == expected and whole.model == name
    assert whole.usage is not None and whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"
    parts = list(client(port).chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text.strip() == expected and len(parts) > 3 and parts[-1].usage.total_tokens > 24
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "length"


def test_samples_seeds_stops_and_logprobs(base: tuple[int, Engine, Path]) -> None:
    port, _, target = base
    name = target.name
    options: Any = {"model": name, "messages": MESSAGES, "max_tokens": 12, "n": 4, "seed": 7}
    first, again = (client(port).chat.completions.create(**options, logprobs=True, top_logprobs=3) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) > 1
    tokens = first.choices[0].logprobs.content
    assert len(tokens) == 12 and all(t.logprob <= t.top_logprobs[0].logprob for t in tokens)
    assert "".join(t.token for t in tokens).strip() == texts[0]
    greedy = client(port).chat.completions.create(**{**options, "temperature": 0, "n": 1, "max_tokens": 40})
    text = greedy.choices[0].message.content
    stop = text[10:13]
    cut = client(port).chat.completions.create(**{**options, "temperature": 0, "n": 1, "max_tokens": 40, "stop": stop})
    assert cut.choices[0].message.content == text[: text.index(stop)].strip()
    assert cut.choices[0].finish_reason == "stop"


def test_completions_echo_and_score_as_the_model_does(base: tuple[int, Engine, Path]) -> None:
    """What lm-evaluation-harness asks: the log-probabilities of a text, and whether it is the greedy one."""
    port, _, target = base
    name = target.name
    model = open_target(target)
    prompt = "The capital of France is Paris.\n"
    reply = client(port).completions.create(model=name, prompt=prompt, max_tokens=0, echo=True, logprobs=2)
    (choice,) = reply.choices
    ids = model.chat.encode([prompt])[0]
    (batch,) = pack_separately([example(ids, 1)])
    with torch.no_grad():
        expected = model.policy.logprobs(batch).tolist()
        logits = model.policy.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    assert choice.text == prompt and choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == expected
    assert "".join(choice.logprobs.tokens) == prompt
    best = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
    assert best == pytest.approx([float(row.max()) for row in logits[:-1]], abs=1e-4)
    assert np.all(np.diff(choice.logprobs.text_offset) >= 0)
    by_ids = client(port).completions.create(model=name, prompt=ids, max_tokens=0, echo=True, logprobs=2)
    assert by_ids.choices[0].logprobs.token_logprobs == choice.logprobs.token_logprobs
    two = client(port).completions.create(model=name, prompt=[prompt, "apples"], max_tokens=3, temperature=0)
    assert [c.index for c in two.choices] == [0, 1] and two.usage.completion_tokens == 6


def test_a_harness_sees_which_text_is_the_greedy_one(base: tuple[int, Engine, Path]) -> None:
    """Harnesses compare a token's log-probability with the best one by equality."""
    port, _, target = base
    ids = open_target(target).chat.encode(["The capital of France is"])[0]
    options: Any = {"model": target.name, "logprobs": 1, "temperature": 0}
    drawn = client(port).completions.create(**options, prompt=ids, max_tokens=24).choices[0].logprobs
    answer = open_target(target).chat.encode(["".join(drawn.tokens)])[0]
    echoed = client(port).completions.create(**options, prompt=[*ids, *answer], max_tokens=1, echo=True)
    pairs = zip(echoed.choices[0].logprobs.token_logprobs, echoed.choices[0].logprobs.top_logprobs, strict=True)
    found = [(own, max(top.values())) for own, top in list(pairs)[1:]]
    equal = [own == largest for own, largest in found]
    assert equal == [own > largest - 1e-4 for own, largest in found] and sum(equal) > 5


def test_generate_is_the_same_alone_and_beside_others(
    base: tuple[int, Engine, Path], tmp_path: Path, capsys: Any
) -> None:
    """`rung generate http://...` at temperature 0 writes what `rung generate BASE` writes, byte for byte."""
    port, engine, target = base
    name = target.name
    rows = [{"prompt": f"what is in box {i}?"} for i in range(9)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--data", tmp_path / "prompts.jsonl", "--n", 1, "--temperature", 0, "--max-new-tokens", 16)
    common = (*common, "--format", "prompt_only")
    code, _, err = inside(capsys, "generate", target, *common, "-o", tmp_path / "here.jsonl")
    assert code == 0, err
    url = f"http://127.0.0.1:{port}/v1"
    remote = ("generate", url, "--model", name, *common)
    assert inside(capsys, *remote, "-o", tmp_path / "alone.jsonl")[0] == 0

    def keep_busy(seed: int) -> None:
        options: Any = {"model": name, "messages": MESSAGES, "seed": seed, "max_tokens": 60}
        client(port).chat.completions.create(**options)

    with ThreadPoolExecutor(31) as pool:
        others = [pool.submit(keep_busy, seed) for seed in range(31)]
        code, _, err = inside(capsys, *remote, "--concurrency", 1, "-o", tmp_path / "beside.jsonl")
        assert code == 0, err
        for other in others:
            other.result()
    texts = [
        [json.loads(line)["answers"] for line in (tmp_path / f"{file}.jsonl").read_text().splitlines()]
        for file in ("here", "alone", "beside")
    ]
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 9
    assert engine.counters.answers >= 49


def test_several_runs_on_one_base(config: Path, tmp_path: Path, tiny_base: Path, capsys: Any) -> None:
    """Adapters share the weights of their base; `model` chooses, a soft prompt too."""
    methods = {"low-rank": "{kind: lora, rank: 4}", "soft": "{kind: prompt, virtual_tokens: 3}"}
    for name, method in methods.items():
        settings = (f"method={method}", f"output={tmp_path / name}")
        assert inside(capsys, "train", config, *settings)[0] == 0
    targets = [tmp_path / name for name in methods]
    expected = {path.name: open_target(path).answer("what is in it, 3?", max_new_tokens=8) for path in targets}
    with served(*targets, tiny_base) as (port, engine):
        low_rank, soft, bare = (served_model.model.policy for served_model in engine.models.values())
        places = [next(iter(p.model.get_input_embeddings().parameters())).data_ptr() for p in (low_rank, soft, bare)]
        # the base is asked for in its own type, the runs computed in float32
        assert places[0] == places[1] != places[2] and bare is not low_rank
        listed = [model.id for model in client(port).models.list().data]
        assert listed == ["low-rank", "soft", str(tiny_base)]
        for name, text in expected.items():
            messages: Any = [{"role": "user", "content": "what is in it, 3?"}]
            reply = client(port).chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=8)
            assert reply.choices[0].message.content == text
        with pytest.raises(openai.NotFoundError, match="no such model"):
            client(port).chat.completions.create(model="other", messages=messages)
    assert expected["low-rank"] != expected["soft"]
    assert inside(capsys, "train", config, f"model={{name: {tiny_base}}}", f"output={tmp_path / 'auto'}")[0] == 0
    for targets in ([tiny_base, tmp_path / "auto"], [tmp_path / "auto", tiny_base]):
        opened = open_models(model_names([str(target) for target in targets])).values()
        parts = [next(iter(m.model.policy.model.get_input_embeddings().parameters())).data_ptr() for m in opened]
        assert parts[0] == parts[1]  # of one type: in memory once, whatever comes first


def test_a_reward_model_scores(
    compared: Path, tmp_path: Path, tiny_base: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The differences are those that `rung eval` ranks by: of the same documents as in training."""
    threads, tokenize = list[str](), engine_model.scored_documents

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return tokenize(*args)

    monkeypatch.setattr(engine_model, "scored_documents", noted)
    code, _, err = inside(capsys, "train", compared, "objective={kind: reward}", f"output={tmp_path / 'judge'}")
    assert code == 0, err
    policy, chat, objective, _ = open_reward_model(tmp_path / "judge")
    texts = ["apples", "stones", "apples"]
    record = Record((Message("user", "what is in box 3?"), Message("assistant", "apples")), Source("x", 1))
    (document,) = tokenize_records(chat, [record], max_length=400, overflow="error").examples
    with torch.no_grad():
        (expected,) = objective.scores(policy, pack_separately([document])[0]).tolist()
    with served(tmp_path / "judge", tiny_base) as (port, _):
        body = {"model": "judge", "text_1": "what is in box 3?", "text_2": texts}
        code, answer = post(port, "/v1/score", json.dumps(body).encode())
        found = [row["score"] for row in answer["data"]]
        assert code == 200 and found[0] == pytest.approx(expected, abs=1e-5)
        assert threads[0].startswith("asyncio")  # of the pool: a long text in the loop itself would stop everybody
        assert found[2] == pytest.approx(found[0], abs=1e-5) and abs(found[1] - found[0]) > 1e-4
        for wrong, said in (
            ({**body, "model": str(tiny_base)}, "a reward model gives scores"),
            ({**body, "text_2": []}, "1 to 64"),
            ({**body, "text_2": "x " * 3000}, "cannot be scored"),
            ({**body, "other": 1}, "other"),
        ):
            code, answer = post(port, "/v1/score", json.dumps(wrong).encode())
            assert code == 400 and said in answer["error"]["message"], answer
        with pytest.raises(openai.BadRequestError, match="writes nothing"):
            client(port).chat.completions.create(model="judge", messages=MESSAGES)  # type: ignore[arg-type]
        with pytest.raises(openai.NotFoundError, match="no embeddings"):
            client(port).embeddings.create(model="judge", input="x")


def test_a_stream_has_what_the_whole_answer_has(base: tuple[int, Engine, Path]) -> None:
    """However far the engine is ahead of its readers: text, reason, and as many answers as were asked for."""
    port, _, target = base

    def ask(seed: int) -> None:
        options: Any = {"model": target.name, "messages": MESSAGES, "seed": seed, "n": 2, "max_tokens": 1 + seed % 7}
        whole = client(port).chat.completions.create(**options)
        texts, reasons = ["", ""], [None, None]
        for part in client(port).chat.completions.create(**options, stream=True):
            time.sleep(0.002 * (seed % 3))  # a slow reader
            for choice in part.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert [text.strip() for text in texts] == [choice.message.content for choice in whole.choices]
        assert reasons == [choice.finish_reason for choice in whole.choices]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(40)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_request_that_fails_leaves_the_others_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for a row, and a model that fails in a step: 500 for it, and the next request is answered."""
    with served(run) as (port, engine):
        options: Any = {"model": run.name, "messages": MESSAGES, "max_tokens": 3, "temperature": 0}
        expected = client(port).chat.completions.create(**options).choices[0].message.content

        def no_memory(*args: object) -> None:
            raise MemoryError("nothing left")

        for owner, name in ((SlotLayer, "reserve"), (SlotBatch, "step")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, no_memory)
                with pytest.raises(openai.InternalServerError, match="MemoryError"):
                    client(port).chat.completions.create(**options)
            assert client(port).chat.completions.create(**options).choices[0].message.content == expected
        with monkeypatch.context() as patch:  # what nobody thought of ends the thread, and nobody waits for ever
            patch.setattr(Engine, "_admit", no_memory)
            with pytest.raises(openai.InternalServerError, match="MemoryError"):
                client(port).chat.completions.create(**options)
            wait_until(lambda: not engine.is_alive)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client(port).chat.completions.create(**options)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 503
        connection.close()


def test_limits_of_memory_and_rows(base: tuple[int, Engine, Path]) -> None:
    port, engine, target = base
    body = {"model": target.name, "prompt": "a b", "max_tokens": 400}

    def refused(said: str, **extra: Any) -> None:
        code, answer = post(port, "/v1/completions", json.dumps({**body, **extra}).encode())
        assert code == 400 and said in answer["error"]["message"], answer

    refused("8 answers at once", n=9)
    engine.cache_bytes, before = 2**16, engine.cache_bytes
    refused("do not fit into memory")
    engine.cache_bytes = before
    refused("do not fit into", prompt=[5] * 600, max_tokens=0, echo=True)
    refused("do not fit into", prompt=["x", "y", "z " * 600], max_tokens=50)
    assert not engine.active_rows and not engine.waiting
    assert not any(batch._layers for batch in engine.batches.values())  # no buffers are held for nobody


def leave(port: int, path: str, body: dict[str, Any], engine: Engine, rows: int) -> None:
    """Send a request, and close the connection once it has so many rows."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(b"POST %b HTTP/1.1\r\nhost: localhost\r\n" % path.encode())
    connection.sendall(b"content-length: %d\r\n\r\n%b" % (len(data), data))
    wait_until(lambda: engine.active_rows >= rows)
    connection.close()
    deadline = time.monotonic() + 20
    while (engine.active_rows or engine.waiting) and time.monotonic() < deadline:
        time.sleep(0.005)


def test_a_client_that_leaves_several_prompts(run: Path) -> None:
    with served(run, max_rows=2) as (port, engine):
        leave(port, "/v1/completions", {"model": run.name, "prompt": ["x"] * 12, "max_tokens": 300}, engine, 2)
        # an answer that drew its end at once was not cancelled
        assert engine.counters.cancelled + engine.counters.answers == 12 and engine.counters.answers < 3


def test_what_clients_send(base: tuple[int, Engine, Path]) -> None:
    """Nulls for what is left out, halves of characters, temperatures near zero, and seeds that do not overlap."""
    port, _, target = base

    def texts(**extra: Any) -> list[str]:
        body = {"model": target.name, "messages": MESSAGES, "max_tokens": 8, **extra}
        code, answer = post(port, "/v1/chat/completions", json.dumps(body).encode())
        assert code == 200, answer
        return [choice["message"]["content"] for choice in answer["choices"]]

    greedy = texts(temperature=0)
    assert texts(temperature=0, n=None, stream=None, stop=None, tools=None, tool_choice="none") == greedy
    assert texts(temperature=1e-320) == texts(temperature=1e-45) == texts(temperature=1e-30) == greedy
    assert texts(seed=7, n=2)[1] != texts(seed=8)[0] and texts(seed=7, n=2)[0] == texts(seed=7)[0]
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}),
        ("/v1/completions", {"prompt": "\ud800"}),
        ("/v1/chat/completions", {"messages": MESSAGES, "stop": ["\udc00"]}),
    ):
        code, answer = post(port, path, json.dumps({"model": target.name, **body}).encode())
        assert code == 400 and "half a character" in answer["error"]["message"]


def test_offsets_are_those_of_the_text(base: tuple[int, Engine, Path]) -> None:
    port, _, target = base
    reply = client(port).completions.create(model=target.name, prompt="a😀b", max_tokens=0, echo=True, logprobs=1)
    text, logprobs = reply.choices[0].text, reply.choices[0].logprobs
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert text[offset:].startswith(token) or "\ufffd" in token
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset[-1] == len(text) - 1
    options: Any = {"model": target.name, "prompt": "a", "max_tokens": 6, "seed": 1, "logprobs": 1}
    parts = list(client(port).completions.create(**options, stream=True))
    offsets = [part.choices[0].logprobs.text_offset[0] for part in parts if part.choices[0].logprobs]
    assert offsets == sorted(offsets) and len(offsets) == 6


def try_no_requests(base: tuple[int, Engine, Path], count: int) -> None:
    port, engine, _ = base
    paths = st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/score"])

    @settings(max_examples=count, deadline=None, database=None)
    @given(paths, NO_REQUESTS)
    def ask(path: str, body: bytes) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        if response.status != 200:
            assert 400 <= response.status < 500, (response.status, text)
            assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}

    ask()
    deadline = time.monotonic() + 20
    while (engine.active_rows or engine.waiting) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.is_alive and not engine.active_rows and not engine.waiting


def test_two_hundred_requests_that_are_none(base: tuple[int, Engine, Path]) -> None:
    """4xx in OpenAI's form, or an answer; never a 5xx, and no row is left behind."""
    try_no_requests(base, 200)


@pytest.mark.soak
def test_two_thousand_requests_that_are_none(base: tuple[int, Engine, Path]) -> None:
    try_no_requests(base, 2000)


def test_a_full_queue_answers_429_and_a_client_that_leaves_frees_its_row(tiny_base: Path) -> None:
    with served(tiny_base, max_rows=1, max_waiting=1) as (port, engine):
        options: Any = {"model": str(tiny_base), "messages": MESSAGES, "max_tokens": 400, "seed": 1}
        stream = client(port).chat.completions.create(**options, stream=True)
        next(iter(stream))
        while not engine.active_rows:  # the head of a stream comes before its row, which waits until then
            time.sleep(0.002)
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(lambda: client(port).chat.completions.create(**{**options, "max_tokens": 2}))
            wait_until(lambda: engine.waiting)
            with pytest.raises(openai.RateLimitError, match="too many requests") as error:
                client(port).chat.completions.create(**options)
            assert error.value.response.headers["retry-after"] == "1"
            stream.close()
            assert waits.result().choices[0].finish_reason == "length"
        assert engine.counters.cancelled == 1 and engine.counters.refused == 1
        connection = socket.create_connection(("127.0.0.1", port))
        body = json.dumps(options).encode()
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n")
        connection.sendall(b"content-length: %d\r\n\r\n%b" % (len(body), body))
        wait_until(lambda: engine.active_rows)
        connection.close()
        deadline = time.monotonic() + 20
        while engine.active_rows and time.monotonic() < deadline:
            time.sleep(0.005)
        assert engine.counters.cancelled == 2


@pytest.mark.parametrize(("body", "status", "said"), MALFORMED)
def test_malformed_requests(body: bytes, status: int, said: str, base: tuple[int, Engine, Path]) -> None:
    port, engine, target = base
    name = target.name
    code, answer = post(port, "/v1/chat/completions", body.replace(b"NAME", name.encode()))
    assert code == status and said in answer["error"]["message"], answer
    assert answer["error"]["type"] == "invalid_request_error" and set(answer["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }
    assert not engine.active_rows and engine.is_alive


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "at least one token"),
        ({"prompt": [99_999_999]}, "each below"),
        ({"prompt": [-1]}, "each below"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": "x", "max_tokens": 0}, "needs echo"),
        ({"prompt": "x", "echo": True, "stream": True}, "no echo"),
        ({"prompt": ["x", "y"], "stream": True}, "one prompt"),
        ({"prompt": "x " * 2000, "max_tokens": 5}, "do not fit"),
        ({"prompt": "x", "logprobs": 50}, "logprobs"),
        ({"prompt": "x", "suffix": "y"}, "does not have `suffix`"),
    ],
)
def test_malformed_completions(body: dict[str, Any], said: str, base: tuple[int, Engine, Path]) -> None:
    port, engine, target = base
    name = target.name
    code, answer = post(port, "/v1/completions", json.dumps({"model": name, **body}).encode())
    assert code == 400 and said in answer["error"]["message"], answer
    assert not engine.active_rows


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /v1/models HTTP/1.1\r\nhost: local",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /health HT",
        b"POST /v1/models HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\nx",
    ],
)
def test_half_a_request_does_not_hold_a_connection(
    sent: bytes, base: tuple[int, Engine, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that does not come, however slowly bytes drip, and a body that nobody waits for."""
    monkeypatch.setattr(header_timeout, "HEADER_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", base[0]), timeout=10) as connection:
        connection.sendall(sent)
        start_time = time.monotonic()
        with suppress(ConnectionError):
            for _ in range(80):
                connection.settimeout(0.05)
                with suppress(TimeoutError):
                    while connection.recv(1000):
                        pass
                    break
                if sent:
                    connection.sendall(b"x")
        assert time.monotonic() - start_time < 3


def test_other_paths_and_sizes(base: tuple[int, Engine, Path]) -> None:
    port, _, target = base
    name = target.name
    assert post(port, "/v1/nowhere", b"{}")[0] == 404
    assert post(port, "/v1/models", b"{}")[0] == 405
    code, answer = post(port, "/v1/chat/completions", b"x" * (4 * 2**20 + 1))
    assert code == 413 and "4 MiB" in answer["error"]["message"]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

    def endless() -> Iterator[bytes]:
        for _ in range(80):
            yield b"y" * 2**16

    connection.request("POST", "/v1/completions", endless(), {"transfer-encoding": "chunked"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    assert "# TYPE rung_generated_tokens_total counter" in text and name not in text
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "ok"}
    connection.close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost", "origin": "https://evil.example"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
        ({"host": "localhost", "origin": "http://["}, 403),
        ({"host": "localhost", "origin": "http://localhost:3000"}, 200),
        ({"host": "["}, 403),
    ],
)
def test_without_a_key_only_this_machine_asks(
    headers: dict[str, str], status: int, base: tuple[int, Engine, Path]
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", base[0], timeout=20)
    connection.request("GET", "/v1/models", headers=headers)
    assert connection.getresponse().status == status
    connection.close()


def test_with_a_key(tiny_base: Path) -> None:
    with served(tiny_base, key="s3cret") as (port, _):
        assert client(port, "s3cret").models.list().data
        for wrong in ("other", "s3cret2", "é"):
            code, answer = post(
                port, "/v1/completions", b"{}", authorization=f"Bearer {wrong}".encode().decode("latin-1")
            )
            assert code == 401 and "s3cret" not in json.dumps(answer)
        assert post(port, "/v1/completions", b"{}", authorization="s3cret")[0] == 401
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/v1/models", headers={"host": "my.host", "authorization": "Bearer s3cret"})
        assert connection.getresponse().status == 200
        connection.close()


def running_answers(port: int) -> int:
    """Answers that a server generates at this moment."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return int(text.rpartition("rung_answers_running ")[2])


def test_the_command(tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    """From start to SIGTERM: what was begun is finished, and nothing of a prompt is in the log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = start("serve", tiny_base, "--port", port)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            client(port).models.list()
            break
        except openai.APIConnectionError:
            time.sleep(0.05)
    options: Any = {"model": str(tiny_base), "messages": [{"role": "user", "content": "SECRET words"}]}
    with socket.create_connection(("127.0.0.1", port)) as gone:  # leaves before its answer
        body = json.dumps({**options, "max_tokens": 400}).encode()
        gone.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n")
        gone.sendall(b"content-length: %d\r\n\r\n%b" % (len(body), body))
        time.sleep(0.1)
    with ThreadPoolExecutor(2) as pool:
        long = {**options, "max_tokens": 300, "temperature": 0}
        answer = pool.submit(lambda: client(port).chat.completions.create(**long))
        stream = pool.submit(lambda: list(client(port).chat.completions.create(**long, stream=True)))
        while running_answers(port) < 2 and not (answer.done() or stream.done()):
            time.sleep(0.01)
        os.kill(running.pid, signal.SIGTERM)
        assert answer.result().choices[0].finish_reason in ("length", "stop")
        assert stream.result()[-1].choices[0].finish_reason in ("length", "stop")
    _, err = running.communicate(timeout=30)
    assert running.returncode in (0, -signal.SIGTERM), err
    assert "serving" in err and "SECRET" not in err and "Traceback" not in err
    code, _, err = inside(capsys, "serve", tiny_base, "--host", "0.0.0.0")  # noqa: S104
    assert code == 2 and "only with a key" in err
    for key in ("", " "):
        code, _, err = inside(capsys, "serve", tiny_base, "--host", "0.0.0.0", "--key", key)  # noqa: S104
        assert code == 2 and "the key is empty" in err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = inside(capsys, "serve", tiny_base, "--port", taken.getsockname()[1])
        assert code == 2 and "nothing can listen" in err
    code, _, err = inside(capsys, "serve", tmp_path / "nowhere")
    assert code == 2
    code, _, err = inside(capsys, "serve", tiny_base, tiny_base)
    assert code == 2 and "one name" in err
