"""Bases stored in bfloat16 that stay bfloat16 in memory while products run in float32.

Widening bfloat16 is exact, so results equal those of a base widened at loading bit for bit, with half the memory for
its weights. `models/fused_ops.py` and `models/logprobs.py` widen each matrix when they use it; small parameters are
widened once. The cost: decoding widens every matrix for every token (decision 0010). `models/load.py` calls this for
folders whose tensors are all bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.pytorch_utils import Conv1D

from rung.files import check_safetensors
from rung.models.weight_files import stored_tensor

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of all tensors in a model folder's safetensors files; None where they differ or there are none.

    The files decide, because the dtype in config.json may differ from them.
    """
    dtypes = set()
    for file in folder.glob("*.safetensors"):
        dtypes |= {entry["dtype"] for entry in check_safetensors(file).values()}
    return _DTYPES.get(dtypes.pop()) if len(dtypes) == 1 else None


def compute_in_float32(model: nn.Module) -> None:
    """Widen everything except the matrices of linears and plain embeddings, which are widened when used."""
    modules: list[Any] = list(model.modules())
    # By identity, because a tied head and embedding are one parameter under two names.
    bfloat16_ids = {id(m.weight) for m in modules if type(m) in (nn.Linear, Conv1D, nn.Embedding)}
    # A subclass of Embedding (Gemma scales its output) computes in the type of its weight, so that weight is widened.
    bfloat16_ids -= {id(m.weight) for m in modules if isinstance(m, nn.Embedding) and type(m) is not nn.Embedding}
    for module in modules:
        if type(module) is nn.Embedding:
            module.forward = _WidenedEmbedding(module)  # type: ignore[method-assign, assignment]
    for p in model.parameters():
        if p.dtype is torch.bfloat16 and id(p) not in bfloat16_ids:
            p.data = p.data.float()


def keeps_bfloat16_weights(model: nn.Module) -> bool:
    """Whether `compute_in_float32` was applied; a base that computes in bfloat16 holds no float32 parameter."""
    return {torch.bfloat16, torch.float32} <= {p.dtype for p in model.parameters()}


@contextmanager
def replaced_data(parameters: Sequence[nn.Parameter], convert: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context, the data of these parameters are what `convert` makes of them."""
    stored_data = [p.data for p in parameters]
    try:
        for p in parameters:
            p.data = convert(p.data)
        yield
    finally:
        for p, data in zip(parameters, stored_data, strict=True):
            p.data = data


@contextmanager
def pretend_float32_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context, bfloat16 parameters of these modules report float32, so peft draws adapters in float32.

    So do parameters that are still in their files, on the device where they belong. The values are not available
    meanwhile.
    """
    owned = [
        (m, name, p) for module in modules for m in module.modules() for name, p in m.named_parameters(recurse=False)
    ]
    stored = [(m, name, p, source) for m, name, p in owned if (source := stored_tensor(p)) is not None]
    bfloat16_parameters = [p for _, _, p in owned if p.dtype is torch.bfloat16 and not p.is_meta]
    # An expanded scalar has the shape of the weight and takes no memory.
    for module, name, p, source in stored:
        hollow = torch.zeros((), device=source.device).expand(p.shape)
        module._parameters[name] = nn.Parameter(hollow, requires_grad=p.requires_grad)
    try:
        with replaced_data(bfloat16_parameters, lambda data: torch.zeros((), device=data.device).expand(data.shape)):
            yield
    finally:
        for module, name, p, _ in stored:
            module._parameters[name] = p


class _WidenedEmbedding:
    """Embedding lookup that widens only the rows it looks up."""

    def __init__(self, module: nn.Embedding) -> None:
        self.module = module

    def __call__(self, ids: Tensor) -> Tensor:
        m: Any = self.module
        options = (m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse)
        return F.embedding(ids, m.weight, *options).float()
