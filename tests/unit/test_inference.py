"""One way to ask, one way to choose, one journal."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from builders import policy_of
from models import tiny_model
from rung.data.chat import ChatTemplate
from rung.errors import CheckpointError
from rung.inference.ask import Answer, Conversation, Reply
from rung.inference.choose import choose, max_prompt_tokens
from rung.inference.journal import Journal, request_key
from rung.inference.local_model import LocalModel
from rung.inference.options import named_logprobs, named_option, option_logprobs
from rung.models.generate import Sampling
from rung.types import Message


def test_what_was_made_is_there_after_a_stop_and_a_torn_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "made.journal"
    journal = Journal(path, {"n": 3})
    journal.add("0", [1, "ä"])
    journal.add("1", None)
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"key": "2", "val')
    again = Journal(path, {"n": 3})
    assert again.results == {"0": [1, "ä"], "1": None}
    again.add("2", 0.1)
    again.close()
    with closing(Journal(path, {"n": 3})) as last:
        assert last.results["2"] == 0.1
    assert len(path.read_text().splitlines()) == 4


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "made.journal"
    Journal(path, {"n": 3}).close()
    with pytest.raises(CheckpointError, match="belongs to a different request"):
        Journal(path, {"n": 4})
    for text in ("hello\n", '{"asked": 1}\n[1]\n', "3\n"):
        path.write_text(text)
        with pytest.raises(CheckpointError):
            Journal(path, {"n": 3})
    path.write_text('{"asked": "half')
    Journal(path, {"n": 3}).remove()
    assert not path.exists()


def test_keys_depend_on_everything_that_was_asked() -> None:
    keys = [request_key("m", {"a": 1, "b": 2}), request_key("m", {"b": 2, "a": 1}), request_key("m", {"a": 1, "b": 3})]
    assert keys[0] == keys[1] != keys[2]
    assert request_key("a", "b") != request_key("ab") != request_key(["a", "b"])


def test_a_reply_survives_the_journal(tmp_path: Path) -> None:
    reply = Reply((Answer("ä\n", True), Answer("", False)), 7, None, 0.25)
    with closing(Journal(tmp_path / "j", {})) as journal:
        journal.add("k", reply.to_json())
    with closing(Journal(tmp_path / "j", {})) as journal:
        assert Reply.from_json(journal.results["k"]) == reply


def test_options_are_scored_as_each_alone_would_be() -> None:
    """Options of several tokens, prompts that share a beginning, and one without room."""
    model = tiny_model(max_position_embeddings=24).double()
    policy = policy_of(model)
    prompts, options = [[5, 6, 7], [5, 6], [9] * 22, [5, 6, 7, 8, 9]], [[1, 2, 3], [4], [1, 5]]
    updates: list[int] = []
    with torch.no_grad():
        logprobs_PC = choose(policy, prompts, options, updates.append)
        for p, row in zip(prompts, logprobs_PC, strict=True):
            for option, value in zip(options, row, strict=True):
                if len(p) + 3 > 24:
                    assert value != value
                    continue
                logits = model(torch.tensor([[*p, *option]])).logits[0].log_softmax(-1)
                expected = sum(float(logits[len(p) - 1 + k, token]) for k, token in enumerate(option))
                assert value == pytest.approx(expected, abs=1e-10)
    assert max_prompt_tokens(policy, options) == 21 and sum(updates) == 3
    assert choose(policy, [], options).shape == (0, 3)


def test_a_local_model_answers_in_order_and_from_the_journal(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The second call computes nothing; what cannot be answered is a failure by name."""
    policy, chat = policy_of(tiny_model(max_position_embeddings=128)), ChatTemplate(tiny_tokenizer)
    model = LocalModel(policy, chat, ["w"])
    texts = ["a b", "word " * 300, "c", "a b"]
    conversations = [Conversation((Message("user", text),)) for text in texts]
    sampling = Sampling(5, 1.0, 3, 2)
    with closing(Journal(tmp_path / "j", model.identity)) as journal:
        replies, failures = model.ask(conversations, sampling, journal)
        size = journal.path.stat().st_size
        policy.model.forward = None  # type: ignore[assignment]
        again, _ = model.ask(conversations, sampling, journal)
        assert journal.path.stat().st_size == size
    assert [f.index for f in failures] == [1] and "before an answer" in failures[0].reason
    assert again == replies and [reply is None for reply in replies] == [False, True, False, False]
    first = replies[0]
    assert (
        first is not None
        and len(first.answers) == 2
        and first.prompt_tokens == len(chat.prompt_ids(conversations[0].turns))
    )
    assert first.answer_tokens is not None and 2 <= first.answer_tokens <= 12 and first.seconds > 0
    assert json.loads(json.dumps(model.identity)) == {"weights": ["w"], "stop_texts": []}


def test_choices_are_normalized_and_kept(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Probabilities of whole documents, in float64; the second call computes nothing; without room there is none."""
    model = tiny_model(max_position_embeddings=64).double()
    policy, chat = policy_of(model), ChatTemplate(tiny_tokenizer)
    local = LocalModel(policy, chat, ["w"])
    conversations = [Conversation((Message("user", text),)) for text in ("apples", "word " * 300, "box 7")]
    with closing(Journal(tmp_path / "j", local.identity)) as journal, torch.no_grad():
        logprobs_PC, replies = local.choose(conversations, ("A", "B"), journal, max_new_tokens=1)
        for row, conversation in zip(logprobs_PC[[0, 2]], (conversations[0], conversations[2]), strict=True):
            prompt = chat.prompt_ids(conversation.turns)
            sums = []
            for option in ("A", "B"):
                ids = chat.encode([option], mid_document=True)[0]
                logits = model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
                sums.append(sum(float(logits[len(prompt) - 1 + k, token]) for k, token in enumerate(ids)))
            assert row.tolist() == pytest.approx([x - np.logaddexp(*sums) for x in sums], abs=1e-10)
        assert np.isnan(logprobs_PC[1]).all() and np.exp(logprobs_PC[0]).sum() == pytest.approx(1.0)
        assert replies[1] is None and replies[0] is not None and replies[0].answer_tokens == 0
        assert replies[0].prompt_tokens == len(chat.prompt_ids(conversations[0].turns))
        policy.model.forward = None  # type: ignore[assignment]
        again = local.choose(conversations, ("A", "B"), journal, max_new_tokens=1).logprobs_PC
    assert np.array_equal(again, logprobs_PC, equal_nan=True)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("A", "A"),
        (" (B)\n", "B"),
        ("[[A]]", "A"),
        ("The answer is **B**.", "B"),
        ("A is polite. The better answer is (B)", "B"),
        ("(A), no: (B)", "B"),
        ("Both A and B are fine.", None),
        ("apples", None),
        ("", None),
        ("a", None),
    ],
)
def test_which_option_a_text_names(text: str, named: str | None) -> None:
    assert named_option(text, ("A", "B")) == named


def tokens(*listed: dict[str, float]) -> SimpleNamespace:
    """A choice with tokens: the first of each is the one that was drawn, the others are alternatives."""
    content = []
    for alternatives in listed:
        top = [SimpleNamespace(token=token, logprob=value) for token, value in alternatives.items()]
        content.append(SimpleNamespace(token=top[0].token, logprob=top[0].logprob, top_logprobs=top))
    return SimpleNamespace(logprobs=SimpleNamespace(content=content))


def test_probabilities_are_those_of_the_token_that_names_the_option() -> None:
    """Spellings of an option are added up; one that is not listed has at most what the listed ones leave."""
    choice = tokens({"A": -0.1, "The": -3.0}, {" B": -0.5, "(B": -2.0, "\u2581A": -1.5, "C": -6.0})
    assert named_logprobs(choice, "A: no, (B)", ("A", "B")) == pytest.approx((-1.5, np.logaddexp(-0.5, -2.0)))
    left = np.log(1 - np.exp(-0.1) - np.exp(-3.0))
    assert named_logprobs(tokens({"A": -0.1, "x": -3.0}), "A", ("A", "B")) == pytest.approx((-0.1, min(left, -3.0)))
    # an explanation behind the option names it with certainty; reasoning before it names both
    explained = tokens({"A": -0.6, "B": -0.8}, {".": 0.0, ",": -9.0}, {"A": -0.001, "B": -7.0})
    assert named_logprobs(explained, "A. A is better", ("A", "B")) == (-0.6, -0.8)
    reasoned = tokens({"<think>": 0.0}, {"B": -0.01, "A": -5.0}, {"</think>": 0.0}, {"A": -0.4, "B": -1.2})
    assert named_logprobs(reasoned, "<think>B</think>A", ("A", "B")) == (-0.4, -1.2)
    for nothing in (SimpleNamespace(), SimpleNamespace(logprobs=None), tokens({"x": -1.0}), tokens()):
        assert named_logprobs(nothing, "A", ("A", "B")) == ()
    # the token alone, or a value that is no number, says nothing of the other option
    assert named_logprobs(tokens({"A": -0.1}), "A", ("A", "B")) == ()
    for value in (None, "-0.1", float("nan"), float("-inf"), True):
        assert named_logprobs(tokens({"A": value, "B": -1.0}), "A", ("A", "B")) == ()  # type: ignore[dict-item]
    assert named_logprobs(choice, "no idea", ("A", "B")) == named_logprobs(choice, "(B)", ()) == ()
    row = option_logprobs(Reply((Answer("(B)", True, option_logprobs=(-1.5, -0.5)),)), ("A", "B"))
    assert np.exp(row).sum() == pytest.approx(1.0) and row[1] - row[0] == pytest.approx(1.0)
    assert option_logprobs(Reply((Answer("(B)", True),)), ("A", "B")) == [-np.inf, 0.0]
    assert np.isnan(option_logprobs(Reply((Answer("neither", True),)), ("A", "B"))).all()
    assert np.isnan(option_logprobs(None, ("A", "B"))).all()
