"""The order of frozen weights in memory: other addresses, the same numbers, and no second copy that stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from builders import policy_of, tuned
from models import tiny_model
from rung.models import matmul, weight_layout
from rung.models.fused_modules import install_fused_forwards, remove_fused_forwards
from rung.models.generate import Sampling, generate
from rung.models.matmul import linear
from rung.models.matmul import matmul as product
from rung.models.weight_layout import order_weights


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_routine", "onednn")


def is_by_columns(weight: torch.Tensor) -> bool:
    return not weight.is_contiguous() and weight.T.is_contiguous()


def test_answers_and_gradients_are_those_of_weights_by_rows() -> None:
    policy, method = tuned("lora", dtype=torch.float32)
    prompts = [[5, 6, 7, 40, 41], [5, 6, 7, 90], [5, 6, 7, 8, 9]]
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    frozen = [m for m in policy.model.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
    first = generate(policy, prompts, stop_ids=[2], sampling=Sampling(8), batch_size=3)
    moved = [m for m in frozen if is_by_columns(m.weight)]
    head = policy.model.get_output_embeddings()
    assert moved and {id(m) for m in frozen} - {id(m) for m in moved} <= {id(head)}
    assert all(p.is_contiguous() for p in method.trainable().values())
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
    assert generate(policy, prompts, stop_ids=[2], sampling=Sampling(8), batch_size=3) == first


@pytest.mark.parametrize(("outputs", "inputs"), [(48, 64), (64, 48), (33, 100), (576, 192)])
@pytest.mark.parametrize("rows", [2, 3, 24, 64, 257])
def test_products_are_equal_bit_for_bit(outputs: int, inputs: int, rows: int) -> None:
    """A climb that is resumed reads its base anew, so a layout must not change what a rung computes."""
    torch.manual_seed(0)
    weight, x, gradient = torch.randn(outputs, inputs), torch.randn(rows, inputs), torch.randn(rows, outputs)
    by_columns = weight.T.contiguous().T
    assert torch.equal(linear(x, weight), linear(x, by_columns))
    assert torch.equal(product(gradient, weight), product(gradient, by_columns))


@pytest.mark.parametrize("kind", ["trained", "float64", "blas", "not fused", "shared"])
def test_other_weights_stay(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained weights have moments in their order, only oneDNN in float32 gains, several models share a memory."""
    policy = policy_of(tiny_model(dtype=torch.float64 if kind == "float64" else torch.float32))
    policy.model.requires_grad_(kind == "trained")
    install_fused_forwards(policy.model)
    if kind == "blas":
        monkeypatch.setattr(matmul, "_routine", "blas")
    if kind == "not fused":
        remove_fused_forwards(policy.model)
    other = policy.base.share_weights() if kind == "shared" else policy.base
    for model in (policy.model, other.model):
        order_weights(model)
        assert all(p.is_contiguous() for p in model.parameters())


def test_the_same_model_moves_where_nothing_forbids_it() -> None:
    model = tiny_model()
    model.requires_grad_(False)
    install_fused_forwards(model)
    order_weights(model)
    assert sum(is_by_columns(p) for p in model.parameters()) == 14  # seven linears in two layers
    # full fine-tuning of a base that has answered: gradients and moments come by rows
    model.requires_grad_(True)
    order_weights(model)
    assert all(p.is_contiguous() for p in model.parameters())


def test_the_file_s_pages_leave_memory(tmp_path: Path) -> None:
    """The weights are mapped from their file: without this each would be resident twice."""
    count = 16 * 2**20
    torch.zeros(count).numpy().tofile(tmp_path / "weights")
    stored = torch.from_file(str(tmp_path / "weights"), shared=False, size=count).view(4096, 4096)
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(stored, requires_grad=False)
    if float(stored.sum()) != 0.0 or resident_file_bytes() < 64 * 2**20:
        pytest.skip("this folder is in memory, not on a disk")
    before = resident_file_bytes()
    model = tiny_model()
    model.requires_grad_(False)
    model.extra = layer
    install_fused_forwards(model)
    order_weights(model)
    assert is_by_columns(layer.weight)
    assert before - resident_file_bytes() > 50 * 2**20
    assert float(stored.sum()) == 0.0  # and can be read again


def test_memory_of_its_own_is_not_released() -> None:
    own = torch.arange(4096.0 * 4)
    weight_layout._release(own, weight_layout._mapped_files())
    assert torch.equal(own, torch.arange(4096.0 * 4))


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) * 1024
