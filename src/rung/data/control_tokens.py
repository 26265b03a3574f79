"""Control tokens in the text of rows: found, marked so that they pass a template, and encoded as the text they are.

A tokenizer turns `<|im_end|>` into a control id wherever it stands, so that a user turn could end itself and open a
turn of another role. Content is searched before it is rendered; what is found gets a mark on both sides, which no
template looks at, and `ChatTemplate.encode` gives the marked text to a copy of the tokenizer that knows no special
tokens. Text without control tokens costs one search for their first characters. `ChatTemplate` and `formats` use this
module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from rung.config.data import ControlTokens
from rung.errors import DataError
from rung.types import Candidate, Message, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OPENING_MARK, CLOSING_MARK = "\ufdd2", "\ufdd3"
"""Stand around a control token in content; noncharacters, which no text should contain (The Unicode Standard, section
23.7)."""
_MARKS = OPENING_MARK + CLOSING_MARK
# A mark that the text itself contains is marked as well, so that splitting gives back every text.
_MARKED = re.compile(f"{OPENING_MARK}([^{_MARKS}]+|[{_MARKS}]){CLOSING_MARK}")

MAX_KNOWN_CHARACTERS = 64
"""Longest text whose ids are remembered: longer than control tokens are."""
END_TOKENS = (
    *("</s>", "<eos>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>"),
    *("<end_of_turn>", "<|return|>", "<|END_OF_TURN_TOKEN|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|eot|>"),
)
"""Tokens that end an answer or a text: Llama 2 and Mistral, Gemma, GPT-2 and Qwen, ChatML, Llama 3, Granite, Phi,
gpt-oss, Command R, DeepSeek, Llama 4 (the `eos_token` of their tokenizers and the stops of their templates)."""


def possible_stops(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Tokens that can be a stop: special tokens, and added tokens that are not just white space."""
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special or t.content.strip()}
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {**added, **{str(text): int(i) for text, i in special}}


def text_control_tokens(
    tokenizer: PreTrainedTokenizerFast, stop_ids: Collection[int], frame: Collection[str] = ()
) -> dict[str, int]:
    """Tokens that text must not become: special ones, stops, and those that the template writes around turns.

    `<think>`, `<tool_call>` and others that models write stay tokens where the tokenizer does not call them special.
    """
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    special |= {str(token) for token in tokenizer.all_special_tokens}
    return {
        text: i for text, i in possible_stops(tokenizer).items() if text in special or text in frame or i in stop_ids
    }


class ControlTokenText:
    """Finds control tokens in text, and marks them; `tokens` are their texts.

    The tokenizer is copied where it first has to encode a control token as text: special tokens are unknown to the
    copy (`split_special_tokens` of transformers).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tokens: Mapping[str, int]) -> None:
        self.tokens = dict(tokens)
        self._backend = tokenizer.backend_tokenizer
        self._unknown = (tokenizer.unk_token, tokenizer.unk_token_id)
        # the longest first: of two tokens that begin at one place a tokenizer takes the longer
        texts = sorted(self.tokens, key=len, reverse=True)
        # without marks, so that all begin alike in most vocabularies, which `re` searches for as a whole
        self._tokens_only = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._pattern = re.compile("|".join(map(re.escape, [*texts, *_MARKS])))
        first = dict.fromkeys(text[0] for text in [*texts, *_MARKS])
        self._first_ascii = tuple(character for character in first if character.isascii())
        self._first_other = tuple(character for character in first if not character.isascii())
        normalized = any(t.special and t.normalized for t in tokenizer.added_tokens_decoder.values())
        self._normalizer = self._backend.normalizer if normalized else None
        self._copy: Tokenizer | None = None
        self._known_ids: dict[str, list[int]] = {}

    def may_occur(self, text: str) -> bool:
        """Whether a text could contain a control token or a mark; False is certain."""
        if self._normalizer is not None:
            return True
        # plain loops: `any` over a generator takes three times as long, and every row pays for it
        for character in self._first_ascii:
            if character in text:
                return not text.isascii() or self._tokens_only.search(text) is not None
        return not text.isascii() and any(character in text for character in self._first_other)

    def may_occur_in(self, messages: Sequence[Message], context: str | None, tools: str | None) -> bool:
        """`may_occur` for the parts of a conversation."""
        for m in messages:
            if self.may_occur(m.content) or (m.tool_calls and self._may_occur_in_json(m.tool_calls)):
                return True
            if (m.reasoning or m.name or m.tool_call_id) and any(map(self.may_occur, filter(None, _other_texts(m)))):
                return True
        return bool((context and self.may_occur(context)) or (tools and self._may_occur_in_json(tools)))

    def _may_occur_in_json(self, text: str) -> bool:
        # an escape hides a character
        return "\\u" in text or self.may_occur(text)

    def found(self, value: Any) -> list[str]:
        """The control tokens in a text, or in all texts of a JSON value, each as often as it occurs."""
        return [text for text in self._occurrences(value) if text not in _MARKS]

    def found_in(self, record: Record) -> list[str]:
        """The control tokens in the texts of a record, without its candidates."""
        if not self.may_occur_in(record.messages, record.context or record.text, record.tools):
            return []
        calls = [json.loads(m.tool_calls) for m in record.messages if m.tool_calls]
        plain = [text for m in record.messages for text in (m.content, *_other_texts(m))]
        tools = json.loads(record.tools) if record.tools else None
        return self.found([plain, calls, record.context, record.text, tools])

    def mark(self, value: Any, *, keep: bool = False) -> Any:
        """A text, or a JSON value of texts, with a mark on both sides of each control token.

        `keep` leaves control tokens as they are and marks only what looks like a mark.
        """
        if isinstance(value, str):
            if keep:
                return re.sub(f"[{_MARKS}]", _with_marks, value) if any(m in value for m in _MARKS) else value
            if not self.may_occur(value):
                return value
            marked = self._pattern.sub(_with_marks, value)
            hidden = self._normalizer is not None and marked == value and self._hides_token(value)
            return f"{OPENING_MARK}{value}{CLOSING_MARK}" if hidden else marked
        if isinstance(value, Mapping):
            return {self.mark(name, keep=keep): self.mark(item, keep=keep) for name, item in value.items()}
        return [self.mark(item, keep=keep) for item in value] if isinstance(value, list | tuple) else value

    def ids_as_text(self, text: str, anchor: Sequence[int]) -> list[int]:
        """Ids of a text without any control id; `anchor` as in `ChatTemplate.encode`.

        Raises `DataError` where the vocabulary has no other way to write it.
        """
        if text not in self._known_ids:
            ids = self._encode(text, anchor)
            unknown_text, unknown_id = self._unknown
            control = set(self.tokens.values())
            if unknown_text is None or unknown_text not in text:
                control.discard(-1 if unknown_id is None else unknown_id)
            # a vocabulary may contain the token itself as a word: half of it is none
            if control.intersection(ids):
                if len(text) == 1:
                    summary = f"the tokenizer has only a control token for the character {text!r}"
                    raise DataError(summary, hint="set data.control_tokens: drop, or keep")
                halves = text[: len(text) // 2], text[len(text) // 2 :]
                ids = [i for half in halves for i in self.ids_as_text(half, anchor)]
            # a whole text, which a normalizer would change, comes once
            if len(text) > MAX_KNOWN_CHARACTERS:
                return ids
            self._known_ids[text] = ids
        return self._known_ids[text]

    def _encode(self, text: str, anchor: Sequence[int]) -> list[int]:
        if self._copy is None:
            backend = json.loads(self._backend.to_str())
            # a stop of the template need not be a special token; in the copy it is, so that it can be switched off
            for token in backend["added_tokens"]:
                token["special"] = token["special"] or token["content"] in self.tokens
            backend["padding"] = backend["truncation"] = None
            self._copy = Tokenizer.from_str(json.dumps(backend))
            self._copy.encode_special_tokens = True
        ids = self._copy.encode("\n" * bool(anchor) + text, add_special_tokens=False).ids
        return list(ids[len(anchor) :])

    def _occurrences(self, value: Any) -> Iterable[str]:
        if isinstance(value, str):
            if not self.may_occur(value):
                return []
            matches = self._pattern.findall(value)
            if not matches and self._normalizer is not None and self._hides_token(value):
                matches = self._pattern.findall(self._normalizer.normalize_str(value))
            return matches
        if isinstance(value, Mapping):
            value = [*value, *value.values()]
        return [t for item in value for t in self._occurrences(item)] if isinstance(value, list | tuple) else []

    def _hides_token(self, text: str) -> bool:
        """Whether the normalizer makes a control token of a text that contains none."""
        return self._pattern.search(self._normalizer.normalize_str(text)) is not None  # type: ignore[union-attr]


def split_marked(text: str) -> list[str]:
    """Text and marked text alternating, `[text, marked, text, ..., text]`."""
    return _MARKED.split(text)


def without_marks(text: str) -> str:
    """The text as the row has it."""
    return _MARKED.sub(r"\1", text) if OPENING_MARK in text else text


def require_whole_marks(rendered: str, plain: str, where: str | None) -> str:
    """The rendered text of marked content, which without marks is `plain`, the text that the template writes.

    Raises `DataError` for a template that treats the control token itself in a way of its own.
    """
    # a template may write JSON with escapes
    for mark in _MARKS:
        rendered = rendered.replace(f"\\u{ord(mark):04x}", mark)
    outside = "".join(split_marked(rendered)[::2])
    if without_marks(rendered) != plain or any(mark in outside for mark in _MARKS):
        summary = "the chat template treats the control token in this text in a way of its own"
        hint = "change the row, or set data.control_tokens: drop"
        raise DataError(summary, where=where, hint=hint)
    return rendered


def without_end_token(text: str, tokens: Collection[str] = ()) -> tuple[str, list[str]]:
    """An answer without the end tokens at its end, as exports leave them, and these tokens.

    `</s>` stays where the answer opens `<s>` itself: that is HTML.
    """
    removed: list[str] = []
    while (bare := text.rstrip()).endswith((*END_TOKENS, *tokens)):
        token = max((t for t in (*END_TOKENS, *tokens) if bare.endswith(t)), key=len)
        if token == "</s>" and "<s>" in bare:  # noqa: S105 -- a tag, not a secret
            break
        text = bare[: -len(token)].rstrip()
        removed.append(token)
    return text, removed


def without_end_tokens(
    messages: Sequence[Message], tokens: Collection[str] = ()
) -> tuple[tuple[Message, ...], list[str]]:
    """`without_end_token` for the answers of a conversation; an answer of end tokens alone stays as it is."""
    kept, removed = [], list[str]()
    for message in messages:
        if message.role == "assistant" and message.content:
            text, ended_by = without_end_token(message.content, tokens)
            if ended_by and (text or message.tool_calls):
                removed += ended_by
                message = replace(message, content=text)
        kept.append(message)
    return tuple(kept), removed


def candidates_without_end_tokens(candidates: Iterable[Candidate]) -> tuple[list[Candidate], list[str]]:
    """`without_end_token` for compared answers."""
    kept, removed = [], list[str]()
    for candidate in candidates:
        text, ended_by = without_end_token(candidate.content)
        is_changed = bool(ended_by and (text or candidate.tool_calls))
        removed += ended_by if is_changed else []
        kept.append(replace(candidate, content=text) if is_changed else candidate)
    return kept, removed


def plain_text_error(tokens: Iterable[str]) -> DataError:
    """The error for a plain text with control tokens where `data.control_tokens` is unset."""
    names = ", ".join(dict.fromkeys(tokens))
    summary = (
        f"the text contains {names}: either it is an already rendered conversation (data.control_tokens: keep learns "
        "them as control tokens), or it writes about them (data.control_tokens: text learns their letters)"
    )
    return DataError(summary, hint="set data.control_tokens: keep, text, or drop, which leaves such rows out")


def refused_error(tokens: Iterable[str]) -> DataError:
    """The error for a row with control tokens under `data.control_tokens: error`."""
    names = ", ".join(dict.fromkeys(tokens))
    hint = "set data.control_tokens: text to encode them as text, drop to leave such rows out, or keep"
    return DataError(f"the row contains the control tokens {names}", hint=hint)


def treatment(policy: ControlTokens | None, *, is_plain_text: bool) -> ControlTokens | None:
    """What is done with control tokens in a row; None: the row is refused, because it can mean two things."""
    return policy or (None if is_plain_text else "text")


def _with_marks(match: re.Match[str]) -> str:
    return f"{OPENING_MARK}{match[0]}{CLOSING_MARK}"


def _other_texts(message: Message) -> tuple[str | None, ...]:
    return message.reasoning, message.name, message.tool_call_id
