"""The columns of each format, and proposals for files whose columns have other names.

A proposal is a `data.map` to paste, never a reading: `Question` is certainly the question, but `response` beside it may
be one of several. `formats` detects by this table and puts the proposals into its errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from rung.config.data import Format


class FormatColumns(NamedTuple):
    """Rung's names of a format's columns."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    answer: str | None = None
    alternatives: tuple[tuple[str, ...], ...] = ()
    """Other columns that do as well as the required ones."""

    @property
    def readings(self) -> tuple[tuple[str, ...], ...]:
        """The sets of columns of which one must be there, in order of precedence."""
        return (self.required, *self.alternatives)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, that of the weight included."""
        return tuple(dict.fromkeys(name for reading in self.readings for name in (*reading, *self._others)))

    def names_read(self, columns: Collection[str], map: Mapping[str, str]) -> tuple[str, ...]:
        """The names that are read of a file with these columns."""
        complete = (r for r in self.readings if not self.missing(columns, map, (r,)))
        return (*next(complete, self.required), *self._others)

    def missing(
        self, columns: Collection[str], map: Mapping[str, str], readings: Collection[tuple[str, ...]] = ()
    ) -> list[str]:
        """Columns of the file that the format needs and that are not among these."""
        required = [[column_of(name, map) for name in names] for names in readings or self.readings]
        missing = [[str(column) for column in reading if column not in columns] for reading in required]
        return min(missing, key=len)

    @property
    def _others(self) -> tuple[str, ...]:
        # OpenAI's name of the schemas before tools
        return (*self.optional, *(("functions",) if "tools" in self.optional else ()), "weight")


def column_of(name: str, map: Mapping[str, str]) -> str | None:
    """The column of the file that one of Rung's names reads; a column that the map gives another name has no second."""
    return map.get(name) or (None if name in map.values() else name)


_PROMPT_COLUMNS = ("input", "context", "system", "tools")
"""Optional columns of formats with a prompt and its answers."""

_CODE_TESTS = ("tests", "test_setup", "entry_point")
"""Optional columns of formats whose answers may be programs; the names are those of MBPP and HumanEval."""

FORMATS: dict[Format, FormatColumns] = {
    "messages": FormatColumns(("messages",), ("tools", "references", *_CODE_TESTS)),
    "sharegpt": FormatColumns(("conversations",), ("system", "tools", "references", *_CODE_TESTS)),
    "alpaca": FormatColumns(
        ("instruction", "output"), ("input", "system", "history", "references", *_CODE_TESTS), "output"
    ),
    "prompt_completion": FormatColumns(("prompt", "completion"), ("tools", "references", *_CODE_TESTS), "completion"),
    "question_answer": FormatColumns(
        ("question", "answer"), ("context", "system", "references", *_CODE_TESTS), "answer"
    ),
    "text": FormatColumns(("text",)),
    "preference": FormatColumns(
        ("prompt", "chosen", "rejected"),
        (*_PROMPT_COLUMNS, "history", "margin", "probability"),
        alternatives=(
            ("conversations", "chosen", "rejected"),
            ("instruction", "chosen", "rejected"),
            ("messages", "chosen", "rejected"),
            ("messages", "rejected"),
            ("chosen", "rejected"),
        ),
    ),
    "ranked": FormatColumns(("prompt", "ranked"), (*_PROMPT_COLUMNS, "probability")),
    "rated": FormatColumns(("prompt", "answers", "scores"), (*_PROMPT_COLUMNS, "probability")),
    "unpaired_preference": FormatColumns(
        ("prompt", "completion", "label"), _PROMPT_COLUMNS, alternatives=(("messages", "label"),)
    ),
    "prompt_only": FormatColumns(("prompt",), (*_PROMPT_COLUMNS, *_CODE_TESTS)),
}

_QUESTION_LIKE = ("query", "problem", "prompt", "instruction", "input", "user", "human", "q")
_ANSWER_LIKE = (
    *("response", "output", "completion", "target", "gold", "solution", "reply", "assistant", "a"),
    *("ground_truth", "expected_output"),
)
SYNONYMS: dict[str, tuple[str, ...]] = {
    "question": _QUESTION_LIKE,
    "answer": _ANSWER_LIKE,
    "prompt": ("question", "query", "problem", "input", "user", "human"),
    "completion": ("response", "answer", "output"),
    "output": ("response", "completion", "answer"),
    "messages": ("conversation", "dialogue", "dialog", "chat"),
    "system": ("system_prompt", "system_message"),
    "context": ("passage",),
    "chosen": (
        *("preferred_output", "chosen_response", "preferred", "accepted", "chosen_messages"),
        *("pos_answer", "positive", "pos"),
    ),
    "rejected": (
        *("rejected_response", "non_preferred_output", "rejected_messages", "rejected_answer", "dispreferred"),
        *("neg_answer", "negative", "neg"),
    ),
    "text": ("content", "document", "article", "body", "completion", "response"),
    "probability": ("soft_label", "prob", "preference_probability", "chosen_probability", "chosen_prob"),
}
"""Columns of public data sets that a message proposes, in lower case."""
_PATHS = "write one row for each path, with its turns as messages"
_CHOICES = "write the choices into the question, and the text of the right one as answer"
_PAIRS = "write the better one as chosen, the other as rejected, and the question as prompt"
FOREIGN_SHAPES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("segments",),
        "segments of raw text (Axolotl's input_output) are not read: write messages, with weight 0 "
        "in turns that are not to be learned",
    ),
    (
        ("completions", "labels"),
        "labels of single steps are not read: write prompt, completion and label, "
        "with data.format: unpaired_preference",
    ),
    (("message_id", "parent_id", "text"), f"each row is one turn of a tree: {_PATHS}"),
    (("message_tree_id", "prompt"), f"each row is a tree of turns: {_PATHS}"),
    (
        ("role", "text"),
        "each row may be one turn of a conversation: write one row for each conversation, "
        "with its turns as messages, or set data.format: text",
    ),
    (("paragraphs",), "questions inside of documents (SQuAD's) are not read: write one row for each question"),
    (
        ("question", "context", "answers"),
        "answers with their places (SQuAD's) are not read: write the first text "
        "as answer, and all of them as references",
    ),
    (
        ("instruction", "instances"),
        "several answers inside of a row are not read: write one row for each instance, "
        "with instruction, input and output",
    ),
    (
        ("question_id", "turns"),
        "questions of several turns (MT-bench's) are not read: write the first as prompt, "
        "with data.format: prompt_only",
    ),
    (("contents",), "contents with parts (Gemini's) are not read: write messages with role and content"),
    (("choices", "answerKey"), _CHOICES),
    (("endings", "label"), _CHOICES),
    *(
        ((f"{name}{first}", f"{name}{second}"), _PAIRS)
        for name in ("response", "response_", "human_ref_", "conversation_")
        for first, second in ("01", "12", "ab", "AB")
    ),
)
"""Columns of shapes that would lose their meaning, and what to do."""
_PROPOSED: tuple[Format, ...] = (
    "question_answer",
    "prompt_completion",
    "alpaca",
    "preference",
    "messages",
    "sharegpt",
    "text",
)
"""Formats that are proposed, the likelier of equals first."""


_KNOWN_NAMES = frozenset(name for columns in FORMATS.values() for name in columns.names)
_KNOWN_NAMES |= {synonym for name, synonyms in SYNONYMS.items() if name != "messages" for synonym in synonyms}


def holds_turns(value: object) -> bool:
    """Whether the value of a column is a list of turns."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and any(names <= set(first) for names in ({"role", "content"}, {"from", "value"}))


def foreign_shape(columns: Collection[str]) -> str | None:
    """What to do with rows of a known shape that is not read; None for others."""
    return next((remedy for names, remedy in FOREIGN_SHAPES if set(names) <= set(columns)), None)


def propose_map(
    columns: Collection[str], format: Format = "auto", turns: Collection[str] = ()
) -> dict[str, str] | None:
    """The map that makes a format of these columns by names that differ in case or are synonyms; None without one.

    `turns` are columns that hold lists of turns, whatever their names.
    """
    formats = _PROPOSED if format == "auto" else (format,)
    proposals = [
        proposal for f in formats for names in FORMATS[f].readings if (proposal := _proposal(names, f, columns, turns))
    ]
    if not proposals:
        return None
    # what covers most columns; of equals what needs the fewest synonyms
    best = max(proposals, key=lambda p: (len(p), sum(name == column.lower() for name, column in p.items())))
    return {name: column for name, column in best.items() if name != column} or None


def _proposal(
    names: tuple[str, ...], format: Format, columns: Collection[str], turns: Collection[str]
) -> dict[str, str] | None:
    proposal: dict[str, str] = {}
    for name in (*names, *FORMATS[format].optional):
        near = [c for wanted in (name, *SYNONYMS.get(name, ())) for c in columns if c.lower() == wanted]
        # prompts and compared answers are lists of turns too, and have names that say so
        near += [c for c in turns if c not in _KNOWN_NAMES] if name == "messages" else ()
        column = name if name in columns else next((c for c in near if c not in proposal.values()), None)
        if column is not None:
            proposal[name] = column
        elif name in names:
            return None
    return proposal


def yaml_map(map: Mapping[str, str]) -> str:
    """A map as a config has it, on one line."""
    return "{" + ", ".join(f"{name}: {_yaml_word(column)}" for name, column in map.items()) + "}"


def _yaml_word(text: str) -> str:
    # words that YAML reads as something else than text
    is_plain = re.fullmatch(r"[A-Za-z_]\w*", text, re.A) and text.lower() not in ("y", "n", "yes", "no", "on", "off")
    return text if is_plain and text.lower() not in ("true", "false", "null") else json.dumps(text, ensure_ascii=False)
