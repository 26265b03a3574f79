"""One entry for all verbs of `rung synth`, by the kind of the config; `rung.synthesize` in Python."""

from __future__ import annotations

from rung.config.constitution import ConstitutionRunConfig
from rung.config.io import SynthRunConfig
from rung.config.synth import ImproveRunConfig
from rung.results import ConstitutionResult, ImproveResult, SynthResult
from rung.synth.constitution import constitution
from rung.synth.improve import improve
from rung.synth.teach import teach


def synthesize(config: SynthRunConfig) -> SynthResult | ImproveResult | ConstitutionResult:
    """Make the rows of a config, or improve its model, in its output folder; the same call continues after a stop.

    Raises `CheckpointError` for a folder of another config.
    """
    if isinstance(config, ConstitutionRunConfig):
        return constitution(config)
    return improve(config) if isinstance(config, ImproveRunConfig) else teach(config)
