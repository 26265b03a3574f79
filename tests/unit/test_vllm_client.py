"""The client of a server that loads adapters: token ids in both directions, and every reply checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rung.config.server import ModelServerConfig
from rung.errors import CheckpointError, ConfigError, PlanError, RungError
from rung.inference.vllm_client import AdapterServer
from rung.models.generate import GeneratedAnswer, Sampling
from vllm_server import Engine, serving

PROMPTS = [[5, 6, 7], [8, 9], [30, 31, 32, 33]]
STOPS = (2, 40, 41)


@pytest.fixture(scope="module")
def served(tiny_base: Path) -> Iterator[Engine]:
    with serving(tiny_base) as engine:
        yield engine


@pytest.fixture
def vllm(served: Engine) -> Engine:
    served.rules, served.requests, served.completed, served.most_at_once = {}, [], 0, 0
    return served


def client(vllm: Engine, **settings: Any) -> AdapterServer:
    config = ModelServerConfig(url=vllm.url, model="base", **settings)
    return AdapterServer(config, "objective.rollout.server", "go on with: rung train --resume")


TWO = Sampling(6, 1.0, 3, 2)


def complete(vllm: Engine, sampling: Sampling = TWO, **settings: Any) -> list[GeneratedAnswer]:
    return client(vllm, **settings).complete("base", PROMPTS, STOPS, sampling, 320)


def test_answers_are_the_tokens_that_were_drawn(vllm: Engine) -> None:
    answers = complete(vllm)
    assert len(answers) == 6 and all(len(a.logprobs) == len(a.all_tokens) for a in answers)
    assert all(a.stop in STOPS if a.stopped else len(a.ids) == 6 for a in answers) and any(a.stopped for a in answers)
    assert complete(vllm) == answers and complete(vllm, Sampling(6, 1.0, 4, 2)) != answers
    _, asked = vllm.requests[0]
    assert asked["prompt"] in PROMPTS and asked["return_token_ids"] is True and asked["stop_token_ids"] == list(STOPS)
    # unset, vLLM takes these from the generation_config.json of the base
    neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "logprobs": 0}
    neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert neutral.items() <= asked.items() and len({asked["seed"] for _, asked in vllm.requests[:3]}) == 3


def test_no_more_at_once_than_asked_for(vllm: Engine) -> None:
    vllm.rules["slow"] = 0.05
    many = [[i + 5] for i in range(6)]
    client(vllm, concurrency=2).complete("base", many, STOPS, Sampling(1), 320)
    assert vllm.most_at_once == 2


def test_each_try_has_its_time(vllm: Engine) -> None:
    vllm.rules |= {"slow": 1.0, "slow_requests": 1}
    answers = client(vllm, timeout=0.1).complete("base", PROMPTS[:1], STOPS, Sampling(1), 320)
    assert len(answers) == 1 and len(vllm.requests) == 2


def of_first(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda reply: change(reply["choices"][0])


def logprobs(change: Callable[[list[Any]], object]) -> Callable[[dict[str, Any]], object]:
    return of_first(lambda choice: change(choice["logprobs"]["token_logprobs"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda reply: reply["choices"].pop(), "1 answers to a prompt, and 2 were asked for"),
        (lambda reply: reply["choices"].append(reply["choices"][0]), "3 answers to a prompt"),
        (lambda reply: reply.update(choices=5), "0 answers to a prompt"),
        (of_first(lambda choice: choice.pop("token_ids")), "no token ids"),
        (of_first(lambda choice: choice.update(token_ids=["token_id:5"])), "no token ids"),
        (of_first(lambda choice: choice.update(token_ids=[])), "no token ids"),
        (of_first(lambda choice: choice.update(token_ids=[True] * len(choice["token_ids"]))), "no token ids"),
        (of_first(lambda choice: choice["token_ids"].__setitem__(0, 320)), "a token is none of the 320 tokens"),
        (of_first(lambda choice: choice["token_ids"].__setitem__(0, -1)), "a token is none"),
        (of_first(lambda choice: choice["token_ids"].insert(0, 2)), "log-probabilities for"),
        (of_first(lambda choice: choice["token_ids"].__setitem__(0, 2)), "goes on behind a stop token"),
        (of_first(lambda choice: choice["prompt_token_ids"].insert(0, 1)), "read another prompt"),
        (of_first(lambda choice: choice["token_ids"].__setitem__(0, 10**4000)), "a token is none of the 320"),
        (of_first(lambda choice: choice.update(prompt_token_ids=5)), "read another prompt"),
        (logprobs(lambda values: values.__setitem__(0, -(10**400))), "no finite number"),
        (of_first(lambda choice: choice.pop("logprobs")), "0 log-probabilities for"),
        (logprobs(list.pop), "log-probabilities for"),
        (logprobs(lambda values: values.__setitem__(0, math.nan)), "no finite number"),
        (logprobs(lambda values: values.__setitem__(0, math.inf)), "no finite number"),
        (logprobs(lambda values: values.__setitem__(0, None)), "no finite number"),
        (logprobs(lambda values: values.__setitem__(0, 0.5)), "no finite number"),
        (logprobs(lambda values: values.__setitem__(0, -9999.0)), "no finite number"),
    ],
)
def test_a_reply_that_is_not_what_was_asked_for(
    change: Callable[[dict[str, Any]], object], words: str, vllm: Engine
) -> None:
    vllm.rules["reply"] = change
    with pytest.raises(CheckpointError, match=words):
        complete(vllm)


def test_a_reply_of_another_model(vllm: Engine) -> None:
    """Of an adapter the name in the reply is its own; a base may have several, of which vLLM gives the first."""
    vllm.rules["reply"] = lambda reply: reply.update(model="rung-older")
    assert complete(vllm)
    server = AdapterServer(ModelServerConfig(url=vllm.url, model="alias"), "objective.rollout.server", "")
    with pytest.raises(CheckpointError, match="another model answered(.|\n)*given: rung-older"):
        server.complete("base", PROMPTS, STOPS, TWO, 320)


def test_an_answer_that_is_cut_before_its_end(vllm: Engine) -> None:
    """A server whose context is shorter ends an answer that nobody has ended; so does one that drops the stop."""

    def cut(choice: dict[str, Any]) -> None:
        choice["token_ids"], choice["finish_reason"] = [9], "length"
        choice["logprobs"]["token_logprobs"] = [-1.0]

    vllm.rules["reply"] = of_first(cut)
    with pytest.raises(CheckpointError, match="ends after 1 tokens .* without a stop token(.|\n)*--max-model-len"):
        complete(vllm)


@pytest.mark.parametrize(
    ("status", "words", "kind"),
    [
        ({"/completions": 400}, "a prompt got no answer: BadRequestError", CheckpointError),
        ({"/completions": 500}, "a prompt got no answer: InternalServerError", CheckpointError),
        ({"/completions": 503}, "answers nobody", CheckpointError),
        ({"/completions": 401}, "refuses the key", ConfigError),
        ({"/completions": 307}, "redirects, which is not followed", ConfigError),
    ],
)
def test_a_server_that_refuses(status: dict[str, int], words: str, kind: type[RungError], vllm: Engine) -> None:
    vllm.rules["status"] = status
    with pytest.raises(kind, match=words) as raised:
        complete(vllm)
    assert kind is ConfigError or "rung train --resume" in str(raised.value)


def test_a_model_that_is_not_there(vllm: Engine) -> None:
    config = ModelServerConfig(url=vllm.url, model="other")
    with pytest.raises(ConfigError, match="no such model(.|\n)*given: other(.|\n)*allowed: base"):
        AdapterServer(config, "evaluation.server", "").models()
    with pytest.raises(ConfigError, match="no such model there"):
        client(vllm).complete("rung-gone", PROMPTS, STOPS, Sampling(1), 320)


def test_adapters_cannot_be_loaded(vllm: Engine, tmp_path: Path) -> None:
    """No folder there, and a server that was started without the right to load."""
    with pytest.raises(PlanError, match="No adapter found(.|\n)*ALLOW_RUNTIME_LORA_UPDATING=True; (.|\n)*`mount`"):
        with client(vllm).adapter("rung-1", tmp_path):
            pass
    vllm.rules["status"] = {"/load_lora_adapter": 400}
    with pytest.raises(CheckpointError, match="does not load the adapter(.|\n)*--enable-lora"):
        with client(vllm).adapter("rung-1", tmp_path):
            pass


def test_paths_of_a_container(vllm: Engine, tmp_path: Path) -> None:
    server = client(vllm, mount=f"{tmp_path}:/data/runs")
    assert server.path_there(tmp_path / "a" / "sampler") == "/data/runs/a/sampler"
    assert client(vllm).path_there(tmp_path) == str(tmp_path.resolve())
    assert server.adapter_prefix(tmp_path / "a") != server.adapter_prefix(tmp_path / "b")
    with pytest.raises(ConfigError, match="does not see this folder(.|\n)*allowed: below"):
        server.path_there(tmp_path.parent)
