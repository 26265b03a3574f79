"""Distillation against torch's own divergences over whole logits, in float64, and students of some layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from builders import documents, in_one_batch, policy_of, tuned
from models import SHAPES, tiny_model
from naive import distance, gradients, naive
from rung.config.layers import student_layers
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import DistillConfig
from rung.errors import ConfigError, PlanError
from rung.methods.registry import attach_method
from rung.models.base_model import BaseModel
from rung.models.distillation_loss import (
    ENTRIES_PER_SLICE,
    DistillTargets,
    Distribution,
    distillation_loss,
    forward_kl,
)
from rung.models.layers import drop_layers
from rung.models.logprobs import LogitTransform
from rung.models.packing import MIN_PREFIX_AHEAD, pack, pack_separately
from rung.models.policy import NoMethod, Policy
from rung.objectives.distill import DistillObjective
from rung.training.gates import check_decoding, check_packing
from rung.training.step import accumulate, mean_loss
from rung.types import Example
from tolerances import FLOAT64


def distill(teacher: Policy, **config: object) -> DistillObjective:
    objective = DistillObjective(DistillConfig(teacher="another", **config), teacher)  # type: ignore[arg-type]
    objective.begin(teacher, 0)
    return objective


def written_out(kind: str, t: Tensor, s: Tensor, beta: float) -> Tensor:
    """Of log-probabilities, by torch's function, which takes its arguments the other way round."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)

    if kind == "forward":
        return kl(t, s)
    if kind == "reverse":
        return kl(s, t)
    mixed = torch.log(beta * t.exp() + (1 - beta) * s.exp())
    return beta * kl(t, mixed) + (1 - beta) * kl(s, mixed)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("kind", "temperature"), [("forward", 1.0), ("reverse", 2.0), ("jsd", 1.5)])
def test_loss_and_gradient_are_those_of_whole_logits(kind: str, temperature: float, method: str) -> None:
    """With a frozen head and with one that moves; the prompt shared, run ahead, or not."""
    config = {"rank": 4} if method == "lora" else {}
    policy, own = tuned(method, "phi", dtype=torch.float64, **config)
    theirs, their_method = naive(method, "phi", dtype=torch.float64, **config)
    whole = tiny_model("phi", seed=5, dtype=torch.float64)
    beta = {"beta": 0.3} if kind == "jsd" else {}
    more = {"temperature": temperature, "cross_entropy": 0.3, "cosine": 0.2, "weight": 0.7}
    objective = distill(policy_of(whole), divergence=kind, **more, **beta)
    plain = tiny_model("phi", seed=5, dtype=torch.float64)
    plain.set_attn_implementation("sdpa")
    examples = documents(3, shared=MIN_PREFIX_AHEAD)
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for e in examples:
        ids = torch.from_numpy(e.ids.astype(np.int64))
        at = torch.from_numpy(np.flatnonzero(e.supervised))
        out, taught = (m(ids[None], use_cache=False, output_hidden_states=True) for m in (theirs, plain))
        s, t = ((o.logits[0][at - 1] / temperature).log_softmax(-1) for o in (out, taught))
        apart = written_out(kind, t.detach(), s, 0.3)
        nats = -out.logits[0].log_softmax(-1)[at - 1, ids[at]]
        angle = F.cosine_similarity(out.hidden_states[-1][0][at - 1], taught.hidden_states[-1][0][at - 1].detach(), -1)
        total = total + e.weight * (0.7 * temperature**2 * apart + 0.3 * nats + 0.2 * (1 - angle)).sum()
        weights += e.weight * len(at)
    (total / weights).backward()
    for batches in (pack(examples, 10_000), pack(examples, 150), pack_separately(examples)):
        policy.model.zero_grad()
        found = accumulate(policy, objective, batches)
        assert float(found) == pytest.approx((total / weights).item(), rel=FLOAT64)
        assert distance(gradients(own), gradients(their_method)) < FLOAT64
    assert (
        objective.take_metrics().keys() == {"divergence", "cross_entropy", "cosine"} and objective.take_metrics() == {}
    )


@pytest.mark.parametrize("shape", ["gemma2", "llama"])
def test_a_teacher_distilled_into_its_own_copy(shape: str) -> None:
    """Nothing to learn: loss 0 and no gradient, softcap or not."""
    model = tiny_model(shape)
    method = attach_method(model, METHOD_CONFIGS["lora"](), seed=0)
    policy = policy_of(model, method)
    for kind in ("forward", "reverse", "jsd"):
        objective = distill(policy_of(tiny_model(shape)), divergence=kind, temperature=2.0)
        policy.model.zero_grad()
        assert float(accumulate(policy, objective, pack(documents(2), 100))) == pytest.approx(0.0, abs=1e-6)
        assert max(float(g.abs().max()) for g in gradients(method).values()) < 1e-5


def test_the_teacher_is_asked_once_for_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is packed the second time; without room for its states it is asked again."""
    policy, _ = tuned("lora")
    examples = documents(3, count=8, shared=MIN_PREFIX_AHEAD)
    for keep in (True, False):
        teacher = policy_of(tiny_model(seed=5))
        objective = distill(teacher, cache_teacher_states=keep)
        assert objective.cached_state_width() == (teacher.model.config.hidden_size if keep else 0)
        if keep:
            objective.open_state_cache()
        first = mean_loss(policy, objective, pack(examples, 10_000))
        asked: list[int] = []
        own = teacher.hidden_states
        monkeypatch.setattr(teacher, "hidden_states", lambda b, own=own, asked=asked: (asked.append(1), own(b))[1])
        again = mean_loss(policy, objective, pack(examples[::-1], 90))
        assert again == pytest.approx(first, abs=1e-5) and (not asked) == keep


def teacher_prompts(examples: Sequence[Example]) -> dict[int, NDArray[np.int32]]:
    """A prompt for each document: a common beginning of worked examples, then something of its own."""
    shared = np.arange(20, 20 + MIN_PREFIX_AHEAD, dtype=np.int32)
    return {id(e): np.concatenate([shared, [7 + i], e.ids[:3]]).astype(np.int32) for i, e in enumerate(examples)}


@pytest.mark.parametrize("kept", [False, True])
def test_a_teacher_behind_another_prompt_is_that_teacher_on_whole_documents(kept: bool) -> None:
    """Prompt distillation: the base itself, behind a longer prompt. However the step is packed, from the cache too."""
    policy, own = tuned("lora", "phi", dtype=torch.float64, rank=4)
    theirs, their_method = naive("lora", "phi", dtype=torch.float64, rank=4)
    plain = tiny_model("phi", dtype=torch.float64)
    plain.set_attn_implementation("sdpa")
    examples = documents(3, count=5, shared=MIN_PREFIX_AHEAD)
    prompts = teacher_prompts(examples)
    config = DistillConfig(teacher="base", teacher_sees={"shots": 2}, cross_entropy=0.25)  # type: ignore[arg-type]
    teacher = policy_of(tiny_model("phi", dtype=torch.float64))
    objective = DistillObjective(config, teacher, lambda document: prompts[id(document)])
    if kept:
        objective.open_state_cache()
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for e in examples:
        at = np.flatnonzero(e.supervised)
        answer = e.ids[at[0] :]
        taught_ids = torch.from_numpy(np.concatenate([prompts[id(e)], answer]).astype(np.int64))
        ids = torch.from_numpy(e.ids.astype(np.int64))
        s = theirs(ids[None], use_cache=False).logits[0][at - 1].log_softmax(-1)
        t = plain(taught_ids[None], use_cache=False).logits[0][at - at[0] + len(prompts[id(e)]) - 1].log_softmax(-1)
        nats = -s[torch.arange(len(at)), ids[at]]
        total = total + e.weight * (written_out("forward", t.detach(), s, 0.5) + 0.25 * nats).sum()
        weights += e.weight * len(at)
    (total / weights).backward()
    for batches in (pack(examples, 10_000), pack(examples[::-1], 90), pack_separately(examples)):
        policy.model.zero_grad()
        found = accumulate(policy, objective, batches)
        assert float(found) == pytest.approx((total / weights).item(), rel=FLOAT64)
        assert distance(gradients(own), gradients(their_method)) < FLOAT64
    # the mutation: a teacher that reads the student's prompt is the student before its first step
    blind = DistillObjective(config, teacher, lambda document: document.ids[: int(document.supervised.argmax())])
    assert mean_loss(policy, blind, pack(examples, 90)) != pytest.approx((total / weights).item(), rel=0.02)


def test_equal_documents_behind_two_prompts_have_two_teachers() -> None:
    """The student is asked the same closed-book question about two passages: cached states are not mixed up."""
    policy, _ = tuned("lora", "phi", dtype=torch.float64)
    examples = documents(1, count=1)
    examples = [replace(examples[0], row=i) for i in range(2)]
    prompts = teacher_prompts(examples)
    config = DistillConfig(teacher="base", teacher_sees={"shots": 2})  # type: ignore[arg-type]
    objective = DistillObjective(config, policy_of(tiny_model("phi", dtype=torch.float64)), lambda d: prompts[id(d)])
    apart = [mean_loss(policy, objective, pack([e], 100)) for e in examples]
    objective.open_state_cache()
    assert [mean_loss(policy, objective, pack([e], 100)) for e in examples] == pytest.approx(apart, rel=FLOAT64)
    assert apart[0] != pytest.approx(apart[1], rel=1e-3)


def test_heads_of_other_sizes_are_compared_over_the_smaller() -> None:
    policy, _ = tuned("lora")
    wide = tiny_model(seed=5, vocab_size=352)
    narrow = tiny_model(seed=6)
    with torch.no_grad():
        for name, value in narrow.state_dict().items():
            value.copy_(wide.state_dict()[name][: len(value)] if value.dim() else value)
    batches = pack(documents(2), 200)
    found = [mean_loss(policy, distill(policy_of(m)), batches) for m in (wide, narrow)]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_which_layers_a_student_takes() -> None:
    assert student_layers("every_other", 12) == (0, 2, 4, 7, 9, 11)  # those of DistilBERT
    assert student_layers("every_other", 30)[0] == 0 and student_layers("every_other", 30)[-1] == 29
    assert len(student_layers("every_other", 30)) == 15 and student_layers("every_other", 2) == (0,)
    assert student_layers("first", 4) == (0, 1) and student_layers("last", 5) == (3, 4)
    assert student_layers((1, 3), 4) == (1, 3)
    for wrong in ((3, 1), (0, 4), (), (0, 1, 2, 3)):
        with pytest.raises(ConfigError):
            student_layers(wrong, 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_student_computes_and_answers(shape: str) -> None:
    """Four layers become two: weights are the teacher's, packed equals alone, decoding equals reading."""
    layers = {"n_layer": 4} if shape == "gpt2" else {"num_hidden_layers": 4}
    model = tiny_model(shape, **layers)
    before = {n: p.clone() for n, p in model.named_parameters()}
    base = drop_layers(BaseModel(model, None, "tiny", "tiny", torch.float32), (1, 3))  # type: ignore[arg-type]
    policy = Policy(base, NoMethod())
    assert base.fingerprint != "tiny" and base.model.config.num_hidden_layers == 2
    for name, p in base.model.named_parameters():
        origin = name.replace("layers.1.", "layers.3.").replace("h.1.", "h.3.")
        origin = origin.replace("layers.0.", "layers.1.").replace("h.0.", "h.1.")
        assert torch.equal(p, before[origin]), name
    probe = [replace(e, row=-1) for e in documents(3, count=3, longest=8)]
    assert check_packing(policy, in_one_batch(probe)).state == check_decoding(policy, probe).state == "passed"


def test_layers_that_know_their_number() -> None:
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(PlanError, match="know their own number"):
        drop_layers(BaseModel(model, None, "tiny", "tiny", torch.float32), (0,))  # type: ignore[arg-type]


def test_slices_of_a_trainable_head_add_up_in_float32() -> None:
    """64 slices of entries, head and states in bfloat16, against float64: the bound is one bfloat16 product's 2^-8."""
    torch.manual_seed(0)
    n, vocabulary, width = 64 * ENTRIES_PER_SLICE, 24, 8
    h, other = torch.randn(n, width).bfloat16(), torch.randn(n, width).bfloat16()
    head, teacher_head = (nn.Linear(width, vocabulary).bfloat16() for _ in range(2))
    targets = DistillTargets(forward_kl, 1.0, torch.rand(n) + 0.5, torch.zeros(n, dtype=torch.long), None)
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        student = copy.deepcopy(head).to(dtype).requires_grad_()
        teacher = Distribution(other.to(dtype), copy.deepcopy(teacher_head).to(dtype), LogitTransform())
        distillation_loss(Distribution(h.to(dtype), student, LogitTransform()), teacher, targets).total.backward()
        gradients.append([student.weight.grad, student.bias.grad])
    for exact, ours in zip(*gradients, strict=True):
        assert float((ours.double() - exact).norm() / exact.norm()) < 2.0**-8
