"""Weights of frozen linears in the order of memory that answering reads fastest.

oneDNN multiplies by blocks of a weight, and first copies each block where the weight [O, I] lies row by row. With the
24 to 64 rows of a batch of answers the copies take as long as a tenth to a fourth of the product. A weight that lies
column by column needs none for x W^T, but then the input gradient does, so training gains and loses nothing. The values
stay, and so do the results (bit for bit from two rows on). `models/generate.py` and `runs/train.py` call this.

Only linears that Rung's functions multiply are moved: torch's own product gains nothing and rounds differently. A run
moves them before its first step, so that a resumed run, which passes no gates and answers nothing, computes alike.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from mmap import PAGESIZE
from pathlib import Path

import torch
from torch import Tensor, nn

from rung.models.base_model import SHARES_MEMORY
from rung.models.fused_modules import fused_linears
from rung.models.matmul import routine_in_use

_PAGE_OUT = 21
"""MADV_PAGEOUT of Linux: unmodified pages of a file leave memory and are read again when they are used."""


@torch.no_grad()
def order_weights(model: nn.Module) -> None:
    """Let frozen float32 linears on the processor lie column by column, and trained ones row by row, as gradients do.

    A second call changes nothing.
    The output head is not moved: its product has so many columns that nothing is gained, and an embedding may share its
    memory. Weights that several models share are not moved either, because each model would get its own copy.
    """
    if routine_in_use() != "onednn":
        return
    head = model.get_output_embeddings()  # type: ignore[operator]
    all_linears = [m for m in fused_linears(model) if m is not head]
    for linear in all_linears:
        if linear.weight.requires_grad:
            linear.weight.data = linear.weight.data.contiguous()
    linears = [m for m in all_linears if _gains(m.weight)]
    files = _mapped_files() if linears else []
    for linear in linears:
        stored = linear.weight.data
        linear.weight.data = stored.T.contiguous().T
        _release(stored, files)


def _gains(weight: Tensor) -> bool:
    """Whether a weight is a frozen matrix of this processor that lies row by row."""
    is_plain = type(weight.data) is Tensor and weight.device.type == "cpu" and weight.dtype is torch.float32
    is_by_rows = weight.is_contiguous() and not weight.T.is_contiguous()
    return is_plain and is_by_rows and not weight.requires_grad and not hasattr(weight, SHARES_MEMORY)


def _mapped_files() -> list[range]:
    """The addresses of this process that show files; empty where the system does not say."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    # addresses, rights, offset, device, inode, and a path where there is one
    fields = [line.split(maxsplit=5) for line in lines]
    bounds = [f[0].split("-") for f in fields if len(f) == 6 and f[4] != "0"]
    return [range(int(start, 16), int(end, 16)) for start, end in bounds]


def _release(tensor: Tensor, files: Sequence[range]) -> None:
    """Let the pages of a tensor that shows a file leave memory, which would hold both copies until the process ends."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    if any(start in file and end <= file.stop for file in files):
        first, last = -(-start // PAGESIZE) * PAGESIZE, end // PAGESIZE * PAGESIZE
        # a refusal costs memory and nothing else
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(max(0, last - first)), _PAGE_OUT)
