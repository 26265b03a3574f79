"""Virtual tokens inside documents against transformers fed with embeddings, one document at a time, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from builders import documents, in_one_batch, policy_of, tuned
from models import tiny_model
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import SftConfig
from rung.errors import PlanError
from rung.methods.registry import attach_method
from rung.models.fused_modules import install_fused_forwards
from rung.models.packing import MIN_PREFIX_AHEAD, pack, pack_separately
from rung.objectives.sft import SftObjective
from rung.training.gates import check_decoding, check_packing
from rung.training.step import accumulate
from rung.types import Example
from tolerances import FLOAT64, LLAMA_GRADIENT

SFT = SftObjective(SftConfig())
SPEC = {"virtual_tokens": 5, "positions": {"front": 2, "user": 1, "assistant": 2}, "encoder": "mlp", "hidden": 8}
FRONT, WORDS = 2, 320


def with_inserted(examples: list[Example], at: int | None = None) -> list[Example]:
    """One before some token of the prompt, two right before the answer."""
    made = []
    for e in examples:
        answer = int(e.supervised.argmax())
        user = min(at or 0, answer)
        ids = np.insert(e.ids, [user, answer, answer], [WORDS, WORDS + 1, WORDS + 2])
        supervised = np.insert(e.supervised, [user, answer, answer], False)
        supervised[0] = False
        made.append(replace(e, ids=ids.astype(np.int32), supervised=supervised))
    return made


def naive_loss(model: PreTrainedModel, rows: Tensor, examples: list[Example]) -> Tensor:
    """The rows in front and inside, written into each document's embeddings."""
    table = torch.cat([model.get_input_embeddings().weight.detach(), rows[FRONT:]])
    total = sum(e.weight * int(e.supervised.sum()) for e in examples)
    losses = []
    for e in examples:
        ids = torch.from_numpy(e.ids.astype(np.int64))
        entering = torch.cat([rows[:FRONT], table[ids]])[None]
        logits = model(inputs_embeds=entering, use_cache=False).logits[0, FRONT:]
        at = torch.from_numpy(np.flatnonzero(e.supervised))
        losses.append(-e.weight * logits.log_softmax(-1)[at - 1, ids[at]].sum() / total)
    return torch.stack(losses).sum()


@pytest.mark.parametrize("shape", ["llama", "qwen3", "phi", "gpt2", "opt"])
@pytest.mark.parametrize("shared", [0, MIN_PREFIX_AHEAD + 9])
def test_loss_and_gradient_are_those_of_embeddings_written_in_place(shape: str, shared: int) -> None:
    examples = with_inserted(documents(6, count=7, shared=shared), at=3)
    policy, method = tuned("p_tuning", shape, dtype=torch.float64, **SPEC)
    parameters = list(method.trainable().values())
    plain = tiny_model(shape, dtype=torch.float64)
    plain.set_attn_implementation("sdpa")
    expected = naive_loss(plain, method._rows(""), examples)
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters)])
    limit = FLOAT64 if shape in ("phi", "gpt2", "opt") else LLAMA_GRADIENT
    for batches in (pack(examples, 50), pack_separately(examples), pack(examples, 10_000)):
        for parameter in parameters:
            parameter.grad = None
        loss = accumulate(policy, SFT, batches)
        ours = torch.cat([p.grad.flatten() for p in parameters])
        assert float(loss) == pytest.approx(float(expected.detach()), rel=limit)
        assert (ours - theirs).norm() / theirs.norm() < limit


def test_the_place_matters_and_so_does_the_task() -> None:
    """The mutation: the same tokens one place further give another loss."""
    config = {**SPEC, "tasks": ("finance", "support")}
    policy, _ = tuned("p_tuning", dtype=torch.float64, **config)
    plain = [replace(e, task="finance") for e in documents(6, count=7, shared=12)]
    here = float(accumulate(policy, SFT, pack(with_inserted(plain, at=3), 10_000)))
    there = float(accumulate(policy, SFT, pack(with_inserted(plain, at=4), 10_000)))
    other = [replace(e, task="support") for e in plain]
    elsewhere = float(accumulate(policy, SFT, pack(with_inserted(other, at=3), 10_000)))
    assert len({round(here, 6), round(there, 6), round(elsewhere, 6)}) == 3


def test_the_encoder_runs_once_a_step() -> None:
    policy, method = tuned("p_tuning", **SPEC)
    calls = []
    method.encoder.register_forward_hook(lambda *given: calls.append(1))
    batches = pack(with_inserted(documents(6, count=7), at=2), 30)
    accumulate(policy, SFT, batches)
    assert len(batches) > 2 and calls == [1]


@pytest.mark.parametrize("shape", ["llama", "gpt2", "qwen3"])
def test_packing_and_decoding_agree(shape: str) -> None:
    policy, _ = tuned("p_tuning", shape, **SPEC)
    examples = with_inserted([d for d in documents(0, count=30) if len(d) < 8], at=2)
    assert check_packing(policy, in_one_batch(examples)).state == "passed"
    assert check_decoding(policy, examples).state == "passed"


def test_the_base_alone_cannot_read_them_and_reads_the_rest_unchanged() -> None:
    policy, _ = tuned("p_tuning", **SPEC)
    with pytest.raises(PlanError, match="inside"):
        policy.reference_logprobs(pack(with_inserted(documents()), 10_000)[0])
    batch, base = pack(documents(), 10_000)[0], tiny_model()
    install_fused_forwards(base)
    assert torch.equal(policy.reference_logprobs(batch), policy_of(base).logprobs(batch))


def test_saved_and_loaded_and_not_taken_for_a_prompt_in_front(tmp_path: Path) -> None:
    import rung.peft  # noqa: F401 -- which lets peft say why

    policy, method = tuned("p_tuning", **SPEC)
    method.save(tmp_path)
    again = attach_method(tiny_model(), METHOD_CONFIGS["p_tuning"](**SPEC), seed=9)
    again.load(tmp_path)
    batch = pack(with_inserted(documents(), at=1), 10_000)[0]
    assert torch.equal(policy_of(again.model, again).logprobs(batch), policy.logprobs(batch))
    with pytest.raises(ValueError, match="are Rung's own"):
        PeftModel.from_pretrained(tiny_model(), str(tmp_path))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"virtual_tokens": 4, "positions": {"front": 2}}, "add up to 2"),
        ({"virtual_tokens": 4, "positions": {"front": 2, "user": 2}, "layers": "all"}, "in front alone"),
        ({"virtual_tokens": 4, "positions": {"system": 4}}, "system"),
    ],
    ids=str,
)
def test_positions_that_cannot_be(config: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        METHOD_CONFIGS["p_tuning"](**config)
