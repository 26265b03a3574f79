"""Resident memory of a process, read the same way on both sides. Standard library only: the peers import it too."""

from __future__ import annotations

from pathlib import Path


def resident(process: int | str = "self", field: str = "VmRSS") -> int:
    """Bytes of resident memory now, or `VmHWM`: the most since the last reset. 0 for a process that is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        return int(status.split(f"{field}:")[1].split()[0]) * 1024
    except (OSError, IndexError):  # a process that has just ended has no memory lines
        return 0


def peak(process: int | str = "self") -> int:
    """Largest resident memory since the last reset, in bytes."""
    return resident(process, "VmHWM")


def reset_peak() -> None:
    """Start measuring the peak anew, as Rung does before its first step."""
    Path("/proc/self/clear_refs").write_text("5")
