"""Names of the Hugging Face hub: what is one, what its model is made of, and what to do where it cannot be asked.

The hub's client tries for half a minute where no network is; here the name of its host is looked up first, and without
it only what was downloaded before is read. `models/load.py` and the planner use this module.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from rung.config.model import ModelConfig
from rung.errors import ConfigError, did_you_mean


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here has the form owner/name, whatever folders there are."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None and not Path(name).exists()


def hub_error(name: str, error: Exception) -> ConfigError:
    """The error for a hub id whose files are not here and cannot be downloaded."""
    if hub_is_reachable():
        summary, given = "this model cannot be downloaded from the hub", f"{name}: {' '.join(str(error).split())[:200]}"
    else:
        summary, given = "no model of this name is here, and the hub cannot be reached", name
    return ConfigError(summary, where="model.name", given=given, hint=_hub_hint(name))


def _hub_hint(name: str) -> str:
    """What to do where a hub id cannot be downloaded; it may be the mistyped path of a folder."""
    parent = Path(name).parent
    folders = [str(p) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    if suggestion := did_you_mean(name, folders):
        return f"there is no such folder either: did you mean {suggestion}?"
    if folders:
        return f"there is no such folder either; {parent} holds {', '.join(sorted(folders)[:5])}"
    return "without a network give a folder or a GGUF file, or a name that `rung models` lists as downloaded"


@cache
def hub_is_reachable() -> bool:
    """Whether the host of the hub has an address, or a proxy knows it; looked up once."""
    if getproxies().get("https"):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


@contextmanager
def without_retries() -> Iterator[None]:
    """Inside, `datasets` and the hub's client ask no server where none can be reached; their caches are read."""
    if hub_is_reachable():
        yield
        return
    import datasets
    from huggingface_hub import constants

    # read from the environment when the libraries are imported, which other code may have done before
    settings: list[Any] = [constants, datasets.config]
    previous = [module.HF_HUB_OFFLINE for module in settings]
    try:
        for module in settings:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(settings, previous, strict=True):
            module.HF_HUB_OFFLINE = value


def hub_options() -> dict[str, Any]:
    """Arguments of a request to the hub: without a network only what is in its cache is read, at once."""
    return {} if hub_is_reachable() else {"local_files_only": True}


def hub_config_path(config: ModelConfig) -> Path:
    """The config of a hub id, from the cache or downloaded now; no weights are downloaded."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(config.name, "config.json", revision=config.revision, **hub_options()))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise hub_error(config.name, error) from error
