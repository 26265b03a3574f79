"""From record to ids: spans, stops, boundaries, lengths, and the gate that checks them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from chats import AT, GEMMA, LLAMA2, LLAMA3, REASONING, TEMPLATES, ZEPHYR, metaspace, record, with_template
from rung.config.data import LossOn
from rung.data.chat import ChatTemplate
from rung.data.template import PLAIN_TEMPLATE
from rung.data.tokenize import TokenizedDataset, preflight, tokenize_records
from rung.errors import ConfigError, DataError, GateError
from rung.types import Candidate, Example, Message, Record


def one(chat: ChatTemplate, row: Record, loss_on: LossOn = "answer") -> Example:
    tokenized = tokenize_records(chat, [row], loss_on=loss_on)
    assert preflight(chat, tokenized).failing == 0
    return tokenized.examples[0]


def learned(chat: ChatTemplate, example: Example) -> str:
    return chat.decode([example.ids[example.supervised].tolist()])[0]


@pytest.fixture(scope="module")
def chat(tiny_tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer)


def test_what_is_encoded_follows_the_length_of_a_chat(chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of its answers are learned: its pieces once, and pieces and whole once more to compare borders."""
    encode, seen = ChatTemplate._encode_texts, list[int]()

    def counted(self: ChatTemplate, texts: list[str]) -> list[list[int]]:
        seen.extend(map(len, texts))
        return encode(self, texts)

    monkeypatch.setattr(ChatTemplate, "_encode_texts", counted)
    rows = [record(*(f"turn {i}" for i in range(200))), record("q", "a")]
    made = tokenize_records(chat, rows, loss_on="assistant_turns").examples
    assert sum(seen) == 3 * sum(map(len, chat.decode([example.ids.tolist() for example in made])))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", ["Paris.", "two\nlines", "naïve 🙂 שלום", " x , y ."])
def test_supervised_ids_decode_to_answer_and_stop(
    tiny_tokenizer: PreTrainedTokenizerFast, name: str, answer: str
) -> None:
    template, stop = TEMPLATES[name]
    chat = ChatTemplate(with_template(tiny_tokenizer, template))
    row = record("q", "first", "r", answer, context="ctx")
    rendered = answer.strip() if name in ("llama3", "gemma") else answer
    lead = " " if name in ("plain", "llama2") else ""
    example = one(chat, row)
    assert learned(chat, example) == f"{lead}{rendered}{stop}"
    assert int(example.ids[-1]) == chat.stop_ids[0]
    both = one(chat, row, "assistant_turns")
    assert learned(chat, both) == f"{lead}first{stop}{lead}{rendered}{stop}"
    assert np.array_equal(example.ids, both.ids) or name in ("plain", "zephyr")
    everything = one(chat, row, "all")
    assert everything.supervised.tolist() == [False] + [True] * (len(everything) - 1)
    generated = example.ids[example.supervised].tolist() + [5, 6]
    assert chat.assistant_text(generated) == rendered


def test_prompt_of_training_is_the_prompt_of_inference(chat: ChatTemplate) -> None:
    row = record("q", "a", "r", "b", context="some context")
    example = one(chat, row)
    ids = chat.prompt_ids(row.messages[:-1], context=row.context)
    assert example.ids[: len(ids)].tolist() == ids
    assert not example.supervised[: len(ids)].any() and example.supervised[len(ids) :].all()
    prompt = chat.decode([chat.prompt_ids(row.messages[:1], context="c")])
    assert prompt == ["<|im_start|>user\nc\n\nq<|im_end|>\n<|im_start|>assistant\n"]


def test_pad_equal_to_eos_keeps_every_stop(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatTemplate(with_template(tiny_tokenizer, ZEPHYR, pad_token="</s>"))
    assert chat.tokenizer.pad_token_id == chat.tokenizer.eos_token_id
    example = one(chat, record("q", "a", "r", "b"), "assistant_turns")
    ends = np.flatnonzero(example.supervised & ~np.append(example.supervised[1:], False))
    assert [int(example.ids[i]) for i in ends] == [chat.tokenizer.eos_token_id] * 2


def test_stop_that_is_not_the_eos_is_supervised(chat: ChatTemplate) -> None:
    stop = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.stop_ids == (stop,) and stop != chat.tokenizer.eos_token_id
    example = one(chat, record("q", "a"))
    assert int(example.ids[-1]) == stop and bool(example.supervised[-1])


def test_tool_turns_with_a_stop_of_their_own(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatTemplate(with_template(tiny_tokenizer, LLAMA3))
    assert chat.decode([[i] for i in chat.stop_ids]) == ["<|eot_id|>", "<|eom_id|>"]
    call = '[{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]'
    turns = (
        Message("user", "q"),
        Message("assistant", "", tool_calls=call),
        Message("tool", "r", name="f"),
        Message("assistant", "a"),
    )
    tools = '[{"name": "f", "parameters": {"x": null}}]'
    example = one(chat, Record(turns, AT, tools=tools), "assistant_turns")
    assert learned(chat, example) == f"{call}<|eom_id|>a<|eot_id|>"
    plain = ChatTemplate(tiny_tokenizer, "plain")
    assert plain.decode([plain.prompt_ids(turns[:3], tools=tools)]) == [
        f"Tools: {tools}\n\nUser: q\nAssistant: {call}</s>\nTool: r\nAssistant:"
    ]


def test_foreign_tool_fields_do_not_leak(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = ChatTemplate(tiny_tokenizer, "plain")
    tools = [f'[{{"name": "{n}", "{n}": 1}}]' for n in ("f", "g")]
    texts = plain.decode([plain.prompt_ids([Message("user", "q")], tools=t) for t in tools])
    assert '"g"' not in texts[0] and "null" not in "".join(texts)


def test_rewritten_history_is_refused_for_all_turns_only(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatTemplate(with_template(tiny_tokenizer, REASONING))
    row = record("q", "<think>x</think>a", "r", "<think>y</think>b")
    assert learned(chat, one(chat, row)) == "<think>y</think>b<|im_end|>"
    with pytest.raises(DataError, match=r"d.jsonl line 3: turn 4: the template rewrites earlier(?s:.*)loss_on: answer"):
        tokenize_records(chat, [row], loss_on="assistant_turns")
    split = [record("q", "<think>x</think>a"), row]
    assert len(tokenize_records(chat, split).examples) == 2


def test_opening_that_the_template_does_not_keep_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    template = (tiny_tokenizer.chat_template or "").replace("assistant\n", "assistant\n<think>\n")
    chat = ChatTemplate(with_template(tiny_tokenizer, template))
    with pytest.raises(DataError, match=r"turn 2: the template opens this answer otherwise"):
        tokenize_records(chat, [record("q", "a")])


@pytest.mark.parametrize(
    ("written", "answer", "learned_text"),
    [
        ("m['content'].split('</think>')[-1]", "<think>x</think>a", None),  # reasoning is dropped
        ("m['content'].replace('colour', 'color')", "a colour", None),
        ("m['content'] | trim", " a\n", "a<|im_end|>"),  # white space is the template's
        ("'<think>\n\n</think>\n\n' + m['content']", "a", "<think>\n\n</think>\n\na<|im_end|>"),  # before every answer
    ],
)
def test_an_answer_that_the_template_changes_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, written: str, answer: str, learned_text: str | None
) -> None:
    own = "{% if m['role'] == 'assistant' %}{{ " + written + " }}{% else %}{{ m['content'] }}{% endif %}"
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}" + own + "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = ChatTemplate(with_template(tiny_tokenizer, template))
    if learned_text is None:
        with pytest.raises(DataError, match=r"d.jsonl line 3: turn 2: the template writes another answer"):
            tokenize_records(chat, [record("q", answer)])
        return
    assert learned(chat, one(chat, record("q", answer))) == learned_text


def test_template_that_raises_names_row_and_message(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatTemplate(with_template(tiny_tokenizer, GEMMA))
    row = Record((Message("system", "s"), Message("user", "q"), Message("assistant", "a")), AT)
    with pytest.raises(DataError, match=r"d.jsonl line 3(?s:.*)No system role"):
        tokenize_records(chat, [row])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "without a stop token"),
        ("{{ eos_token }}", "leaves answers out"),
        ("{% for", "the chat template is broken"),
        ("{{ bos_token + bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}", "two BOS"),
    ],
)
def test_unusable_templates_are_config_errors(
    tiny_tokenizer: PreTrainedTokenizerFast, template: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ChatTemplate(with_template(tiny_tokenizer, template))


def test_template_choice(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="set model.template: plain"):
        ChatTemplate(bare)
    assert ChatTemplate(bare, "plain").template == PLAIN_TEMPLATE and bare.chat_template is None
    file = tmp_path / "t.jinja"
    file.write_text(ZEPHYR)
    assert ChatTemplate(bare, str(file)).template == ZEPHYR
    with pytest.raises(ConfigError, match="no such template"):
        ChatTemplate(bare, str(tmp_path / "other.jinja"))
    bare.chat_template = {"default": GEMMA, "tool_use": ZEPHYR}
    assert ChatTemplate(bare).template == GEMMA
    bare.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-text token"):
        ChatTemplate(bare, "plain")
    with pytest.raises(ConfigError, match="not a fast one"):
        ChatTemplate(object())  # type: ignore[arg-type]


def test_exactly_one_bos(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    adding = with_template(tiny_tokenizer, LLAMA3)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert adding("a")["input_ids"][0] == 1
    row, text = record("q", "a"), Record((), AT, text="some text")
    for chat in (ChatTemplate(adding), ChatTemplate(adding, "plain")):
        for ids in (chat.prompt_ids(row.messages[:1]), one(chat, row).ids.tolist(), one(chat, text).ids.tolist()):
            assert ids[0] == 1 and ids.count(1) == 1
    with pytest.raises(DataError, match="two BOS"):
        tokenize_records(ChatTemplate(adding).with_control_tokens("keep"), [replace(text, text="<s><s>x")])
    assert 1 not in ChatTemplate(tiny_tokenizer, "plain").prompt_ids(row.messages[:1])


def test_plain_text_is_learned_whole(chat: ChatTemplate) -> None:
    row = Record((), AT, text="🙂 any text", weight=2.0, group="g")
    for loss_on in ("answer", "all"):
        example = one(chat, row, loss_on)  # type: ignore[arg-type]
        assert chat.decode([example.ids.tolist()]) == ["🙂 any text</s>"]
        assert not example.supervised[0] and example.supervised[1:].all()
        assert (example.weight, example.group, example.source, example.ids.dtype) == (2.0, "g", AT, np.int32)


def test_a_stop_inside_an_answer_fails_preflight(chat: ChatTemplate) -> None:
    for loss_on in ("answer", "assistant_turns", "all"):
        with pytest.raises(GateError, match="the answer holds a stop token"):
            one(chat.with_control_tokens("keep"), record("q", "a <|im_end|> b"), loss_on)  # type: ignore[arg-type]


def broken(tokenized: TokenizedDataset, **change: Any) -> TokenizedDataset:
    return replace(tokenized, examples=(replace(tokenized.examples[0], **change),))


def test_preflight_finds_wrong_labels(chat: ChatTemplate) -> None:
    good = tokenize_records(chat, [record("q", "answer")])
    example = good.examples[0]
    no_stop = example.supervised.copy()
    no_stop[-1] = False
    late = example.supervised.copy()
    late[int(np.flatnonzero(late)[0])] = False
    ids = example.ids.copy()
    ids[-2] = 5
    for change, message in (
        ({"supervised": np.zeros_like(no_stop)}, "no supervised token"),
        ({"supervised": no_stop}, "does not end in a supervised stop"),
        ({"supervised": late}, "decodes to"),
        ({"ids": ids}, "decodes to"),
    ):
        with pytest.raises(GateError, match=f"1 of 1 rows(?s:.*)d.jsonl line 3: .*{message}"):
            preflight(chat, broken(good, **change))
    measured = preflight(chat, good)
    assert measured.to_json()["rows"] == 1 and measured.supervised_tokens == int(example.supervised.sum())


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, LLAMA2])
def test_vocabularies_that_write_a_space_of_their_own(scheme: str, template: str) -> None:
    chat = ChatTemplate(with_template(metaspace(scheme), template))
    row = record("what?", "it is", "a?", " it is a cat.")
    stop = "</s>" if template == PLAIN_TEMPLATE else " </s>"
    tokenized = tokenize_records(chat, [row], loss_on="assistant_turns")
    assert preflight(chat, tokenized).rows == 1
    assert tokenized.expected_texts == (f" it is{stop}  it is a cat.{stop}",)
    example = one(chat, row)
    assert chat.assistant_text(example.ids[example.supervised].tolist()) == " it is a cat."


def test_a_normalizing_tokenizer_is_reported_not_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    composing = copy.deepcopy(tiny_tokenizer)
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    chat = ChatTemplate(composing)
    rows = [record("q", "cafe\u0301"), record("q", "caf\u00e9")]
    assert preflight(chat, tokenize_records(chat, rows)).normalized == 1


def test_tools_that_a_template_never_shows_are_refused(chat: ChatTemplate) -> None:
    with pytest.raises(DataError, match=r"line 3: the row has tools(?s:.*)model.template: plain"):
        tokenize_records(chat, [record("q", "a", tools='[{"name": "f"}]')])
    call = Message("assistant", "", tool_calls='[{"type": "function", "function": {"name": "f", "arguments": {}}}]')
    with pytest.raises(DataError, match="the row has tool_calls"):
        tokenize_records(chat, [Record((Message("user", "q"), call), AT)])


def test_boundary_differences_are_counted(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    merging = "{% for m in messages %}{{ m['content'] + ('</s>' if m['role'] == 'assistant' else '') }}{% endfor %}"
    chat = ChatTemplate(with_template(tiny_tokenizer, merging))
    tokenized = tokenize_records(chat, [record("th", "e"), record("?", "e")])
    assert (tokenized.columns.boundary_checked, tokenized.columns.boundary_differences) == (2, 1)
    assert tokenize_records(ChatTemplate(tiny_tokenizer), [record("th", "e")]).columns.boundary_differences == 0


def test_answers_of_a_row_share_a_prompt_that_would_merge(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """`th` and `e` are one token together: tokenized as one text, the two prompts would end in different ones."""
    merging = "{% for m in messages %}{{ m['content'] + ('</s>' if m['role'] == 'assistant' else '') }}{% endfor %}"
    chat = ChatTemplate(with_template(tiny_tokenizer, merging))
    row = record("what is th", "e", score=1.0, candidates=(Candidate("xyz", 0.0),))
    better, other = tokenize_records(chat, [row], with_candidates=True).examples
    prompt = chat.prompt_ids(row.messages[:1])
    for document, answer in ((better, "e"), (other, "xyz")):
        start = int(document.supervised.argmax())
        assert document.ids[:start].tolist() == prompt
        assert chat.decode([document.ids[start:]]) == [f"{answer}</s>"]
    assert len(chat.encode(["the"])[0]) < len(chat.encode(["th"])[0]) + len(chat.encode(["e"])[0])


def test_overflow_policies(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatTemplate(with_template(tiny_tokenizer, LLAMA3))
    rows = [record("q", "a"), *(record("word " * (40 + i), "the answer") for i in range(12))]
    with pytest.raises(DataError) as caught:
        tokenize_records(chat, rows, max_length=64)
    assert "12 of 13 documents" in str(caught.value) and "and 2 more" in str(caught.value)
    assert "tokens" in str(caught.value) and "data.overflow" in str(caught.value)
    dropped = tokenize_records(chat, rows, max_length=64, overflow="drop")
    assert (len(dropped.examples), len(dropped.columns.dropped), dropped.columns.rows["record"]) == (1, 12, [0])
    assert dropped.summary()["dropped"] == 12
    with pytest.raises(DataError, match="no document is left(?s:.*)12 of 12(?s:.*)raise data.max_length"):
        tokenize_records(chat, rows[1:], max_length=64, overflow="drop")
    for loss_on in ("answer", "assistant_turns", "all"):
        trimmed = tokenize_records(chat, rows, loss_on=loss_on, max_length=64, overflow="trim_prompt")  # type: ignore[arg-type]
        assert len(trimmed.columns.trimmed) == 12 and trimmed.lengths.max() == 64
        assert preflight(chat, trimmed).rows == 13
        for example in trimmed.examples:
            assert example.ids[0] == 1 and not example.supervised[0]
            assert chat.decode([example.ids.tolist()])[0].endswith(("answer<|eot_id|>", "a<|eot_id|>"))
    with pytest.raises(DataError, match="even without their prompt"):
        tokenize_records(chat, [record("q", "word " * 100)], max_length=64, overflow="trim_prompt")
    with pytest.raises(DataError, match="even without their prompt"):
        tokenize_records(chat, [Record((), AT, text="word " * 100)], max_length=64, overflow="trim_prompt")


def test_context_needs_a_user_turn(chat: ChatTemplate) -> None:
    with pytest.raises(DataError, match="no user turn"):
        chat.prompt_ids([Message("system", "s")], context="c")


def test_the_tokenizer_is_left_as_it_was(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    before = (
        tiny_tokenizer.backend_tokenizer.to_str(),
        tiny_tokenizer.chat_template,
        tiny_tokenizer.special_tokens_map,
    )
    one(ChatTemplate(tiny_tokenizer, "plain"), record("q", "a"))
    assert before == (
        tiny_tokenizer.backend_tokenizer.to_str(),
        tiny_tokenizer.chat_template,
        tiny_tokenizer.special_tokens_map,
    )


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(TEXT, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0))
def test_spans_round_trip_over_unicode(chat: ChatTemplate, contents: list[str]) -> None:
    row = record(*contents)
    example = one(chat, row, "assistant_turns")
    assert learned(chat, example) == "".join(f"{answer}<|im_end|>" for answer in contents[1::2])
    last = one(chat, row)
    assert learned(chat, last) == f"{contents[-1]}<|im_end|>"
    assert chat.assistant_text(last.ids[last.supervised].tolist()) == contents[-1]
