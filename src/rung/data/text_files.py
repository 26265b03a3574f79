"""Files of text, plain or compressed, opened as checked UTF-8 in bounded memory.

pyarrow decompresses gzip, bzip2 and zstd piece by piece. A file is read twice, once to check all of it: no row is used
of a file that is damaged or not UTF-8. `read` builds its readers on `open_utf8`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from rung.config.data_files import COMPRESSIONS
from rung.errors import DataError

_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\x28\xb5\x2f\xfd": ".zst"}
"""First bytes of compressed files: RFC 1952 section 2.3.1, bzip2's format, RFC 8878 section 3.1.1."""


def open_utf8(file: Path, newline: str) -> TextIO:
    """Open a file as text after a check of all of it.

    Raises:
        DataError: a line is not UTF-8, a compressed file is damaged, or the name does not fit the content.
    """
    # checked by line, to name the line: the text layer decodes in blocks and knows no line number
    with reporting_damage(file), _open_bytes(file) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                summary = f"byte 0x{line[error.start]:02x} is not UTF-8 ({error.reason})"
                raise DataError(summary, where=f"{file} line {number}", hint="save the file as UTF-8") from error
    # utf-8-sig: Excel writes a byte order mark, which would become part of the first column's name
    return io.TextIOWrapper(_open_bytes(file), encoding="utf-8-sig", newline=newline)


@contextmanager
def reporting_damage(file: Path) -> Iterator[None]:
    """Inside, errors of reading become a `DataError` that names the file."""
    try:
        yield
    except (OSError, EOFError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = "it may be cut off: copy or download it again" if file.suffix.lower() in COMPRESSIONS else None
        raise DataError(f"cannot be read: {reason}", where=str(file), hint=hint) from error


def _open_bytes(file: Path) -> BinaryIO:
    stream = file.open("rb")
    start = stream.peek(4)[:4]
    actual = next((suffix for magic, suffix in _MAGIC.items() if start.startswith(magic)), None)
    suffix = file.suffix.lower() if file.suffix.lower() in COMPRESSIONS else None
    if actual == suffix:
        if suffix is None:
            return stream
        stream.close()
        import pyarrow as pa  # not at the top: plain files do without it

        decompressed = pa.CompressedInputStream(pa.OSFile(str(file)), COMPRESSIONS[suffix])
        return cast(BinaryIO, io.BufferedReader(decompressed))
    stream.close()
    plain_name = file.name if suffix is None else file.stem
    name = plain_name if actual is None else f"{plain_name}{actual}"
    content = "not compressed" if actual is None else f"compressed with {COMPRESSIONS[actual]}"
    hint = f"rename it to {name}" + ("" if suffix is None or actual else ", or download it again if it is damaged")
    raise DataError(f"the content is {content}, which its name does not say", where=str(file), hint=hint)
