"""Other systems than Linux: nothing of Linux alone is imported, locks hold, and no step needs float64 on the device."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from builders import documents, policy_of, rows, tuned
from models import tiny_model
from rung.config.objective import PreferenceConfig, SftConfig
from rung.errors import CheckpointError
from rung.files import lock_file
from rung.methods import mixture
from rung.models import decoding
from rung.models import policy as policies
from rung.models.base_model import compute_dtype, widest_float
from rung.models.generate import Sampling, generate
from rung.models.packing import pack
from rung.objectives.preference import make_preference_objective
from rung.objectives.sft import SftObjective
from rung.runs import load
from rung.training.step import accumulate

IMPORT_ALL = """
import importlib, pkgutil, sys
missing = {"fcntl", "resource", "termios", "pwd", "grp", "readline"}

class Windows:
    def find_spec(self, name, path=None, target=None):
        frame, found = sys._getframe(1), False
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith("rung"):
                found = True
                break
            if not frame.f_globals.get("__name__", "").startswith("importlib"):
                break
            frame = frame.f_back
        if name in missing and found:
            raise ModuleNotFoundError(name)

import rung
for name in missing:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Windows())
for module in pkgutil.walk_packages(rung.__path__, "rung."):
    if module.name != "rung.__main__":
        for name in missing:  # other libraries may have imported them
            sys.modules.pop(name, None)
        importlib.import_module(module.name)
print("all")
"""


def test_nothing_of_linux_alone_is_imported_at_module_level() -> None:
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_ALL]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert found.stdout.strip() == "all", found.stderr[-2000:]


def test_a_lock_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, whose function locks a range of bytes from where the file stands."""
    held = set[tuple[int, int]]()

    def locking(number: int, mode: int, size: int) -> None:
        place = (Path(f"/proc/self/fd/{number}").resolve().stat().st_ino, size)
        assert mode == 2
        if place in held:
            raise PermissionError(errno.EACCES, "Permission denied")
        held.add(place)

    msvcrt: Any = ModuleType("msvcrt")
    msvcrt.LK_NBLCK, msvcrt.locking = 2, locking
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    lock = lock_file(tmp_path / "lock")
    with pytest.raises(CheckpointError, match="another process"):
        lock_file(tmp_path / "lock")
    lock.file.write(b"read by others")
    lock.file.flush()
    assert (tmp_path / "lock").read_bytes() == b"read by others"
    lock.remove()


def test_apples_gpu_is_taken_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = load.device()
    assert device.type == "mps" and compute_dtype("auto", device) is torch.float32
    assert widest_float(device) is torch.float32 and widest_float(torch.device("cuda")) is torch.float64


class WithoutFloat64(TorchDispatchMode):
    """A device that has no float64, as Apple's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.dtype is torch.float64 for t in tree_leaves(result)):
            raise TypeError(f"{func} makes float64")
        return result


@pytest.mark.parametrize("narrow", [True, False])
def test_no_step_needs_float64(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mutation: where the device's own dtype is not asked for, float64 is made."""
    if narrow:
        for module in (policies, decoding, mixture):
            monkeypatch.setattr(module, "widest_float", lambda device: torch.float32)
    policy, _ = tuned("lora")
    policy.reference_cache = {}
    preference = make_preference_objective(PreferenceConfig())
    experts, base = tuned("mixture")[0], policy_of(tiny_model())
    made = []
    for work in (
        lambda: accumulate(policy, preference, pack(rows(3), 200)),
        lambda: accumulate(experts, SftObjective(SftConfig()), pack(documents(), 200)),
        lambda: generate(base, [[5, 6, 7]], stop_ids=(), sampling=Sampling(3, temperature=1.0)),
    ):
        try:
            with WithoutFloat64():
                work()
            made.append(False)
        except TypeError:
            made.append(True)
    assert made == [not narrow] * 3
