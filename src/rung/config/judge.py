"""Who judges which of two answers is better, and what it is checked against."""

from __future__ import annotations

from pydantic import Field, PositiveInt, model_validator

from rung.config.base import Config, Fraction


class JudgeConfig(Config):
    """A model that sees two answers in both orders; asked by `rung eval RUN --baseline OTHER`."""

    model: str = Field(default=..., min_length=1)
    """A run folder or a base, whose log-probabilities of the verdicts decide; with `server`, the model's name there."""
    server: str | None = Field(default=None, pattern=r"^https?://")
    """URL of a server that speaks as OpenAI's does, up to and including /v1: its words are read."""
    criteria: str | None = Field(default=None, min_length=1)
    """What makes an answer better, in words for the judge; none is: correct, helpful and to the point."""
    reference: bool = False
    """Show the judge the expected answer."""
    human_labels: str | None = Field(default=None, min_length=1)
    """A file of pairs that people have labelled; without it a judge is not trusted."""
    min_kappa: Fraction = 0.4
    """The lower end of Cohen's kappa with the majority of people that makes a judge trusted (0.4: moderate)."""
    concurrency: PositiveInt | None = None
    """With `server`: requests on their way at once; none is 8."""

    @model_validator(mode="after")
    def _reject_unused_settings(self) -> JudgeConfig:
        if self.concurrency is not None and self.server is None:
            raise ValueError("`concurrency` is of requests to a `server`, and none is named")
        return self
