"""What this machine can do: its name, and the rate of matrix products at the shapes a training step uses.

`python -m benchmarks.machine MODEL_FOLDER` prints the rates as one JSON object; the bench starts it before and after
every pair of runs, because a shared machine does not stay the same.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.flops import KINDS, Flops
from rung.config.model import ModelConfig
from rung.planning.architecture import ModelShape, read_shape

ROWS = 700
"""Tokens of a micro-batch: products of this many rows run at full speed."""
SECONDS = 0.12
"""How long each product is repeated."""
EXTENSIONS = ("avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile")


def processor() -> dict[str, Any]:
    """Name, cores, memory and instruction sets, as Linux tells them."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": f"{fields.get('model name', 'unknown')} (family {fields.get('cpu family', '?')})",
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "instructions": [name for name in EXTENSIONS if name in flags],
    }


def measure(shape: ModelShape, rows: int = ROWS) -> Flops:
    """Operations per second of each kind of product in float32; those of a block are weighed by their work."""
    block = [(m.inputs, m.outputs) for m in shape.matrices]
    head = [(shape.width, shape.vocabulary)]
    found = [*_rates(block, rows), *_rates(head, rows)]
    return dict(zip(KINDS, found, strict=True))


def _rates(linears: list[tuple[int, int]], rows: int) -> list[float]:
    """Forward, input gradient and weight gradient: all operations over all the time they take."""
    work = sum(2.0 * rows * inputs * outputs for inputs, outputs in linears)
    timed = {pair: _times(*pair, rows) for pair in set(linears)}
    return [work / sum(timed[pair][kind] for pair in linears) for kind in range(3)]


def _times(inputs: int, outputs: int, rows: int) -> tuple[float, float, float]:
    """By the faster of torch's own product and the one that Rung takes: what the machine can do, whoever asks it to."""
    import torch

    from rung.models.matmul import matmul

    x, weight, gradient = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)

    def best(a: torch.Tensor, b: torch.Tensor) -> float:
        return min(_seconds(lambda: a @ b), _seconds(lambda: matmul(a, b)))

    return best(x, weight.T), best(gradient, weight), best(gradient.T, x)


def _seconds(call: Callable[[], object]) -> float:
    """Median time of a call, after two that warm it up."""
    call(), call()
    taken: list[float] = []
    while sum(taken) < SECONDS or len(taken) < 3:
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> None:
    """Print the rates, the version of torch and its threads."""
    import torch

    rates = measure(read_shape(ModelConfig(name=sys.argv[1])))
    print(json.dumps({"rates": rates, "torch": torch.__version__, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
