"""Products through oneDNN: the same numbers for any strides, and no memory that grows with the lengths of rows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rung.models.matmul import linear, matmul
from tolerances import FLOAT32

GROWTH = """
import torch
from rung.models.matmul import linear

def resident():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024

x, weight = torch.randn(300, 576), torch.randn(1536, 576)
for rows in range(20, 50):
    linear(x[:rows], weight)
before = resident()
for rows in range(50, 300):
    linear(x[:rows], weight)
print(resident() - before)
"""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_any_strides_give_the_same_numbers(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    wide = torch.randn(40, 60, dtype=dtype)
    operands = [wide[:7, :20], wide[:, :7].T[:, :20], wide[3:10, 5:45:2], wide[:7, :20].contiguous(), wide[:0, :20]]
    weights = [wide[10:30, :20], wide[:20, 10:30].T, wide[::2, ::3], torch.randn(20, 20, dtype=dtype).T]
    b = torch.randn(20, dtype=dtype) if bias else None
    for x in operands:
        for w in weights:
            exact = x.double() @ w.double().T + (0 if b is None else b.double())
            limit = {torch.float64: 1e-12, torch.float32: FLOAT32, torch.bfloat16: 5e-2}[dtype]
            assert linear(x, w, b).dtype is dtype
            scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
            assert (linear(x, w, b).double() - exact).abs().sum() <= limit * scale * max(1, exact.numel())
            assert torch.equal(matmul(x, w.T), linear(x, w))


def test_new_lengths_do_not_fill_the_memory() -> None:
    """Left alone, each of the 250 lengths would keep about a megabyte."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 80
