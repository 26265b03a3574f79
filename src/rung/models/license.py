"""The license of a base: from the catalog, or as the model card in its folder or on the hub states it.

A license is never guessed: where no card states one it is unknown, and a reader has to find it out. Reading a card of
the hub downloads that file alone. `commands.climb_models` and `commands.export` call these functions.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download

from rung.config.model import ModelConfig
from rung.config.model_catalog import CATALOG
from rung.files import is_run_folder
from rung.planning.architecture import adapter_base_name, is_adapter_folder
from rung.planning.hub import hub_options, is_hub_id


def base_license(config: ModelConfig) -> str | None:
    """The license of a base, or of the base that a run or an adapter stands on; None where nothing states it."""
    name = config.student_of or config.name
    if name in CATALOG:
        return CATALOG[name].license
    if is_hub_id(name):
        return _hub_license(name, config.revision)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    if is_run_folder(folder):
        settings = json.loads((folder / "run.json").read_text())["config"]["model"]
        return base_license(ModelConfig.model_validate(settings))
    if is_adapter_folder(folder):
        return base_license(ModelConfig(name=adapter_base_name(folder)))
    return card_license(folder / "README.md")


def card_license(card: Path) -> str | None:
    """The license that the metadata of a model card names; None without a card, without a license, without a form."""
    if not card.is_file():
        return None
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    # a README of any form
    except Exception:
        return None
    license = data.get("license")
    # the hub's word for a license that it does not list, whose name stands beside it
    if license == "other":
        license = data.get("license_name") or license
    return str(license) if license else None


def _hub_license(name: str, revision: str | None) -> str | None:
    try:
        return card_license(Path(hf_hub_download(name, "README.md", revision=revision, **hub_options())))
    # a model without a card, or a hub that does not answer: its weights are here, so this is no error
    except Exception:
        return None
