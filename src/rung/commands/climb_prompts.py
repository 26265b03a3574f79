"""What each rung of a climb is asked: contexts, worked examples, instruction. What can be refused is, before a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rung.config.climb import UNTUNED, WITH_SHOTS, RungSpec
from rung.config.evaluation import Context
from rung.config.run import RunSpec
from rung.data.chat import Chat
from rung.data.records import Records
from rung.data.splits import Splits
from rung.evaluation.evaluate import PERPLEXITY, Evaluation, framed, require_questions
from rung.evaluation.prompting import Framing, Shots, choose_shots, nearest_shots
from rung.evaluation.retrieval import Library
from rung.runs.dataset import as_asked, library_of
from rung.runs.load import test_records, validation_records
from rung.types import Record


@dataclass(frozen=True)
class Asked:
    """The questions of a rung and what is known about how they are put."""

    records: Records
    framing: Framing
    facts: dict[str, Any]
    """For `result.json`: the context, what was retrieved, the worked examples, the instruction."""


class Asking:
    """The held-out questions of a climb as its rungs ask them."""

    def __init__(self, spec: RunSpec, splits: Splits) -> None:
        """Raises `ConfigError` without a test split, `DataError` for questions, shots or documents that are missing."""
        self.spec, self.splits = spec, splits
        self.test = test_records(spec, splits)
        require_questions(self.test)
        zero_shot = next((rung for rung in spec.climb.rungs if rung.kind == "zero_shot"), None)
        self.chooser: RungSpec | None = zero_shot if spec.climb.instructions else None
        """The rung that chooses the instruction of all untuned ones."""
        if self.chooser is not None:
            require_questions(self.validation)
        looks_up = any(self.context(rung) == "retrieved" for rung in spec.climb.rungs)
        self.library: Library | None = library_of(spec, splits) if looks_up else None
        self._chosen: dict[str, Shots | Callable[[Record], Shots]] = {}
        for rung in spec.climb.rungs:
            if rung.kind in WITH_SHOTS:
                self._shots(rung)

    @cached_property
    def validation(self) -> Records:
        """What instructions are tried on. Raises `ConfigError` where there is nothing."""
        return validation_records(self.spec, self.splits)

    def context(self, rung: RungSpec) -> Context:
        """What stands before the questions of a rung."""
        return rung.context_of(self.spec.evaluate.context)

    @property
    def contexts(self) -> list[Context]:
        """What tuned rungs are trained with, each once, the config's own first."""
        tuned = [self.context(rung) for rung in self.spec.climb.rungs if rung.kind not in UNTUNED]
        return list(dict.fromkeys(tuned or [self.spec.evaluate.context]))

    @property
    def instructions(self) -> list[str | None]:
        """Candidates, in their order."""
        own = self.spec.evaluate.instruction
        return list(dict.fromkeys([*([own] if own else []), *self.spec.climb.instructions])) or [None]

    def of(self, rung: RungSpec, instruction: str | None) -> Asked:
        """Everything about a rung; tuned ones get the bare question."""
        context = self.context(rung)
        known = context == "retrieved" or any(record.context for record in self.test)
        facts: dict[str, Any] = {"context": context if known else None}
        if context == "retrieved" and self.library is not None:
            facts["retrieval"] = self.retrieval
        framing = Framing()
        if rung.kind in UNTUNED:
            framing = self.framing(rung, instruction)
            facts |= {"instruction": instruction, **self._told(rung, framing)}
        return Asked(self.put(rung, self.test), framing, facts)

    def put(self, rung: RungSpec, records: Records) -> Records:
        """Records with what stands before their questions."""
        return as_asked(self.context(rung), records, self.library)

    def framing(self, rung: RungSpec, instruction: str | None) -> Framing:
        """Instruction and worked examples of an untuned rung."""
        if rung.kind not in WITH_SHOTS:
            return Framing(instruction)
        found = self._shots(rung)
        return Framing(instruction, nearest=found) if callable(found) else Framing(instruction, found)

    def check_room(self, chat: Chat, limit: int) -> None:
        """Raise `DataError` for a prompt of an untuned rung that leaves the model no room for its answer."""
        longest = max(self.instructions, key=lambda text: len(text or ""))
        for rung in self.spec.climb.rungs:
            if rung.kind in UNTUNED:
                framing = self.framing(rung, longest)
                for part in (self.test, self.validation) if rung == self.chooser else (self.test,):
                    framed(chat, self.put(rung, part), framing, limit)

    def choose(self, rung: RungSpec, folder: Path, score: Callable[[Records, Framing], Evaluation]) -> dict[str, Any]:
        """Score every instruction on the validation split; the best by the deciding metric, the earlier of equal ones.

        Each is on disk before the next: a climb that was stopped goes on.
        """
        records = self.put(rung, self.validation)
        metric, tried = self.spec.evaluate.metrics[0], []
        sign = -1.0 if metric == PERPLEXITY else 1.0
        for number, text in enumerate(self.instructions):
            file = folder / f"validation-{number}.parquet"
            if file.exists():
                result = Evaluation.read(file)
            else:
                result = score(records, Framing(text))
                folder.mkdir(parents=True, exist_ok=True)
                result.write(file)
            tried.append({"instruction": text, **result.summary()})
        best = max(range(len(tried)), key=lambda i: (sign * tried[i]["scores"][metric]["mean"], -i))
        return {"instruction": tried[best]["instruction"], "instructions": tried}

    @cached_property
    def retrieval(self) -> dict[str, Any]:
        """How well the library answers the questions of the test."""
        return self.library.measure(self.test) if self.library is not None else {}

    def _shots(self, rung: RungSpec) -> Shots | Callable[[Record], Shots]:
        """Worked examples of a rung, each with what stands before its question as in the test; chosen once."""
        if rung.label not in self._chosen:
            self._chosen[rung.label] = self._choose_shots(rung)
        return self._chosen[rung.label]

    def _choose_shots(self, rung: RungSpec) -> Shots | Callable[[Record], Shots]:
        count, context = rung.shots or self.spec.evaluate.shots, self.context(rung)
        # what is not shown must not tell two questions apart
        train = self.splits.train if context == "given" else self._closed

        def put(shots: Shots) -> Shots:
            found = self.library if context == "retrieved" else None
            return tuple(found.shown(shot) if found else shot for shot in shots)

        if rung.choose == "similarity":
            nearest = nearest_shots(train, count)
            return lambda record: put(nearest(record))
        return put(choose_shots(train, count, self.spec.seed, rung.choose or "random"))

    @cached_property
    def _closed(self) -> Records:
        return as_asked("withheld", self.splits.train, None)

    def _told(self, rung: RungSpec, framing: Framing) -> dict[str, Any]:
        """Which worked examples stand in front; of those that differ by question, all that do somewhere."""
        shots = framing.shots
        if framing.nearest is not None:
            shots = tuple({str(s.source): s for record in self.test for s in framing.nearest(record)}.values())
        each = (rung.shots or self.spec.evaluate.shots) if rung.kind in WITH_SHOTS else 0
        told = {"shots": [str(shot.source) for shot in shots], "shots_each": each}
        return {**told, "choose": rung.choose or "random"} if each else told
