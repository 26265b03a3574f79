"""Memory of this process and of its graphics card: what is free, and the peak of a part of a run.

On a card the numbers are those of torch's CUDA allocator, because the resident memory of the process says nothing about
the card; on a processor they are the kernel's. Only Linux tells all of them; elsewhere some are missing or cover the
whole life of the process. `runs`, `commands` and `training` call these functions.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from rung.planning.memory import CUDA_CONTEXT_BYTES


def free_memory(device: torch.device) -> int | None:
    """Bytes available to a run, including what this process already holds; None if the system does not say."""
    if device.type == "cuda":
        # Estimates count the context too, which this process holds already, as it does what it reserved for tensors.
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) + CUDA_CONTEXT_BYTES
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free = int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024
        # Estimates count a whole process, so what this one holds already (torch, a loaded base) is not missing.
        resident = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return None
    return free + resident


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peaks of a card's allocated memory and of resident memory, where the kernel allows it (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        # 5 resets VmHWM, see proc(5)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process since the last reset, in bytes: allocated on a card, else resident."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_host_memory_bytes()


def peak_host_memory_bytes() -> int:
    """Peak resident memory of this process since the last reset, in bytes; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    # without /proc: the peak since the start of the process, in bytes on macOS and in kilobytes elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Return freed memory to the system where the allocator can (glibc), which would keep that of small tensors."""
    if sys.platform == "win32":
        return
    # CDLL(None): the process itself, hence the C library in use; musl and macOS have no malloc_trim
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def synchronize(device: torch.device) -> None:
    """Wait until a card has finished: its work is queued, so a clock without this would stop too early."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
