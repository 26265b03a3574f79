"""`rung plan`: memory and time of a run before anything is loaded. Imports no torch and reads no weights."""

from __future__ import annotations

from collections.abc import Sequence

from rung.config.io import ConfigSource, resolve_config
from rung.planning.advise import Advice, advise, parse_device, parse_size


def plan(
    config: ConfigSource,
    *,
    overrides: Sequence[str] = (),
    memory: str | None = None,
    device: str | None = None,
    tokens: float | None = None,
) -> Advice:
    """Estimate what a run holds and how long it takes, for its own method and for all others.

    `memory` is what there is, for example `24GiB`; `device` a known device, for example `h100`; `tokens` the tokens of
    an epoch, where the data files are not at hand. `Advice.plan.fits` says whether the config's own method fits.

    Raises `ConfigError` for a config, a size or a device that cannot be read.
    """
    limit = parse_size(memory)
    return advise(resolve_config(config, overrides), limit=limit, device=parse_device(device), tokens=tokens)
