"""The prompts of each rung of a climb: held-out questions, contexts, worked examples and instruction.

An untuned rung gets the strongest prompt the config allows, a tuned one the bare question, as in its training; a
comparison against a weak prompt would flatter training. Instructions are chosen on the validation split, so that the
test split stays unseen, at the cost of one evaluation for each instruction. Missing questions, missing examples and
prompts without room for an answer are refused before the first training step. `climb.py` holds one `ClimbPrompts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rung.commands.climb_data import ClimbData
from rung.config.climb import DISTILLED_PROMPT, UNTUNED, WITH_SHOTS, RungConfig
from rung.config.evaluation import Context
from rung.config.run import RunConfig
from rung.data.chat import ChatTemplate
from rung.data.records import Records
from rung.evaluation.choices import label_choices
from rung.evaluation.evaluate import PERPLEXITY, Evaluation, prompt_ids, require_questions
from rung.evaluation.prompting import PromptFormat, Shots, choose_shots, nearest_shots
from rung.evaluation.retrieval import Library
from rung.runs.dataset import load_library, with_contexts
from rung.runs.load import test_records, validation_records
from rung.types import Record


@dataclass(frozen=True)
class RungPrompts:
    """The questions of one rung and the format of its prompts."""

    records: Records
    prompt_format: PromptFormat
    facts: dict[str, Any]
    """For `result.json`: context, retrieval, worked examples, instruction."""


ScoreFunction = Callable[[Records, PromptFormat], Evaluation]


class ClimbPrompts:
    """The held-out questions of a climb in the form in which each rung is asked them."""

    def __init__(self, config: RunConfig, data: ClimbData) -> None:
        """Raises `ConfigError` without a test split, `DataError` for missing questions, examples or documents."""
        self.config, self.data, splits = config, data, data.splits
        self.test = test_records(config, splits)
        require_questions(self.test)
        self.choices = label_choices(config.evaluation, splits.train, self.test)
        """Labels among which answers are chosen; empty where they are generated."""
        zero_shot = next((rung for rung in config.climb.rungs if rung.kind == "zero_shot" and not rung.model), None)
        self.instruction_rung: RungConfig | None = zero_shot if config.climb.instructions else None
        """The rung on the climb's own model that chooses the instruction of all untuned rungs."""
        if self.instruction_rung is not None:
            require_questions(self.validation_records)
        needs_library = any(self.context(rung) == "retrieved" for rung in config.climb.rungs)
        self.library: Library | None = load_library(config, splits) if needs_library else None
        # Chosen now, so that a training split with too few rows is refused before a model is loaded.
        rungs_with_shots = [rung for rung in config.climb.rungs if rung.kind in WITH_SHOTS]
        self._shots = {rung.label: self._choose_shots(rung) for rung in rungs_with_shots}

    @cached_property
    def validation_records(self) -> Records:
        """The records on which instructions are compared. Raises `ConfigError` without a validation split."""
        return validation_records(self.config, self.data.splits)

    def context(self, rung: RungConfig) -> Context:
        """The context of a rung: its own setting, or else that of the evaluation."""
        return rung.context_of(self.config.evaluation.context)

    @property
    def instructions(self) -> list[str | None]:
        """Candidate instructions, that of the evaluation first; a single None if there are none."""
        instruction = self.config.evaluation.instruction
        return list(dict.fromkeys([*([instruction] if instruction else []), *self.config.climb.instructions])) or [None]

    def for_rung(self, rung: RungConfig, instruction: str | None) -> RungPrompts:
        """The prompts of a rung on the test split; a tuned rung gets the bare question."""
        context = self.context(rung)
        # Without contexts in the data, "given" and "withheld" are the same prompt and the ladder names neither.
        has_contexts = context == "retrieved" or any(record.context for record in self.test)
        facts: dict[str, Any] = {"context": context if has_contexts else None}
        if context == "retrieved" and self.library is not None:
            facts["retrieval"] = self.retrieval
        prompt_format = PromptFormat()
        if rung.kind in UNTUNED:
            prompt_format = self.prompt_format(rung, instruction)
            facts |= {"instruction": instruction, **self._shots_summary(rung, prompt_format)}
        elif rung.kind == DISTILLED_PROMPT:
            facts["replaces"] = self.config.climb.replaced_rung(rung).label
        return RungPrompts(self.with_contexts(rung, self.test), prompt_format, facts)

    def with_contexts(self, rung: RungConfig, records: Records) -> Records:
        """Records whose context is what the rung sees before a question."""
        return with_contexts(self.context(rung), records, self.library)

    def prompt_format(self, rung: RungConfig, instruction: str | None) -> PromptFormat:
        """Instruction and worked examples of an untuned rung."""
        if rung.kind not in WITH_SHOTS:
            return PromptFormat(instruction, choices=self.choices)
        shots = self._shots[rung.label]
        if callable(shots):
            return PromptFormat(instruction, nearest_shots=shots, choices=self.choices)
        return PromptFormat(instruction, shots, choices=self.choices)

    def check_room(self, rungs: Iterable[RungConfig], chat: ChatTemplate, max_prompt_tokens: int) -> None:
        """Raise `DataError` for a prompt of an untuned rung that leaves its model no room for the answer."""
        # The longest instruction bounds all others. Characters are a good enough measure of length: an evaluation
        # checks its own prompts again, in tokens.
        longest_instruction = max(self.instructions, key=lambda text: len(text or ""))
        for rung in rungs:
            if rung.kind in UNTUNED:
                prompt_format = self.prompt_format(rung, longest_instruction)
                # The rung that chooses the instruction also answers the validation split.
                splits = (self.test, self.validation_records) if rung == self.instruction_rung else (self.test,)
                for records in splits:
                    prompt_ids(chat, self.with_contexts(rung, records), prompt_format, max_prompt_tokens)

    def choose_instruction(self, rung: RungConfig, folder: Path, score: ScoreFunction) -> dict[str, Any]:
        """Score every instruction on the validation split and take the best by the deciding metric.

        Each evaluation is on disk before the next starts, so a stopped climb repeats none.
        """
        records = self.with_contexts(rung, self.validation_records)
        metric, candidates = self.config.evaluation.metrics[0], []
        sign = -1.0 if metric == PERPLEXITY else 1.0
        for index, instruction in enumerate(self.instructions):
            file = folder / f"validation-{index}.parquet"
            if file.exists():
                result = Evaluation.read(file)
            else:
                # Without worked examples: the choice stands for all untuned rungs, whose examples differ.
                result = score(records, PromptFormat(instruction, choices=self.choices))
                folder.mkdir(parents=True, exist_ok=True)
                result.write(file)
            candidates.append({"instruction": instruction, **result.summary()})
        # Of equal scores the earlier instruction wins: the order in the config decides.
        best = max(range(len(candidates)), key=lambda i: (sign * candidates[i]["scores"][metric]["mean"], -i))
        return {"instruction": candidates[best]["instruction"], "instructions": candidates}

    @cached_property
    def retrieval(self) -> dict[str, Any]:
        """The hit rate of the library on the questions of the test."""
        return self.library.hit_rate(self.test) if self.library is not None else {}

    def _choose_shots(self, rung: RungConfig) -> Shots | Callable[[Record], Shots]:
        """Worked examples of a rung: a fixed set, or a function of the question."""
        count, context = rung.shots or self.config.evaluation.shots, self.context(rung)
        train = self.data.splits_of(rung).train
        # A context that is not shown must not make two equal questions look different to the selection.
        if context != "given":
            train = with_contexts("withheld", train, None) if rung.data else self._closed_book_training_records

        def with_passages(shots: Shots) -> Shots:
            # Passages are looked up for the chosen examples only, since a search over all training rows costs more.
            library = self.library if context == "retrieved" else None
            return tuple(library.with_passages(shot) if library else shot for shot in shots)

        if rung.example_selection == "similarity":
            nearest_to = nearest_shots(train, count)
            return lambda record: with_passages(nearest_to(record))
        return with_passages(choose_shots(train, count, self.config.seed, rung.example_selection or "random"))

    @cached_property
    def _closed_book_training_records(self) -> Records:
        return with_contexts("withheld", self.data.splits.train, None)

    def _shots_summary(self, rung: RungConfig, prompt_format: PromptFormat) -> dict[str, Any]:
        """The sources of the worked examples; of examples that depend on the question, all that any question gets."""
        shots = prompt_format.shots
        if prompt_format.nearest_shots is not None:
            nearest = (shot for record in self.test for shot in prompt_format.nearest_shots(record))
            shots = tuple({str(shot.source): shot for shot in nearest}.values())
        shots_per_prompt = (rung.shots or self.config.evaluation.shots) if rung.kind in WITH_SHOTS else 0
        summary = {"shots": [str(shot.source) for shot in shots], "shots_each": shots_per_prompt}
        return {**summary, "example_selection": rung.example_selection or "random"} if shots_per_prompt else summary
