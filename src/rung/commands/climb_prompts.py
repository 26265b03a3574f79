"""What each rung of a climb is asked: contexts, worked examples, instruction. What can be refused is, before a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rung.config.climb import UNTUNED, WITH_SHOTS, RungConfig
from rung.config.evaluation import Context
from rung.config.run import RunConfig
from rung.data.chat import ChatTemplate
from rung.data.records import Records
from rung.data.splits import Splits
from rung.evaluation.evaluate import PERPLEXITY, Evaluation, prompt_ids, require_questions
from rung.evaluation.prompting import PromptFormat, Shots, choose_shots, nearest_shots
from rung.evaluation.retrieval import Library
from rung.runs.dataset import load_library, with_contexts
from rung.runs.load import test_records, validation_records
from rung.types import Record


@dataclass(frozen=True)
class RungPrompts:
    """The questions of a rung and what is known about how they are put."""

    records: Records
    prompt_format: PromptFormat
    facts: dict[str, Any]
    """For `result.json`: the context, what was retrieved, the worked examples, the instruction."""


class ClimbPrompts:
    """The held-out questions of a climb as its rungs ask them."""

    def __init__(self, config: RunConfig, splits: Splits) -> None:
        """Raises `ConfigError` without a test split, `DataError` for questions, shots or documents that are missing."""
        self.config, self.splits = config, splits
        self.test = test_records(config, splits)
        require_questions(self.test)
        zero_shot = next((rung for rung in config.climb.rungs if rung.kind == "zero_shot"), None)
        self.chooser: RungConfig | None = zero_shot if config.climb.instructions else None
        """The rung that chooses the instruction of all untuned ones."""
        if self.chooser is not None:
            require_questions(self.validation_records)
        looks_up = any(self.context(rung) == "retrieved" for rung in config.climb.rungs)
        self.library: Library | None = load_library(config, splits) if looks_up else None
        self._chosen: dict[str, Shots | Callable[[Record], Shots]] = {}
        for rung in config.climb.rungs:
            if rung.kind in WITH_SHOTS:
                self._shots(rung)

    @cached_property
    def validation_records(self) -> Records:
        """What instructions are tried on. Raises `ConfigError` where there is nothing."""
        return validation_records(self.config, self.splits)

    def context(self, rung: RungConfig) -> Context:
        """What stands before the questions of a rung."""
        return rung.context_of(self.config.evaluation.context)

    @property
    def contexts(self) -> list[Context]:
        """What tuned rungs are trained with, each once, the config's own first."""
        tuned = [self.context(rung) for rung in self.config.climb.rungs if rung.kind not in UNTUNED]
        return list(dict.fromkeys(tuned or [self.config.evaluation.context]))

    @property
    def instructions(self) -> list[str | None]:
        """Candidates, in their order."""
        own = self.config.evaluation.instruction
        return list(dict.fromkeys([*([own] if own else []), *self.config.climb.instructions])) or [None]

    def for_rung(self, rung: RungConfig, instruction: str | None) -> RungPrompts:
        """Everything about a rung; tuned ones get the bare question."""
        context = self.context(rung)
        known = context == "retrieved" or any(record.context for record in self.test)
        facts: dict[str, Any] = {"context": context if known else None}
        if context == "retrieved" and self.library is not None:
            facts["retrieval"] = self.retrieval
        framing = PromptFormat()
        if rung.kind in UNTUNED:
            framing = self.prompt_format(rung, instruction)
            facts |= {"instruction": instruction, **self._shot_facts(rung, framing)}
        return RungPrompts(self.with_contexts(rung, self.test), framing, facts)

    def with_contexts(self, rung: RungConfig, records: Records) -> Records:
        """Records with what stands before their questions."""
        return with_contexts(self.context(rung), records, self.library)

    def prompt_format(self, rung: RungConfig, instruction: str | None) -> PromptFormat:
        """Instruction and worked examples of an untuned rung."""
        if rung.kind not in WITH_SHOTS:
            return PromptFormat(instruction)
        found = self._shots(rung)
        return PromptFormat(instruction, nearest_shots=found) if callable(found) else PromptFormat(instruction, found)

    def check_room(self, chat: ChatTemplate, limit: int) -> None:
        """Raise `DataError` for a prompt of an untuned rung that leaves the model no room for its answer."""
        longest = max(self.instructions, key=lambda text: len(text or ""))
        for rung in self.config.climb.rungs:
            if rung.kind in UNTUNED:
                framing = self.prompt_format(rung, longest)
                for part in (self.test, self.validation_records) if rung == self.chooser else (self.test,):
                    prompt_ids(chat, self.with_contexts(rung, part), framing, limit)

    def choose_instruction(
        self, rung: RungConfig, folder: Path, score: Callable[[Records, PromptFormat], Evaluation]
    ) -> dict[str, Any]:
        """Score every instruction on the validation split; the best by the deciding metric, the earlier of equal ones.

        Each is on disk before the next: a climb that was stopped goes on.
        """
        records = self.with_contexts(rung, self.validation_records)
        metric, tried = self.config.evaluation.metrics[0], []
        sign = -1.0 if metric == PERPLEXITY else 1.0
        for number, text in enumerate(self.instructions):
            file = folder / f"validation-{number}.parquet"
            if file.exists():
                result = Evaluation.read(file)
            else:
                result = score(records, PromptFormat(text))
                folder.mkdir(parents=True, exist_ok=True)
                result.write(file)
            tried.append({"instruction": text, **result.summary()})
        best = max(range(len(tried)), key=lambda i: (sign * tried[i]["scores"][metric]["mean"], -i))
        return {"instruction": tried[best]["instruction"], "instructions": tried}

    @cached_property
    def retrieval(self) -> dict[str, Any]:
        """How well the library answers the questions of the test."""
        return self.library.hit_rate(self.test) if self.library is not None else {}

    def _shots(self, rung: RungConfig) -> Shots | Callable[[Record], Shots]:
        """Worked examples of a rung, each with what stands before its question as in the test; chosen once."""
        if rung.label not in self._chosen:
            self._chosen[rung.label] = self._choose_shots(rung)
        return self._chosen[rung.label]

    def _choose_shots(self, rung: RungConfig) -> Shots | Callable[[Record], Shots]:
        count, context = rung.shots or self.config.evaluation.shots, self.context(rung)
        # what is not shown must not tell two questions apart
        train = self.splits.train if context == "given" else self._closed_book_training_records

        def put(shots: Shots) -> Shots:
            found = self.library if context == "retrieved" else None
            return tuple(found.with_passages(shot) if found else shot for shot in shots)

        if rung.example_selection == "similarity":
            nearest = nearest_shots(train, count)
            return lambda record: put(nearest(record))
        return put(choose_shots(train, count, self.config.seed, rung.example_selection or "random"))

    @cached_property
    def _closed_book_training_records(self) -> Records:
        return with_contexts("withheld", self.splits.train, None)

    def _shot_facts(self, rung: RungConfig, framing: PromptFormat) -> dict[str, Any]:
        """Which worked examples stand in front; of those that differ by question, all that do somewhere."""
        shots = framing.shots
        if framing.nearest_shots is not None:
            shots = tuple({str(s.source): s for record in self.test for s in framing.nearest_shots(record)}.values())
        each = (rung.shots or self.config.evaluation.shots) if rung.kind in WITH_SHOTS else 0
        told = {"shots": [str(shot.source) for shot in shots], "shots_each": each}
        return {**told, "example_selection": rung.example_selection or "random"} if each else told
