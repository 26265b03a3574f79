"""What a chat template writes around an answer: its opening, its end and its stop tokens, read off probe conversations.

Nothing is configured per model: sentinels are rendered, and what stands around them is the template's. That works for
any template, also for those that write no stop because the token of the next role ends an answer (GLM), and for those
that open reasoning in the prompt and drop it from the history (DeepSeek). `ChatTemplate` calls `read_answer_form`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rung.data.parsed_answer import REASONING_TAGS
from rung.errors import ConfigError, DataError
from rung.types import Message

# A word no template writes by itself: its position in the rendered text shows where an answer stands.
SENTINEL = "RungSentinel"
REASONING_SENTINEL = "RungThought"
_NEXT_SENTINEL = "RungNext"
_CALL = '[{"type": "function", "id": "call00000", "function": {"name": "f", "arguments": {"x": "1"}}}]'
_QUESTION, _ANSWER = Message("user", "Q"), Message("assistant", SENTINEL)
_CALL_ANSWER = Message("assistant", "", tool_calls=_CALL)


class Render(Protocol):
    """`ChatTemplate._render`, as far as probes need it."""

    def __call__(self, messages: list[Message], *, generation: bool = False) -> str:
        """The turns, under `generation` with the opening of an answer. Raises `DataError` where a template refuses."""
        ...


class AnswerEnding(NamedTuple):
    """What a template writes after an answer: text before the stop, the stop, and text up to the next turn."""

    before_stop: str  # between the answer and the stop
    stop: str
    after_stop: str
    stop_id: int


@dataclass(frozen=True)
class AnswerForm:
    """What stands around an answer; without arguments, that of a template that is not known yet."""

    endings: tuple[AnswerEnding, ...] = ()
    """That of a plain answer, then that of tool calls where it differs."""
    opening: str = ""
    """The rendered prompt of a question, without white space at its end."""
    prefix: str = ""
    """What the template writes before every answer, behind the opening of the prompt."""
    next_role: Mapping[bool, str] | None = None
    """For a template that writes no stop: what follows an answer up to and with the token of the next role, for a
    plain answer (False) and for tool calls (True)."""
    dropped_opening: str = ""
    """Tag of reasoning, with its white space, that the prompt opens and the history does not keep."""
    frame_tokens: frozenset[str] = frozenset()
    """Control tokens that the template writes around plain turns."""

    @property
    def closed_reasoning(self) -> str:
        """The closing tag that belongs to `dropped_opening`."""
        return dict(REASONING_TAGS)[self.dropped_opening.strip()]

    def reopened(self, answer: str, reasoning: str | None) -> str:
        """An answer of the history as it stands behind a prompt that opens its reasoning.

        DeepSeek-R1 and Qwen 3 write `<think>`, a line break, reasoning, a line break, `</think>` and an empty line; an
        answer without reasoning has the empty block of Qwen 3.
        """
        return f"{reasoning or ''}\n{self.closed_reasoning}\n\n{answer}"


def read_answer_form(render: Render, stops: Mapping[str, int], end_ids: Collection[int], choice: str) -> AnswerForm:
    """The form of answers of a template; `stops` are the tokens that can be a stop, `end_ids` the model's own.

    Raises `ConfigError` for a template that leaves answers out, or ends them without a stop token.
    """
    try:
        opening, full = render([_QUESTION], generation=True), render([_QUESTION, _ANSWER])
    except DataError as error:
        summary = f"the chat template is broken: {error.summary}"
        raise ConfigError(summary, where="model.template", given=choice) from error
    body, sentinel, tail = full.rpartition(SENTINEL)
    if not sentinel:
        raise _no_stop_error("leaves answers out", tail or choice)
    endings, next_role = _endings(render, stops, tail), None
    if not endings:
        endings, next_role = _endings_by_next_role(render, stops, end_ids, tail)
    tags = {tag for pair in REASONING_TAGS for tag in pair}
    return AnswerForm(
        endings=tuple(endings),
        opening=opening.rstrip(),
        prefix=body.removeprefix(opening) if body.startswith(opening) else "",
        next_role=next_role,
        dropped_opening=_dropped_opening(render, opening, full),
        frame_tokens=frozenset(t for t in stops if t not in tags and (t in opening or t in full)),
    )


def _no_stop_error(fault: str, given: str, hint: str | None = None) -> ConfigError:
    allowed = "a special token after every assistant turn"
    hint = hint or "set model.template: plain, or a .jinja file that writes one"
    return ConfigError(f"the chat template {fault}", where="model.template", given=given, allowed=allowed, hint=hint)


def _find_ending(tail: str, stops: Mapping[str, int]) -> AnswerEnding | None:
    # the earliest control token, and of two at one position the longer: `<|end|>` may be a prefix of another
    matches = [(tail.find(text), -len(text), text) for text in stops if text in tail]
    if not matches:
        return None
    position, _, stop = min(matches)
    return AnswerEnding(tail[:position], stop, tail[position + len(stop) :], stops[stop])


def _endings(render: Render, stops: Mapping[str, int], tail: str) -> list[AnswerEnding]:
    ending = _find_ending(tail, stops)
    if ending is None:
        return []
    # listed only where it differs, so that the first ending stays that of a plain answer
    call_ending = _tool_call_ending(render, stops)
    differs = call_ending and (call_ending.stop, call_ending.after_stop) != (ending.stop, ending.after_stop)
    return [ending, call_ending] if call_ending and differs else [ending]


def _tool_call_ending(render: Render, stops: Mapping[str, int]) -> AnswerEnding | None:
    """Some templates end a turn with a tool call by another stop; others do not support tools at all (None)."""
    try:
        text = render([_QUESTION, _CALL_ANSWER])
    except DataError:
        return None
    # no sentinel can stand in a call, so the stop is the control token at the end of the text
    body = text.rstrip()
    stop = max((t for t in stops if body.endswith(t)), key=len, default=None)
    return AnswerEnding("", stop, text[len(body) :], stops[stop]) if stop else None


def _endings_by_next_role(
    render: Render, stops: Mapping[str, int], end_ids: Collection[int], tail: str
) -> tuple[list[AnswerEnding], dict[bool, str]]:
    """Endings of a template that writes no stop: the token of the next role is one, where the model ends by it too."""
    fault = "ends an answer without a stop token"
    try:
        rest = render([_QUESTION, _ANSWER, Message("user", _NEXT_SENTINEL)]).rpartition(SENTINEL)[2]
    except DataError:
        rest = ""
    ending = _find_ending(rest.partition(_NEXT_SENTINEL)[0], stops)
    if ending is None or not rest.startswith(tail):
        raise _no_stop_error(fault, tail or "nothing after an answer")
    if ending.stop_id not in end_ids:
        hint = (
            f"the next turn begins with {ending.stop}: if the model ends its answers with it, name it in eos_token_id "
            "of its generation_config.json; or set model.template: plain, or a .jinja file that writes a stop"
        )
        raise _no_stop_error(f"{fault}, and the token of the next role is no end of the model", ending.stop, hint)
    endings = [ending._replace(after_stop="")]
    next_role = dict.fromkeys((False, True), ending.before_stop[len(tail) :] + ending.stop)
    call_ending = _call_ending_by_next_role(render, stops)
    if call_ending is not None and call_ending.stop_id in end_ids:
        next_role[True] = call_ending.before_stop + call_ending.stop
        if call_ending.stop != ending.stop:
            endings.append(call_ending._replace(after_stop=""))
    return endings, next_role


def _call_ending_by_next_role(render: Render, stops: Mapping[str, int]) -> AnswerEnding | None:
    result = Message("tool", _NEXT_SENTINEL, name="f", tool_call_id="call00000")
    try:
        call, with_result = render([_QUESTION, _CALL_ANSWER]), render([_QUESTION, _CALL_ANSWER, result])
    except DataError:
        return None
    rest = with_result[len(call) :] if with_result.startswith(call) else ""
    return _find_ending(rest.partition(_NEXT_SENTINEL)[0], stops)


def _dropped_opening(render: Render, opening: str, full: str) -> str:
    """The tag of reasoning that only the prompt opens, where the template itself drops reasoning from the history."""
    common = os.path.commonprefix([opening, full])
    extra = opening[len(common) :]
    closing = dict(REASONING_TAGS).get(extra.strip())
    if closing is None or not full[len(common) :].startswith(SENTINEL):
        return ""
    answer = Message("assistant", f"{REASONING_SENTINEL}{closing}{SENTINEL}")
    try:
        return "" if REASONING_SENTINEL in render([_QUESTION, answer]) else extra
    except DataError:
        return ""
