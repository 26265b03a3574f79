"""`rung plan`: memory and time of a run before anything is loaded.

Imports no torch and reads no weights, so it answers at once and also for models that do not fit here; the price is that
everything is an estimate. The estimates are in `planning`; `cli` and `rung.plan` call `plan`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rung.config.io import ConfigSource, resolve_config
from rung.planning.advise import Advice, advise, parse_size
from rung.planning.devices import find_local_device, parse_device


def plan(
    config: ConfigSource,
    *,
    overrides: Sequence[str] = (),
    memory: str | None = None,
    device: str | None = None,
    devices: int = 1,
    tokens: float | None = None,
) -> Advice:
    """Estimate memory and time of a run, for its own method and for all others.

    `memory` is the memory of each device, for example `24GiB`; `device` a known card, for example `h100`, or `cpu`;
    `devices` the number of processes, each on its own device; `tokens` the tokens of an epoch, for data files
    that are not here. Without `device` the plan is for the first graphics card of this machine, and without a card for
    its processor. `Advice.plan.fits` says whether the config's own method fits.

    Raises `ConfigError` for a config, a size or a device that cannot be read, `PlanError` for a run that several
    processes cannot share.
    """
    limit = parse_size(memory)
    card = find_local_device() if device is None else parse_device(device)
    run_config = resolve_config(config, overrides)
    return advise(run_config, limit=limit, device=card, processes=devices, tokens=tokens)
