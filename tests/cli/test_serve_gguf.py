"""`rung serve FILE.gguf`: llama.cpp behind the same routes, rules and errors as runs."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from benchmarks.memory import resident
from benchmarks.serving import free_port
from gguf import GGUFWriter, PoolingType
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from models import tiny_model
from processes import inside, start
from rung import ExportRequest, GgufRequest, export
from rung.exporting.llama_cpp_process import LlamaCppOptions
from rung.runs.load import open_target
from rung.serving import llama_cpp_model
from rung.serving.gguf_facts import read_gguf_facts
from rung.serving.llama_cpp_model import LlamaCppModel
from serving_clients import MALFORMED, MESSAGES, NO_REQUESTS, client, post, served, trained_run, wait_until

pytest.importorskip("xllamacpp")
LIMITS: dict[str, Any] = {"max_rows": 4, "max_waiting": 8, "cache_bytes": 2**24, "threads": 1}


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A base whose greedy answers are of letters: bytes of half characters would be shown otherwise by llama.cpp."""
    model = tiny_model(max_position_embeddings=512, tie_word_embeddings=False)
    vocabulary = tiny_tokenizer.convert_ids_to_tokens(range(model.config.vocab_size))
    others = [i for i, token in enumerate(vocabulary) if not (token and token.isascii() and token.isalpha())]
    with torch.no_grad():
        model.lm_head.weight[others] = 0
    folder = tmp_path_factory.mktemp("letters") / "letters"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(letters: Path, questions: Path) -> Path:
    return trained_run(letters.parent, letters, questions)


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    """The same as a GGUF file in float32."""
    folder = run.parent / "small"
    export(run, folder, ExportRequest("gguf", GgufRequest(types=("f32",))))
    return folder / "small-f32.gguf"


@pytest.fixture(scope="module")
def port(file: Path, run: Path) -> Iterator[tuple[int, LlamaCppModel]]:
    """A server of the run, and of its file."""
    with pytest.MonkeyPatch.context() as patch:
        # keys and values of 16 bits change one answer of a random model in three
        patch.setattr(llama_cpp_model, "LlamaCppOptions", partial(LlamaCppOptions, is_exact=True))
        model = LlamaCppModel("small", file, **LIMITS)
    with served(run, files={"small": model}) as (port, _):
        yield port, model
    model.close()
    assert not model._process.is_alive and not model.running


def test_answers_are_those_of_the_model(port: tuple[int, LlamaCppModel], run: Path) -> None:
    """Greedy answers and their log-probabilities, whole and as a stream, of a file in float32 beside its base."""
    options: Any = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    here = client(port[0]).chat.completions.create(model="tiny", **options)
    there = client(port[0]).chat.completions.create(model="small", **options)
    assert there.model == "small" and there.choices[0].message.content.strip() == here.choices[0].message.content
    assert there.usage.model_dump() == here.usage.model_dump()
    for ours, theirs in zip(here.choices[0].logprobs.content, there.choices[0].logprobs.content, strict=True):
        assert theirs.token == ours.token and len(theirs.top_logprobs) == 2
        assert theirs.logprob == pytest.approx(ours.logprob, abs=1e-3)
    stream: Any = {**options, "stream": True, "stream_options": {"include_usage": True}}
    parts = list(client(port[0]).chat.completions.create(model="small", **stream))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == there.choices[0].message.content and parts[-1].usage == there.usage
    assert {part.model for part in parts} == {"small"} and len({part.id for part in parts}) == 1
    bare = client(port[0]).chat.completions.create(model="small", **{**options, "top_logprobs": None})
    assert bare.choices[0].logprobs.content[0].top_logprobs == []


def test_completions(port: tuple[int, LlamaCppModel], run: Path) -> None:
    """Several prompts, texts and ids; log-probabilities in the form of this route; tokens of every answer counted."""
    ids = open_target(run).chat.encode(["what is in box 3?"])[0]
    options: Any = {"temperature": 0, "max_tokens": 6, "logprobs": 2, "n": 2}
    for prompt in ("what is in box 3?", ids, ["what is in box 3?", "apples"]):
        here = client(port[0]).completions.create(model="tiny", prompt=prompt, **options)
        there = client(port[0]).completions.create(model="small", prompt=prompt, **options)
        assert [c.text for c in there.choices] == [c.text for c in here.choices]
        assert [c.index for c in there.choices] == list(range(len(here.choices)))
        assert there.usage.completion_tokens == here.usage.completion_tokens == 6 * len(here.choices)
        assert there.usage.prompt_tokens == here.usage.prompt_tokens
        ours, theirs = here.choices[-1].logprobs, there.choices[-1].logprobs
        assert theirs.tokens == ours.tokens and theirs.text_offset == ours.text_offset
        assert theirs.token_logprobs == pytest.approx(ours.token_logprobs, abs=1e-3)
        assert [len(top) for top in theirs.top_logprobs] == [len(top) for top in ours.top_logprobs]


def test_seeds_and_stops(port: tuple[int, LlamaCppModel]) -> None:
    options: Any = {"model": "small", "messages": MESSAGES, "max_tokens": 10}

    def texts(**extra: Any) -> list[str]:
        return [c.message.content for c in client(port[0]).chat.completions.create(**options, **extra).choices]

    first = texts(n=3, seed=5)
    assert first == texts(n=3, seed=5) and len(set(first)) == 3
    assert texts() != texts()  # without a seed each request draws anew
    (greedy,) = texts(temperature=0)
    stopped = client(port[0]).chat.completions.create(**options, temperature=0, stop=greedy[4:6]).choices[0]
    assert stopped.message.content == greedy[: greedy.index(greedy[4:6])] and stopped.finish_reason == "stop"


def test_what_llama_cpp_has_beyond_a_run(port: tuple[int, LlamaCppModel]) -> None:
    """A schema is followed, a bias makes a token certain; what nobody follows is refused as for a run."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    options: Any = {"model": "small", "messages": MESSAGES, "max_tokens": 60, "seed": 1}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    # an untrained model would write digits for ever: the sentence ends where the grammar ends it
    text = client(port[0]).chat.completions.create(**options, response_format=form).choices[0].message.content
    assert text.lstrip().startswith("{")
    biased = client(port[0]).completions.create(model="small", prompt="a", max_tokens=4, logit_bias={"70": 100})
    assert len(set(biased.choices[0].text)) == 1
    for field, value, said in (
        ("top_k", "many", "top_k"),
        ("frequency_penalty", 9, "frequency_penalty"),
        ("suffix", "y", "does not have `suffix`"),
        ("response_format", {"type": "json_object"}, "does not have `response_format`"),
        ("tool_choice", "required", "does not have `tool_choice`"),
        ("logit_bias", {"-1": 1}, "number of a token"),
        ("logit_bias", {"99999999": 1}, "number of a token"),
        ("logit_bias", {"abc": 1}, "number of a token"),
        ("logit_bias", {"5": 1e308}, "logit_bias"),
        ("logit_bias", {"5": float("nan")}, "not finite"),
        ("logit_bias", {str(i): 1 for i in range(1025)}, "logit_bias"),
        ("echo", True, "no echo"),
        ("prompt", [99_999_999], "each below"),
        ("prompt", [], "prompt"),
        ("n", 9, "4 answers at once"),
    ):
        body = {"model": "small", "prompt": "a", "max_tokens": 2, field: value}
        code, answer = post(port[0], "/v1/completions", json.dumps(body).encode())
        assert code == 400 and said in answer["error"]["message"], answer


def test_chats_that_the_file_cannot_follow(port: tuple[int, LlamaCppModel]) -> None:
    """Tools that its template does not show, formats that are none, and schemas of which no grammar is made in time."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    properties = {f"p{i}": {"type": "integer"} for i in range(3000)}
    large = {"name": "x", "schema": {"type": "object", "properties": properties}}
    for extra, said in (
        ({"tools": [tool]}, "shows no tools"),
        ({"tools": [tool], "stream": True}, "shows no tools"),
        ({"messages": [*MESSAGES, called, {"role": "tool", "content": "4"}]}, "shows no tools"),
        ({"tool_choice": "required"}, "no `tools`"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": 5}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": large}}, "16 KiB"),
        ({"tools": [{"type": "function", "function": {"name": "f", "minimum": float("nan")}}]}, "not finite"),
    ):
        body = json.dumps({"model": "small", "messages": MESSAGES, "max_tokens": 2, **extra}).encode()
        code, answer = post(port[0], "/v1/chat/completions", body)
        assert code == 400 and said in answer["error"]["message"], (extra, answer)


def test_the_same_shape_as_a_run(port: tuple[int, LlamaCppModel]) -> None:
    """Keys and nulls of whole answers and of streams, and content in parts."""
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "in box 3?"}]
    for content in ("hi", parts, None):
        bodies = {}
        for name in ("tiny", "small"):
            message = {"role": "user", **({} if content is None else {"content": content})}
            body = {"model": name, "messages": [message], "max_tokens": 3, "temperature": 0}
            code, whole = post(port[0], "/v1/chat/completions", json.dumps(body).encode())
            assert code == 200, whole
            bodies[name] = whole
        here, there = bodies["tiny"], bodies["small"]
        assert here.keys() == there.keys() and here["usage"] == there["usage"]
        assert here["choices"][0].keys() == there["choices"][0].keys()
    options: Any = {"messages": MESSAGES, "max_tokens": 3, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    streams = {}
    for name in ("tiny", "small"):
        found = client(port[0]).chat.completions.create(model=name, **options, stream=True)
        streams[name] = [part.choices[0] for part in found if part.choices]
    assert streams["tiny"][0].delta.content == streams["small"][0].delta.content == ""
    first, second = (next(c for c in streams[name] if c.logprobs).logprobs.content[0] for name in ("tiny", "small"))
    assert first.to_dict().keys() == second.to_dict().keys()
    assert first.top_logprobs[0].to_dict().keys() == second.top_logprobs[0].to_dict().keys()


@pytest.mark.parametrize(("body", "status", "said"), MALFORMED)
def test_malformed_requests(body: bytes, status: int, said: str, port: tuple[int, LlamaCppModel]) -> None:
    """Refused in OpenAI's form, unless llama.cpp follows what a run does not."""
    code, answer = post(port[0], "/v1/chat/completions", body.replace(b"NAME", b"small"))
    if b"json_object" in body:  # an untrained model does not end its object: llama.cpp gives no part of it
        assert code == 200 or "cut at max_tokens" in answer["error"]["message"], answer
        return
    if "does not have" in said and "best_wishes" not in said or "do not fit" in said:
        assert code == 200, answer
        return
    assert code == status and said in answer["error"]["message"], answer


def test_requests_that_are_none(port: tuple[int, LlamaCppModel]) -> None:
    from hypothesis import given, settings

    @settings(max_examples=60, deadline=None, database=None)
    @given(NO_REQUESTS)
    def ask(body: bytes) -> None:
        code, answer = post(port[0], "/v1/chat/completions", body.replace(b'"tiny"', b'"small"'))
        if code != 200:
            assert 400 <= code < 500 and set(answer["error"]) == {"message", "type", "param", "code"}, answer

    ask()
    assert port[1]._process.is_alive and not port[1].running


def test_many_clients_one_request_after_the_other(port: tuple[int, LlamaCppModel]) -> None:
    """Each of its connections to llama.cpp is new: llama.cpp closes them at moments of its own."""
    options: Any = {"model": "small", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}

    def ask(_: int) -> str:
        parts = client(port[0]).chat.completions.create(**options, stream=True)
        return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(160)))) == 1


def test_a_full_queue_and_clients_that_leave(file: Path) -> None:
    model = LlamaCppModel("small", file, **{**LIMITS, "max_rows": 1, "max_waiting": 1})
    with served(files={"small": model}) as (port, _):
        options: Any = {"model": "small", "messages": MESSAGES, "max_tokens": 400, "seed": 1}
        code, answer = post(port, "/v1/chat/completions", json.dumps({**options, "messages": MESSAGES * 99}).encode())
        assert code == 400 and answer["error"]["code"] == "context_length_exceeded"
        os.kill(model._process.pid, signal.SIGSTOP)  # a tiny model would have answered before the next client comes
        leaves = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps({**options, "stream": True})
        leaves.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        wait_until(lambda: model.running)
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(lambda: client(port).chat.completions.create(**{**options, "max_tokens": 2}))
            wait_until(lambda: model.waiting)
            for is_stream in (False, True):
                with pytest.raises(openai.RateLimitError, match="too many requests"):
                    client(port).chat.completions.create(**options, stream=is_stream)
            leaves.close()
            os.kill(model._process.pid, signal.SIGCONT)
            assert waits.result().choices[0].finish_reason == "length"
        assert model.counters.refused == 2 and model.counters.cancelled == 1 and not model.running
        os.kill(model._process.pid, signal.SIGSTOP)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llama_cpp_model, "HEALTH_SECONDS", 0.3)
            assert health(port) == 503  # it hangs
        os.kill(model._process.pid, signal.SIGCONT)
        assert health(port) == 200
        os.kill(model._process.pid, signal.SIGKILL)
        for is_stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="llama.cpp does not answer"):
                client(port).chat.completions.create(**options, stream=is_stream)
        with half_a_stream() as url:  # its client gets an error, and no end that looks like one
            model._client.base_url = url
            stream = client(port).chat.completions.create(**options, stream=True)
            assert next(iter(stream)).choices[0].delta.content == "x"
            with pytest.raises(openai.APIError, match="llama.cpp does not answer"):
                list(stream)
        assert post(port, "/v1/models", b"")[0] == 405 and not model.running
    model.close()


def health(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/health")
    status = connection.getresponse().status
    connection.close()
    return status


def test_the_memory_of_llama_cpp_is_bounded(file: Path) -> None:
    """By default it keeps 8 GiB of earlier prompts."""
    model = LlamaCppModel("small", file, **{**LIMITS, "max_rows": 1})
    with served(files={"small": model}) as (port, _):
        sizes = []
        for i in range(60):
            text = " ".join(str(i * 1000 + k) for k in range(60))
            client(port).completions.create(model="small", prompt=text, max_tokens=1)
            sizes.append(resident(model._process.pid))
    model.close()
    assert max(sizes[30:]) < max(sizes[5:30]) + 2**20


def test_sigterm_ends_a_llama_cpp_that_hangs(file: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun is finished, and nothing is left behind: exit code 0."""
    port = free_port()
    running = start("serve", file, run, "--port", port)
    while running.poll() is None:
        with suppress(OSError):
            if health(port) == 200:
                break
        time.sleep(0.05)
    options: Any = {"model": file.stem, "messages": MESSAGES, "max_tokens": 400}
    parts = client(port).chat.completions.create(**options, stream=True)
    next(iter(parts))
    os.kill(running.pid, signal.SIGTERM)
    assert list(parts)[-1].choices[0].finish_reason in ("length", "stop")
    _, err = running.communicate(timeout=30)
    assert running.returncode == 0 and "Traceback" not in err, err


@contextmanager
def half_a_stream() -> Iterator[str]:
    """The address of a server that ends in the middle of an answer."""
    part = b'data: {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": null}]}\n\n'
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(2**16)
            connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(part), part))
            time.sleep(0.1)

    thread = threading.Thread(target=answer)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    thread.join()
    listening.close()


def test_files_that_are_none(tmp_path: Path, file: Path, capsys: Any) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF is not this")
    code, _, err = inside(capsys, "serve", tmp_path / "x.gguf", "--port", 1025)
    assert code == 2 and "cannot be read" in err
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-4096])
    code, _, err = inside(capsys, "serve", cut, "--port", 1025)
    assert code in (2, 3) and "Traceback" not in err and "cut.gguf" in err
    code, _, err = inside(capsys, "serve", file, "--port", 1025, "--cache", 1, "--rows", 200)
    assert code == 3 and "--cache" in err
    code, _, err = inside(capsys, "serve", file, "--port", 1025, "--rows", 300)
    assert code == 2 and "up to 256" in err
    code, _, err = inside(capsys, "serve", file, "--port", 1025, "--dtype", "float32")
    assert code == 2 and "no base is served" in err


def test_embeddings_of_an_encoder(tmp_path: Path) -> None:
    """The mean of the last states, of length 1, as transformers computes them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2581red", "\u2581blue", "\u2581box", "es"]
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), max_position_embeddings=64, hidden_act="gelu", **shape)
    bert = BertModel(config).eval()
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    write_bert(tmp_path / "encoder.gguf", bert, words)
    assert read_gguf_facts(tmp_path / "encoder.gguf").is_encoder
    model = LlamaCppModel("encoder", tmp_path / "encoder.gguf", **LIMITS)
    with served(files={"encoder": model}) as (port, _):
        texts = ["red box", "blue boxes red"]
        ids = [[2, 4, 6, 3], [2, 5, 6, 7, 4, 3]]
        found = client(port).embeddings.create(model="encoder", input=texts)
        for entry, row in zip(found.data, ids, strict=True):
            states = bert(torch.tensor([row])).last_hidden_state[0].mean(0)
            expected = (states / states.norm()).tolist()
            assert entry.embedding == pytest.approx(expected, abs=2e-3)
        assert found.model == "encoder" and found.usage.prompt_tokens == 10
        body = json.dumps({"model": "encoder", "input": texts[0], "encoding_format": "base64"}).encode()
        code, answer = post(port, "/v1/embeddings", body)
        raw = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), np.float32)
        assert code == 200 and raw == pytest.approx(found.data[0].embedding, abs=1e-6)
        with pytest.raises(openai.BadRequestError, match="is an encoder"):
            client(port).chat.completions.create(model="encoder", messages=MESSAGES)  # type: ignore[arg-type]
        code, answer = post(port, "/v1/embeddings", json.dumps({"model": "encoder", "input": "red " * 99}).encode())
        assert code == 400 and answer["error"]["code"] == "context_length_exceeded"
        assert "batch size" not in answer["error"]["message"]
        for wrong in ({"input": []}, {"input": [""]}, {"input": [1]}, {"input": "x", "dimensions": 4}):
            assert post(port, "/v1/embeddings", json.dumps({"model": "encoder", **wrong}).encode())[0] == 400
    model.close()


def write_bert(path: Path, bert: BertModel, words: list[str]) -> None:
    config, tensors = bert.config, bert.state_dict()
    writer = GGUFWriter(path, "bert")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(PoolingType.MEAN)
    writer.add_token_type_count(2)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3, 3, 1, 1, 1, 1])
    writer.add_unk_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_sep_token_id(3)
    names = {
        "embeddings.word_embeddings.weight": "token_embd.weight",
        "embeddings.position_embeddings.weight": "position_embd.weight",
        "embeddings.token_type_embeddings.weight": "token_types.weight",
        "embeddings.LayerNorm.weight": "token_embd_norm.weight",
        "embeddings.LayerNorm.bias": "token_embd_norm.bias",
    }
    parts = {
        "attention.self.query": "attn_q",
        "attention.self.key": "attn_k",
        "attention.self.value": "attn_v",
        "attention.output.dense": "attn_output",
        "attention.output.LayerNorm": "attn_output_norm",
        "intermediate.dense": "ffn_up",
        "output.dense": "ffn_down",
        "output.LayerNorm": "layer_output_norm",
    }
    for layer in range(config.num_hidden_layers):
        for name, short in parts.items():
            for kind in ("weight", "bias"):
                names[f"encoder.layer.{layer}.{name}.{kind}"] = f"blk.{layer}.{short}.{kind}"
    for name, short in names.items():
        writer.add_tensor(short, tensors[name].float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
