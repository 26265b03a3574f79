"""Starts one process at a time, watches its memory from outside, and keeps what was measured, line by line."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.memory import peak

ROOT = Path(__file__).parent.parent
OURS, PEERS = ROOT / ".venv/bin", ROOT / ".venv-peers/bin"
EVERY = 0.05
"""Seconds between two looks at a process."""
Entry = dict[str, Any]


class RunError(Exception):
    """A process failed; the message holds the end of what it printed."""


@dataclass(frozen=True)
class Finished:
    """A process that ended well."""

    seconds: float
    """From its start to its end, imports, loading and saving included."""
    peak_bytes: int
    """Largest resident memory of its whole life."""


def run(command: Sequence[str | Path], log: Path, env: Mapping[str, str]) -> Finished:
    """Run a command in the repository's root. Raises `RunError` when it fails."""
    highest, started = 0, time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            while process.poll() is None:
                highest = max(highest, peak(process.pid))  # a process may reset its own peak
                time.sleep(EVERY)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RunError(f"{Path(command[0]).name} left with {process.returncode}; {log} ends with:\n{tail}")
    return Finished(round(time.perf_counter() - started, 3), highest)


@dataclass
class Store:
    """Everything measured so far, one JSON object a line, so that an interrupted bench goes on where it stood."""

    path: Path
    entries: list[Entry] = field(default_factory=list)

    @staticmethod
    def open(path: Path, settings: Entry, *, resume: bool) -> Store:
        """Start anew, or go on. Raises `ValueError` when the stored results were measured with other settings."""
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {"kind": "settings", **settings}
        if not (resume and path.exists()):
            path.write_text(json.dumps(head) + "\n")
            return Store(path, [head])
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        if entries[0] != head:
            raise ValueError(f"{path} was measured with {entries[0]}, not with {head}: leave out --resume")
        return Store(path, entries)

    def add(self, entry: Entry) -> Entry:
        """Keep an entry."""
        self.entries.append(entry)
        with self.path.open("a") as lines:
            lines.write(json.dumps(entry) + "\n")
        return entry

    def all(self, **match: Any) -> list[Entry]:
        """Entries with these values, in the order they were measured."""
        return [e for e in self.entries if all(e.get(name) == value for name, value in match.items())]

    def one(self, **match: Any) -> Entry | None:
        """The entry with these values, if there is one."""
        return next(iter(self.all(**match)), None)
