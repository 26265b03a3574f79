"""Chat templates: the only path from a record to text, ids and supervised spans (FAILURES 1-5).

Training, evaluation, generation and chat all use `ChatTemplate`, so that a prompt has the same ids everywhere.
The stop tokens and what surrounds an answer are found by rendering probe conversations, not configured per model:
that works for any template, and a template without a stop token is refused. Prompt and answer are tokenized
separately (decision 0003), which costs an occasional extra token compared with other tools.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from rung.config.data import ControlTokens, LossOn
from rung.config.model import ModelConfig
from rung.data.answer_form import (
    REASONING_SENTINEL,
    SENTINEL,
    AnswerForm,
    read_answer_form,
)
from rung.data.control_tokens import (
    OPENING_MARK,
    ControlTokenText,
    possible_stops,
    require_whole_marks,
    split_marked,
    text_control_tokens,
    without_marks,
)
from rung.data.parsed_answer import REASONING_TAGS, ParsedAnswer, parse_answer
from rung.data.prompt_positions import PromptPositions
from rung.data.template import (
    REASONING_FIELDS,
    for_template,
    greeting_error,
    is_greeting,
    read_template,
    renders_unchanged,
    rewritten_answer_error,
    unstable_template_error,
    with_arguments_as_text,
    with_fixed_date,
    with_variables,
)
from rung.data.tool_calls import (
    Reader,
    calls_of_message,
    canonical_calls,
    probe_calls,
    same_but_for_types,
    tool_call_reader,
)
from rung.errors import ConfigError, DataError
from rung.types import Message, Record, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTES_OF_A_CHARACTER = 4
"""In UTF-8, at most: a tail that starts inside a character decodes to the replacement character up to its end."""
NO_USER_TURN = "a context, but no user turn to put it in front of"


class TextPart(NamedTuple):
    """A piece of a document that is tokenized separately."""

    text: str
    supervised: bool
    excluded: bool = False
    """Not learned even where all tokens are (`data.loss_on: all`): an answer that the data marks so."""


class ChatTemplate:
    """A tokenizer with a chat template. The tokenizer is never modified.

    Args:
        tokenizer: a fast tokenizer of transformers.
        template: `auto` (the tokenizer's own), `plain` (`PLAIN_TEMPLATE`), or the path of a .jinja file.
        positions: virtual tokens inside the conversation; None for most methods.
        variables: values of variables that the template reads, such as `enable_thinking`.
        day: date in place of today's, where the template writes it; default: a fixed one.
        end_ids: further tokens at which the model ends a text, from its generation config.

    Raises:
        ConfigError: no template, a broken one, one without a stop token, or one that begins with two BOS.
    """

    template: str
    """The Jinja text in use; published models carry it."""
    stop_ids: tuple[int, ...]
    """Tokens that end an assistant turn, found in the rendered template; the first ends a plain answer."""
    generation_stop_ids: tuple[int, ...]
    """Tokens at which generation ends: those of the template, then the end-of-text tokens of tokenizer and model."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: str = "auto",
        positions: PromptPositions | None = None,
        *,
        variables: Mapping[str, Any] | None = None,
        day: date | None = None,
        end_ids: Collection[int] = (),
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError("the tokenizer is not a fast one", given=type(tokenizer).__name__)
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.adds_bos = self.bos_id is not None and tokenizer("a")["input_ids"][:1] == [self.bos_id]
        """Whether the tokenizer itself prepends a BOS: then documents without a template get one too."""
        self.positions: PromptPositions | None = None
        self.control_tokens: ControlTokens | None = None
        """`data.control_tokens` of the rows that are rendered; prompts of other origin have None."""
        self.control_text = ControlTokenText(tokenizer, {})
        # The order matters: rendering needs the template, endings need the control tokens, and the probes must run
        # before virtual tokens are set, because they show the template alone.
        self._anchor = self._find_anchor()
        text = with_fixed_date(read_template(tokenizer, template, adds_bos=self.adds_bos), day)
        self.template = with_variables(text, variables or {})
        self._form = AnswerForm()
        self._form = self._read_form(template, possible_stops(tokenizer), end_ids)
        self.positions = positions
        self.stop_ids = tuple(dict.fromkeys(e.stop_id for e in self._form.endings))
        model_end_ids = [i for i in (self.eos_id, *end_ids) if i is not None]
        self.generation_stop_ids = tuple(dict.fromkeys((*self.stop_ids, *model_end_ids)))
        # last: probes are the template's own text
        tokens = text_control_tokens(tokenizer, self.generation_stop_ids, self._form.frame_tokens)
        self.control_text = ControlTokenText(tokenizer, tokens)

    @staticmethod
    def of_model(
        tokenizer: PreTrainedTokenizerFast,
        config: ModelConfig,
        end_ids: Collection[int] = (),
        positions: PromptPositions | None = None,
    ) -> ChatTemplate:
        """The template of a base under the settings of its config."""
        variables, day = config.template_kwargs, config.template_date
        return ChatTemplate(tokenizer, config.template, positions, variables=variables, day=day, end_ids=end_ids)

    def without_virtual_tokens(self) -> ChatTemplate:
        """The same template without virtual tokens: the input of the untuned model."""
        # shallow: probing the template again would render it three times for the same result
        plain = copy.copy(self)
        plain.positions = None
        return plain

    def _read_form(self, choice: str, stops: Mapping[str, int], end_ids: Collection[int]) -> AnswerForm:
        form = read_answer_form(self._render, stops, end_ids, choice)
        try:
            # here and not at the first row: a template that doubles the BOS is a config error, not a data error
            probe = self._render([Message("user", "Q"), Message("assistant", SENTINEL)])
            self.check_bos(self._encode_texts([probe])[0], "model.template")
        except DataError as error:
            raise ConfigError(error.summary, where="model.template", hint=error.hint) from error
        return form

    def with_control_tokens(self, policy: ControlTokens | None) -> ChatTemplate:
        """The same template for rows with this setting of `data.control_tokens`; None for text of any other origin."""
        other = copy.copy(self)
        other.control_tokens = policy
        return other

    def prompt_ids(self, turns: Sequence[Message], context: str | None = None, tools: str | None = None) -> list[int]:
        """Ids of the prompt with the opening of the answer and virtual tokens; special tokens are the template's only.

        Raises:
            DataError: the template refuses these turns, or the ids begin with two BOS.
        """
        ids = self.encode([self._render(turns, context, tools, generation=True)])[0]
        self.check_bos(ids, "the prompt")
        return ids

    def prompt_text(self, turns: Sequence[Message], *, opens_answer: bool = True) -> str:
        """The text of a conversation as the template writes it, with the opening of the answer or without it."""
        return self._render(turns, generation=opens_answer)

    def assistant_text(self, ids: Sequence[int]) -> str:
        """Generated ids as the text of the turn: cut at the first stop, without what the template writes around it."""
        # a base model may end a text its own way before tuning
        end = next((i for i, token in enumerate(ids) if token in self.generation_stop_ids), len(ids))
        text = self.decode([ids[:end]], mid_document=True)[0].removeprefix(self._form.prefix)
        return text.removesuffix(self._form.endings[0].before_stop) if end < len(ids) else text

    def parsed_answer(
        self, ids: Sequence[int], *, stopped: bool = True, stop_texts: Sequence[str] = ()
    ) -> ParsedAnswer:
        """Generated ids as an answer, before the first of `stop_texts`, and the reasoning before it (`parse_answer`).

        `stopped`: False for an answer that was cut.
        """
        options = {"stopped": stopped, "stop_texts": stop_texts, "reasoning_tags": self._reasoning_tags}
        return parse_answer(self.assistant_text(ids), self._form.opening, **options)  # type: ignore[arg-type]

    def has_stop_text(self, ids: Sequence[int], stop_texts: Sequence[str]) -> bool:
        """Whether a stop text ends the answer, asked after each generated token."""
        # A token has at least one byte, so the last tokens hold every text that the newest one can complete; the whole
        # answer is decoded only where it does.
        last = ids[-max(len(text.encode()) for text in stop_texts) - BYTES_OF_A_CHARACTER :]
        before, tail = self.decode([last[:-1], last], mid_document=True)
        known = len(before.rstrip("\ufffd"))
        is_completed = any(tail.rfind(text) + len(text) > known for text in stop_texts if text in tail)
        return is_completed and self.parsed_answer(ids, stopped=False, stop_texts=stop_texts).found_stop

    @cached_property
    def _reasoning_tags(self) -> tuple[tuple[str, str], ...]:
        """What stands around reasoning: in this template first, then as other models write it."""
        try:
            turns = [Message("user", "Q"), Message("assistant", SENTINEL, reasoning=REASONING_SENTINEL)]
            answer = self._rendered_answer(turns)
        except DataError:
            return REASONING_TAGS
        opening, sentinel, rest = answer.partition(REASONING_SENTINEL)
        closing = rest.partition(SENTINEL)[0].strip()
        # nothing before it: the prompt opens it, with a tag that other models write too
        is_complete = sentinel and opening.strip() and closing
        return ((opening.strip(), closing), *REASONING_TAGS) if is_complete else REASONING_TAGS

    @property
    def reads_tool_calls(self) -> bool:
        """Whether tool calls can be read from answers in this template's form."""
        return self._tool_call_reader is not None

    def canonical_calls(self, text: str) -> str | None:
        """The tool calls in an answer as text that is equal for equal calls; None where there is no call.

        Raises `ConfigError` for a template whose calls cannot be read.
        """
        calls = self._require_tool_call_reader()(text)
        return canonical_calls(calls) if calls else None

    def expected_calls(self, record: Record) -> str | None:
        """The tool calls that end a record, as `canonical_calls` reads them; None for a record that ends without.

        Raises `ConfigError` as `canonical_calls`, and `DataError` for calls that this template does not keep.
        """
        answer = record.messages[-1]
        if not answer.tool_calls:
            return None
        read = self._require_tool_call_reader()
        calls = read(self._answer_body(self.split_conversation(record, "answer")[-1].text))
        if not same_but_for_types(calls, calls_of_message(answer.tool_calls)):
            hint = "set model.template to a .jinja file that writes calls as JSON"
            summary = "the chat template writes these tool calls in a form that cannot be read back and compared"
            raise DataError(summary, where=str(record.source), given=answer.tool_calls, hint=hint)
        return canonical_calls(calls)

    @cached_property
    def _tool_call_reader(self) -> Reader | None:
        question = Message("user", "Q")
        bodies: list[str | None] = []
        for count in (1, 2):
            try:
                answer = self._rendered_answer([question, Message("assistant", "", probe_calls(count))])
                bodies.append(self._answer_body(answer))
            except DataError:
                # some templates take one call a turn
                bodies.append(None)
        return None if bodies[0] is None else tool_call_reader(bodies[0], bodies[1])

    def _require_tool_call_reader(self) -> Reader:
        if self._tool_call_reader is None:
            summary = "tool calls in the form of this chat template cannot be read, so they cannot be compared"
            hint = "set model.template to a .jinja file that writes calls as JSON, or evaluation.metrics: [perplexity]"
            raise ConfigError(summary, where="model.template", hint=hint)
        return self._tool_call_reader

    def _rendered_answer(self, turns: Sequence[Message]) -> str:
        """What the template writes for the last turn, stop included."""
        prompt, full = self._render(turns[:-1], generation=True), self._render(turns)
        answer = full[len(prompt) :] if full.startswith(prompt) else full
        return answer[: len(answer) - len(self._text_after_stop(full, None))]

    def split_conversation(self, record: Record, loss_on: LossOn) -> list[TextPart]:
        """Split a rendered conversation into prompt and answer pieces; it ends with its last stop.

        Answer i is render(turns up to i) minus render(turns before i, with the opening of an answer).

        Raises:
            DataError: the template refuses the row, or what it wrote before an answer changes afterwards.
        """
        turns, rest = record.messages, (record.context, record.tools, record.source)
        # once for all turns: each is rendered several times
        marks = self.control_text.may_occur_in(turns, record.context, record.tools)
        parts: list[TextPart] = []
        prefix = ""
        for i in self._answers_to_split(record, loss_on):
            full = self._render(turns[: i + 1], *rest, marks=marks)
            if is_greeting(turns, i):
                prompt = self._text_before_greeting(full, record.source)
            else:
                prompt = self._render(turns[:i], *rest, generation=True, marks=marks)
            opened, turn = prompt, turns[i]
            reopens = bool(self._form.dropped_opening) and prompt.endswith(self._form.dropped_opening)
            if reopens:
                opened, turn = prompt.removesuffix(self._form.dropped_opening), replace(turn, reasoning=None)
            # both must be prefixes, or the training text differs from the prompts of inference
            if not (full.startswith(opened) and prompt.startswith(prefix)):
                raise unstable_template_error(record.source, i, loss_on, rewrites_history=full.startswith(opened))
            answer = full[len(opened) : len(full) - len(self._text_after_stop(full, record.source))]
            if not renders_unchanged(self._answer_body(answer), turn, self._form.prefix):
                raise rewritten_answer_error(record.source, i, self._answer_body(answer))
            answer = self._form.reopened(answer, turns[i].reasoning) if reopens else answer
            learned = turns[i].is_learned
            parts += [TextPart(prompt[len(prefix) :], False), TextPart(answer, learned, excluded=not learned)]
            prefix = prompt + answer
        return parts

    def _text_before_greeting(self, full: str, source: Source) -> str:
        """The text up to an answer before the first question; transformers renders no prompt without turns."""
        question = [Message("user", "Q")]
        # what the template writes to open an answer, whatever comes before it
        opening = self._render(question, generation=True).removeprefix(self._render(question))
        before, found, _ = full.partition(opening) if opening else ("", "", "")
        if not found or self.positions is not None:
            raise greeting_error(source)
        return before + opening

    @staticmethod
    def _answers_to_split(record: Record, loss_on: LossOn) -> list[int]:
        """The turns that become separate parts: learned answers, and answers to exclude where all is learned."""
        turns = record.messages
        answers, last = [i for i, m in enumerate(turns) if m.role == "assistant"], len(turns) - 1
        if loss_on == "assistant_turns":
            indices = [i for i in answers if turns[i].is_learned]
        elif loss_on == "all":
            indices = [i for i in answers if i == last or not turns[i].is_learned]
        else:
            indices = [last]
        if not indices or not turns[indices[-1]].is_learned:
            learned = "its last answer" if loss_on != "assistant_turns" else "any of its answers"
            summary = f"nothing is learned of this row: {learned} is marked as not to be learned (weight 0)"
            hint = "leave the row out, or set data.loss_on: assistant_turns to learn its other answers"
            raise DataError(summary, where=str(record.source), hint=hint)
        return indices

    def _answer_body(self, answer: str) -> str:
        """The answer text before the stop, without marks of virtual tokens and of control tokens in the text."""
        ending = next(e for e in self._form.endings if answer.endswith(e.stop))
        text = without_marks(answer.removesuffix(ending.stop).removesuffix(ending.before_stop))
        return text if self.positions is None else "".join(self.positions.split_at_marks(text)[::2])

    def plain_text_part(self, text: str) -> TextPart:
        """A plain text as a part; its control tokens are text unless they are kept."""
        keep = self.control_tokens == "keep"
        return TextPart(self.control_text.mark(text, keep=keep), True)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The tokens at which generation ends, as text."""
        return tuple(text for text, i in self.control_text.tokens.items() if i in self.generation_stop_ids)

    def encode(self, texts: Sequence[str], mid_document: bool | Sequence[bool] = False) -> list[list[int]]:
        """Ids of each text, without added special tokens: the template has written them.

        `mid_document` says which texts (or whether all) continue a document, as answers do. SentencePiece vocabularies
        put a space before every text, so such texts are encoded after a newline whose ids are then removed;
        byte-level vocabularies need no such anchor.
        """
        mid_document = [mid_document] * len(texts) if isinstance(mid_document, bool) else mid_document
        if self.positions is None and not any(OPENING_MARK in text for text in texts):
            return self._encode_anchored(texts, mid_document)
        rows: list[list[list[int] | int]] = []  # ids, or the number of a text that is encoded below
        plain: list[str] = []
        flags: list[bool] = []
        # one tokenizer call for all segments: the fast tokenizer is parallel only within a call
        for text, is_mid in zip(texts, mid_document, strict=True):
            rows.append([])
            for i, part in enumerate([text] if self.positions is None else self.positions.split_at_marks(text)):
                if i % 2 and self.positions is not None:
                    rows[-1].append(list(self.positions.ids_of_mark(part)))
                    continue
                for k, piece in enumerate(split_marked(part)):
                    if k % 2:
                        rows[-1].append(self.control_text.ids_as_text(piece, self._anchor))
                        continue
                    rows[-1].append(len(plain))
                    plain.append(piece)
                    flags.append(is_mid or i > 0 or k > 0)
        encoded = self._encode_anchored(plain, flags)
        return [list(chain.from_iterable(encoded[x] if isinstance(x, int) else x for x in row)) for row in rows]

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
        policy = [] if self.control_tokens is None else [self.control_tokens]
        return json.dumps([backend, special, self.template, *virtual_ids, *policy], sort_keys=True)

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

    def _render(
        self,
        messages: Sequence[Message],
        context: str | None = None,
        tools: str | None = None,
        source: Source | None = None,
        *,
        generation: bool = False,
        marks: bool | None = None,
    ) -> str:
        if marks is None:
            marks = self.control_text.may_occur_in(messages, context, tools)
        turns = [for_template(m) for m in messages]
        where = str(source) if source else None
        start = next((i for i, m in enumerate(messages) if m.role != "system"), 0)
        has_greeting = is_greeting(messages, start)
        self._require_shown(messages, tools, where)
        if context:
            first_user = next((t for t in turns if t["role"] == "user"), None)
            if first_user is not None:
                first_user["content"] = with_context(context, first_user["content"])
            elif not has_greeting:  # else the question comes later
                raise DataError(NO_USER_TURN, where=where)
        schemas: Any = json.loads(tools) if tools else None
        marked_turns, marked_schemas = turns, schemas
        if marks:
            keep = self.control_tokens == "keep"
            marked_turns, marked_schemas = (self.control_text.mark(x, keep=keep) for x in (turns, schemas))
        is_marked = (marked_turns, marked_schemas) != (turns, schemas)
        if self.positions is not None:
            turns, marked_turns = (self.positions.with_marks(t, where) for t in (turns, marked_turns))
        try:
            text = unmarked = self._apply(marked_turns, marked_schemas, generation=generation)
            if is_marked:
                unmarked = self._apply(turns, schemas, generation=generation)
                text = require_whole_marks(text, unmarked, where)
        # templates fail in many ways: raise_exception, a missing key, a method that a value lacks
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            summary, roles = f"the chat template refuses this conversation: {error}", " ".join(m.role for m in messages)
            hint = "change the row, or set model.template: plain or a .jinja file"
            raise DataError(summary, where=where, given=roles, hint=hint) from error
        if has_greeting and messages[start].content.strip() not in unmarked:
            summary = "the chat template leaves out the greeting, the answer before the first question"
            hint = "leave the turn out, or set model.template: plain or a .jinja file that writes it"
            raise DataError(summary, where=where, hint=hint)
        if self._form.next_role is not None and not generation and messages[-1].role == "assistant":
            text += self._form.next_role[bool(messages[-1].tool_calls)]
        if self.positions is None:
            return text
        return self.positions.with_answer_mark(text, turns, self._form.prefix, generation=generation)

    def _require_shown(self, messages: Sequence[Message], tools: str | None, where: str | None) -> None:
        """Raise `DataError` for a part of a row that the template does not know."""
        # Jinja ignores variables a template never uses: tools would silently vanish from the prompt. Reasoning that the
        # prompt opens is written by `split_conversation`.
        has_reasoning = any(m.reasoning for m in messages) and not self._form.dropped_opening
        fields = {"tools": tools, "tool_calls": any(m.tool_calls for m in messages), "reasoning": has_reasoning}
        for name, present in fields.items():
            names = REASONING_FIELDS if name == "reasoning" else (name,)
            if present and not any(field in self.template for field in names):
                summary = f"the row has {name}, but the chat template never shows it"
                hint = "set model.template: plain, or a .jinja file that writes them"
                raise DataError(summary, where=where, hint=hint)

    def _apply(self, turns: list[dict[str, Any]], schemas: Any, *, generation: bool) -> str:
        options = {"tools": schemas, "chat_template": self.template, "add_generation_prompt": generation}
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **options))
        except TypeError:
            # DeepSeek's template puts arguments together with text, as OpenAI writes them
            as_text = [with_arguments_as_text(turn) for turn in turns]
            if as_text == turns:
                raise
            return str(self.tokenizer.apply_chat_template(as_text, tokenize=False, **options))

    def _text_after_stop(self, full: str, source: Source | None) -> str:
        for ending in self._form.endings:
            if full.endswith(ending.stop + ending.after_stop):
                return ending.after_stop
        summary = "the template ends this answer without a stop token"
        allowed = " or ".join(repr(e.stop + e.after_stop) for e in self._form.endings)
        where = None if source is None else str(source)
        raise DataError(summary, where=where, given=repr(full[-60:]), allowed=allowed)


def with_context(context: str, question: str) -> str:
    """A question preceded by its context."""
    return f"{context}\n\n{question}"


def turns_with_context(turns: Sequence[Message], context: str | None) -> list[Message]:
    """Turns with the context before the first one of a user, as in what `ChatTemplate` renders.

    Raises `DataError` for a context without such a turn.
    """
    turns = list(turns)
    if not context:
        return turns
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise DataError(NO_USER_TURN)
    turns[first] = replace(turns[first], content=with_context(context, turns[first].content))
    return turns
