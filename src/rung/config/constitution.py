"""The config of `rung synth constitution`: rules that a model's answers are revised or compared by.

Bai et al. 2022 (arXiv 2212.08073), Constitutional AI. `config.io` reads it beside the other kinds of `synth`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator

from rung.config.base import MAX_SEED, Config, Fraction, LocalPath, shorthand
from rung.config.synth import TeacherConfig


class PrincipleConfig(Config):
    """A rule that answers should follow, and how it is put to the critic. In YAML the rule alone is enough."""

    rule: str = Field(default=..., min_length=1)
    """The rule in one sentence, for example: An answer names no customer."""
    critique: str | None = Field(default=None, min_length=1)
    """Request for a critique of the last answer; default: one that quotes the rule."""
    revision: str | None = Field(default=None, min_length=1)
    """Request for a better answer; default: one that quotes the rule."""
    comparison: str | None = Field(default=None, min_length=1)
    """Question which of two answers is better; default: one that quotes the rule."""


class WriterConfig(TeacherConfig):
    """A model that answers, criticizes and revises. In YAML the name of a run folder or base alone is enough."""

    temperature: NonNegativeFloat = 1.0
    """Sampling temperature (Bai et al. 2022, section 3.2)."""


class RevisionFiltersConfig(Config):
    """What a revision must pass; docs/synth/constitution.md defines each filter."""

    roles: bool = True
    """Leave out texts that go on as another speaker, such as a line `Human:` or `Critique:`."""
    prefaces: bool = True
    """Leave out revisions that begin by announcing themselves, such as `Here is a revised answer:`."""
    language: bool = True
    """Leave out texts in another script or language than the seeds."""
    max_answer_words: PositiveInt | None = None
    """Most words of a revision; default: no limit."""


class RevisionsConfig(Config):
    """Rows for fine-tuning: answers that were revised (Bai et al. 2022, section 3)."""

    kind: Literal["revisions"] = "revisions"
    rounds: PositiveInt = 4
    """Critiques and revisions of one answer, one after the other (section 3.2)."""
    critiques: bool = True
    """Ask for a critique before each revision; without it for the revision alone (section 3.5)."""
    answers: Literal["made", "seeds"] = "made"
    """What is revised. `made`: the teacher's answers; `seeds`: those of the rows."""
    helpful: str | None = Field(default=None, min_length=1)
    """Rows that are added unrevised, so that the model stays helpful; those of a file without answers are answered by
    the teacher (section 3.2)."""


class PreferencesConfig(Config):
    """Pairs of answers with the probability that the chosen one is better (Bai et al. 2022, section 4)."""

    kind: Literal["preferences"] = "preferences"
    pairs_per_question: PositiveInt = 1
    """Pairs of answers that are sampled for each question."""
    reasoning: bool = False
    """The critic writes its reasons before it compares (section 4.1, chain of thought)."""
    clamp: tuple[Fraction, Fraction] | None = None
    """Lowest and highest probability; default: none, and 0.4 to 0.6 with reasoning, behind which probabilities are
    extreme (section 4.1)."""

    @property
    def probability_range(self) -> tuple[float, float]:
        """The resolved `clamp`."""
        return self.clamp or ((0.4, 0.6) if self.reasoning else (0.0, 1.0))

    def _check(self) -> None:
        if self.clamp is not None and not (self.clamp[0] < 0.5 and abs(sum(self.clamp) - 1.0) < 1e-9):
            raise ValueError("clamp is a lowest probability below 0.5, and 1 less that: [0.4, 0.6]")


class ConstitutionConfig(Config):
    """A model criticizes and revises answers by written rules, or compares them (Bai et al. 2022)."""

    kind: Literal["constitution"] = "constitution"
    teacher: Annotated[WriterConfig, shorthand("model")] = Field(default=...)
    """The model whose answers are revised or compared."""
    critic: Annotated[WriterConfig | None, shorthand("model")] = None
    """The model that criticizes, revises and compares; default: the teacher itself (Bai et al. 2022, section 3.1)."""
    principles: tuple[PrincipleConfig, ...] = Field(default=..., min_length=1)
    """The rules, of which one is drawn for each revision or comparison; in YAML also a file with a list of them."""
    seeds: str = Field(default=..., min_length=1)
    """Rows with the questions, as `data.path`."""
    limit: PositiveInt | None = None
    """Maximum number of seeds, a random sample by the seed."""
    makes: Annotated[RevisionsConfig | PreferencesConfig, Field(discriminator="kind"), shorthand("kind")] = (
        RevisionsConfig()
    )
    """What is made, and how. In YAML the kind alone is enough."""
    transcripts: str | None = Field(default=None, min_length=1)
    """Worked examples before every request: rows of `rule`, `question`, `answer`, `critique`, `revision`, and for
    comparisons of `rule`, `question`, `first`, `second`, `better`."""
    human_labels: str | None = Field(default=None, min_length=1)
    """Pairs of answers that people compared by these rules, as `evaluation.judge.human_labels`. The critic is trusted
    if it agrees with people more often than chance; without them this is not measured."""
    filters: RevisionFiltersConfig = RevisionFiltersConfig()
    """What a text must pass."""
    never: tuple[str, ...] = ()
    """Files whose questions must not occur among the rows, for example the test data. One among the seeds is an
    error."""

    @field_validator("principles", mode="before")
    @classmethod
    def _expand_rules(cls, principles: Any) -> Any:
        if not isinstance(principles, list | tuple):
            return principles
        names = PrincipleConfig.model_fields.keys()
        if colon := next((p for p in principles if isinstance(p, dict) and not p.keys() <= names), None):
            raise ValueError(f"a rule with a colon stands in quotes: {next(iter(colon))!r}")
        return [{"rule": p.strip()} if isinstance(p, str) else p for p in principles]

    @field_validator("makes", mode="before")
    @classmethod
    def _expand_makes(cls, makes: Any) -> Any:
        # a union of sections has no default kind of its own
        return {"kind": "revisions", **makes} if isinstance(makes, dict) else makes

    def _check(self) -> None:
        if len({principle.rule for principle in self.principles}) < len(self.principles):
            raise ValueError("a rule stands in principles twice")


class ConstitutionRunConfig(Config):
    """Everything `rung synth constitution` needs."""

    synth: ConstitutionConfig = Field(default=...)
    """Whose answers are revised or compared, by which rules."""
    output: LocalPath = Field(default=..., min_length=1)
    """Folder of the rows."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Seed of the principles and the sampling."""
