"""Reward models against the formula written out, and against transformers' and peft's sequence classification."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from builders import policy_of, rows, tuned
from models import tiny_model
from naive import distance, gradients, naive, score
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import RewardConfig
from rung.evaluation.reward_model import calibration_error, reward_model_health, score_reward_model
from rung.methods.registry import attach_method
from rung.models.packing import MIN_PREFIX_AHEAD, pack, pack_separately
from rung.models.policy import Policy
from rung.objectives.pairs import correlation
from rung.objectives.reward import RewardObjective, ScoreHead
from rung.runs.reward_head import read_score_head, write_score_head
from rung.training.step import accumulate
from tolerances import FLOAT64


def reward(policy: Policy, **config: float) -> RewardObjective:
    objective = RewardObjective(RewardConfig(**config))
    objective.begin(policy, 3)
    return objective


@pytest.mark.parametrize(("answers", "shared"), [(2, 0), (2, MIN_PREFIX_AHEAD + 5), (4, 0)])
def test_loss_and_gradient_are_those_of_documents_alone(answers: int, shared: int) -> None:
    """All pairs of a row, their mean weighted by the row; margin by score difference; centering."""
    examples = rows(3, answers=answers, shared=shared)
    policy, method = tuned("lora", "phi", dtype=torch.float64, rank=4)
    theirs, their_method = naive("lora", "phi", dtype=torch.float64, rank=4)
    objective = reward(policy, margin=0.3, center_rewards_coefficient=0.05)
    weight = objective.head.weight.detach().clone().requires_grad_(True)
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for start in range(0, len(examples), answers):
        own = [score(theirs, weight, e) for e in examples[start : start + answers]]
        pairs = [(i, j) for i in range(answers) for j in range(i + 1, answers)]
        losses = [
            torch.log(1 + torch.exp(-(own[i] - own[j] - 0.3 * (j - i)))) + 0.05 * (own[i] + own[j]) ** 2
            for i, j in pairs
        ]
        total = total + examples[start].weight * sum(losses) / len(pairs)
        weights += examples[start].weight
    (total / weights).backward()
    for batches in (pack(examples, 10_000), pack(examples, 60), pack_separately(examples)):
        policy.model.zero_grad()
        objective.head.zero_grad()
        found = accumulate(policy, objective, batches)
        assert float(found) == pytest.approx((total / weights).item(), rel=FLOAT64)
        assert distance(gradients(method), gradients(their_method)) < FLOAT64
        assert torch.allclose(objective.head.weight.grad, weight.grad, rtol=0, atol=1e-9)


def test_a_score_knows_neither_its_batch_nor_its_place() -> None:
    policy, _ = tuned("lora")
    objective, examples = reward(policy), rows(5, count=6, answers=3, shared=MIN_PREFIX_AHEAD)
    with torch.no_grad():
        alone = {id(d): float(objective.scores(policy, b)[0]) for d in examples for b in pack_separately([d])}
        for batches in (pack(examples, 10_000), pack(examples[::-1], 70), pack_separately(examples)):
            for batch in policy.iterate_batches(batches):
                for document, found in zip(batch.documents, objective.scores(policy, batch).tolist(), strict=True):
                    assert found == pytest.approx(alone[id(document)], abs=1e-5)


def test_the_log_says_what_it_saw() -> None:
    policy, _ = tuned("lora")
    objective, examples = reward(policy), rows(5, count=8)
    (batch,) = pack(examples, 10_000)
    with torch.no_grad():
        objective.loss(policy, batch)
        scores = dict(zip(map(id, batch.documents), objective.scores(policy, batch).tolist(), strict=True))
    apart = np.array([scores[id(a)] - scores[id(b)] for a, b in zip(examples[::2], examples[1::2], strict=True)])
    longer = np.array([len(a) - len(b) for a, b in zip(examples[::2], examples[1::2], strict=True)])
    said = objective.take_metrics()
    assert said["accuracy"] == pytest.approx((apart > 0).mean())
    assert said["margin"] == pytest.approx(apart.mean(), abs=1e-6)
    assert said["length_correlation"] == pytest.approx(np.corrcoef(apart, longer)[0, 1], abs=1e-5)
    assert objective.take_metrics() == {}
    assert correlation(torch.ones(3).double(), torch.rand(3).double()) == 0.0


@pytest.mark.parametrize("shape", ["llama", "qwen2", "gpt2", "phi"])
def test_a_full_run_loads_as_sequence_classification(shape: str, tmp_path: Path) -> None:
    """Also where the head of the language model is its own: it stays behind."""
    model = tiny_model(shape)
    method = attach_method(model, METHOD_CONFIGS["full"](), seed=0)
    method.freeze_output_head()
    policy = policy_of(model, method)
    objective = reward(policy)
    assert method.declared_parameters() == sum(p.numel() for p in method.trainable().values())
    method.save(tmp_path)
    write_score_head(tmp_path, objective.published_head(), 0)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and theirs.config.num_labels == 1
    assert torch.equal(read_score_head(tmp_path), objective.published_head())
    _same_scores(policy, objective, theirs)


@pytest.mark.parametrize(
    ("kind", "config"),
    [("lora", {}), ("lora", {"init": "pissa"}), ("prompt", {"virtual_tokens": 4}), ("prefix", {"virtual_tokens": 4})],
)
def test_an_adapter_loads_as_sequence_classification(kind: str, config: dict[str, object], tmp_path: Path) -> None:
    policy, method = tuned(kind, **config)
    objective = reward(policy)
    method.save(tmp_path)
    write_score_head(tmp_path, objective.published_head(), 0)
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    theirs = PeftModelForSequenceClassification.from_pretrained(plain, tmp_path)
    # under a prompt transformers sees no ids, and takes the last place of a row for its last token
    _same_scores(policy, objective, theirs.eval(), padded=kind != "prompt")
    with torch.no_grad():  # the method reads its own part of the file and leaves the head alone
        before = {n: p.clone() for n, p in method.trainable().items()}
        for parameter in method.trainable().values():
            parameter.zero_()
        method.load(tmp_path)
    assert all(torch.allclose(p, before[n]) for n, p in method.trainable().items())
    assert torch.equal(read_score_head(tmp_path), objective.published_head())


def _same_scores(policy: Policy, objective: RewardObjective, theirs: PreTrainedModel, *, padded: bool = True) -> None:
    """In a batch padded on the right, as a server would."""
    examples = rows(5, count=3)[: None if padded else 1]
    longest = max(map(len, examples))
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, e in zip(ids, examples, strict=True):
        row[: len(e)] = torch.from_numpy(e.ids.astype(np.int64))
    mask = torch.tensor([[i < len(e) for i in range(longest)] for e in examples]).long()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).logits[:, 0]
        for e, value in zip(examples, expected.tolist(), strict=True):
            (batch,) = pack_separately([e])
            assert float(objective.scores(policy, batch)[0]) == pytest.approx(value, abs=1e-4)


def test_health_of_held_out_pairs() -> None:
    """Each verdict from scores made for it."""
    rng = np.random.default_rng(0)
    clusters = [str(i) for i in range(200)]

    def of(d: np.ndarray, longer: np.ndarray | None = None, scores: np.ndarray | None = None) -> str:
        n = rng.normal(size=len(d)) if longer is None else longer
        r = rng.normal(size=400) if scores is None else scores
        lengths = np.arange(len(r))
        return reward_model_health(d, n, clusters[: len(d)], r, lengths).verdict

    assert of(rng.normal(1.0, 1.0, 200)) == "healthy"
    assert of(np.tile([1.0, -1.0], 100)) == "unproven"
    assert of(rng.normal(-1.0, 1.0, 200)) == "broken"
    assert of(rng.normal(1.0, 1.0, 200), scores=np.full(400, 0.3)) == "broken"
    assert of(np.full(200, np.nan), scores=np.full(400, np.nan)) == "broken"
    d = rng.normal(1.0, 1.0, 200)
    assert of(d, longer=d, scores=np.arange(400.0)) == "length"
    assert of(np.ones(3)) == "unproven"


def test_calibration_error_by_hand() -> None:
    """Ninety per cent promised and kept is calibrated; promised and kept half the time is off by 0.4."""
    nine = math.log(9.0)
    kept = np.array([nine] * 9000 + [-nine] * 1000)
    assert calibration_error(np.random.default_rng(0).permutation(kept)) < 0.02
    one_bin = np.array([nine, -nine])
    assert calibration_error(np.tile(one_bin, 100)) == pytest.approx(0.4, abs=1e-6)


def test_examining_equals_scoring_one_by_one() -> None:
    policy, _ = tuned("lora")
    objective, examples = reward(policy), rows(9, count=40, shared=20)
    examples = [replace(e, group=str(e.row // 4)) for e in examples]
    health = score_reward_model(policy, objective, examples, 100)
    with torch.no_grad():
        own = [float(objective.scores(policy, b)[0]) for b in pack_separately([replace(e, row=-1) for e in examples])]
    right = [a > b for a, b in zip(own[::2], own[1::2], strict=True)]
    assert health.accuracy.mean == pytest.approx(np.mean(right)) and health.accuracy.clusters == 10
    assert health.spread == pytest.approx(np.std(own), rel=1e-4) and health.pairs == 40


def test_a_head_begins_as_drawn() -> None:
    policy = policy_of(tiny_model())
    first, again = ScoreHead.fresh(policy, 5), ScoreHead.fresh(policy, 5)
    assert torch.equal(first.weight, again.weight) and first.weight.shape == (1, 32)
    assert float(first.weight.detach().std()) == pytest.approx(33**-0.5, rel=0.5)
