"""Append-only files and lazy sequences: items are decoded from disk on access and not kept in memory.

The memory of a run therefore does not grow with its rows (decision 0011). The cost is that an item read twice is
decoded twice. Files are read with pread, not mapped: a mapped page counts as memory of the process once touched.
`records`, `token_store` and `cache` are built on this module.
"""

from __future__ import annotations

import copy
import operator
import os
import tempfile
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar, overload

import numpy as np

from rung.errors import CheckpointError
from rung.files import cache_folder

T = TypeVar("T")
BUFFER_BYTES = 1 << 18
"""Bytes per write or read."""
DISK_SPACE_HINT = "free some disk space, or set RUNG_CACHE to a folder with room"


class AppendFile:
    """A file that grows at its end and is read at any offset. The descriptor closes with the last reference."""

    def __init__(self, descriptor: int, size: int, name: str) -> None:
        self.name = name
        self.size = size
        self._descriptor = descriptor
        self._pending = bytearray()
        # not __del__: slices and views share this object, and finalize also runs at interpreter exit
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def new(cls) -> AppendFile:
        """An empty unnamed file in the cache folder: it disappears however the process ends.

        The system's temporary folder is not used, because it is often a RAM disk.
        """
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                # dup: TemporaryFile closes its own descriptor at the end of the with block
                return cls(os.dup(file.fileno()), 0, str(folder))
        except OSError as error:
            raise CheckpointError(f"could not write here: {error}", where=str(folder), hint=DISK_SPACE_HINT) from error

    @classmethod
    def open(cls, path: Path) -> AppendFile:
        """Open an existing file for reading; another process may replace it meanwhile. Raises OSError."""
        # CLOEXEC: child processes must not inherit the descriptor
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return cls(descriptor, os.fstat(descriptor).st_size, str(path))

    def append(self, data: bytes | memoryview) -> int:
        """Append bytes and return the offset of the first one."""
        start = self.size
        self._pending += data
        self.size += len(data)
        if len(self._pending) >= BUFFER_BYTES:
            self._flush()
        return start

    def read(self, start: int, size: int) -> bytes:
        """Read exactly `size` bytes. Raises `CheckpointError` when the file has become shorter."""
        if self._pending:
            self._flush()
        data = os.pread(self._descriptor, size, start)
        while len(data) < size:  # one call reads at most 2 GiB
            chunk = os.pread(self._descriptor, size - len(data), start + len(data))
            if not chunk:
                raise CheckpointError("a file of the cache was cut short while in use", where=self.name)
            data += chunk
        return data

    def _flush(self) -> None:
        try:
            # a memoryview, so that a partial write (full disk, signal) does not copy the rest
            with memoryview(self._pending) as view:
                offset = 0
                while offset < len(view):
                    offset += os.write(self._descriptor, view[offset:])
        except OSError as error:
            raise CheckpointError(f"could not write here: {error}", where=self.name, hint=DISK_SPACE_HINT) from error
        self._pending.clear()


class ByteRange(NamedTuple):
    """A range of bytes in a file."""

    file: AppendFile
    start: int
    size: int

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from offset `start` of the range."""
        return self.file.read(self.start + start, size)

    def pieces(self) -> Iterator[bytes]:
        """All bytes in order, one buffer at a time."""
        for start in range(0, self.size, BUFFER_BYTES):
            yield self.read(start, min(BUFFER_BYTES, self.size - start))


class LazySequence(Sequence[T]):
    """A sequence whose items are created on access; it equals any sequence of equal items. Slices are lazy too."""

    rows: np.ndarray
    """A row per item: all that is kept in memory of it."""

    @abstractmethod
    def at(self, i: int) -> T:
        """Item `i`, already checked to be in range."""

    def select(self, rows: slice | np.ndarray) -> Self:
        """The items of a slice or at the given indices, in that order; nothing is read."""
        selection = copy.copy(self)
        selection.rows = self.rows[rows]
        return selection

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(index)
        i, length = operator.index(index), len(self)
        if not -length <= i < length:
            raise IndexError(f"item {i} of {length}")
        return self.at(i % length)

    # Sequence's own __iter__ would go through __getitem__ and its range checks for every item.
    def __iter__(self) -> Iterator[T]:
        return map(self.at, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    # Equal to lists, which are not hashable either.
    __hash__ = None  # type: ignore[assignment]


class MappedSequence(LazySequence[T]):
    """Items computed by a function from rows, which may be another lazy sequence."""

    def __init__(self, make_item: Callable[[Any], T], rows: Any) -> None:
        self._make_item, self.rows = make_item, rows

    def __iter__(self) -> Iterator[T]:
        return map(self._make_item, self.rows)  # in one pass over the rows, which may read a file

    def at(self, i: int) -> T:
        """Compute one; nothing is cached."""
        return self._make_item(self.rows[i])


def chunks(items: Iterable[T], size: Callable[[T], int], *, count: int, limit: int) -> Iterator[list[T]]:
    """Lists of at most `count` items with a total size of at most `limit`; a larger item gets a list to itself."""
    chunk: list[T] = []
    chunk_size = 0
    for item in items:
        item_size = size(item)
        if chunk and (len(chunk) == count or chunk_size + item_size > limit):
            yield chunk
            chunk, chunk_size = [], 0
        chunk.append(item)
        chunk_size += item_size
    if chunk:
        yield chunk
