"""Ids beyond the vocabulary stand where they should in every template, and nothing else changes."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from chats import AT, REASONING, TEMPLATES, metaspace, record, with_template
from rung.config.method import PTuningConfig, front_virtual_tokens, inserted_token_ids
from rung.data.chat import ChatTemplate
from rung.data.prompt_positions import MARKS, PromptPositions
from rung.data.template import PLAIN_TEMPLATE
from rung.data.tokenize import preflight, tokenize_records
from rung.errors import DataError
from rung.types import Message, Record

USER, ASSISTANT = (320, 321), (322,)
BOTH = PromptPositions({"user": USER, "assistant": ASSISTANT})


def real(ids: list[int]) -> list[int]:
    return [i for i in ids if i < 320]


@pytest.mark.parametrize("name", TEMPLATES)
def test_they_stand_before_the_words_of_each_turn(tiny_tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    tokenizer = with_template(tiny_tokenizer, TEMPLATES[name][0])
    plain, chat = ChatTemplate(tokenizer), ChatTemplate(tokenizer, positions=BOTH)
    row = record("first words", "first answer", "more words", "last answer", context="given")
    (example,) = tokenize_records(chat, [row], loss_on="answer").examples
    ids = example.ids.tolist()
    assert plain.decode([real(ids)]) == plain.decode([tokenize_records(plain, [row]).examples[0].ids.tolist()])
    places = [i for i, token in enumerate(ids) if token == USER[0]]
    assert [ids[i : i + 2] for i in places] == [list(USER)] * 2
    after = [plain.decode([real(ids[i:])], mid_document=True)[0].lstrip() for i in places]
    assert after[0].startswith("given\n\nfirst words") and after[1].startswith("more words")
    answers = [i for i, token in enumerate(ids) if token == ASSISTANT[0]]
    after = [plain.decode([real(ids[i:])], mid_document=True)[0].lstrip() for i in answers]
    assert after[0].startswith("first answer") and after[1].startswith("last answer")
    assert bool(example.supervised[answers[1] + 1]) and not example.supervised[: answers[1] + 1].any()


@pytest.mark.parametrize("loss_on", ["answer", "assistant_turns", "all"])
def test_a_prompt_asks_as_training_read(tiny_tokenizer: PreTrainedTokenizerFast, loss_on: str) -> None:
    chat = ChatTemplate(tiny_tokenizer, positions=BOTH)
    row = record("a", "b", "c", "d")
    tokenized = tokenize_records(chat, [row], loss_on=loss_on)  # type: ignore[arg-type]
    assert preflight(chat, tokenized).failing == 0
    (example,) = tokenized.examples
    prompt = chat.prompt_ids(row.messages[:-1])
    assert prompt == example.ids[: len(prompt)].tolist() and prompt[-1] == ASSISTANT[0]
    assert (example.ids[example.supervised] < 320).all()
    assert not set("".join(MARKS.values())) & set(chat.decode([[i for i in prompt if i < 320]])[0])


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_words_behind_them_are_encoded_as_within_a_text(scheme: str) -> None:
    """SentencePiece writes a space of its own before a text, which stands in no text here."""
    tokenizer, question = with_template(metaspace(scheme), PLAIN_TEMPLATE), [Message("user", "what is it?")]
    plain, chat = ChatTemplate(tokenizer), ChatTemplate(tokenizer, positions=BOTH)
    assert plain.decode([real(chat.prompt_ids(question))])[0] == plain.decode([plain.prompt_ids(question)])[0]


def test_what_cannot_be_placed_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatTemplate(tiny_tokenizer, positions=BOTH)
    with pytest.raises(DataError, match="FDD0"):
        tokenize_records(chat, [record("a \ufdd0", "b")])
    with pytest.raises(DataError, match="plain text"):
        tokenize_records(chat, [Record((), AT, text="words")])
    losing = with_template(tiny_tokenizer, REASONING)  # takes a turn's beginning for thoughts
    with pytest.raises(DataError, match="leaves out"):
        tokenize_records(ChatTemplate(losing, positions=BOTH), [record("hm </think> a", "b")])


def test_another_place_is_another_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    found = {
        ChatTemplate(tiny_tokenizer, positions=i).identity() for i in (None, BOTH, PromptPositions({"user": USER}))
    }
    assert len(found) == 3


def test_a_spec_names_its_ids() -> None:
    config = PTuningConfig(virtual_tokens=6, positions={"front": 1, "user": 2, "assistant": 3})  # type: ignore[arg-type]
    assert front_virtual_tokens(config) == 1 and inserted_token_ids(config, 50) == {
        "user": (50, 51),
        "assistant": (52, 53, 54),
    }
    assert front_virtual_tokens(PTuningConfig(virtual_tokens=6)) == 6 and inserted_token_ids(PTuningConfig(), 50) == {}


def test_what_is_too_long_loses_words_and_never_virtual_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatTemplate(tiny_tokenizer, positions=BOTH)
    long = record("word " * 60, "a")
    tokenized = tokenize_records(chat, [long], max_length=40, overflow="trim_prompt")
    ids = tokenized.examples[0].ids.tolist()
    assert len(ids) == 40 and [i for i in ids if i >= 320] == [*USER, *ASSISTANT]
    assert preflight(chat, tokenized).failing == 0
