"""What the files of a constitution's config hold: questions, helpful rows, worked examples and labels of people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np

from rung.config.constitution import ConstitutionConfig, RevisionsConfig
from rung.data.messages import message_to_json
from rung.data.rows import columns_of
from rung.errors import DataError
from rung.evaluation.judge import AnswerPair, read_human_labels
from rung.scoring.pairwise import Outcome
from rung.synth.filters import LanguageFilter, LeakFilter
from rung.synth.principles import Transcripts
from rung.synth.sources import Seed, read_records, read_seeds


@dataclass(frozen=True)
class ConstitutionSources:
    """What the files of a config hold."""

    seeds: Sequence[Seed]
    language: LanguageFilter | None
    """The language of all seeds, also of those beyond `limit`; None where no text is checked for it."""
    helpful: Sequence[Seed]
    transcripts: Transcripts
    labeled: Sequence[AnswerPair]
    """Pairs that people compared."""
    people: Sequence[Sequence[Outcome | None]]

    @staticmethod
    def read(config: ConstitutionConfig, seed: int) -> ConstitutionSources:
        """Read and check all files. Raises `DataError` for rows that cannot be used."""
        helpful: list[Seed] = []
        makes, critiques = config.makes, False
        with_answers = isinstance(makes, RevisionsConfig) and makes.answers == "seeds"
        seeds = read_seeds(config.seeds, with_answers=with_answers, where="synth.seeds")
        if isinstance(makes, RevisionsConfig):
            critiques = makes.critiques
            if makes.helpful is not None:
                helpful = read_seeds(makes.helpful, with_answers=False, where="synth.makes.helpful")
        never = LeakFilter(record for path in config.never for record in read_records(path, "synth.never"))
        for row in (*seeds, *helpful):
            if (leak := never.check(row.record)) is not None:
                hint = "take the row out: its question would be among the rows"
                raise DataError("a row asks what synth.never names", where=row.source, given=leak.reason, hint=hint)
        texts = [text for seed in seeds for text in (seed.question, seed.answer)]
        language = LanguageFilter(texts) if config.filters.language else None
        # files are often sorted, and a part of them may be enough; a preview has the first ones
        order = np.random.default_rng([seed, 8]).permutation(len(seeds))[: config.limit]
        seeds = [seeds[int(i)] for i in order]
        transcripts = Transcripts.read(config.transcripts, config.principles, critiques=critiques)
        labeled, people = read_human_labels(config.human_labels) if config.human_labels else ([], [])
        if config.transcripts and not (
            transcripts.comparisons or (transcripts.revisions and isinstance(makes, RevisionsConfig))
        ):
            hint = f"its rows are of revisions, and {makes.kind} are made"
            raise DataError("no worked example is for this", where=config.transcripts, hint=hint)
        return ConstitutionSources(seeds, language, helpful, transcripts, labeled, people)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that requests and rows are made of."""
        rows = [
            [[message_to_json(turn) for turn in s.record.messages], columns_of(s.record)]
            for s in (*self.seeds, *self.helpful)
        ]
        examples = [*self.transcripts.revisions, *self.transcripts.comparisons]
        pairs = [[pair.question, pair.context, pair.first, pair.second, pair.group] for pair in self.labeled]
        content = [rows, len(self.seeds), examples, pairs, list(map(list, self.people))]
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
