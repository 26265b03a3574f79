"""The section `evaluation.judge`: the model that compares answers, and the human labels it is validated against."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from rung.config.base import Config, Fraction


class JudgeConfig(Config):
    """A judge model. It sees both answers in both orders; used by `rung eval RUN --baseline OTHER`."""

    model: str = Field(default=..., min_length=1)
    """A run folder or base, whose log-probabilities of the verdicts decide; with `server`: the model name there."""
    server: str | None = Field(default=None, pattern=r"^https?://")
    """URL of an OpenAI-compatible server, up to and including /v1; the verdict is read from the text of its answer."""
    criteria: str | None = Field(default=None, min_length=1)
    """Criteria for a better answer, in words for the judge; default: correct, helpful and to the point."""
    reference: bool = False
    """Whether the judge sees the expected answer."""
    human_labels: str | None = Field(default=None, min_length=1)
    """File of pairs labeled by people; without it the judge is reported as not trusted."""
    min_kappa: Fraction = 0.4
    """A judge is trusted where the lower end of the interval of Cohen's kappa with the majority of people reaches this
    value (0.4: moderate agreement)."""
    concurrency: PositiveInt | None = None
    """With `server`: concurrent requests; default: 8."""

    def _check(self) -> None:
        if self.concurrency is not None and self.server is None:
            raise ValueError("`concurrency` is of requests to a `server`, and none is named")
