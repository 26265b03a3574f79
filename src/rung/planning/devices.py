"""Devices that a run can be planned for: a table of graphics cards, and the card of this machine.

Memory is what the driver reports as total, which is below the round number in a card's name. Peak rates are the
manufacturers' dense bfloat16 figures; no number here was measured. `nvidia-smi` answers for the local card, because
importing torch would take seconds. `commands.plan` looks devices up, `planning.advise` plans for them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from rung.errors import ConfigError, did_you_mean

MiB = 2**20
_QUERY_SECONDS = 3
"""A driver that does not answer within this time counts as no card."""


@dataclass(frozen=True, slots=True)
class Device:
    """A graphics card to plan for."""

    name: str
    memory: int
    """Bytes in total."""
    flops: float | None
    """Peak operations per second; None if unknown."""
    compute: str = "bfloat16"
    """Dtype of products for `model.dtype: auto`."""


_DEVICES = (
    # Turing has no bfloat16 units, and Rung does not train in float16: its float32 rate.
    Device("t4", 15_360 * MiB, 8.1e12, "float32"),
    Device("l4", 23_034 * MiB, 121e12),
    Device("a10", 23_028 * MiB, 125e12),
    Device("rtx3090", 24_576 * MiB, 71e12),
    Device("rtx4090", 24_564 * MiB, 165e12),
    Device("rtx5090", 32_607 * MiB, 209e12),
    Device("a100-40", 40_960 * MiB, 312e12),
    Device("l40s", 46_068 * MiB, 362e12),
    Device("a100", 81_920 * MiB, 312e12),
    Device("h100", 81_559 * MiB, 989e12),
    Device("h200", 143_771 * MiB, 989e12),
    Device("mi300x", 196_592 * MiB, 1307e12),
    Device("b200", 183_359 * MiB, 2250e12),
)
DEVICES = {device.name: device for device in _DEVICES}


def parse_device(name: str) -> Device | None:
    """Look up a card; None for `cpu`. Raises `ConfigError` for an unknown name."""
    known = {**DEVICES, "cpu": None}
    if name.lower() in known:
        return known[name.lower()]
    suggestion = did_you_mean(name.lower(), list(known))
    hint = f"did you mean {suggestion}?" if suggestion else "give --memory for another"
    raise ConfigError("no such device", where="--device", given=name, allowed=", ".join(known), hint=hint)


def find_local_device() -> Device | None:
    """The first NVIDIA card that this process may use, as its driver describes it; None without one."""
    program = shutil.which("nvidia-smi")
    # As CUDA reads it: an empty value or -1 hides all cards, and the first entry is the first card.
    number = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if program is None or number in ("", "-1"):
        return None
    command = [program, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits", f"--id={number}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True)  # noqa: S603 - no shell
        name, mebibytes, capability = (field.strip() for field in answer.stdout.splitlines()[0].split(","))
        if int(mebibytes) <= 0:
            return None
        return describe_device(name, int(mebibytes) * MiB, tuple(map(int, capability.split("."))))
    # A driver without a card, or of another version than its tools, answers with an error text.
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def describe_device(name: str, memory: int, capability: tuple[int, ...]) -> Device:
    """A card by its marketing name, with the peak rate of its entry in the table where the name matches one.

    Compute capability 8.0 (Ampere) and later multiply bfloat16.
    """
    words = name.lower().replace("-", " ").replace("rtx ", "rtx").split()
    known = next((device for key, device in DEVICES.items() if key.split("-")[0] in words), None)
    if "laptop" in words or {"h100", "pcie"} <= set(words):
        known = None  # slower than the card of that name
    return Device(name, memory, known.flops if known else None, "bfloat16" if capability >= (8, 0) else "float32")
