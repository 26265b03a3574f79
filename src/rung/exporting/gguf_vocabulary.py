"""The tokenizer of a run in GGUF: tokens, merges or scores, special tokens, and the pre-tokenizer by name.

llama.cpp does not run a tokenizer's own pre-tokenizer but one of some fifty that it has by name. The name is read off
the tokenizer's parts where they are known, and `pre_tokenizer_candidates` lists the others to try; `proof.py` compares
the ids on the run's own rows either way. The list of tokens is exactly as long as the embedding, the template and the
stops are those that the run learned.

Sources: src/llama-vocab.cpp of llama.cpp; `tokenizers` for the parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gguf import GGUFWriter, TokenType

from rung.data.chat import ChatTemplate
from rung.errors import PlanError
from rung.types import Message

UNUSED_SCORE = -10_000.0
"""Score of tokens that no merge makes: added tokens and padding."""
_QWEN2_SPLIT = "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+"
_LLAMA3_SPLIT = "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+"
_GPT4O_SPLIT = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*"
PRE_TOKENIZERS = (
    *("gpt-2", "smollm", "llama-bpe", "qwen2", "gpt-4o", "tekken", "default", "deepseek-llm", "deepseek-coder"),
    *("deepseek-v3", "falcon", "starcoder", "refact", "command-r", "qwen35", "stablelm2", "olmo", "dbrx", "smaug-bpe"),
    *(
        "poro-chat",
        "chatglm-bpe",
        "viking",
        "codeshell",
        "bloom",
        "gpt3-finnish",
        "exaone",
        "minerva-7b",
        "mpt",
        "jais",
    ),
    *("superbpe", "seed-coder", "trillion", "bailingmoe", "hunyuan", "hunyuan-dense", "kimi-k2", "grok-2"),
)
"""Names of byte-level pre-tokenizers that llama.cpp has, the most common ones first."""


@dataclass(frozen=True)
class GgufVocabulary:
    """What a GGUF file holds of a tokenizer and its chat template."""

    model: str
    """`gpt2` for byte-level BPE, `llama` for BPE with SentencePiece's spaces."""
    pre: str | None
    """Name of the pre-tokenizer; `default` for `llama`, which has none. None: not known by its parts."""
    tokens: Sequence[bytes]
    types: Sequence[TokenType]
    merges: Sequence[str]
    """For `gpt2`, in their order."""
    scores: Sequence[float]
    """For `llama`: minus the rank of the merge that makes the token."""
    special_ids: Mapping[str, int]
    """By name of the key: bos, eos, eot, eom, unk, pad."""
    adds_bos: bool
    """Whether llama.cpp puts BOS before plain text, as the run's tokenizer does; templates write their own."""
    adds_space: bool
    """For `llama`: whether a space is put before a text."""
    template: str | None

    def with_pre_tokenizer(self, name: str) -> GgufVocabulary:
        """The same with another pre-tokenizer."""
        return replace(self, pre=name)

    def write(self, writer: GGUFWriter) -> None:
        """Add the keys of the tokenizer. Raises `PlanError` where the pre-tokenizer is not known."""
        if self.pre is None:
            summary = "only llama.cpp can say which of its pre-tokenizers this tokenizer has"
            raise PlanError(summary, hint="pip install 'rung[export]'")
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        if self.scores:
            writer.add_token_scores(list(self.scores))
            writer.add_add_space_prefix(self.adds_space)
        for name, token in self.special_ids.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(False)
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(chat: ChatTemplate, size: int) -> GgufVocabulary:
    """The vocabulary of a tokenizer for an embedding of `size` rows.

    Raises `PlanError` for a tokenizer of a kind that llama.cpp does not have, or with more tokens than rows.
    """
    parts = json.loads(chat.tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    if model.get("type") != "BPE":
        raise _unknown_tokenizer(f"a {model.get('type')} model")
    ids = chat.tokenizer.get_vocab()
    is_byte_level = not model.get("byte_fallback")
    if is_byte_level and not _has_part(parts, "ByteLevel"):
        raise _unknown_tokenizer("BPE that is neither byte-level nor falls back to bytes")
    tokens = [f"[PAD{i}]".encode() for i in range(size)]
    types = [TokenType.UNUSED] * size
    added = {token["id"]: token for token in parts["added_tokens"]}
    for text, number in ids.items():
        if number < size:
            tokens[number], types[number] = _token(text, added.get(number), chat)
        # transformers adds tokens of its own to some tokenizers; the model has no row for them and never saw them
        elif number not in added or number in chat.generation_stop_ids:
            given, hint = (
                f"{text} is {number}, and there are {size} rows",
                "take the tokenizer that belongs to the base",
            )
            raise PlanError("the tokenizer has ids beyond the embedding", given=given, hint=hint)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return GgufVocabulary(
        model="gpt2" if is_byte_level else "llama",
        pre=known_pre_tokenizer(parts) if is_byte_level else "default",
        tokens=tokens,
        types=types,
        merges=merges if is_byte_level else (),
        scores=() if is_byte_level else _scores(tokens, model["merges"]),
        special_ids=_special_ids(chat),
        # a template without BOS is what was trained, whatever the tokenizer does to plain text
        adds_bos=chat.adds_bos and chat.prompt_ids([Message("user", "Q")])[:1] == [chat.bos_id],
        adds_space=_adds_space(chat),
        template=chat.template,
    )


def _unknown_tokenizer(given: str) -> PlanError:
    hint = "rung export --as merged writes a transformers folder"
    return PlanError("llama.cpp does not have this kind of tokenizer", given=given, allowed="BPE", hint=hint)


def _token(text: str, added: Mapping[str, Any] | None, chat: ChatTemplate) -> tuple[bytes, TokenType]:
    """Bytes and type of a token."""
    number = chat.tokenizer.convert_tokens_to_ids(text)
    if number == chat.tokenizer.unk_token_id and not (
        added and added["special"] and number in chat.generation_stop_ids
    ):
        return text.encode(), TokenType.UNKNOWN
    if added is not None:
        # a stop that the tokenizer does not call special would be printed at the end of every answer
        is_control = added["special"] or number in chat.generation_stop_ids
        # llama.cpp looks for added tokens in the text as it was written, with its own spaces
        return text.replace("▁", " ").encode(), TokenType.CONTROL if is_control else TokenType.USER_DEFINED
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return text.encode(), TokenType.BYTE if is_byte else TokenType.NORMAL


def _scores(tokens: Sequence[bytes], merges: Sequence[Any]) -> list[float]:
    """SentencePiece's scores from ranks: llama.cpp merges the pair whose token has the highest score."""
    ranks: dict[bytes, int] = {}
    for rank, pair in enumerate(merges):
        first, second = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault((first + second).encode(), rank)
    return [-float(ranks[token]) if token in ranks else UNUSED_SCORE for token in tokens]


def _special_ids(chat: ChatTemplate) -> dict[str, int]:
    """Ids by key. The end of text is the end of turn that the run learned, whatever the base calls its own."""
    stops = dict(zip(("eos", "eot", "eom"), chat.generation_stop_ids, strict=False))
    others = {"bos": chat.bos_id, "unk": chat.tokenizer.unk_token_id, "pad": chat.tokenizer.pad_token_id}
    return {**stops, **{name: int(token) for name, token in others.items() if token is not None}}


def general_name(chat: ChatTemplate, name: str) -> str:
    """A name for `general.name`: llama.cpp strips spaces after control tokens where it contains phi-3 or phi3."""
    strips = any(token.rstrip for token in chat.tokenizer.added_tokens_decoder.values() if token.special)
    if strips:
        return name if re.search(r"phi-?3", name.lower()) else f"{name} (phi-3 tokenizer)"
    return re.sub(r"(?i)phi-?3", "phi_3", name)


def _adds_space(chat: ChatTemplate) -> bool:
    first = chat.tokenizer.convert_ids_to_tokens(chat.encode(["a"])[0])[0]
    return bool(str(first).startswith("▁"))


def _has_part(parts: Mapping[str, Any], kind: str) -> bool:
    return any(part.get("type") == kind for part in pre_tokenizer_parts(parts))


def pre_tokenizer_parts(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer in their order."""
    outer = parts.get("pre_tokenizer") or {}
    return list(outer["pretokenizers"]) if outer.get("type") == "Sequence" else [outer]


def known_pre_tokenizer(parts: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of a byte-level pre-tokenizer by its parts; None for parts that are not known."""
    steps = pre_tokenizer_parts(parts)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = str(steps[0]["pattern"].get("Regex", ""))
        if _GPT4O_SPLIT in pattern:
            return "tekken" if "\\p{N}{1,3}" not in pattern else "gpt-4o"
        known = {_LLAMA3_SPLIT: "llama-bpe", _QWEN2_SPLIT: "qwen2"}
        return next((name for part, name in known.items() if part in pattern), None)
    return None
