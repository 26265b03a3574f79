"""Chat templates: the only path from a record to text, ids and supervised spans (FAILURES 1-5).

Training, evaluation, generation and chat all use `ChatTemplate`, so that a prompt has the same ids everywhere.
The stop tokens and what surrounds an answer are found by rendering probe conversations, not configured per model:
that works for any template, and a template without a stop token is refused. Prompt and answer are tokenized
separately (decision 0003), which costs an occasional extra token compared with other tools.
"""

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
from rung.data.prompt_positions import PromptPositions
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
"""`model.template: plain`, for base models without a template. The stop is the tokenizer's end-of-text token."""

# A word no template writes by itself: its position in the rendered text shows where an answer stands.
_SENTINEL = "RungSentinel"
_CALL = '[{"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}]'


class TextPart(NamedTuple):
    """A piece of a document that is tokenized separately."""

    text: str
    supervised: bool


class _AnswerEnding(NamedTuple):
    """What a template writes after an answer: text before the stop, the stop, and text up to the next turn."""

    before_stop: str  # between the answer and the stop
    stop: str
    after_stop: str
    stop_id: int


class ChatTemplate:
    """A tokenizer with a chat template. The tokenizer is never modified.

    Args:
        tokenizer: a fast tokenizer of transformers.
        template: `auto` (the tokenizer's own), `plain` (`PLAIN_TEMPLATE`), or the path of a .jinja file.
        positions: virtual tokens inside the conversation; None for most methods.

    Raises:
        ConfigError: no template, a broken one, one without a stop token, or one that begins with two BOS.
    """

    template: str
    """The Jinja text in use; published models carry it."""
    stop_ids: tuple[int, ...]
    """Tokens that end an assistant turn, found in the rendered template; the first ends a plain answer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, template: str = "auto", positions: PromptPositions | None = None
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError("the tokenizer is not a fast one", given=type(tokenizer).__name__)
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.adds_bos = self.bos_id is not None and tokenizer("a")["input_ids"][:1] == [self.bos_id]
        """Whether the tokenizer itself prepends a BOS: then documents without a template get one too."""
        self.positions: PromptPositions | None = None
        # The order matters: rendering needs the template, endings need the control tokens, and the probes must run
        # before virtual tokens are set, because they show the template alone.
        self._anchor = self._find_anchor()
        self.template = self._read_template(template)
        self._control_ids = _control_tokens(tokenizer)
        self._endings, self._answer_prefix = self._probe_endings(template)
        self.positions = positions
        self.stop_ids = tuple(dict.fromkeys(e.stop_id for e in self._endings))

    def without_virtual_tokens(self) -> ChatTemplate:
        """The same template without virtual tokens: the input of the untuned model."""
        # shallow: probing the template again would render it three times for the same result
        plain = copy.copy(self)
        plain.positions = None
        return plain

    def prompt_ids(self, turns: Sequence[Message], context: str | None = None, tools: str | None = None) -> list[int]:
        """Ids of the prompt with the opening of the answer and virtual tokens; special tokens are the template's only.

        Raises:
            DataError: the template refuses these turns, or the ids begin with two BOS.
        """
        ids = self.encode([self._render(turns, context, tools, generation=True)])[0]
        self.check_bos(ids, "the prompt")
        return ids

    def assistant_text(self, ids: Sequence[int]) -> str:
        """Generated ids as the text of the turn: cut at the first stop, without what the template writes around it."""
        # eos as well: a base model may end a text its own way before tuning
        stops = {*self.stop_ids, self.eos_id}
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        text = self.decode([ids[:end]], mid_document=True)[0].removeprefix(self._answer_prefix)
        return text.removesuffix(self._endings[0].before_stop) if end < len(ids) else text

    def split_conversation(self, record: Record, loss_on: LossOn) -> list[TextPart]:
        """Split a rendered conversation into prompt and answer pieces; it ends with its last stop.

        Answer i is render(turns up to i) minus render(turns before i, with the opening of an answer).

        Raises:
            DataError: the template refuses the row, or what it wrote before an answer changes afterwards.
        """
        last = len(record.messages) - 1
        parts: list[TextPart] = []
        prefix = ""
        for i in range(last + 1) if loss_on == "assistant_turns" else (last,):
            if record.messages[i].role != "assistant":
                continue
            turns, rest = record.messages, (record.context, record.tools, record.source)
            prompt, full = self._render(turns[:i], *rest, generation=True), self._render(turns[: i + 1], *rest)
            # both must be prefixes, or the training text differs from the prompts of inference
            if not (full.startswith(prompt) and prompt.startswith(prefix)):
                raise unstable_template_error(record.source, i, loss_on, rewrites_history=full.startswith(prompt))
            answer = full[len(prompt) : len(full) - len(self._text_after_stop(full, record.source))]
            if not renders_unchanged(self._answer_body(answer), record.messages[i], self._answer_prefix):
                raise rewritten_answer_error(record.source, i, self._answer_body(answer))
            parts += [TextPart(prompt[len(prefix) :], False), TextPart(answer, True)]
            prefix = prompt + answer
        return parts

    def _answer_body(self, answer: str) -> str:
        """The answer text before the stop, without marks of virtual tokens."""
        ending = next(e for e in self._endings if answer.endswith(e.stop))
        text = answer.removesuffix(ending.stop).removesuffix(ending.before_stop)
        return text if self.positions is None else "".join(self.positions.split_at_marks(text)[::2])

    def encode(self, texts: Sequence[str], mid_document: bool | Sequence[bool] = False) -> list[list[int]]:
        """Ids of each text, without added special tokens: the template has written them.

        `mid_document` says which texts (or whether all) continue a document, as answers do. SentencePiece vocabularies
        put a space before every text, so such texts are encoded after a newline whose ids are then removed;
        byte-level vocabularies need no such anchor.
        """
        mid_document = [mid_document] * len(texts) if isinstance(mid_document, bool) else mid_document
        if self.positions is None:
            return self._encode_anchored(texts, mid_document)
        segments = [self.positions.split_at_marks(text) for text in texts]
        flags = [f or i > 0 for parts, f in zip(segments, mid_document, strict=True) for i in range(0, len(parts), 2)]
        # one tokenizer call for all segments: the fast tokenizer is parallel only within a call
        encoded = iter(self._encode_anchored([text for parts in segments for text in parts[::2]], flags))
        ids_of_mark = self.positions.ids_of_mark
        rows = ((ids_of_mark(p) if i % 2 else next(encoded) for i, p in enumerate(parts)) for parts in segments)
        return [list(chain.from_iterable(row)) for row in rows]

    def _encode_anchored(self, texts: Sequence[str], mid_document: Sequence[bool]) -> list[list[int]]:
        if not self._anchor:
            return self._encode_texts(texts)
        rows = self._encode_texts(["\n" * flag + text for text, flag in zip(texts, mid_document, strict=True)])
        return [row[len(self._anchor) * flag :] for row, flag in zip(rows, mid_document, strict=True)]

    def decode(self, ids: Iterable[Sequence[int]], *, mid_document: bool = False) -> list[str]:
        """Byte-exact text of each row of ids, special tokens included; `mid_document` as in `encode`."""
        anchor = self._anchor if mid_document else []
        rows = [[*anchor, *row] for row in ids]
        # clean_up_tokenization_spaces eats spaces before punctuation
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [str(text).removeprefix("\n") for text in texts] if anchor else list(texts)

    def check_bos(self, ids: Sequence[int], where: str) -> None:
        """Raise `DataError` for a document that begins with two BOS tokens (FAILURES 4)."""
        if self.bos_id is not None and len(ids) > 1 and ids[0] == ids[1] == self.bos_id:
            hint = "the template or the text writes one too many"
            raise DataError("begins with two BOS tokens", where=where, hint=hint)

    def identity(self) -> str:
        """Everything besides the data that decides the ids, as JSON: tokenizer, special tokens, template."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # not part of the vocabulary, and this module turns both off in every call
        for state in ("padding", "truncation"):  # earlier calls of someone else leave traces there
            backend.pop(state, None)
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        virtual_ids = [sorted(self.positions.ids.items())] if self.positions else []
        return json.dumps([backend, special, self.template, *virtual_ids], sort_keys=True)

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        unused = ("add_special_tokens", "padding", "truncation", "return_attention_mask", "verbose")
        encoded = self.tokenizer(list(texts), **dict.fromkeys(unused, False))
        return [list(ids) for ids in encoded["input_ids"]]

    def _find_anchor(self) -> list[int]:
        """Ids of a newline where the tokenizer puts a space before every text, else an empty list."""
        newline, bare, anchored = self._encode_texts(["\n", "a", "\na"])
        return newline if anchored[: len(newline)] == newline and anchored[len(newline) :] != bare else []

    def _read_template(self, choice: str) -> str:
        if choice == "plain":
            if self.tokenizer.eos_token is None:
                summary = "the tokenizer has no end-of-text token to stop at"
                raise ConfigError(summary, where="model.template", given=choice)
            # the model was pretrained with a BOS only where its tokenizer adds one
            return ("{{- bos_token -}}\n" if self.adds_bos else "") + PLAIN_TEMPLATE
        if choice == "auto":
            tokenizer_template = self.tokenizer.chat_template
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

    def _render(
        self,
        messages: Sequence[Message],
        context: str | None = None,
        tools: str | None = None,
        source: Source | None = None,
        *,
        generation: bool = False,
    ) -> str:
        turns = [for_template(m) for m in messages]
        where = str(source) if source else None
        # Jinja ignores variables a template never uses: tools would silently vanish from the prompt
        for name, present in (("tools", tools), ("tool_calls", any(m.tool_calls for m in messages))):
            if present and name not in self.template:
                summary = f"the row has {name}, but the chat template never shows them"
                hint = "set model.template: plain, or a .jinja file that writes them"
                raise DataError(summary, where=where, hint=hint)
        if context:
            first_user = next((t for t in turns if t["role"] == "user"), None)
            if first_user is None:
                raise DataError("a context, but no user turn to put it in front of", where=where)
            first_user["content"] = with_context(context, first_user["content"])
        if self.positions is not None:
            turns = self.positions.with_marks(turns, where)
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                tools=json.loads(tools) if tools else None,
                chat_template=self.template,
                add_generation_prompt=generation,
                tokenize=False,
            )
        # templates fail in many ways: raise_exception, a missing key, a method that a value lacks
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            summary, roles = f"the chat template refuses this conversation: {error}", " ".join(m.role for m in messages)
            hint = "change the row, or set model.template: plain or a .jinja file"
            raise DataError(summary, where=where, given=roles, hint=hint) from error
        if self.positions is None:
            return str(text)
        return self.positions.with_answer_mark(str(text), turns, self._answer_prefix, generation=generation)

    def _probe_endings(self, choice: str) -> tuple[list[_AnswerEnding], str]:
        """Render sentinel answers and extract what the template writes around them."""
        question = Message("user", "Q")
        try:
            opening = self._render([question], generation=True)
            full = self._render([question, Message("assistant", _SENTINEL)])
        except DataError as error:
            summary = f"the chat template is broken: {error.summary}"
            raise ConfigError(summary, where="model.template", given=choice) from error
        body, sentinel, tail = full.rpartition(_SENTINEL)
        ending = self._find_ending(tail)
        if not sentinel or ending is None:
            fault = "ends an answer without a stop token" if sentinel else "leaves answers out"
            allowed = "a special token after every assistant turn"
            hint = "set model.template: plain, or a .jinja file that writes one"
            summary = f"the chat template {fault}"
            raise ConfigError(summary, where="model.template", given=tail or choice, allowed=allowed, hint=hint)
        try:
            # here and not at the first row: a template that doubles the BOS is a config error, not a data error
            self.check_bos(self._encode_texts([full])[0], "model.template")
        except DataError as error:
            raise ConfigError(error.summary, where="model.template", hint=error.hint) from error
        endings = [ending]
        # listed only where it differs, so that the first ending stays that of a plain answer
        call_ending = self._tool_call_ending(question)
        if call_ending and (call_ending.stop, call_ending.after_stop) != (ending.stop, ending.after_stop):
            endings.append(call_ending)
        return endings, body.removeprefix(opening) if body.startswith(opening) else ""

    def _find_ending(self, tail: str) -> _AnswerEnding | None:
        # the earliest control token, and of two at one position the longer: `<|end|>` may be a prefix of another
        matches = [(tail.find(text), -len(text), text) for text in self._control_ids if text in tail]
        if not matches:
            return None
        position, _, stop = min(matches)
        return _AnswerEnding(tail[:position], stop, tail[position + len(stop) :], self._control_ids[stop])

    def _tool_call_ending(self, question: Message) -> _AnswerEnding | None:
        """Some templates end a turn with a tool call by another stop; others do not support tools at all (None)."""
        try:
            text = self._render([question, Message("assistant", "", tool_calls=_CALL)])
        except DataError:
            return None
        # no sentinel can stand in a call, so the stop is the control token at the end of the text
        body = text.rstrip()
        stop = max((t for t in self._control_ids if body.endswith(t)), key=len, default=None)
        return _AnswerEnding("", stop, text[len(body) :], self._control_ids[stop]) if stop else None

    def _text_after_stop(self, full: str, source: Source) -> str:
        for ending in self._endings:
            if full.endswith(ending.stop + ending.after_stop):
                return ending.after_stop
        summary = "the template ends this answer without a stop token"
        allowed = " or ".join(repr(e.stop + e.after_stop) for e in self._endings)
        raise DataError(summary, where=str(source), given=repr(full[-60:]), allowed=allowed)


def with_context(context: str, question: str) -> str:
    """A question preceded by its context."""
    return f"{context}\n\n{question}"


def _control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Tokens that can be a stop: special tokens, and added tokens that are not just white space."""
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special or t.content.strip()}
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {**added, **{str(text): int(i) for text, i in special}}
