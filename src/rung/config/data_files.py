"""Data sources by their names: one file, a pattern, a folder of shards, or a folder of `datasets`' `save_to_disk`.

Only names are looked at, nothing is read, so that planning can size the data and the command line can tell data from a
config. A folder or a pattern must name files of one kind: two kinds are often the same rows twice, and so they are
refused and named. `data.read` reads the files, `evaluation.retrieval` uses the same rules for documents.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from typing import NoReturn

from rung.errors import DataError

TEXT_ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
"""Files of rows as text, which may be compressed."""
ROW_SUFFIXES = (*TEXT_ROW_SUFFIXES, ".parquet")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
"""Suffix of a compressed file and the name of its compression."""
KINDS = f"{', '.join(ROW_SUFFIXES)}, or a compressed text ({', '.join(COMPRESSIONS)})"
"""The kinds of data files, as messages name them."""
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".xz")
_METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""Files that `datasets` and hubs write beside data."""
_SPLIT_WORDS = {"train": "train", "training": "train", "test": "test"}
_SPLIT_WORDS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation")
MAX_NAMED = 10
"""Files that a message names; the others are counted."""


@dataclass(frozen=True, slots=True)
class DataFiles:
    """Files of one kind, in the order in which they are read."""

    paths: tuple[Path, ...]
    skipped: tuple[str, ...] = ()
    """Names beside them that are not read."""

    @property
    def note(self) -> str | None:
        """What is not read, for the user."""
        if not self.skipped:
            return None
        files = "data file" if len(self.paths) == 1 else "data files"
        return f"{len(self.paths)} {files} of {self.paths[0].parent}; not read: {_listed(self.skipped)}"


@dataclass(frozen=True, slots=True)
class SavedDataset:
    """A folder of `datasets`' `save_to_disk`; of a `DatasetDict` the folder of one split."""

    folder: Path


def data_suffix(path: Path) -> str | None:
    """The suffix of a data file with that of its compression, in lower case; None for other files."""
    suffix = path.suffix.lower()
    if suffix in ROW_SUFFIXES:
        return suffix
    inner = Path(path.stem).suffix.lower()
    return f"{inner}{suffix}" if suffix in COMPRESSIONS and inner in TEXT_ROW_SUFFIXES else None


def is_pattern(path: str) -> bool:
    """Whether a path is a pattern of several files, such as `data/*.jsonl`."""
    # a part of a split of a `datasets` set has brackets too: name:train[:100]
    has_brackets = "[" in path and (":" not in path or data_suffix(Path(path)) is not None)
    return (has_brackets or "*" in path or "?" in path) and not Path(path).exists()


def find_data(path: str) -> DataFiles | SavedDataset | None:
    """What a path names; None where it can only be the name of a `datasets` set.

    Raises:
        DataError: nothing is there, a file is empty or of an unknown kind, or a folder holds no data or several kinds.
    """
    if not path:
        # an empty path would be the current folder
        raise DataError("no data is named", where="data.path", hint="name a file, a folder or a pattern")
    path = os.path.expanduser(path)  # no shell has read a path of a config
    if (saved := _saved_dataset(path)) is not None:
        return saved
    file = Path(path)
    if is_pattern(path):
        return _matching_files(path)
    if file.is_dir():
        return _files_of_folder(file)
    if not file.exists():
        # a path, not a hub name: a question to the hub would only wait for the network
        if data_suffix(file) or path.startswith(("/", "./", "../", "~")):
            _missing_file_error(file)
        return None
    if data_suffix(file) is None:
        raise DataError("unknown kind of file", where=path, given=file.suffix, allowed=KINDS, hint=_kind_hint(file))
    _refuse_empty([file])
    return DataFiles((file,))


def _kind_hint(file: Path) -> str | None:
    suffix = file.suffix.lower()
    if suffix in _ARCHIVES:
        return "unpack it, and name the folder or the files"
    if suffix in COMPRESSIONS:
        inner = Path(file.stem).suffix.lower()
        if inner == ".parquet":
            return f"parquet is compressed inside: unpack it to {file.stem}"
        is_archive = inner in _ARCHIVES
        return "unpack it" if is_archive else f"name what is inside, for example {Path(file.stem).stem}.jsonl{suffix}"
    if suffix in (".txt", ".md"):
        lines = f"where each line is a JSON object already, rename it to {file.stem}.jsonl"
        return f'write each text as {{"text": ...}} on a line of a .jsonl file; {lines}'
    return "save a table as .csv" if suffix in (".xlsx", ".xls", ".ods") else None


def _refuse_empty(files: Sequence[Path]) -> None:
    for file in files:
        if file.stat().st_size == 0:
            hint = None if len(files) == 1 else "remove it, or name the other files"
            raise DataError("the file is empty", where=str(file), hint=hint)


def _refuse_broken_links(entries: Sequence[Path]) -> None:
    """Raise `DataError` for a link to a data file that is gone: its rows would be missing."""
    for entry in entries:
        if entry.is_symlink() and not entry.exists() and data_suffix(entry):
            given, hint = os.readlink(entry), "fetch what it points to, or remove the link"
            raise DataError("this link points to nothing", where=str(entry), given=given, hint=hint)


def _saved_dataset(path: str) -> SavedDataset | None:
    folder, split = Path(path), ""
    # the last colon: a drive of Windows has one too
    name, colon, last = path.rpartition(":")
    if colon and not folder.exists():
        folder, split = Path(name), last
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        if split:
            hint = f"name it without a split: {folder}"
            raise DataError("this folder holds one data set, without splits", where=path, given=split, hint=hint)
        return SavedDataset(folder)
    if not (folder / "dataset_dict.json").is_file():
        if split and folder.is_dir():
            hint = f"name its files, for example {folder}/{split}*.jsonl"
            summary = "this folder is none of `save_to_disk` with several splits, so it has no split of a name"
            raise DataError(summary, where=path, hint=hint)
        return None
    try:
        splits = list(map(str, json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"dataset_dict.json cannot be read: {error}", where=str(folder), hint="save it anew") from error
    if (split or "train") not in splits:
        hint = f"name one, for example {folder}:{next(iter(splits), 'test')}"
        raise DataError("no such split", where=path, given=split or "train", allowed=", ".join(splits), hint=hint)
    return SavedDataset(folder / (split or "train"))


def _matching_files(pattern: str) -> DataFiles:
    matches = sorted(Path(name) for name in glob(pattern, recursive=True))
    _refuse_broken_links(matches)
    files = [path for path in matches if path.is_file() and data_suffix(path)]
    if not files:
        folder = next((p for p in Path(pattern).parents if not is_pattern(str(p))), Path())
        hint = f"data files there: {_data_names(folder)}" if folder.is_dir() else f"no folder {folder}"
        raise DataError("no data file matches", where=pattern, allowed=KINDS, hint=hint)
    _refuse_kinds(files, pattern)
    return DataFiles(tuple(files), tuple(str(path) for path in matches if path not in files))


def _files_of_folder(folder: Path) -> DataFiles:
    entries = sorted(folder.iterdir())
    _refuse_broken_links(entries)
    files = [
        p for p in entries if p.is_file() and data_suffix(p) and p.name not in _METADATA and not p.name.startswith(".")
    ]
    if not files:
        found = _listed([f"{p.name}/" if p.is_dir() else p.name for p in entries])
        hint = f"it holds: {found}"
        if any(p.is_dir() for p in entries):
            hint += f"; folders in it are read by a pattern, for example {folder}/**/*.parquet"
        raise DataError("this folder holds no data file", where=str(folder), allowed=KINDS, hint=hint)
    _refuse_kinds(files, str(folder))
    splits = {word: file.name for file in files if (word := _split_word(file)) is not None}
    if len(splits) > 1:
        train = splits.get("train", files[0].name)
        other = next(name for name in splits.values() if name != train)
        names, hint = " and ".join(splits.values()), f"data: {{path: {folder / train}, test: {folder / other}}}"
        hint = f"name the files of each split by itself, or by a pattern, for example {hint}"
        raise DataError("the files of this folder are of different splits", where=str(folder), given=names, hint=hint)
    return DataFiles(tuple(files), tuple(f"{p.name}/" if p.is_dir() else p.name for p in entries if p not in files))


def _split_word(file: Path) -> str | None:
    words = re.split(r"[^a-z]+", file.name.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _refuse_kinds(files: Sequence[Path], where: str) -> None:
    _refuse_empty(files)
    by_target: dict[Path, Path] = {}
    for file in files:
        if (other := by_target.setdefault(file.resolve(), file)) is not file:
            given = f"{other.name} and {file.name}"
            hint = "remove one of the links, or name the files"
            raise DataError("two names of one file, whose rows would count twice", where=where, given=given, hint=hint)
    examples: dict[str, Path] = {}
    for file in files:
        examples.setdefault(str(data_suffix(file)), file)
    if len(examples) > 1:
        given = ", ".join(f"{kind} ({file.name})" for kind, file in examples.items())
        kind, file = next(iter(examples.items()))
        hint = f"name one kind by a pattern, for example {file.parent}/*{kind}"
        raise DataError("files of several kinds, which may be the same rows twice", where=where, given=given, hint=hint)


def _data_names(folder: Path) -> str:
    return _listed(sorted(p.name for p in folder.iterdir() if p.is_file() and data_suffix(p)))


def _listed(names: Sequence[str]) -> str:
    remainder = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return (", ".join(names[:MAX_NAMED]) + remainder) or "none"


def _missing_file_error(file: Path) -> NoReturn:
    folder = file.parent
    if not folder.is_dir():
        raise DataError("no such file, and no such folder", where=str(file), given=str(folder))
    names = [p.name for p in folder.iterdir() if p.is_file()]
    similar = get_close_matches(file.name, names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(similar)}?" if similar else f"data files there: {_data_names(folder)}"
    raise DataError("no such file", where=str(file), hint=hint)
