"""Values of documents that are there already (log-probabilities, scores), without gradient, in the given order.

Documents are packed, so that a shared prefix is computed once; packing reorders them and this module puts the values
back. `inference.choose`, evaluation, reward models and rollouts call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from rung.models.packing import pack
from rung.models.policy import Policy
from rung.types import Example, PackedBatch

T = TypeVar("T")


@torch.no_grad()
def values_by_document(
    readers: Sequence[Policy], documents: Sequence[Example], budget: int, value: Callable[[PackedBatch], Iterable[T]]
) -> list[T]:
    """The value of each document, in the order of `documents`, without gradient.

    `value` returns one value per document of a batch; `readers` are the policies it runs. `budget` is in tokens per
    batch and is raised to the longest document.
    """
    if not documents:
        return []
    # by identity: packing reorders documents, and two of them may be equal
    index_by_id = {id(document): i for i, document in enumerate(documents)}
    values: dict[int, T] = {}
    device = readers[0].device
    token_budget = max(budget, *map(len, documents))
    batches: Iterable[PackedBatch] = pack(documents, token_budget, device=device, boundary=readers[0].rope_boundary)
    for reader in readers:
        batches = reader.iterate_batches(batches)
    for batch in batches:
        values |= {index_by_id[id(d)]: v for d, v in zip(batch.documents, value(batch), strict=True)}
    return [values[i] for i in range(len(documents))]


def token_values_by_document(
    readers: Sequence[Policy], documents: Sequence[Example], budget: int, value: Callable[[PackedBatch], Tensor]
) -> list[np.ndarray]:
    """Values [predictions] of each document; `value` returns one number for each prediction of a batch, [N]."""

    def split_by_document(batch: PackedBatch) -> list[np.ndarray]:
        # entries of the loss index are grouped by owner in the order of predictions
        values_N, owner_N = value(batch).cpu(), batch.loss.owner.cpu()
        return [values_N[owner_N == i].numpy() for i in range(len(batch.documents))]

    return values_by_document(readers, documents, budget, split_by_document)
