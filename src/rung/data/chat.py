"""The one path from a record to text, ids and supervised spans, for training, evaluation and chat (FAILURES 1-5)."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import TemplateError

from rung.config.data import LossOn
from rung.data.messages import for_template, renders_unchanged, rewritten_answer_error, unstable_template_error
from rung.data.prompt_positions import PromptPositions, without_marks
from rung.errors import ConfigError, DataError
from rung.types import Message, Record, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN_TEMPLATE = """\
{%- if tools -%}{{ 'Tools: ' + (tools | tojson) + '\\n\\n' }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' -%}{{ 'User: ' + message.content + '\\n' }}
{%- elif message.role == 'tool' -%}{{ 'Tool: ' + message.content + '\\n' }}
{%- else -%}{{ 'Assistant: ' + message.content }}
{%- if message.tool_calls -%}{{ message.tool_calls | tojson }}{%- endif -%}{{ eos_token + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""
"""`model.template: plain`, for bases without a template. The stop is the tokenizer's end-of-text token."""

__all__ = ["PLAIN_TEMPLATE", "ChatTemplate", "TextPart", "with_context"]

_SENTINEL = "RungSentinel"
_CALL = '[{"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}]'


class TextPart(NamedTuple):
    """A piece of a document that is tokenized on its own."""

    text: str
    supervised: bool


class _AnswerEnding(NamedTuple):
    """What a template writes after an answer: up to and including the stop, and then until the next turn."""

    before: str  # between the answer and the stop
    stop: str
    after: str
    stop_id: int


class ChatTemplate:
    """A tokenizer with a template. The tokenizer is never changed.

    Args:
        tokenizer: a fast tokenizer of transformers.
        template: `auto` (the tokenizer's own), `plain` (`PLAIN_TEMPLATE`), or the path of a .jinja file.
        inserted: virtual tokens inside the conversation; none for most methods.

    Raises:
        ConfigError: no template, a broken one, one without a stop token, or one that begins with two BOS.
    """

    template: str
    """The jinja text in use; write it into whatever is published."""
    stop_ids: tuple[int, ...]
    """Tokens that end an assistant turn, read off the rendered template; the first ends a plain answer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, template: str = "auto", positions: PromptPositions | None = None
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError("the tokenizer is not a fast one", given=type(tokenizer).__name__)
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.adds_bos = self.bos_id is not None and tokenizer("a")["input_ids"][:1] == [self.bos_id]
        """Whether the tokenizer itself puts a BOS in front: then documents without a template get one too."""
        self.positions: PromptPositions | None = None
        self._anchor = self._find_anchor()
        self.template = self._template(template)
        self._control = _control_tokens(tokenizer)
        self._endings, self._lead = self._probe(template)
        self.positions = positions
        self.stop_ids = tuple(dict.fromkeys(e.stop_id for e in self._endings))

    def without_virtual_tokens(self) -> ChatTemplate:
        """The same without anything inserted: what a model that learned nothing reads."""
        plain = copy.copy(self)
        plain.positions = None
        return plain

    def prompt_text(self, messages: Sequence[Message], *, context: str | None = None, tools: str | None = None) -> str:
        """The text a model is to continue, with the template's opening of the answer.

        Raises:
            DataError: with the template's own message, where it refuses these turns.
        """
        return without_marks(self._render(messages, context, tools, generation=True))

    def prompt_ids(
        self, messages: Sequence[Message], *, context: str | None = None, tools: str | None = None
    ) -> list[int]:
        """`prompt_text` as ids, what is inserted among them; special tokens come from the template alone.

        Raises:
            DataError: the template refuses these turns, or the ids begin with two BOS.
        """
        ids = self.encode([self._render(messages, context, tools, generation=True)])[0]
        self.check_bos(ids, "the prompt")
        return ids

    def assistant_text(self, ids: Sequence[int]) -> str:
        """Generated ids as the text of the turn: cut at the first stop, without what the template puts around it."""
        stops = {*self.stop_ids, self.eos_id}
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        text = self.decode([ids[:end]], inner=True)[0].removeprefix(self._lead)
        return text.removesuffix(self._endings[0].before) if end < len(ids) else text

    def split_conversation(self, record: Record, loss_on: LossOn) -> list[TextPart]:
        """Cut a rendered conversation into prompt and answer pieces; it ends with its last stop.

        Answer i is render(turns up to i) minus render(turns before i, with the opening of an answer).

        Raises:
            DataError: the template refuses the row, or what it wrote before an answer changes afterwards.
        """
        last = len(record.messages) - 1
        turns = range(last + 1) if loss_on == "assistant_turns" else (last,)
        parts: list[TextPart] = []
        done = ""
        for i in turns:
            if record.messages[i].role != "assistant":
                continue
            prompt = self._render(record.messages[:i], record.context, record.tools, generation=True, at=record.source)
            full = self._render(record.messages[: i + 1], record.context, record.tools, at=record.source)
            if not (full.startswith(prompt) and prompt.startswith(done)):
                raise unstable_template_error(record.source, i, loss_on, earlier=full.startswith(prompt))
            answer = full[len(prompt) : len(full) - len(self._after(full, record.source))]
            if not renders_unchanged(self._body(answer), record.messages[i], self._lead):
                raise rewritten_answer_error(record.source, i, self._body(answer))
            parts += [TextPart(prompt[len(done) :], False), TextPart(answer, True)]
            done = prompt + answer
        return parts

    def _body(self, answer: str) -> str:
        """What stands before the stop, without what is inserted."""
        ending = next(e for e in self._endings if answer.endswith(e.stop))
        text = answer.removesuffix(ending.stop).removesuffix(ending.before)
        return text if self.positions is None else "".join(self.positions.split_at_marks(text)[::2])

    def encode(self, texts: Sequence[str], inner: bool | Sequence[bool] = False) -> list[list[int]]:
        """Ids of each text on its own, no special token added: the template has written them.

        `inner` says which texts (or whether all) go on within a document, as answers do. SentencePiece vocabularies put
        a space before every text, so those are encoded after a newline, which is then taken off again; byte-level
        ones need no such anchor.
        """
        inner = [inner] * len(texts) if isinstance(inner, bool) else inner
        if self.positions is None:
            return self._encode_within(texts, inner)
        cut = [self.positions.split_at_marks(text) for text in texts]
        within = [flag or i > 0 for parts, flag in zip(cut, inner, strict=True) for i in range(len(parts[::2]))]
        encoded = iter(self._encode_within([text for parts in cut for text in parts[::2]], within))
        rows = [
            [self.positions.ids_of_mark(part) if i % 2 else next(encoded) for i, part in enumerate(parts)]
            for parts in cut
        ]
        return [list(chain.from_iterable(row)) for row in rows]

    def _encode_within(self, texts: Sequence[str], inner: Sequence[bool]) -> list[list[int]]:
        if not self._anchor:
            return self._encode(texts)
        size = len(self._anchor)
        rows = self._encode(["\n" + t if within else t for t, within in zip(texts, inner, strict=True)])
        return [row[size:] if within else row for row, within in zip(rows, inner, strict=True)]

    def decode(self, ids: Iterable[Sequence[int]], *, inner: bool = False) -> list[str]:
        """Byte-exact text of each row of ids, special tokens included; `inner` as in `encode`."""
        anchor = self._anchor if inner else []
        rows = [[*anchor, *row] for row in ids]
        # clean_up_tokenization_spaces eats spaces before punctuation
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [str(text).removeprefix("\n") for text in texts] if anchor else list(texts)

    def check_bos(self, ids: Sequence[int], where: str) -> None:
        """Refuse a document that begins with two BOS tokens (FAILURES 4)."""
        if self.bos_id is not None and len(ids) > 1 and ids[0] == ids[1] == self.bos_id:
            raise DataError(
                "begins with two BOS tokens", where=where, hint="the template or the text writes one too many"
            )

    def identity(self) -> str:
        """Everything but the data that decides the ids: the tokenizer, its special tokens and the template, as JSON."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for state in ("padding", "truncation"):  # earlier calls of someone else leave traces there
            backend.pop(state, None)
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        inside = [sorted(self.positions.ids.items())] if self.positions else []
        return json.dumps([backend, special, self.template, *inside], sort_keys=True)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def _find_anchor(self) -> list[int]:
        """Ids of a newline where the tokenizer writes a space of its own before every text, else nothing."""
        newline, alone, after = self._encode(["\n", "a", "\na"])
        return newline if after[: len(newline)] == newline and after[len(newline) :] != alone else []

    def _template(self, choice: str) -> str:
        if choice == "plain":
            if self.tokenizer.eos_token is None:
                raise ConfigError(
                    "the tokenizer has no end-of-text token to stop at", where="model.template", given=choice
                )
            return ("{{- bos_token -}}\n" if self.adds_bos else "") + PLAIN_TEMPLATE
        if choice == "auto":
            own = self.tokenizer.chat_template
            own = own.get("default") if isinstance(own, dict) else own
            if not own:
                raise ConfigError(
                    "the tokenizer has no chat template",
                    where="model.template",
                    given=choice,
                    allowed="auto, plain, or a .jinja file",
                    hint="set model.template: plain",
                )
            return str(own)
        if not choice.endswith(".jinja") or not Path(choice).is_file():
            raise ConfigError(
                "no such template",
                where="model.template",
                given=choice,
                allowed="auto, plain, or an existing .jinja file",
            )
        return Path(choice).read_text(encoding="utf-8")

    def _render(
        self,
        messages: Sequence[Message],
        context: str | None = None,
        tools: str | None = None,
        *,
        generation: bool = False,
        at: Source | None = None,
    ) -> str:
        turns = [for_template(m) for m in messages]
        for name, used in (("tools", tools), ("tool_calls", any(m.tool_calls for m in messages))):
            if used and name not in self.template:
                raise DataError(
                    f"the row has {name}, but the chat template never shows them",
                    where=str(at) if at else None,
                    hint="set model.template: plain, or a .jinja file that writes them",
                )
        if context:
            first = next((t for t in turns if t["role"] == "user"), None)
            if first is None:
                raise DataError("a context, but no user turn to put it in front of", where=str(at) if at else None)
            first["content"] = with_context(context, first["content"])
        inserted = self.positions
        if inserted is not None:
            turns = inserted.with_marks(turns, at)
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                tools=json.loads(tools) if tools else None,
                chat_template=self.template,
                add_generation_prompt=generation,
                tokenize=False,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(
                f"the chat template refuses this conversation: {error}",
                where=str(at) if at else None,
                given=" ".join(m.role for m in messages),
                hint="change the row, or set model.template: plain or a .jinja file",
            ) from error
        return (
            str(text)
            if inserted is None
            else inserted.with_answer_mark(str(text), turns, self._lead, generation=generation)
        )

    def _probe(self, choice: str) -> tuple[list[_AnswerEnding], str]:
        """Render sentinel answers and look at what the template writes around them."""
        question = Message("user", "Q")
        try:
            opening = self._render([question], generation=True)
            full = self._render([question, Message("assistant", _SENTINEL)])
        except DataError as error:
            raise ConfigError(
                f"the chat template is broken: {error.summary}", where="model.template", given=choice
            ) from error
        body, found, tail = full.rpartition(_SENTINEL)
        ending = self._ending(tail)
        if not found or ending is None:
            raise ConfigError(
                f"the chat template {'ends an answer without a stop token' if found else 'leaves answers out'}",
                where="model.template",
                given=tail or choice,
                allowed="a special token after every assistant turn",
                hint="set model.template: plain, or a .jinja file that writes one",
            )
        try:
            self.check_bos(self._encode([full])[0], "model.template")
        except DataError as error:
            raise ConfigError(error.summary, where="model.template", hint=error.hint) from error
        endings = [ending]
        call = self._call_ending(question)
        if call and (call.stop, call.after) != (ending.stop, ending.after):
            endings.append(call)
        return endings, body.removeprefix(opening) if body.startswith(opening) else ""

    def _ending(self, tail: str) -> _AnswerEnding | None:
        found = [(tail.find(text), -len(text), text) for text in self._control if text in tail]
        if not found:
            return None
        at, _, stop = min(found)
        return _AnswerEnding(tail[:at], stop, tail[at + len(stop) :], self._control[stop])

    def _call_ending(self, question: Message) -> _AnswerEnding | None:
        """Some templates end a turn that calls a tool with a stop of its own; some know no tools at all."""
        try:
            text = self._render([question, Message("assistant", "", tool_calls=_CALL)])
        except DataError:
            return None
        body = text.rstrip()
        stop = max((t for t in self._control if body.endswith(t)), key=len, default=None)
        return _AnswerEnding("", stop, text[len(body) :], self._control[stop]) if stop else None

    def _after(self, full: str, source: Source) -> str:
        for ending in self._endings:
            if full.endswith(ending.stop + ending.after):
                return ending.after
        raise DataError(
            "the template ends this answer without a stop token",
            where=str(source),
            given=repr(full[-60:]),
            allowed=" or ".join(repr(e.stop + e.after) for e in self._endings),
        )


def with_context(context: str, question: str) -> str:
    """A question with its context in front."""
    return f"{context}\n\n{question}"


def _control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Tokens that can be a stop: special ones, and added ones that are not mere white space."""
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special or t.content.strip()}
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {**added, **{str(text): int(i) for text, i in special}}
