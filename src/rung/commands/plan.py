"""`rung plan`: memory and time of a run before anything is loaded.

Imports no torch and reads no weights, so it answers at once and also for models that do not fit here; the price is that
everything is an estimate. The estimates are in `planning`; `cli.py` and `rung.plan` call `plan`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rung.config.io import ConfigSource, resolve_config
from rung.planning.advise import Advice, advise, parse_size
from rung.planning.throughput import parse_device


def plan(
    config: ConfigSource,
    *,
    overrides: Sequence[str] = (),
    memory: str | None = None,
    device: str | None = None,
    tokens: float | None = None,
) -> Advice:
    """Estimate memory and time of a run, for its own method and for all others.

    `memory` is the available memory, for example `24GiB`; `device` a known device, for example `h100`; `tokens` the
    tokens of an epoch, for data files that are not here. `Advice.plan.fits` says whether the config's own method fits.

    Raises `ConfigError` for a config, a size or a device that cannot be read.
    """
    limit = parse_size(memory)
    return advise(resolve_config(config, overrides), limit=limit, device=parse_device(device), tokens=tokens)
