"""Tool calls in the forms that templates write: read back, compared as calls, refused where no form is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from chats import AT, with_template
from rung.data.chat import ChatTemplate
from rung.data.tool_calls import canonical_calls, probe_calls, tool_call_reader
from rung.errors import ConfigError, DataError
from rung.types import Message, Record

TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
END = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CALLS = {
    # Qwen 2.5 and Hermes
    "hermes": "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}"
    "{{ c.function | tojson }}{{ '\n</tool_call>' }}{% endfor %}",
    # Llama 3.1
    "llama": '{% for c in m.tool_calls or [] %}{{ \'{"name": "\' + c.function.name + \'", "parameters": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}' }}{% endfor %}",
    # Mistral 7B v0.3
    "mistral": "{% if m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}{{ ']' }}{% endif %}",
    # Mistral Small 3.2
    "mistral names": "{% for c in m.tool_calls or [] %}{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' }}"
    "{{ c.function.arguments | tojson }}{% endfor %}",
    # DeepSeek V3
    "deepseek": "{% if m.tool_calls %}{{ '<calls>' }}{% for c in m.tool_calls %}"
    "{{ '<call>function<sep>' + c.function.name + '\n```json\n' }}"
    "{{ c.function.arguments | tojson }}{{ '\n```</call>' }}{% endfor %}{{ '</calls>' }}{% endif %}",
    # Qwen 3 Coder
    "xml": "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n<function=' + c.function.name + '>\n' }}"
    "{% for k, v in c.function.arguments.items() %}{{ '<parameter=' + k + '>\n' }}"
    "{{ v if v is string else v | tojson }}{{ '\n</parameter>\n' }}{% endfor %}"
    "{{ '</function>\n</tool_call>' }}{% endfor %}",
    # GLM 4.5
    "glm": "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>' + c.function.name + '\n' }}"
    "{% for k, v in c.function.arguments.items() %}{{ '<arg_key>' + k + '</arg_key>\n<arg_value>' }}"
    "{{ v if v is string else v | tojson }}{{ '</arg_value>\n' }}{% endfor %}{{ '</tool_call>' }}{% endfor %}",
}


def calls(*functions: tuple[str, dict[str, Any]]) -> str:
    return json.dumps([{"type": "function", "function": {"name": n, "arguments": a}} for n, a in functions])


def record(tool_calls: str, content: str = "") -> Record:
    return Record((Message("user", "weather?"), Message("assistant", content, tool_calls)), AT)


def chat_of(tokenizer: PreTrainedTokenizerFast, form: str) -> ChatTemplate:
    return ChatTemplate(with_template(tokenizer, TURNS + CALLS.get(form, form) + END))


@pytest.mark.parametrize("form", CALLS)
def test_the_right_call_scores_1_and_nothing_0(form: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A right call scored 0 and an empty answer 1: the expected text of such a row was empty."""
    chat = chat_of(tiny_tokenizer, form)
    arguments = {"city": "Berlin, Mitte", "days": 3, "exact": True, "at": {"lat": 1.5, "tags": ["a", "b"]}}
    wanted = record(calls(("get_weather", arguments), ("noop", {"x": "y"})))
    expected = chat.expected_calls(wanted)

    def answer(tool_calls: str) -> str:
        return chat.split_conversation(record(tool_calls, "Let me look."), "answer")[-1].text

    turned = dict(reversed(arguments.items()))
    assert chat.canonical_calls(answer(calls(("noop", {"x": "y"}), ("get_weather", turned)))) == expected
    for wrong in (
        calls(("get_weather", arguments)),
        calls(("get_weather", {**arguments, "days": 4}), ("noop", {"x": "y"})),
        calls(("get_forecast", arguments), ("noop", {"x": "y"})),
        calls(("get_weather", arguments), ("noop", {"x": "y", "z": 1})),
    ):
        assert chat.canonical_calls(answer(wrong)) not in (expected, None)
    assert chat.canonical_calls("") is None and chat.canonical_calls("I cannot call get_weather {here}.") is None
    assert chat.expected_calls(Record((Message("user", "q"), Message("assistant", "a")), AT)) is None


def test_a_form_that_cannot_be_read_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Only the names are written: two calls with other arguments would be equal."""
    names = "{% for c in m.tool_calls or [] %}{{ 'call ' + c.function.name }}{% endfor %}"
    chat = chat_of(tiny_tokenizer, names)
    assert not chat.reads_tool_calls
    with pytest.raises(ConfigError, match="cannot be read"):
        chat.expected_calls(record(calls(("f", {"x": 1}))))


def test_calls_that_the_template_does_not_keep_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = chat_of(tiny_tokenizer, "glm")
    with pytest.raises(DataError, match="cannot be read back"):
        chat.expected_calls(record(calls(("f", {"x": "a</arg_value>\n<arg_key>y"}))))


def test_text_beside_a_call_that_the_template_drops_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Preflight let every row with a call pass."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}" + END
    )
    chat = ChatTemplate(with_template(tiny_tokenizer, template))
    assert chat.split_conversation(record(calls(("f", {}))), "answer")
    with pytest.raises(DataError, match="another answer"):
        chat.split_conversation(record(calls(("f", {})), "Let me look."), "answer")


def test_canonical_form() -> None:
    first = [{"name": "f", "arguments": {"a": 1.0, "b": [1, {"c": 2, "d": 3}]}}, {"name": "e", "arguments": {}}]
    second = [{"arguments": {}, "name": "e"}, {"name": "f", "arguments": {"b": [1, {"d": 3, "c": 2.0}], "a": 1}}]
    assert canonical_calls(first) == canonical_calls(second)
    assert canonical_calls(first[:1]) != canonical_calls([{"name": "f", "arguments": {"a": "1", "b": []}}])


# Qwen 3 writes an empty thought before the first call
AFTER_A_THOUGHT = "{% if m.tool_calls %}{{ '<think>\n\n</think>\n' }}{% endif %}" + CALLS["hermes"]


def test_what_stands_before_the_first_call_alone_is_no_mark(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = chat_of(tiny_tokenizer, AFTER_A_THOUGHT)
    wanted = record(calls(("f", {"x": 1}), ("g", {})))
    expected = chat.expected_calls(wanted)
    texts = ('{"name": "g", "arguments": {}}', '{"name": "f", "arguments": {"x": 1}}')
    without_thought = "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
    assert chat.canonical_calls(without_thought) == expected


ONE_CALL = (
    "{% for c in m.tool_calls or [] %}{% if loop.length > 1 %}{{ raise_exception('single calls only') }}{% endif %}"
    '{{ \'{"name": "\' + c.function.name + \'", "parameters": \' }}'
    "{{ (c.function.arguments | tojson) + '}' }}{% endfor %}"
)
FIRST_CALL = (
    "{% if m.tool_calls %}{{ '<|channel|>commentary to=functions.' + m.tool_calls[0].function.name }}"
    "{{ ' <|constrain|>json<|message|>' + (m.tool_calls[0].function.arguments | tojson) }}{% endif %}"
)
WITH_IDS = (
    "{% for c in m.tool_calls or [] %}{{ '[TOOL_CALLS]' + c.function.name }}"
    "{{ '[CALL_ID]' + (c.id or 'none') + '[ARGS]' }}"
    "{{ c.function.arguments | tojson }}{% endfor %}"
)
AS_TEXT = (
    "{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + '<sep>' + c.function.arguments + '</call>' }}"
    "{% endfor %}"
)
PYTHON_VALUES = CALLS["xml"].replace("v | tojson", "v | string")


@pytest.mark.parametrize("form", [ONE_CALL, FIRST_CALL, WITH_IDS, AS_TEXT, PYTHON_VALUES])
def test_forms_of_real_templates(form: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Llama 3.1 refuses a second call, gpt-oss leaves it out, Mistral Small writes ids, DeepSeek adds text, Qwen 3.5
    writes `True`."""
    chat = chat_of(tiny_tokenizer, form)
    wanted = record(calls(("f", {"x": "a", "exact": True})))
    answer = chat.split_conversation(record(calls(("f", {"exact": True, "x": "a"}))), "answer")[-1].text
    assert chat.canonical_calls(answer) == chat.expected_calls(wanted)
    assert chat.canonical_calls(answer.replace("a", "b")) != chat.expected_calls(wanted)


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "f", "arguments": {"x": 1}}',
        '<tool_call>\n{"name": "f", "parameters": {"x": 1}}\n</tool_call>',
        'I could call {"name": "f", "arguments": {"x": 1}} but will not.',
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}',
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>\n{"name": "f", "argum',
        '<tool_call>\n{"name": "f", "arguments": {"x": 1\n</tool_call>',
    ],
)
def test_only_the_form_of_the_template_is_a_call(answer: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """No server would run these: a reward for them would teach calls without their tags."""
    chat = chat_of(tiny_tokenizer, "hermes")
    expected = chat.expected_calls(record(calls(("f", {"x": 1}))))
    assert chat.canonical_calls('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>') == expected
    assert chat.canonical_calls(answer) != expected


def test_a_hostile_answer_takes_no_time() -> None:
    """100,000 opening brackets: each could begin a value."""
    read = tool_call_reader(*(probe_calls(count) for count in (1, 2)))
    assert read is not None
    for text in ("[" * 100_000, '{"name": ' * 20_000, "{" * 50_000 + '"'):
        assert read(text) == []


def test_an_opened_call_with_other_names_is_a_wrong_call_and_not_none(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """`parameters` where the template writes `arguments`: a server finds no arguments."""
    chat = chat_of(tiny_tokenizer, "hermes")
    called = '<tool_call>\n{"name": "f", "%s": {"x": 1}}\n</tool_call>'
    assert chat.canonical_calls(called % "arguments") == '[{"arguments": {"x": 1}, "name": "f"}]'
    wrong = chat.canonical_calls(called % "parameters")
    assert wrong is not None and wrong != chat.canonical_calls(called % "arguments")
