"""What is wrong with a file that is no valid JSON or CSV, as a hint.

A parser names a position; the user needs the cause: a web page or a pointer of Git LFS that was saved under the name of
the file, objects of a list without its brackets, a comma too many. `read` puts the hints into its errors.
"""

from __future__ import annotations

import json
from pathlib import Path

from rung.errors import DataError

LFS_POINTER = "version https://git-lfs.github.com/spec/"
"""Start of a pointer of Git LFS, which stands in a clone in place of the file."""
COMMA_AT_THE_END = "objects on lines have no commas between them, and no comma may follow the last field of one"


def refuse_other_content(file: Path, first_line: str) -> None:
    """Raise `DataError` where a data file begins as a web page or a pointer of Git LFS does."""
    start = first_line.lstrip("\ufeff \t\r\n").lower()
    if start.startswith(("<!doctype html", "<html", "<?xml")):
        hint = "download the file itself: on a hub that is the raw file or resolve, not the page that shows it"
        raise DataError("this is a web page, not data", where=str(file), given=first_line.strip()[:60], hint=hint)
    if start.startswith(LFS_POINTER):
        hint = "run git lfs pull in its repository, or download the file itself"
        raise DataError("this is a pointer of Git LFS, not the file", where=str(file), hint=hint)


def json_hint(file: Path, text: str, error: json.JSONDecodeError) -> str | None:
    """What to do about a .json file that cannot be parsed."""
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if error.msg == "Extra data":
        if after.startswith(","):
            return "put [ before the first object and ] after the last, without a comma before the ]"
        return f"one object per line is .jsonl: rename the file to {file.name.replace('.json', '.jsonl')}"
    # Python 3.13 points to the comma itself, earlier versions behind it
    behind = after.removeprefix(",").lstrip() if after.startswith(",") else after
    if (before.endswith(",") or after.startswith(",")) and behind[:1] in ("]", "}"):
        return f"remove the comma before the {behind[0]}"
    if not after:
        return "the file ends too early: it may be cut off, copy or download it again"
    return None
