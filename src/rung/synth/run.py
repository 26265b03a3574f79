"""One entry for all verbs of `rung synth`, by the kind of the config; `rung.synthesize` in Python."""

from __future__ import annotations

from rung.config.constitution import ConstitutionRunConfig
from rung.config.io import SynthRunConfig
from rung.config.synth import ImproveRunConfig
from rung.errors import ConfigError
from rung.results.synth import ConstitutionResult, ImproveResult, SynthResult
from rung.synth.constitution import constitution
from rung.synth.improve import improve
from rung.synth.teach import teach


def synthesize(config: SynthRunConfig, *, overwrite: bool = False) -> SynthResult | ImproveResult | ConstitutionResult:
    """Make the rows of a config, or improve its model, in its output folder; the same call continues after a stop.

    Raises `CheckpointError` for a folder of another config; `overwrite` replaces the rows there, and what was
    answered is not asked again. Raises `ConfigError` for `overwrite` with `improve`, whose rounds are trained models.
    """
    if isinstance(config, ConstitutionRunConfig):
        return constitution(config, overwrite=overwrite)
    if not isinstance(config, ImproveRunConfig):
        return teach(config, overwrite=overwrite)
    if overwrite:
        hint = "name another output, or remove the folder"
        raise ConfigError("rounds of improve are not overwritten", where="overwrite", given=True, hint=hint)
    return improve(config)
