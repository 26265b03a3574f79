"""Ollama's template from the Jinja template, read by a small interpreter of Go's language as an independent oracle."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rung.errors import PlanError
from rung.exporting.ollama import modelfile, read_frames
from rung.types import Message

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "braces of Go's own": CHATML.replace("'<|im_end|>'", "'<{{>'"),
    # Qwen and SmolLM put a system turn of their own in front
    "default system": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    + CHATML,
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    # Gemma 2 refuses system turns and calls the assistant by another name
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "mistral, without system turns": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}"
        "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}"
        "{% endfor %}"
    ),
    "plain words": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n{% elif m['role'] == 'user' %}"
        "Instruct: {{ m['content'] }}\n{% else %}Output: {{ m['content'] }}<|end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Output:{% endif %}"
    ),
}


def jinja(template: str, turns: Sequence[Message], opens_answer: bool = True) -> str:
    def refuse(words: str) -> None:
        raise ValueError(words)

    environment = ImmutableSandboxedEnvironment()
    environment.globals["raise_exception"] = refuse
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    options = {"messages": messages, "add_generation_prompt": opens_answer, "bos_token": "<s>"}
    return environment.from_string(template).render(options)


def go(template: str, turns: Sequence[Message]) -> str:
    """What Go's text/template writes, for text, `.Content`, a literal, `if`, `else if`, `range` and `end`."""
    # text and actions in turn; an action at an odd place
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    system = any(turn.role == "system" for turn in turns)

    def block(i: int, turn: Message, *, shown: bool) -> tuple[str, int]:
        """The text up to the `end` of a block, and the place behind it; `else if` opens another branch of it."""
        text, active, taken = "", shown, shown
        while i < len(parts):
            part, i = parts[i], i + 1
            if i % 2:
                text += part * active
            elif part == "end":
                break
            elif part == ".Content":
                text += turn.content * active
            elif part == '"{{"':
                text += "{{" * active
            elif part == "range .Messages":
                text += "".join(block(i, each, shown=True)[0] for each in turns)
                i = block(i, turn, shown=False)[1]
            elif part.startswith("else if"):
                active = not taken and _holds(part.removeprefix("else "), turn, system)
                taken = taken or active
            else:
                body, i = block(i, turn, shown=active and _holds(part, turn, system))
                text += body
        return text, i

    return block(0, turns[0], shown=True)[0]


def _holds(condition: str, turn: Message, system: bool) -> bool:
    if condition == "if not .System":
        return not system
    return re.fullmatch(r'if eq \.Role "(\w+)"', condition)[1] == turn.role  # type: ignore[index]


USER, ANSWER, SYSTEM = Message("user", "How much?"), Message("assistant", "12 {{ x }}"), Message("system", "Brief.")
CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, ANSWER, USER], [SYSTEM, USER, ANSWER, USER, ANSWER, USER]]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_go_writes_what_jinja_writes(name: str, turns: list[Message]) -> None:
    bos = "<s>" if TEMPLATES[name].startswith("{{ bos_token }}") else None
    frames = read_frames(lambda *turns: jinja(TEMPLATES[name], *turns), bos)
    if turns[0].role == "system" and "system" not in frames.frames:
        return
    expected = jinja(TEMPLATES[name], turns)
    # llama.cpp puts BOS in front by itself
    assert go(frames.go_template(), turns) == frames.compose(turns) == expected.removeprefix(bos or "")


def test_gemma_has_no_frame_for_system_turns() -> None:
    frames = read_frames(lambda *turns: jinja(TEMPLATES["gemma"], *turns), "<s>")
    assert set(frames.frames) == {"user", "assistant"}
    assert frames.frames["assistant"] == ("<start_of_turn>model\n", "<end_of_turn>\n")


@pytest.mark.parametrize(
    "template",
    [
        # a turn that is repeated; numbered turns; content that is changed
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ messages[0]['content'] if loop.index == 2 }}"
        "{{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %}{{ m['content'] }}</s>{% endif %}{% endfor %}",
        "{% for m in messages %}{{ loop.index }} {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:",
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | upper }}\n{% endfor %}<assistant>",
    ],
)
def test_what_go_cannot_write_is_refused(template: str) -> None:
    with pytest.raises(PlanError, match="Ollama"):
        read_frames(lambda *turns: jinja(template, *turns), None)


def test_a_modelfile() -> None:
    frames = read_frames(lambda *turns: jinja(CHATML, *turns), None)
    lines = modelfile("m.gguf", frames, ["<|im_end|>", "\n"]).splitlines()
    assert lines[0] == "FROM ./m.gguf"
    assert lines[-3:] == ['PARAMETER stop "<|im_end|>"', 'PARAMETER stop "', '"']
    assert modelfile("m.gguf", frames, ['say "so"!']).endswith('PARAMETER stop """say "so"!"""\n')
    quoted = read_frames(lambda *turns: jinja(CHATML.replace("<|im_end|>", '"""'), *turns), None)
    with pytest.raises(PlanError, match="quotation"):
        modelfile("m.gguf", quoted, [])


def test_a_template_that_trims_is_said() -> None:
    """Go has no function for it; turns rarely have spaces at their ends."""
    trimming = CHATML.replace("m['content']", "(m['content'] | trim)")
    assert read_frames(lambda *turns: jinja(trimming, *turns), None).trims
    assert not read_frames(lambda *turns: jinja(CHATML, *turns), None).trims


def test_every_turn_has_its_own_end() -> None:
    """Where a template begins with a system turn of its own, the end of a turn is not the beginning of the next."""
    frames = read_frames(lambda *turns: jinja(TEMPLATES["default system"], *turns), None)
    assert frames.frames["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    assert frames.frames["assistant"] == ("<|im_start|>assistant\n", "<|im_end|>\n")
    assert frames.opening == "<|im_start|>assistant\n"
