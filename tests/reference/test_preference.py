"""Preference losses against transformers, one document at a time, and against the formulas written out, in float64."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from builders import example, policy_of, rows, tuned
from models import tiny_model
from naive import distance, gradients, logprob, naive, written_out
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import PreferenceConfig
from rung.methods.registry import attach_method
from rung.models.packing import MIN_PREFIX_AHEAD, pack, pack_lazily, pack_separately
from rung.models.policy import sum_by_document
from rung.objectives.pairs import AnswerPairs, answer_pairs
from rung.objectives.preference import LOSSES, PairedPreference, PairLogprobs, UnpairedPreference, is_good_answer
from rung.objectives.registry import OBJECTIVES
from rung.training.step import accumulate, count_window, mean_loss
from rung.types import Example, PackedBatch
from tolerances import FLOAT64, LLAMA_GRADIENT

EXTRA = {"robust": {"label_smoothing": 0.2}}


def spec_of(loss: str, **more: object) -> PreferenceConfig:
    return PreferenceConfig(loss=loss, **{**EXTRA.get(loss, {}), **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [0, MIN_PREFIX_AHEAD + 5])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_are_those_of_documents_alone(loss: str, shared: int) -> None:
    examples, config = rows(3, shared=shared), spec_of(loss, beta=0.3)
    policy, method = tuned("lora", "phi", dtype=torch.float64, rank=4)
    theirs, their_method = naive("lora", "phi", dtype=torch.float64, rank=4)
    base = tiny_model("phi", dtype=torch.float64)
    base.set_attn_implementation("sdpa")
    free = loss in ("simpo", "orpo")
    total, weights, nats, tokens = torch.zeros((), dtype=torch.float64), 0.0, torch.zeros(()).double(), 0.0
    for chosen, rejected in zip(examples[::2], examples[1::2], strict=True):
        own = [logprob(theirs, e) for e in (chosen, rejected)]
        ratios = own if free else [a - logprob(base, e).detach() for a, e in zip(own, (chosen, rejected), strict=True)]
        lengths = [int(e.supervised.sum()) for e in (chosen, rejected)]
        total = total + chosen.weight * written_out(loss, *ratios, *lengths, 0.3)
        weights += chosen.weight
        nats, tokens = nats - chosen.weight * own[0], tokens + chosen.weight * lengths[0]
    expected = total / weights + (nats / tokens if loss == "orpo" else 0.0)
    expected.backward()
    for batches in (pack(examples, 10_000), pack(examples, 60), pack_separately(examples)):
        policy.model.zero_grad()
        found = accumulate(policy, PairedPreference(config), batches)
        assert float(found) == pytest.approx(expected.item(), rel=FLOAT64)
        assert distance(gradients(method), gradients(their_method)) < FLOAT64


def test_it_begins_at_ln_2_whatever_the_packing() -> None:
    """The reference is where the policy begins, so no pair leans either way."""
    model = tiny_model()
    policy = policy_of(model, attach_method(model, METHOD_CONFIGS["lora"](), seed=0))
    objective = PairedPreference(spec_of("dpo"))
    for batches in (pack(rows(), 10_000), pack(rows(), 50)):
        assert mean_loss(policy, objective, batches) == pytest.approx(math.log(2.0), abs=1e-6)
    assert objective.take_metrics()["margin"] == pytest.approx(0.0, abs=1e-6)


def test_another_reference_is_asked_instead_of_the_base() -> None:
    """With itself as the reference every pair stands at ln 2; with the base it does not."""
    policy, _ = tuned("lora")
    other, _ = tuned("lora")
    batches, objective = pack(rows(shared=MIN_PREFIX_AHEAD), 60), PairedPreference(spec_of("dpo"))
    assert abs(mean_loss(policy, objective, batches) - math.log(2.0)) > 1e-3
    policy.reference = other
    assert mean_loss(policy, objective, batches) == pytest.approx(math.log(2.0), abs=1e-6)


def test_all_pairs_of_a_ranking_and_none_of_a_tie() -> None:
    ranked = rows(1, count=3, answers=4)
    (batch,) = pack(ranked, 10_000)
    better, other, weight, probability = answer_pairs(batch)
    assert probability == [1.0] * len(better)
    assert len(better) == 3 * 6 and weight == [batch.documents[i].weight / 6 for i in better]
    score = [d.score for d in batch.documents]
    assert all(score[a] > score[b] for a, b in zip(better, other, strict=True))
    assert {batch.documents[a].row for a in better} == {0, 1, 2}
    tied = [replace(e, score=min(e.score, 2.0)) for e in ranked]
    # scores 4, 3, 2, 1 become 2, 2, 2, 1: three pairs a row
    assert len(answer_pairs(pack(tied, 10_000)[0]).chosen) == 3 * 3
    assert answer_pairs(pack([replace(e, score=0.0) for e in ranked], 10_000)[0]).chosen == []


@pytest.mark.parametrize("budget", [20, 60, 90, 300])
@pytest.mark.parametrize("answers", [2, 5])
def test_answers_of_a_row_are_never_parted(budget: int, answers: int) -> None:
    examples = rows(2, count=12, answers=answers, shared=20)
    for batches in (pack(examples, budget), list(pack_lazily(examples, budget)), pack_separately(examples)):
        seen: dict[int, PackedBatch] = {}
        for batch in batches:
            for document in batch.documents:
                assert seen.setdefault(document.row, batch) is batch
        assert sum(batch.sequences for batch in batches) == len(examples)


def test_a_prompt_is_computed_once_for_all_its_answers() -> None:
    examples = rows(2, count=1, answers=5)
    examples = [replace(e, ids=np.concatenate([np.arange(3, 43, dtype=np.int32), e.ids])) for e in examples]
    examples = [replace(e, supervised=np.concatenate([np.zeros(40, bool), e.supervised])) for e in examples]
    (batch,) = pack(examples, 10_000)
    prompt = int(examples[0].supervised.argmax())
    assert len(batch.ids) == prompt + sum(len(e) - prompt for e in examples)


def test_counts_and_the_sft_term() -> None:
    examples = rows(4, count=4, answers=3)
    (batch,) = pack(examples, 10_000)
    counts = count_window(PairedPreference(spec_of("dpo")), [batch])
    assert counts.pairs == pytest.approx(sum(e.weight for e in examples[::3]))
    assert counts.tokens == sum(e.weight * int(e.supervised.sum()) for e in examples[::3])
    policy, _ = tuned("lora")
    plain, mixed = (mean_loss(policy, PairedPreference(spec_of("dpo", sft=w)), [batch]) for w in (None, 0.5))
    nats = sum(-e.weight * float(logprob_of(policy, e)) for e in examples[::3]) / counts.tokens
    assert mixed - plain == pytest.approx(0.5 * nats, rel=1e-4)


def logprob_of(policy: object, e: Example) -> Tensor:
    return policy.logprobs(pack_separately([e])[0]).sum().detach()  # type: ignore[attr-defined]


def test_longer_answers_that_win_are_seen_in_the_log() -> None:
    """Twice as long and by that much likelier: the correlation says so."""
    objective = PairedPreference(spec_of("dpo"))
    lengths = torch.arange(1.0, 9.0)
    sides = PairLogprobs(2.0 * lengths, lengths, 2.0 * lengths, lengths)
    certain = AnswerPairs([*range(8)], [*range(8)], [1.0] * 8, [1.0] * 8)
    objective._record_batch(certain, sides, torch.zeros(8), torch.zeros(8))
    found = objective.take_metrics()
    assert found["length_ratio"] == pytest.approx(2.0) and found["length_correlation"] == pytest.approx(1.0)
    assert found["accuracy"] == 1.0 and objective.take_metrics() == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"loss": "robust"}, "needs label_smoothing"),
        ({"loss": "dpo", "label_smoothing": 0.1}, "is for loss: robust"),
        ({"loss": "dpo", "margin": 1.0}, "is for loss: simpo"),
        ({"loss": "dpo", "undesirable_weight": 2.0}, "is for loss: kto"),
        ({"loss": "simpo", "reference": "runs/x"}, "knows no reference"),
    ],
)
def test_settings_that_do_not_go_together(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PreferenceConfig(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [10_000, 60])
def test_rows_with_one_prompt_are_read_as_if_alone(budget: int) -> None:
    """Kept together, rows are not in the order of their tokens: neighbours say what is shared, not the ends."""
    prompt = list(range(3, 43))
    tails = [[7, 50, 51, 60], [9, 8], [7, 50, 51, 61], [7, 52, 90, 91, 92], [7, 50, 51, 60, 4], [200, 5, 6]]
    examples = [
        replace(example([*prompt, *tail], len(prompt), line=i // 2), row=i // 2, score=float(i % 2))
        for i, tail in enumerate(tails)
    ]
    policy, _ = tuned("lora", "gpt2", dtype=torch.float64)
    found, alone = ({}, {})
    for kept, batches in (
        (found, pack(examples, budget)),
        (alone, pack_separately([replace(e, row=-1) for e in examples])),
    ):
        for batch in batches:
            sums = sum_by_document(batch, policy.logprobs(batch).detach())
            kept.update({tuple(d.ids.tolist()): float(v) for d, v in zip(batch.documents, sums, strict=True)})
    assert found.keys() == alone.keys()
    assert all(found[key] == pytest.approx(alone[key], abs=1e-9) for key in found)


def test_what_is_good_without_labels_is_the_best_of_its_row() -> None:
    """Scores of a reward model may all lie below 0."""
    scores = [-1.2, -3.4, 0.0, -1.0, 1.0, 0.0]
    examples = [replace(e, score=scores[i]) for i, e in enumerate(rows(1, count=3))]
    (batch,) = pack(examples, 10_000)
    assert {d.score for d, g in zip(batch.documents, is_good_answer(batch), strict=True) if g} == {-1.2, 0.0, 1.0}
    labelled = [replace(e, row=i, score=float(i)) for i, e in enumerate(rows(2, count=1))]
    (batch,) = pack(labelled, 10_000)
    assert {(d.score, g) for d, g in zip(batch.documents, is_good_answer(batch), strict=True)} == {
        (0.0, False),
        (1.0, True),
    }


def test_the_sft_term_of_kto_is_a_mean_over_good_answers() -> None:
    examples = rows(4, count=4)
    policy, _ = tuned("lora")
    (batch,) = pack(examples, 10_000)
    plain, mixed = (mean_loss(policy, UnpairedPreference(spec_of("kto", sft=w)), [batch]) for w in (None, 0.5))
    best = examples[::2]
    tokens = sum(e.weight * int(e.supervised.sum()) for e in best)
    nats = sum(-e.weight * float(logprob_of(policy, e)) for e in best) / tokens
    assert mixed - plain == pytest.approx(0.5 * nats, rel=1e-4)


def test_odds_of_certain_answers_are_finite() -> None:
    certain = torch.zeros(3, requires_grad=True)
    loss = LOSSES["orpo"](
        PairLogprobs(certain, torch.full((3,), -1.0), torch.ones(3), torch.ones(3)), spec_of("orpo")
    ).sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(certain.grad).all()


def test_kto_is_that_of_documents_alone_with_mismatched_answers_as_the_reference_point() -> None:
    examples, config = rows(3), spec_of("kto", beta=0.3, undesirable_weight=1.5)
    policy, method = tuned("lora", "phi", dtype=torch.float64, rank=4)
    theirs, their_method = naive("lora", "phi", dtype=torch.float64, rank=4)
    base = tiny_model("phi", dtype=torch.float64)
    base.set_attn_implementation("sdpa")
    objective = UnpairedPreference(config)
    mixed = objective.kl_examples(examples)
    for i, e in enumerate(mixed):
        prompt, own = int(e.supervised.argmax()), examples[i]
        assert e.ids[:prompt].tolist() == own.ids[: int(own.supervised.argmax())].tolist()
        assert any(
            e.ids[prompt:].tolist() == o.ids[int(o.supervised.argmax()) :].tolist()
            for o in examples
            if o.row != own.row
        )
    with torch.no_grad():
        ratios = [logprob(theirs, e) - logprob(base, e) for e in mixed]
    point = max(0.0, float(torch.stack(ratios).mean()))
    terms, weights = [], 0.0
    for e in examples:
        above = 0.3 * (logprob(theirs, e) - logprob(base, e).detach() - point)
        bad = e.score < 2
        terms.append(e.weight * (1.5 if bad else 1.0) * (1 - 1 / (1 + torch.exp(above if bad else -above))))
        weights += e.weight
    expected = torch.stack(terms).sum() / weights
    expected.backward()
    for budget in (10_000, 60):
        policy.model.zero_grad()
        with torch.no_grad():
            objective.prepare(policy, policy.iterate_batches(pack(mixed, budget)))
        assert float(objective.reference_point) == pytest.approx(point, rel=FLOAT64, abs=1e-12)
        found = accumulate(policy, objective, pack(examples, budget))
        assert float(found) == pytest.approx(expected.item(), rel=FLOAT64)
        assert distance(gradients(method), gradients(their_method)) < FLOAT64
    report = objective.take_metrics()
    assert report["margin"] == pytest.approx(report["good_reward"] - report["bad_reward"])


def test_the_reference_reads_a_document_once_and_what_was_read_counts() -> None:
    """The mutation: kept sums that are changed change the loss, so they are what is used."""
    examples = rows(3, count=6, shared=MIN_PREFIX_AHEAD)
    policy, _ = tuned("lora")
    objective = PairedPreference(spec_of("dpo"))
    plain = mean_loss(policy, objective, pack(examples, 60))
    policy.reference_cache = {}
    calls = []
    genuine = policy.base_logprobs
    policy.base_logprobs = lambda batch: calls.append(1) or genuine(batch)  # type: ignore[method-assign]
    assert mean_loss(policy, objective, pack(examples, 60)) == pytest.approx(plain, rel=1e-6)
    first, kept = len(calls), dict(policy.reference_cache)
    assert len(kept) == len(examples)
    again = mean_loss(policy, objective, pack(examples, 10_000))
    assert again == pytest.approx(plain, rel=1e-5) and len(calls) == first and policy.reference_cache == kept
    policy.reference_cache = {key: value - 1.0 * (i % 2) for i, (key, value) in enumerate(kept.items())}
    assert abs(mean_loss(policy, objective, pack(examples, 60)) - plain) > 1e-3


TRL = {
    "dpo": {"loss_type": "sigmoid"},
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.2},
    "apo_zero": {"loss_type": "apo_zero"},
    "sigmoid_norm": {"loss_type": "sigmoid_norm"},
}
"""What TRL's trainer of pairs calls them."""


def test_losses_are_those_of_trl_on_the_same_logits(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, peers: Path
) -> None:
    """One batch, two models, six losses, in float64."""
    for name, seed in (("policy", 0), ("reference", 5)):
        tiny_model(seed=seed, dtype=torch.float64).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    examples = [replace(e, weight=1.0) for e in rows(3, count=4)]
    cut = [int(e.supervised.argmax()) for e in examples]
    pairs_of = [
        {"prompt_ids": a.ids[:p].tolist(), "chosen_ids": a.ids[p:].tolist(), "rejected_ids": b.ids[p:].tolist()}
        for a, b, p in zip(examples[::2], examples[1::2], cut[::2], strict=True)
    ]
    asked = {name: {**settings, "beta": 0.3} for name, settings in TRL.items()}
    job = {"policy": str(tmp_path / "policy"), "reference": str(tmp_path / "reference")}
    (tmp_path / "job.json").write_text(json.dumps({**job, "rows": pairs_of, "losses": asked}))
    script = Path(__file__).parents[1] / "peers" / "dpo_losses.py"
    subprocess.run([peers, script, tmp_path / "job.json", tmp_path / "told.json"], check=True, capture_output=True)
    theirs = json.loads((tmp_path / "told.json").read_text())
    policy = policy_of(tiny_model(dtype=torch.float64))
    policy.reference = policy_of(tiny_model(seed=5, dtype=torch.float64))
    batches = pack(examples, 10_000)
    for name in TRL:
        objective = OBJECTIVES["preference"](spec_of(name, beta=0.3))
        with torch.no_grad():
            assert mean_loss(policy, objective, batches) == pytest.approx(theirs[name], rel=LLAMA_GRADIENT), name
