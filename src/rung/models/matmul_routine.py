"""Which routine multiplies float32 matrices on this machine, oneDNN or torch's BLAS: measured in less than a second.

On AMD's processors with AVX-512 oneDNN is twice as fast as MKL, on those with AVX2 alone they differ by some percent,
and on Intel's either may lead. The result is kept in the cache folder for the processor, its instruction sets, the
number of threads and the version of torch. The two routines add in different orders, so a command has one for all its
models: training and climbs settle it by their config and record it in run.json; elsewhere the first model decides.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rung.console import print_status
from rung.errors import CheckpointError, ConfigError
from rung.files import cache_folder, write_text
from rung.models.matmul import Routine, has_onednn, onednn_linear, routine_in_use, use_routine

PROBES = ((256, 576, 1536), (256, 1536, 576), (256, 576, 2048), (24, 576, 1536))
"""Rows, inputs and outputs of the products that are timed: a micro-batch in a block, a tile of the head, and one token
for each of 24 answers; at the width of a small model, where the routines differ most."""
ROUNDS = 5
"""Calls of each routine a probe, in turns; the fastest counts, because other processes only slow calls down."""
MIN_LEAD = 0.05
"""oneDNN is kept unless the BLAS takes this share less time: near a tie all machines of a kind should agree."""
_INSTRUCTION_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


Setting = Literal["auto"] | Routine
_settled = False


def resolve_routine(setting: Setting) -> Routine:
    """The routine that `model.matmul` names. Raises `ConfigError` for oneDNN where there is none."""
    if setting == "onednn" and not has_onednn():
        reason = "this build of torch has no oneDNN, or it is switched off"
        raise ConfigError(reason, where="model.matmul", given=setting, allowed="auto, blas")
    return fastest_routine() if setting == "auto" else setting


def settle_routine(routine: Routine) -> None:
    """Compute the products of this command by this routine, whatever models it loads later."""
    global _settled
    use_routine(routine)
    _settled = True


def settle_routine_once(setting: Setting) -> None:
    """`settle_routine` by the config of a model that is loaded, unless the command has settled it."""
    if not _settled:
        settle_routine(resolve_routine(setting))
    elif setting not in ("auto", in_use := routine_in_use()):
        print_status(
            f"model.matmul: {setting} is not followed: the models of one command share a routine, here {in_use}"
        )


def fastest_routine() -> Routine:
    """The faster routine on this machine, measured at its first use."""
    if not has_onednn():
        return "blas"
    path, key = cache_folder() / "matmul.json", _machine_key()
    measured = _read(path)
    if measured.get(key) not in ("onednn", "blas"):
        measured = {**measured, key: _measure()}
        try:
            write_text(path, json.dumps(measured, indent=2) + "\n")
        except (OSError, CheckpointError):
            pass  # a cache folder that cannot be written costs the measurement in every process
    return measured[key]


def _measure() -> Routine:
    generator = torch.Generator().manual_seed(0)
    seconds: dict[Routine, float] = {"onednn": 0.0, "blas": 0.0}
    with torch.no_grad():
        for rows, inputs, outputs in PROBES:
            x, weight = (torch.randn(n, inputs, generator=generator) for n in (rows, outputs))
            calls: dict[Routine, Callable[[], Tensor]] = {
                "onednn": lambda x=x, weight=weight: onednn_linear(x, weight),  # type: ignore[misc]
                "blas": lambda x=x, weight=weight: x @ weight.T,  # type: ignore[misc]
            }
            times: dict[Routine, list[float]] = {name: [] for name in calls}
            for _ in range(ROUNDS):
                for name, call in calls.items():
                    start = time.perf_counter()
                    call()
                    times[name].append(time.perf_counter() - start)
            for name, taken in times.items():
                # by operations, so that the few rows of an answer's token do not vanish beside a micro-batch
                seconds[name] += min(taken) / (rows * inputs * outputs)
    return "blas" if seconds["blas"] < (1.0 - MIN_LEAD) * seconds["onednn"] else "onednn"


def _machine_key() -> str:
    """Everything that decides which routine is faster."""
    variables = [f"{name}={os.environ[name]}" for name in _INSTRUCTION_VARIABLES if name in os.environ]
    parts = [_processor_name(), f"{torch.get_num_threads()} threads", torch.backends.cpu.get_cpu_capability()]
    return ", ".join([*parts, f"torch {torch.__version__}", *variables])


def _processor_name() -> str:
    """As Linux names it, with its family, which tells generations of one name apart; elsewhere by its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.partition(":")[::2] for line in lines)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    if "model name" not in values:  # ARM has numbers instead of names
        return ", ".join([platform.machine(), *(values.get(name, "?") for name in ("CPU implementer", "CPU part"))])
    return f"{values['model name']}, family {values.get('cpu family', '?')}"


def _read(path: Path) -> dict[str, Routine]:
    try:
        return dict(json.loads(path.read_text()))
    # A missing or damaged cache only means that nothing was measured.
    except (OSError, ValueError, TypeError):
        return {}
