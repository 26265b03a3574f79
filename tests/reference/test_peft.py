"""Rung's own tuners in stock peft, once rung.peft is imported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import rung.peft  # noqa: F401 -- registers them
from builders import documents, logits_of, tuned
from models import tiny_model
from rung.models.packing import pack_separately

KINDS = [
    ("bottleneck", {"width": 3}),
    ("bottleneck", {"width": 3, "placement": "pfeiffer", "activation": "silu"}),
    ("bottleneck", {"width": 3, "placement": "parallel", "scale": 4.0}),
    ("mixture", {"experts": 3, "rank": 2}),
    ("mixture", {"experts": 3, "rank": 2, "top_k": 2, "targets": ("q", "down")}),
]


@pytest.mark.parametrize("shape", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize(("kind", "config"), KINDS, ids=str)
def test_stock_peft_gives_the_same_logits(kind: str, config: dict[str, object], shape: str, tmp_path: Path) -> None:
    policy, method = tuned(kind, shape, **config)
    method.save(tmp_path / "one")
    plain = tiny_model(shape)
    plain.set_attn_implementation("eager")
    (document,) = documents(1, count=1)
    ids = torch.tensor(document.ids, dtype=torch.long)[None]
    with torch.no_grad():
        before = plain(ids, use_cache=False).logits[0]
        model = PeftModel.from_pretrained(plain, str(tmp_path / "one"), adapter_name="mine").eval()
        ours = logits_of(policy, pack_separately([document])[0])
        assert (model(ids, use_cache=False).logits[0] - ours).abs().max() < 1e-4
        with model.disable_adapter():
            assert torch.equal(model(ids, use_cache=False).logits[0], before)
        assert (before - ours).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "again")
    again = tuned(kind, shape, **config)[1]
    with torch.no_grad():
        for parameter in again.trainable().values():
            parameter.zero_()
    again.load(tmp_path / "again" / "mine")
    for name, parameter in method.trainable().items():
        assert torch.equal(parameter, again.trainable()[name])


def test_two_of_them_are_switched_and_the_base_stays(tmp_path: Path) -> None:
    """Bit for bit after many switches."""
    for i, config in enumerate(({"width": 3}, {"width": 5})):
        _, method = tuned("bottleneck", **config)
        method.save(tmp_path / str(i))
    plain = tiny_model()
    plain.set_attn_implementation("eager")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        base = plain(ids, use_cache=False).logits
        model = PeftModel.from_pretrained(plain, str(tmp_path / "0"), adapter_name="a").eval()
        model.load_adapter(str(tmp_path / "1"), adapter_name="b")
        first: dict[str, torch.Tensor] = {}
        for turn in range(40):
            name = "ab"[turn % 2]
            model.set_adapter(name)
            logits = model(ids, use_cache=False).logits
            assert torch.equal(first.setdefault(name, logits), logits)
        assert not torch.equal(first["a"], first["b"])
        with model.disable_adapter():
            assert torch.equal(model(ids, use_cache=False).logits, base)


@pytest.mark.parametrize(
    "config",
    [
        {"virtual_tokens": 2, "hidden": 8, "positions": {"front": 1, "user": 1}},
        {"virtual_tokens": 2, "hidden": 8, "tasks": ("a", "b")},
    ],
    ids=["inside", "tasks"],
)
def test_what_peft_has_no_form_for_says_so(config: dict[str, object], tmp_path: Path) -> None:
    _, method = tuned("p_tuning", **config)
    method.save(tmp_path)
    with pytest.raises(ValueError, match="are Rung's own"):
        PeftModel.from_pretrained(tiny_model(), str(tmp_path))
