"""A base whose file is bfloat16, held as bfloat16 and computed in float32.

Widening bfloat16 is exact, so results are bit for bit those of a base widened when it was loaded, with half the memory
of its weights. Each matrix is widened when it is used (`models/fused_ops.py`, `models/logprobs.py`); everything small
is widened
once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.pytorch_utils import Conv1D


def stored_in_bfloat16(folder: Path) -> bool:
    """Whether every tensor of a model folder's safetensors files is bfloat16: the config may say otherwise."""
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {opened.get_slice(name).get_dtype() for name in opened.keys()}
    return found == {"BF16"}


def compute_in_float32(model: nn.Module) -> None:
    """Widen all but the matrices of linears and of plain embeddings, which stay as they are until they are used."""
    narrow: set[int] = set()
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D):
            narrow.add(id(module.weight))
        elif type(module) is nn.Embedding:
            narrow.add(id(module.weight))
            module.forward = _WidenedEmbedding(module)  # type: ignore[method-assign, assignment]
    for module in model.modules():  # an embedding with a formula of its own computes in its weight's type
        if isinstance(module, nn.Embedding) and type(module) is not nn.Embedding:
            narrow.discard(id(module.weight))
    for parameter in model.parameters():
        if parameter.dtype is torch.bfloat16 and id(parameter) not in narrow:
            parameter.data = parameter.data.float()


def keeps_bfloat16_weights(model: nn.Module) -> bool:
    """Whether `compute_in_float32` was here: a base that computes in bfloat16 holds everything in it."""
    return {torch.bfloat16, torch.float32} <= {p.dtype for p in model.parameters()}


def has_rounded_buffers(model: nn.Module) -> bool:
    """Whether a number that the file does not hold (a scale, a frequency) was rounded to bfloat16 at loading."""
    return any(buffer.dtype is torch.bfloat16 for buffer in model.buffers())


@contextmanager
def report_float32_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, matrices of these modules held in bfloat16 claim to be float32: what is made beside them is drawn so.

    Their values are not there meanwhile.
    """
    held = [(p, p.data) for module in modules for p in module.parameters() if p.dtype is torch.bfloat16]
    for parameter, data in held:
        parameter.data = torch.zeros((), device=data.device).expand(data.shape)
    try:
        yield
    finally:
        for parameter, data in held:
            parameter.data = data


class _WidenedEmbedding:
    """The rows of an embedding that are looked up, widened."""

    def __init__(self, module: nn.Embedding) -> None:
        self.module = module

    def __call__(self, ids: Tensor) -> Tensor:
        m: Any = self.module
        return F.embedding(
            ids, m.weight, m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse
        ).float()
