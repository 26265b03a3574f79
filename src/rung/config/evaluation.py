"""The `evaluation` section: metrics, prompts, retrieval and the judge."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from rung.config.base import Config, Pattern, shorthand
from rung.config.code import CodeLimitsConfig
from rung.config.judge import JudgeConfig
from rung.config.server import ModelServerConfig

Context = Literal["given", "withheld", "retrieved"]
ExampleSelection = Literal["random", "similarity", "coverage"]

MetricName = Literal[
    "exact",
    "normalized",
    "numeric",
    "math",
    "token_f1",
    "rouge_l",
    "code",
    "perplexity",
    "not_refused",
    "not_banned",
]


class RetrievalConfig(Config):
    """Passages retrieved by BM25, which replace the context of a row."""

    documents: str | None = None
    """A folder or a pattern of .txt and .md files, one such file, or rows as in `data.path` with a text in every row.
    Default: the contexts of all rows of the run, of all splits and regardless of `data.limit`."""
    column: str | None = None
    """Column of the texts where documents are rows; default: `text`."""
    chunk_words: PositiveInt = 200
    """Words per passage; longer documents are cut into several."""
    overlap: NonNegativeInt = 40
    """Words that adjacent passages of a document share."""
    top_k: PositiveInt = 3
    """Passages per question."""

    def _check(self) -> None:
        # the window advances by chunk_words - overlap words
        if self.overlap >= self.chunk_words:
            raise ValueError("overlap is below chunk_words, or passages would never move on")
        if self.column is not None and self.documents is None:
            raise ValueError("column names one of a file of documents, and no documents are named")


class ChoicesConfig(Config):
    """Labels among which answers are chosen by their log-probability."""

    labels: Literal["auto"] | tuple[str, ...] = "auto"
    """All labels; `auto`: the distinct answers of the training rows."""
    calibrated: bool = False
    """Subtract the log-probability of each label after a question without content, so that a label does not win by
    being a frequent text (Holtzman et al. 2021, Zhao et al. 2021)."""

    def _check(self) -> None:
        labels = self.labels
        if labels != "auto" and (len(labels) < 2 or len(set(labels)) < len(labels) or "" in labels):
            raise ValueError("labels are two or more different texts, none of them empty")


class EvaluationConfig(Config):
    """How greedy answers to held-out questions are generated and scored."""

    metrics: tuple[MetricName, ...] = Field(default=("exact", "numeric"), min_length=1)
    """Metrics to report; decisions use the first one. `math` needs `pip install 'rung[math]'`, `code` rows with tests
    and Linux."""
    code_limits: CodeLimitsConfig = CodeLimitsConfig()
    """For the metric `code`: limits of the program of an answer."""
    banned: tuple[Pattern, ...] = ()
    """For the metric `not_banned`: regular expressions that no answer may contain; case does not count."""
    instruction: str | None = None
    """System prompt of the untuned rungs: the best one you have, for a fair comparison. Tuned rungs do not use it."""
    shots: NonNegativeInt = 4
    """Worked examples before each question of the few-shot rung, taken from the training split."""
    context: Context = "given"
    """Context before the question, for tuned rungs also in training: `given`: the context of the row; `withheld`: none;
    `retrieved`: retrieved passages. A rung can override it."""
    retrieve: RetrievalConfig | None = None
    """Source and size of retrieved passages; default: the defaults of its settings."""
    choices: Annotated[ChoicesConfig, shorthand("labels")] | None = None
    """Labels: the answer is the likeliest of them and is not generated; `auto`, a list, or {labels, calibrated}. The
    instruction of the untuned rungs lists them. Default: answers are generated."""
    max_new_tokens: PositiveInt = 64
    """Maximum answer length in tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, such as a line break where an answer is one line. The earliest one and everything after
    it are not part of the answer. White space at the start and reasoning are not searched."""
    limit: PositiveInt | None = None
    """Maximum number of test items, a random sample by the seed; also of validation items where instructions are
    chosen on them."""
    dequantize: bool = False
    """qlora only: answer with a dequantized copy of the base: the same weights, faster, more memory."""
    batch: PositiveInt = 64
    """Answers generated at once; a question that waits takes the place of an answer that has ended."""
    server: ModelServerConfig | None = None
    """A vLLM server that generates the answers of `rung eval` and `rung climb`, with the adapter of each run; some of
    them are read here again. Default: this process generates them."""
    judge: JudgeConfig | None = None
    """Model that compares two answers, for `rung eval RUN --baseline OTHER`."""
    human: str | None = Field(default=None, min_length=1)
    """For `rung climb`: a folder of `rung label`, or a file of labels that another tool exported, in which people
    compared, ranked or rated the answers of rungs. Their preference stands in the ladder beside the scores."""

    def _check(self) -> None:
        if self.server is not None and self.batch != type(self).model_fields["batch"].default:
            raise ValueError("batch is of answers that this process generates: for a server set server.concurrency")
        if self.server is not None and self.dequantize:
            raise ValueError("dequantize is of answers that this process generates: leave it out with a server")
        if self.server is not None and set(self.metrics) == {"perplexity"}:
            raise ValueError("server is of generated answers, and perplexity alone generates none")
        if self.choices is not None and self.server is not None:
            raise ValueError("choices are read by this process: leave out server")
        if self.choices is not None and self.stop:
            raise ValueError("stop ends generated answers, and choices are not generated: leave one of them out")
        if self.code_limits != CodeLimitsConfig() and "code" not in self.metrics:
            raise ValueError("code_limits is for metrics: [code]")
        if bool(self.banned) != ("not_banned" in self.metrics):
            raise ValueError("metrics: [not_banned] and the patterns of `banned` go together")
        if "" in self.stop:
            raise ValueError("an empty text in stop would end every answer before its first word")
        if text := next((text for text in self.stop if "\\n" in text or "\\t" in text), None):
            raise ValueError(f"stop: {text!r} is a backslash and a letter: YAML reads \\n in double quotes only")
