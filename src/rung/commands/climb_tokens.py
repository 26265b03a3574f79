"""The tokenized rows of a climb: one tokenization for each base, context and set of rows, which rungs share.

Rows are tokenized while their base is loaded for its checks, before the first training step, so that rows which a
template or a context refuses cost no training. Methods with virtual tokens and rungs with an objective of their own
need other documents and tokenize for themselves, when they are trained. `climb.py` holds one `ClimbTokens`.
"""

from __future__ import annotations

from rung.commands.climb_data import ClimbData
from rung.commands.climb_models import ClimbModels
from rung.commands.climb_prompts import ClimbPrompts
from rung.config.climb import DISTILLED_PROMPT, UNTUNED, RungConfig
from rung.config.climb_runs import rung_data
from rung.config.evaluation import Context
from rung.config.method import FullConfig
from rung.config.run import RunConfig
from rung.data.chat import ChatTemplate
from rung.data.splits import Splits
from rung.models.base_model import BaseModel
from rung.runs.dataset import RunData
from rung.runs.teacher import tokenize_run

DataKey = tuple[str, Context, str | None]
"""Title of the base, context, and label of a rung with rows of its own: rungs with one key share tokens."""


class ClimbTokens:
    """Chat templates of the bases, and the tokenized rows of their rungs."""

    def __init__(self, config: RunConfig, data: ClimbData, models: ClimbModels, prompts: ClimbPrompts) -> None:
        self.config, self.data, self.models, self.prompts = config, data, models, prompts
        self.chats: dict[str, ChatTemplate] = {}
        """By the title of the base."""
        self._tokenized: dict[DataKey, RunData] = {}

    def tokenize_for(self, title: str, base: BaseModel) -> ChatTemplate:
        """Tokenize the rows of all rungs on a base; its chat template. Raises as `tokenize_run`."""
        chat = ChatTemplate.of_model(base.tokenizer, self.models.config_on(title).model, base.end_ids)
        self.chats[title] = chat.with_control_tokens(self.config.data.control_tokens)
        for context, rung in self._shared_rows(title):
            key = (title, context, rung.label if rung is not None else None)
            if key not in self._tokenized:
                self._tokenized[key] = self._tokenize_shared(title, context, rung, base)
        return self.chats[title]

    @property
    def of_climb(self) -> RunData:
        """The rows of the climb for its first base."""
        title = self.models.titles[0]
        return next(data for (name, _, rung), data in self._tokenized.items() if name == title and rung is None)

    def shared(self, rung: RungConfig) -> RunData | None:
        """The rows that were tokenized before the first rung; None for rows of its own that a rung distills."""
        key = self.models.title(rung), self.prompts.context(rung), rung.label if rung.data else None
        return self._tokenized.get(key)

    def row_count(self, rung: RungConfig) -> int:
        """Training rows of a tuned rung."""
        shared = self.shared(rung)
        return len(self.data.splits_of(rung).train) if shared is None else len(shared.train.rows)

    def for_run(self, config: RunConfig, rung: RungConfig, base: BaseModel) -> RunData:
        """The shared data, or the splits tokenized anew where virtual tokens or an objective need other documents."""
        shared = self.shared(rung)
        if shared and not config.method.virtual_token_count and config.objective == self.config.objective:
            return shared
        return self.tokenize(config, rung, self.data.splits_of(rung), base)

    def tokenize(self, config: RunConfig, rung: RungConfig, splits: Splits, base: BaseModel) -> RunData:
        """The tokenized rows of one run of a tuned rung."""
        example_rows = None
        # What a prompt is distilled from is what the other rung shows, and not the rows that are distilled.
        if _distills(rung) and ((replaced := self.config.climb.replaced_rung(rung)).data or rung.data):
            example_rows = self.data.splits_of(replaced).train
        return tokenize_run(config, splits, base, self.prompts.library, example_rows)

    def _shared_rows(self, title: str) -> list[tuple[Context, RungConfig | None]]:
        """Of the tuned rungs on a base the context, and the rung itself where it has rows of its own."""
        tuned = [r for r in self.config.climb.rungs if r.kind not in UNTUNED and self.models.title(r) == title]
        # Rows to distill may lack answers, which the teacher writes.
        rungs = [rung for rung in tuned if not (rung.data and _distills(rung))]
        rows = [(self.prompts.context(rung), rung if rung.data else None) for rung in rungs]
        # The rows of the climb are read once in any case, for the summary of its data.
        if title == self.models.titles[0] and all(rung is not None for _, rung in rows):
            rows.append((self.config.evaluation.context, None))
        return rows

    def _tokenize_shared(self, title: str, context: Context, rung: RungConfig | None, base: BaseModel) -> RunData:
        """The tokenized rows of all rungs of one context whose method has no virtual tokens, or of a rung's own."""
        # Virtual tokens take room in the context or stand inside the text, so methods with them tokenize for
        # themselves. `FullConfig` stands for all others: none of them changes a document.
        evaluation = self.config.evaluation.model_copy(update={"context": context})
        config = self.models.config_on(title).model_copy(update={"method": FullConfig(), "evaluation": evaluation})
        splits = self.data.splits
        if rung is not None:
            config = config.model_copy(update={"data": rung_data(self.config, rung)})
            splits = self.data.splits_of(rung)
        return tokenize_run(config, splits, base, self.prompts.library)


def _distills(rung: RungConfig) -> bool:
    return rung.kind == DISTILLED_PROMPT
