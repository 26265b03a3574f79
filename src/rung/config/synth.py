"""The config of `rung synth`: data that a model writes, and the filters that it must pass.

A file of its own, because a teacher needs no training data: seeds, documents or a description of the task are enough.
Its rows are a data file that `rung train` and `rung climb` read as it is. `improve` trains, with the sections of a run.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from rung.config.base import MAX_SEED, Config, Fraction, LocalPath, shorthand
from rung.config.data import DataConfig
from rung.config.evaluation import EvaluationConfig
from rung.config.judge import JudgeConfig
from rung.config.method import LoraConfig, MethodConfig
from rung.config.model import ModelConfig
from rung.config.objective import JudgeRewardConfig, RewardSourceConfig
from rung.config.run import RunConfig
from rung.config.training import TrainingConfig


class PriceConfig(Config):
    """What a server charges, in any currency."""

    prompt: NonNegativeFloat = 0.0
    """For a million tokens of prompts."""
    answer: NonNegativeFloat = 0.0
    """For a million tokens of answers."""


class TeacherConfig(Config):
    """The model that writes. In YAML the name of a run folder or base alone is enough."""

    model: str = Field(default=..., min_length=1)
    """A run folder or a base; with `server`: the model's name there."""
    server: str | None = Field(default=None, pattern=r"^https?://")
    """URL of an OpenAI-compatible server, up to and including /v1."""
    temperature: NonNegativeFloat = 0.7
    """Sampling temperature."""
    max_new_tokens: PositiveInt = 512
    """Maximum length of one text in tokens; longer ones are cut, and left out."""
    stop: tuple[str, ...] = ()
    """Without a server: texts that end an answer, for an untuned base that goes on."""
    concurrency: PositiveInt | None = None
    """With `server`: concurrent requests; default: 8."""
    price: PriceConfig | None = None
    """Price of tokens, for the cost in the report; default: none is computed."""

    def _check(self) -> None:
        if self.concurrency is not None and self.server is None:
            raise ValueError("`concurrency` is of requests to a `server`, and none is named")
        if self.stop and self.server is not None:
            raise ValueError("`stop` is for a model in this process: a server ends its answers itself")


class FiltersConfig(Config):
    """What a made row must pass; docs/synth/teach.md defines each filter. A filter that is off passes all rows."""

    novelty: Fraction | None = 0.7
    """ROUGE-L F1 with any seed or earlier question at which a question is not new (Wang et al. 2023, section 2.2)."""
    near_duplicates: Fraction | None = 0.8
    """Share of common character 5-grams (Jaccard) at which context, question and answer repeat an earlier row."""
    min_words: NonNegativeInt = 3
    """Fewest words of a question."""
    max_words: PositiveInt = 150
    """Most words of a question."""
    max_answer_words: PositiveInt | None = None
    """Most words of an answer; default: no limit."""
    refusals: bool = True
    """Leave out answers that refuse."""
    language: bool = True
    """Leave out texts in another script or language than the seeds."""
    grounded: bool = True
    """With `documents`: leave out answers with a number or a name that their passage does not hold."""

    def _check(self) -> None:
        if self.min_words > self.max_words:
            raise ValueError("min_words is at most max_words, or no question could pass")


class MakesConfig(Config):
    """The form of the rows. In YAML the kind alone is enough."""

    kind: Literal["answers", "explanations", "preferences", "dialogues", "labels"] = "answers"
    """`answers`: question and answer; `explanations`: the answer after its reasons; `preferences`: the best and the
    worst of several answers; `dialogues`: several questions in turn; `labels`: texts of each label."""
    labels: tuple[str, ...] = ()
    """labels only: the labels; default: the answers of the seeds."""
    turns: PositiveInt = 2
    """dialogues only: questions in one dialogue."""

    def _check(self) -> None:
        if self.labels and self.kind != "labels":
            raise ValueError("`labels` is for makes: {kind: labels}")
        if self.turns != 2 and self.kind != "dialogues":
            raise ValueError("`turns` is for makes: {kind: dialogues}")


class ExamplesConfig(Config):
    """Rows that stand before a request, as worked examples."""

    seeds: NonNegativeInt = 6
    """Seeds (Wang et al. 2023, section 2.2)."""
    made: NonNegativeInt = 2
    """Rows that were made before, in addition (Wang et al. 2023, section 2.2)."""


class DocumentsConfig(Config):
    """Texts whose passages are asked about. In YAML the path alone is enough."""

    path: str = Field(default=..., min_length=1)
    """A folder or a pattern of .txt and .md files, one such file, or rows as in `data.path`, each with a text."""
    column: str | None = None
    """Column of the texts where documents are rows; default: `text`."""
    chunk_words: PositiveInt = 200
    """Words per passage; longer documents are cut into several."""


class SelectionConfig(Config):
    """How answers are scored, and which of several is kept."""

    samples: PositiveInt | None = None
    """Answers to each question, of which the best is kept; default: 4 for preferences, else 1."""
    verifier: RewardSourceConfig | None = None
    """What scores an answer; except for a reward run, a question without an answer above 0 is left out."""
    judge: JudgeConfig | None = None
    """A model that compares sampled answers in both orders; used only once its agreement with people was measured."""

    def _check(self) -> None:
        if self.verifier is not None and self.judge is not None:
            raise ValueError("either a verifier or a judge scores answers")
        if isinstance(self.verifier, JudgeRewardConfig) and self.verifier.against == "group":
            raise ValueError(
                "a judge that compares the sampled answers is set in `judge`; as verifier: against: expected"
            )


class TeachConfig(Config):
    """A teacher writes rows from seeds, documents or a description (Wang et al. 2023, Self-Instruct)."""

    kind: Literal["teach"] = "teach"
    teacher: Annotated[TeacherConfig, shorthand("model")] = Field(default=...)
    """The model that writes questions and answers."""
    task: str | None = Field(default=None, min_length=1)
    """The task in words, for the teacher: what the questions are about, and how they are answered."""
    seeds: str | None = Field(default=None, min_length=1)
    """Rows of the task, as `data.path`; some of them stand before each request as examples."""
    documents: Annotated[DocumentsConfig | None, shorthand("path")] = None
    """Texts. Each question is about one passage, which is kept as its context."""
    questions: Literal["made", "seeds"] = "made"
    """`made`: the teacher writes new questions; `seeds`: it answers those of the seeds, whose answers are not shown."""
    makes: Annotated[MakesConfig, shorthand("kind")] = MakesConfig()
    """The form of the rows."""
    attributes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Values to vary, for example {reader: [a beginner, an auditor]}: every request draws one of each."""
    rows: PositiveInt | None = None
    """Rows that are kept at the end. `questions: seeds` needs no number: every seed is answered once."""
    attempts: PositiveInt = 5
    """Questions that are tried at most for each row that is wanted."""
    examples: ExamplesConfig = ExamplesConfig()
    """Rows that stand before a request."""
    selection: SelectionConfig = SelectionConfig()
    """How answers are scored, and which is kept."""
    filters: FiltersConfig = FiltersConfig()
    """What a row must pass."""
    never: tuple[str, ...] = ()
    """Files whose questions must not occur among the rows, for example the test data. One among the seeds is an error;
    one that the teacher writes is left out."""

    @field_validator("attributes", mode="before")
    @classmethod
    def _read_numbers(cls, attributes: Any) -> Any:
        if not isinstance(attributes, dict):
            return attributes
        # YAML reads 10 as a number; an attribute is a word of the request
        return {
            name: [str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for v in values]
            if isinstance(values, list | tuple)
            else values
            for name, values in attributes.items()
        }

    @property
    def samples_per_question(self) -> int:
        """The resolved `selection.samples`."""
        return self.selection.samples or (4 if self.makes.kind == "preferences" else 1)

    def _check(self) -> None:
        if not (self.task or self.seeds or self.documents):
            raise ValueError("the teacher needs something to begin with: task, seeds or documents")
        if self.questions == "seeds":
            self._check_answering()
        elif self.rows is None:
            raise ValueError("rows is missing: the number of rows to make")
        self._check_selection()
        if self.makes.kind == "labels" and not (self.makes.labels or self.seeds):
            raise ValueError("makes: labels needs `labels`, or seeds that hold them")
        if empty := [name for name, values in self.attributes.items() if not values or "" in values]:
            raise ValueError(f"attribute {empty[0]!r} has no values, or an empty one")

    def _check_answering(self) -> None:
        if not self.seeds:
            raise ValueError("questions: seeds answers those of `seeds`, and none are named")
        if self.documents or self.makes.kind in ("dialogues", "labels"):
            raise ValueError("questions: seeds takes the questions as they are, without documents, dialogues or labels")
        if self.attributes:
            raise ValueError("attributes vary new questions, and questions: seeds writes none")
        for name in ("attempts", "examples"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is of new questions, and questions: seeds writes none")

    def _check_selection(self) -> None:
        is_scored = self.selection.verifier is not None or self.selection.judge is not None
        if self.makes.kind == "preferences" and self.samples_per_question < 2:
            raise ValueError("a preference is between two answers: selection.samples is at least 2")
        if self.makes.kind == "labels" and (is_scored or self.selection.samples is not None):
            raise ValueError("makes: labels asks for no answers that could be selected")
        if self.makes.kind == "dialogues" and self.samples_per_question > 1:
            raise ValueError("a dialogue continues with its one answer: selection.samples is 1")
        if self.samples_per_question > 1 and not is_scored:
            raise ValueError("several answers to a question need a verifier or a judge that chooses among them")
        if self.samples_per_question == 1 and self.selection.judge is not None:
            raise ValueError("a judge compares answers: set selection.samples to 2 or more")
        if self.selection.judge is not None and self.selection.judge.reference and self.questions == "made":
            raise ValueError("judge.reference shows the expected answer, and made questions have none")


class ImproveConfig(Config):
    """A model learns from those of its own answers that a verifier accepts (Singh et al. 2023, ReST-EM).

    Each round samples answers with the model of the round before and trains the base anew on the accepted ones.
    """

    kind: Literal["improve"] = "improve"
    verifier: RewardSourceConfig = Field(default=...)
    """What accepts an answer: a score above `threshold`."""
    threshold: float = 0.0
    """Score above which an answer is accepted; the scores of a reward run have a level of their own. A judge gives 1 to
    an answer that is better than the expected one and 0.5 to one that is as good: 0 accepts both, 0.5 the better."""
    start: str | None = None
    """Run whose model answers in the first round; default: the base of `model`."""
    rounds: PositiveInt = 3
    """Rounds at most; a round whose gain on the validation split is not sure is the last."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Answers to each question."""
    temperature: PositiveFloat = 0.7
    """Sampling temperature."""
    per_question: PositiveInt = 4
    """Accepted answers of a question that are trained on at most: easy questions would outweigh others."""
    hint: bool = False
    """Ask a question without an accepted answer again with its expected answer shown, and train on what the model then
    writes as if it had not been shown (Zelikman et al. 2022, STaR, section 3.3)."""
    mix: bool = True
    """Train on the answers of the data as well."""
    pairs: bool = False
    """Write pairs of accepted and other answers too, for preferences and reward models."""

    def _check(self) -> None:
        if not isinstance(self.verifier, JudgeRewardConfig):
            return
        if self.verifier.against == "group":
            reason = "a share of wins among the answers of one model says nothing about its level"
            raise ValueError(f"{reason}: set verifier.against: expected")
        if not 0.0 <= self.threshold < 1.0:
            raise ValueError("a judge scores 0, 0.5 or 1: threshold is at least 0 and below 1, or it decides nothing")


class TeachRunConfig(Config):
    """Everything `rung synth teach` needs."""

    synth: TeachConfig = Field(default=...)
    """What is written, by which model, and what a row must pass."""
    output: LocalPath = Field(default=..., min_length=1)
    """Folder of the rows."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Seed of the examples, the attributes and the sampling."""


class ImproveRunConfig(Config):
    """Everything `rung synth improve` needs: its rounds are runs, with the sections of a run."""

    synth: ImproveConfig = Field(default=...)
    """How answers are sampled, verified and kept."""
    model: ModelConfig = ModelConfig()
    """As in a run: the base that every round trains anew."""
    data: DataConfig = Field(default=...)
    """As in a run. Answers to its training rows are sampled; its test split measures the result."""
    method: MethodConfig = LoraConfig()
    """As in a run."""
    training: TrainingConfig = TrainingConfig()
    """As in a run."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """As in a run; `max_new_tokens`, `stop`, `context` and `limit` hold for sampled answers."""
    output: LocalPath = Field(default=..., min_length=1)
    """Folder of the rounds."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """As in a run, and of the sampling."""

    def run_config(self, output: str) -> RunConfig:
        """The run of one round."""
        names = ("model", "data", "method", "training", "evaluation", "seed")
        return RunConfig(**{name: getattr(self, name) for name in names}, output=output)

    def _check(self) -> None:
        if self.data.validation == 0:
            raise ValueError("rounds are compared on the validation split, and data.validation is 0")
        if self.evaluation.context == "retrieved":
            raise ValueError("improve retrieves no passages: evaluation.context is given or withheld")
        self.run_config(self.output)
