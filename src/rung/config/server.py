"""A vLLM server that answers for the model of a run: the sections `objective.rollout.server` and `evaluation.server`.

Rung writes the adapter of the run as a peft folder and loads it there, so the server needs the base and the folder and
nothing of Rung. docs/scale.md has the command that starts such a server.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from rung.config.base import Config


class ModelServerConfig(Config):
    """A vLLM server with the base of the run, which loads adapters while it serves (`--enable-lora`)."""

    url: str = Field(default=..., pattern=r"^https?://")
    """URL up to and including /v1."""
    model: str = Field(default=..., min_length=1)
    """Name of the base on the server, as `GET /v1/models` lists it."""
    mount: Annotated[str, Field(pattern=r"^.+:/.*$")] | None = None
    """Where the server sees other paths, as in a container: a folder here and its path there, written as in
    `docker run -v HERE:THERE`. Default: the server sees the same paths."""
    concurrency: PositiveInt = 32
    """Concurrent requests, each of one prompt with all its answers."""
    timeout: PositiveFloat = 300.0
    """Seconds per try of a request; requests that fail for a moment are tried again."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type of the server, which decides how far its log-probabilities may differ from those of this process. In
    bfloat16 the 90th percentile of the differences may be 0.3 nats. In float32, where this process computes in float32
    too, the largest may be 0.002."""

    @property
    def address(self) -> dict[str, str]:
        """What results say of the server."""
        return {"url": self.url, "model": self.model}


class RolloutServerConfig(ModelServerConfig):
    """A vLLM server that draws the answers of rollouts; losses are corrected for its other arithmetic."""

    importance_sampling_cap: PositiveFloat = 2.0
    """Largest weight C of a token or answer: the policy loss is multiplied by min(p_policy / p_server, C) (truncated
    importance sampling, Yao et al. 2025)."""
