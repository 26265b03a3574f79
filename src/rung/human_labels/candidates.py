"""Items from files and run folders: what people are asked to label.

A file is what `rung generate` wrote, rows of any format with answers, or labels that another tool exported. A run
folder or climb gives the answers of its last evaluation, each under the name of its rung. Answers of several sources to
one prompt are put together, each under the name of its source.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from rung.config.data import DataConfig
from rung.console import print_status
from rung.data.formats import load_records
from rung.data.read import RejectedRow, stream_rows
from rung.errors import ConfigError, DataError
from rung.files import is_run_folder
from rung.human_labels.items import MAX_ANSWERS, Item, merge_answers, prompt_id
from rung.types import Message, Record


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer to a prompt, before answers to the same prompt are put together."""

    prompt: tuple[Message, ...]
    context: str | None
    group: str | None
    expected: str | None
    answer: str
    system: str | None


def read_items(sources: Sequence[str], limit: int | None = None) -> list[Item]:
    """The items of all sources, in order. With several sources an item is a prompt that all of them answered.

    `limit` keeps the first items. Raises `DataError` for rows that cannot be read, and `ConfigError` where no prompt is
    answered by all sources.
    """
    names = _names(sources)
    by_source = [
        list(map(_encodable, _candidates(source, name if len(sources) > 1 else None)))
        for source, name in zip(sources, names, strict=True)
    ]
    by_prompt: dict[str, list[Candidate]] = {}
    answered = Counter[str]()
    for candidates in by_source:
        keys = [prompt_id(candidate.prompt, candidate.context) for candidate in candidates]
        answered.update(set(keys))
        for key, candidate in zip(keys, candidates, strict=True):
            by_prompt.setdefault(key, []).append(candidate)
    if lost := sum(count < len(sources) for count in answered.values()):
        print_status(f"{lost:,} of {len(answered):,} prompts are not in every FILE: not asked")
    common = [candidates for key, candidates in by_prompt.items() if answered[key] == len(sources)]
    if not common:
        summary = "no prompt is answered by all of these" if len(sources) > 1 else "there is nothing to label"
        raise ConfigError(summary, where="FILE", given=", ".join(sources))
    return [_item(candidates) for candidates in common[:limit]]


def _encodable(candidate: Candidate) -> Candidate:
    """The candidate without halves of characters, which no export could write."""
    prompt = tuple(replace(turn, content=_clean(turn.content)) for turn in candidate.prompt)
    context = None if candidate.context is None else _clean(candidate.context)
    return replace(candidate, prompt=prompt, context=context, answer=_clean(candidate.answer))


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _item(candidates: Sequence[Candidate]) -> Item:
    first = candidates[0]
    answers = merge_answers((candidate.answer, candidate.system) for candidate in candidates)
    if len(answers) > MAX_ANSWERS:
        given = f"{len(answers)} answers to {first.prompt[-1].content[:60]!r}"
        raise DataError(
            "a person cannot compare so many answers at once", given=given, allowed=f"{MAX_ANSWERS} answers"
        )
    # agreement beyond chance depends on what is called first: in files the better answer often is
    key = prompt_id(first.prompt, first.context)
    answers = tuple(sorted(answers, key=lambda answer: sha256(f"{key}{answer.text}".encode()).digest()))
    return Item(first.prompt, answers, first.context, first.group, first.expected)


def _names(sources: Sequence[str]) -> list[str]:
    """A short name of each source: its last part, or all of it where two would be the same."""
    short = [Path(source).stem if Path(source).is_file() else Path(source).name for source in sources]
    return [source if short.count(name) > 1 else name for name, source in zip(short, sources, strict=True)]


def _candidates(source: str, name: str | None) -> Iterator[Candidate]:
    path = Path(source)
    if is_run_folder(path):
        yield from _from_run(path, name)
        return
    # what `rung generate` wrote; with scores it is a file of ratings too, and both read the same prompts and answers
    first = next((row for row in stream_rows(source) if not isinstance(row, RejectedRow)), None)
    if first is not None and isinstance(first.row.get("answers"), list) and "prompt" in first.row:
        yield from _from_generated(source, name)
        return
    for record in load_records(DataConfig(path=source), source).records:
        yield from _from_record(record, name)


def _from_run(path: Path, name: str | None) -> Iterator[Candidate]:
    """The answers of the last evaluation; each rung of a climb is a system of its own."""
    from rung.report.run_reader import read_report_source  # loads torch

    rungs = [rung for rung in read_report_source(path).rungs if rung.items]
    if not rungs:
        hint = "rung eval RUN answers the questions of its test split"
        raise ConfigError("this run has answered no questions yet", where=str(path), hint=hint)
    systems = {rung.label: rung.label if len(rungs) > 1 or name is None else name for rung in rungs}
    if name is not None and len(rungs) > 1:
        systems = {label: f"{name}/{label}" for label in systems}
    contexts: dict[str, set[str]] = defaultdict(set)
    for item in (item for rung in rungs for item in rung.items):
        contexts[item["source"]].update([item["context"]] if item["context"] else [])
    for rung in rungs:
        for item in rung.items:
            if not item["question"]:
                continue  # plain text, which is only read
            # rungs may see other passages; a person is shown the one context that there is
            context = next(iter(contexts[item["source"]])) if len(contexts[item["source"]]) == 1 else None
            prompt = (Message("user", item["question"]),)
            group = item["group"] if item["group"] is not None else item["source"]
            system = systems[rung.label] if len(rungs) > 1 or name is not None else None
            yield Candidate(prompt, context, group, item["expected"], item["answer"], system)


def _from_generated(source: str, name: str | None) -> Iterator[Candidate]:
    for item in stream_rows(source):
        if isinstance(item, RejectedRow):
            raise DataError(item.reason, where=str(item.source))
        row, where = item.row, str(item.source)
        answers = row.get("answers")
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise DataError("answers is no list of texts", where=where, given=answers)
        systems = row.get("systems")
        if systems is not None and (not isinstance(systems, list) or len(systems) != len(answers)):
            raise DataError("systems is no list with a name for each answer", where=where, given=systems)
        prompt, context = _prompt(row, where)
        group, expected = (None if row.get(key) is None else str(row[key]) for key in ("group", "expected"))
        for i, answer in enumerate(answers):
            system = name if systems is None else str(systems[i])
            yield Candidate(prompt, context, group, expected, answer, system)


def _prompt(row: Mapping[str, Any], where: str) -> tuple[tuple[Message, ...], str | None]:
    prompt = row.get("prompt")
    context = None if row.get("context") is None else str(row["context"])
    if isinstance(prompt, str):
        return (Message("user", prompt),), context
    try:
        turns = tuple(Message(str(turn["role"]), str(turn["content"])) for turn in prompt or ())  # type: ignore[arg-type]
    except (TypeError, KeyError):
        raise DataError("prompt is neither a text nor a list of turns", where=where, given=prompt) from None
    if not turns:
        raise DataError("the prompt is empty", where=where)
    return turns, context


def _from_record(record: Record, name: str | None) -> Iterator[Candidate]:
    if not record.messages or (record.is_prompt_only and not record.candidates):
        hint = "rung generate RUN --data FILE -o OUTPUT writes answers"
        raise DataError("this row has no answer to label", where=str(record.source), hint=hint)
    prompt = record.messages[:-1]
    answers = [record.messages[-1].content, *(candidate.content for candidate in record.candidates)]
    for answer in answers:
        # without compared answers the one answer is what is rated or corrected, and nothing else is expected
        yield Candidate(prompt, record.context, record.group, None, answer, name)
