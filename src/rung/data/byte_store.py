"""Bytes on disk instead of objects in memory: an item is made when it is asked for, and nobody keeps it.

So the memory of a run does not grow with its rows. Files are read with pread, never mapped: a mapped page counts as
memory of the process once it was touched.
"""

from __future__ import annotations

import operator
import os
import tempfile
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar, overload

import numpy as np

from rung.errors import CheckpointError
from rung.files import cache_folder

T = TypeVar("T")
BUFFER = 1 << 18
"""Bytes written or read in one go."""
DISK_SPACE_HINT = "free some disk space, or set RUNG_CACHE to a folder with room"


class AppendFile:
    """A file of bytes: appended to, and read from anywhere. A file descriptor that goes with its last user."""

    def __init__(self, descriptor: int, size: int, name: str) -> None:
        self.name = name
        self.size = size
        self._descriptor = descriptor
        self._waiting = bytearray()
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def new(cls) -> AppendFile:
        """An empty file without a name beside the cache: however the process ends, nothing of it stays.

        Not in the system's temporary folder, which often is memory.
        """
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                return cls(os.dup(file.fileno()), 0, str(folder))
        except OSError as error:
            raise CheckpointError(f"could not write here: {error}", where=str(folder), hint=DISK_SPACE_HINT) from error

    @classmethod
    def open(cls, path: Path) -> AppendFile:
        """A file that is there, for reading. It may be replaced meanwhile. Raises OSError."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return cls(descriptor, os.fstat(descriptor).st_size, str(path))

    def append(self, data: bytes | memoryview) -> int:
        """Add bytes at the end; where they begin."""
        start = self.size
        self._waiting += data
        self.size += len(data)
        if len(self._waiting) >= BUFFER:
            self._flush()
        return start

    def read(self, start: int, size: int) -> bytes:
        """Exactly these bytes. Raises `CheckpointError` when the file is shorter than it was."""
        if self._waiting:
            self._flush()
        data = os.pread(self._descriptor, size, start)
        while len(data) < size:  # one call reads at most 2 GiB
            more = os.pread(self._descriptor, size - len(data), start + len(data))
            if not more:
                raise CheckpointError("a file of the cache was cut short while in use", where=self.name)
            data += more
        return data

    def _flush(self) -> None:
        try:
            with memoryview(self._waiting) as rest:
                done = 0
                while done < len(rest):
                    done += os.write(self._descriptor, rest[done:])
        except OSError as error:
            raise CheckpointError(f"could not write here: {error}", where=self.name, hint=DISK_SPACE_HINT) from error
        self._waiting.clear()


class ByteRange(NamedTuple):
    """A stretch of a blob."""

    file: AppendFile
    start: int
    size: int

    @classmethod
    def of_file(cls, blob: AppendFile) -> ByteRange:
        """All that was written so far."""
        return cls(blob, 0, blob.size)

    def read(self, start: int, size: int) -> bytes:
        """Bytes from `start` within the region."""
        return self.file.read(self.start + start, size)

    def pieces(self) -> Iterator[bytes]:
        """All bytes in order, a buffer at a time."""
        for start in range(0, self.size, BUFFER):
            yield self.read(start, min(BUFFER, self.size - start))


class LazySequence(Sequence[T]):
    """A sequence whose items are made on access; equal to any sequence of equal items. A slice is lazy too."""

    @abstractmethod
    def at(self, i: int) -> T:
        """Item `i`, which is in range."""

    @abstractmethod
    def select(self, rows: slice | np.ndarray) -> Self:
        """The items of a slice or at these indices, in their order."""

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

    def __iter__(self) -> Iterator[T]:
        return map(self.at, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class MappedSequence(LazySequence[T]):
    """Items that a function makes from their numbers."""

    def __init__(self, make: Callable[[int], T], numbers: np.ndarray | range) -> None:
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def at(self, i: int) -> T:
        """Made anew each time."""
        return self._make(int(self._numbers[i]))

    def select(self, rows: slice | np.ndarray) -> MappedSequence[T]:
        """A view of these alone."""
        return MappedSequence(self._make, np.asarray(self._numbers)[rows])


class TextStore:
    """Texts on disk, each with a number of its own."""

    def __init__(self) -> None:
        self._blob = AppendFile.new()
        self._ends = array("q", [0])
        self._numbers = array("q")

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, number: int, text: str) -> None:
        """Keep a text and its number."""
        self._blob.append(text.encode(errors="surrogatepass"))
        self._ends.append(self._blob.size)
        self._numbers.append(number)

    def at(self, i: int) -> tuple[int, str]:
        """Number and text that were added as the i-th."""
        start = self._ends[i]
        text = self._blob.read(start, self._ends[i + 1] - start)
        return self._numbers[i], text.decode(errors="surrogatepass")


def chunks(items: Iterable[T], size: Callable[[T], int], *, count: int, limit: int) -> Iterator[list[T]]:
    """Lists of at most `count` items that together are at most `limit` in size; a larger item stands alone."""
    chunk: list[T] = []
    filled = 0
    for item in items:
        own = size(item)
        if chunk and (len(chunk) == count or filled + own > limit):
            yield chunk
            chunk, filled = [], 0
        chunk.append(item)
        filled += own
    if chunk:
        yield chunk
