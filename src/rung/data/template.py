"""The text of a chat template: where it comes from, its variables and date, and the turns that it is given.

Variables and the date are written into the template itself, so that a published tokenizer renders what the training
did, in any server and on any day. The price is that a call of `strftime_now` must have its format as literal text.
`ChatTemplate` renders with the result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rung.config.data import LossOn
from rung.errors import ConfigError, DataError
from rung.types import Message, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN_TEMPLATE = """\
{%- if tools -%}{{ 'Tools: ' + (tools | tojson) + '\\n\\n' }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' -%}{{ 'User: ' + message.content + '\\n' }}
{%- elif message.role == 'tool' -%}{{ 'Tool: ' + message.content + '\\n' }}
{%- else -%}{{ 'Assistant: ' }}
{%- if message.reasoning_content -%}{{ '<think>' + message.reasoning_content + '</think>\\n' }}{%- endif -%}
{{ message.content }}
{%- if message.tool_calls -%}{{ message.tool_calls | tojson }}{%- endif -%}{{ eos_token + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""
"""`model.template: plain`, for base models without a template. The stop is the tokenizer's end-of-text token."""

DEFAULT_DATE = date(2024, 7, 26)
"""Date in templates that write today's: the fallback of Meta's template of Llama 3.1."""
_DATE_CALL = re.compile(r"strftime_now\(\s*(?:'(?P<single>[^'\\]*)'|\"(?P<double>[^\"\\]*)\")\s*\)")
_DATE_FUNCTION = re.compile(r"strftime_now\s*\(")
_DATE_TEST = re.compile(r"strftime_now\s+is\s+defined")
RENDERER_NAMES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})
"""Variables of a template that are not settings."""
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names of the reasoning of a turn, in rows and in templates: Qwen and GLM, gpt-oss, and others."""


def read_template(tokenizer: PreTrainedTokenizerFast, choice: str, *, adds_bos: bool) -> str:
    """The Jinja text of `auto` (the tokenizer's own), `plain`, or a .jinja file. Raises `ConfigError` without one."""
    if choice == "plain":
        if tokenizer.eos_token is None:
            summary = "the tokenizer has no end-of-text token to stop at"
            raise ConfigError(summary, where="model.template", given=choice)
        # the model was pretrained with a BOS only where its tokenizer adds one
        return ("{{- bos_token -}}\n" if adds_bos else "") + PLAIN_TEMPLATE
    if choice == "auto":
        tokenizer_template = tokenizer.chat_template
        if isinstance(tokenizer_template, dict):
            tokenizer_template = tokenizer_template.get("default")
        if tokenizer_template:
            return str(tokenizer_template)
        summary, allowed = "the tokenizer has no chat template", "auto, plain, or a .jinja file"
        hint = "set model.template: plain"
        raise ConfigError(summary, where="model.template", given=choice, allowed=allowed, hint=hint)
    if not choice.endswith(".jinja") or not Path(choice).is_file():
        allowed = "auto, plain, or an existing .jinja file"
        raise ConfigError("no such template", where="model.template", given=choice, allowed=allowed)
    return Path(choice).read_text(encoding="utf-8")


def with_variables(template: str, variables: Mapping[str, Any]) -> str:
    """The template with values of its variables, such as `enable_thinking: false`, set at its beginning.

    Raises `ConfigError` for a name that the template never reads, and for one that it was given before.
    """
    variables = {n: v for n, v in variables.items() if f"{_assignment(n)} {_literal(v)} %}}" not in template}
    for name in variables:
        where = f"model.template_kwargs.{name}"
        if name in RENDERER_NAMES:
            raise ConfigError("this is set by what is rendered, not by a config", where=where, given=name)
        if template.startswith(_assignment(name)) or ("}" + _assignment(name)) in template:
            summary = "this template has another value for it already, from the run that it was trained in"
            raise ConfigError(summary, where=where, hint="leave it out, or name the base of that run")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ConfigError("the chat template never reads it", where=where, given=name)
    if not variables:
        return template
    assignments = "".join(f"{_assignment(name)} {_literal(value)} %}}" for name, value in variables.items())
    # transformers removes a newline after a block: without the empty output a template would lose its first one
    return assignments + ("{{ '' }}" if template.startswith("\n") else "") + template


def with_fixed_date(template: str, day: date | None) -> str:
    """The template with `day` (default: `DEFAULT_DATE`) in place of today's date, which would change overnight.

    Raises `ConfigError` for a date that the template never writes, and for a call that cannot be replaced.
    """
    if not _DATE_FUNCTION.search(template):
        if day is not None:
            raise ConfigError("the chat template writes no date", where="model.template_date", given=day)
        return template
    fixed = day or DEFAULT_DATE
    text = _DATE_CALL.sub(lambda m: _literal(fixed.strftime(m["single"] or m["double"] or "")), template)
    if _DATE_FUNCTION.search(text):
        summary = "the chat template asks for today's date in a way that cannot be fixed, so prompts would change daily"
        hint = "set model.template to a .jinja file with a date in it"
        raise ConfigError(summary, where="model.template", hint=hint)
    # the function no longer matters; servers without it must take the same branch
    return _DATE_TEST.sub("true", text)


def _assignment(name: str) -> str:
    return f"{{%- set {name} ="


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(name))}: {_literal(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    # not as escapes: Jinja would read half of a character beyond 16 bits
    return json.dumps(value, ensure_ascii=False)


def for_template(message: Message) -> dict[str, Any]:
    """A turn in the form that chat templates expect."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = json.loads(message.tool_calls)
    if message.reasoning:
        turn |= dict.fromkeys(REASONING_FIELDS, message.reasoning)
    optional = {"name": message.name, "tool_call_id": message.tool_call_id}
    return turn | {name: value for name, value in optional.items() if value}


def with_arguments_as_text(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn whose tool calls have their arguments as JSON text, for templates that add them to text."""
    if "tool_calls" not in turn:
        return turn

    def as_text(function: dict[str, Any]) -> dict[str, Any]:
        return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}

    return {**turn, "tool_calls": [{**call, "function": as_text(call["function"])} for call in turn["tool_calls"]]}


def renders_unchanged(rendered: str, message: Message, answer_prefix: str) -> bool:
    """Whether a template wrote the answer of the row unchanged, ignoring white space.

    `answer_prefix` is what it writes before every answer. Tool calls and reasoning have forms of their own; the text of
    the answer, the reasoning and the names of the called functions must all be there.
    """
    # white space is ignored because many templates strip answers
    rendered, content, prefix = ("".join(text.split()) for text in (rendered, message.content, answer_prefix))
    if not message.tool_calls and not message.reasoning:
        return rendered in (content, prefix + content)
    parts = [content, "".join((message.reasoning or "").split())]
    if message.tool_calls:
        parts += ["".join(call["function"]["name"].split()) for call in json.loads(message.tool_calls)]
    return all(part in rendered for part in parts)


def unstable_template_error(source: Source, turn: int, loss_on: LossOn, *, rewrites_history: bool) -> DataError:
    """The error for a template whose training text differs from its inference text."""
    fault = "opens this answer otherwise than it writes it"
    if rewrites_history:
        fault = "rewrites earlier turns when a later one comes"
    hint = "set model.template to a .jinja file that keeps the history as it was generated"
    if not rewrites_history:
        hint += ", give the rows their reasoning (reasoning_content), or change model.template_kwargs"
    if loss_on == "assistant_turns":
        hint = f"set data.loss_on: answer, or give each turn a row of its own; or {hint}"
    summary = f"turn {turn + 1}: the template {fault}, so the training text is not what the model will see"
    return DataError(summary, where=str(source), hint=hint)


def is_greeting(turns: Sequence[Message], i: int) -> bool:
    """Whether a turn is an answer before the first question."""
    before = turns[:i]
    return i < len(turns) and turns[i].role == "assistant" and all(turn.role == "system" for turn in before)


def greeting_error(source: Source) -> DataError:
    """The error for a greeting that is to be learned or kept from it, where the template hides its beginning."""
    summary = "the template does not show where the answer before the first question begins, so it cannot be learned"
    hint = "set data.loss_on: answer, which learns the last answer alone, or leave the turn out"
    return DataError(summary, where=str(source), hint=hint)


def rewritten_answer_error(source: Source, turn: int, rendered: str) -> DataError:
    """The error for an answer that a template changes."""
    summary = f"turn {turn + 1}: the template writes another answer than the row has"
    hint = (
        "set model.template to a .jinja file that keeps answers whole, with the text beside tool calls and the "
        "reasoning, or change the rows"
    )
    return DataError(summary, where=str(source), given=repr(rendered), hint=hint)
