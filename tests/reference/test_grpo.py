"""Group-relative policy optimization against the formulas written out, and answers against what they are drawn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from builders import documents, policy_of, rows, tuned
from models import tiny_model
from naive import distance, gradients, naive
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import GrpoConfig, RolloutConfig
from rung.methods.registry import attach_method
from rung.models.generate import GeneratedAnswer, Sampling, generate
from rung.models.packing import pack, pack_separately
from rung.models.policy import Policy
from rung.objectives.advantages import group_normalized_advantages, leave_one_out_advantages, mean_baseline_advantages
from rung.objectives.grpo import GrpoObjective, clipped_surrogate, kl_estimate
from rung.training.rollout import RolloutSource
from rung.training.step import accumulate
from rung.types import Example, Rollout
from tolerances import FLOAT64

REWARD = {"kind": "exact"}


def spec_of(loss: str = "grpo", *, answers: int = 3, **more: object) -> GrpoConfig:
    rollout = RolloutConfig(num_generations=answers, max_new_tokens=9, **more.pop("rollout", {}))  # type: ignore[arg-type]
    return GrpoConfig(loss=loss, reward=REWARD, rollout=rollout, **more)  # type: ignore[arg-type]


def test_advantages_by_hand() -> None:
    r = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    assert group_normalized_advantages(r) == pytest.approx((r - 0.6) / (np.sqrt(0.3) + 1e-4))
    assert mean_baseline_advantages(r) == pytest.approx(r - 0.6)
    assert leave_one_out_advantages(r) == pytest.approx([0.5, -0.75, -0.75, 0.5, 0.5])
    assert not group_normalized_advantages(np.ones(4)).any()


def test_clipping_by_hand() -> None:
    """A ratio beyond the clip no longer moves anything, where that would go further the same way."""
    ratio, advantage = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.1]).double(), torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    expected = [-0.5, 0.8, -1.2, 1.5, -2.2]
    assert clipped_surrogate(ratio.log(), advantage.double(), 0.2).tolist() == pytest.approx(expected)


def test_the_divergence_estimate_is_the_exact_sum() -> None:
    """Its mean under the policy, over a vocabulary of five, is the KL divergence."""
    random = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, generator=random, dtype=torch.float64).log_softmax(0) for _ in range(2))
    assert float((p.exp() * kl_estimate(p, q)).sum()) == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-12)
    assert bool((kl_estimate(p, q) >= 0).all())


def with_columns(examples: list[Example], seed: int, advantage: Callable[[int], float]) -> list[Example]:
    rng = np.random.default_rng(seed)
    made = []
    for i, e in enumerate(examples):
        old, reference = (-5.8 + 0.2 * rng.normal(size=e.predictions) for _ in range(2))
        own = {"advantage": np.full(e.predictions, advantage(i)), "old": old, "reference": reference}
        made.append(replace(e, columns=own))
    return made


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "rloo"])
def test_loss_and_gradient_are_those_of_documents_alone(loss: str) -> None:
    examples = with_columns(rows(3, count=4, answers=3), 1, lambda i: (-1.0) ** i * (0.5 + i))
    policy, method = tuned("lora", "phi", dtype=torch.float64, rank=4)
    theirs, their_method = naive("lora", "phi", dtype=torch.float64, rank=4)
    objective = GrpoObjective(spec_of(loss, beta=0.3))
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    apart = []
    for e in examples:
        ids = torch.from_numpy(e.ids.astype(np.int64))
        logits = theirs(ids[None], use_cache=False).logits[0].log_softmax(-1)
        at = torch.from_numpy(np.flatnonzero(e.supervised))
        lp = logits[at - 1, ids[at]]
        a, old, ref = (torch.from_numpy(e.columns[n]) for n in ("advantage", "old", "reference"))
        if loss == "rloo":
            ratio = torch.exp((lp - old).sum())
            own = -torch.minimum(ratio * a[0], ratio.clamp(0.8, 1.2) * a[0])
        else:
            ratio = torch.exp(lp - old)
            per_token = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
            per_token = per_token + 0.3 * (torch.exp(ref - lp) - (ref - lp) - 1)
            own = per_token.mean() if loss == "grpo" else per_token.sum() / 9
        total, weights = total + e.weight * own, weights + e.weight
        apart.append(lp - ref if loss == "rloo" else torch.exp(ref - lp) - (ref - lp) - 1)
    (total / weights).backward()
    for batches in (pack(examples, 10_000), pack(examples, 60), pack_separately(examples)):
        policy.model.zero_grad()
        found = accumulate(policy, objective, batches)
        assert float(found) == pytest.approx((total / weights).item(), rel=FLOAT64)
        assert distance(gradients(method), gradients(their_method)) < FLOAT64
    assert objective.take_metrics()["kl"] == pytest.approx(float(torch.cat(apart).detach().mean()), rel=1e-6)
    assert objective.take_metrics() == {}


def rollouts(
    policy: Policy, objective: GrpoObjective, worth: Callable[[GeneratedAnswer], float], seed: int = 0
) -> RolloutSource:
    def judge(documents: object, answers: list[GeneratedAnswer]) -> list[float]:
        return [worth(a) for a in answers]

    return RolloutSource(policy, objective, objective.config.rollout, (2,), judge, judge, seed, 200)  # type: ignore[arg-type]


def prompts(count: int = 4) -> list[Example]:
    return [replace(e, row=i, supervised=np.arange(len(e)) > 0) for i, e in enumerate(documents(3, count=count))]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("shape", ["llama", "gemma2"])
def test_what_is_drawn_is_what_is_scored(temperature: float, shape: str) -> None:
    """The decoder's log-probabilities are the loss's, softcap and temperature included; ratio 1, divergence 0."""
    model = tiny_model(shape)
    policy = policy_of(model, attach_method(model, METHOD_CONFIGS["lora"](), seed=0))
    objective = GrpoObjective(spec_of(rollout={"temperature": temperature, "num_iterations": 2}))
    source = rollouts(policy, objective, lambda a: float(len(a.ids)))
    asked = prompts()
    with source.sampling():
        examples, told = source.documents_for_step(asked, 0)
        assert told["rollout_seconds"] > 0 and len(examples) == 4 * 3
        seed = int(np.random.SeedSequence([0, 5, 0]).generate_state(1)[0])
        made = generate(
            policy,
            [p.ids.tolist() for p in asked],
            stop_ids=(2,),
            sampling=Sampling(9, temperature, seed, 3),
            batch_size=64,
        )
        for e, answer in zip(examples, made, strict=True):
            assert e.ids[-len(answer.all_tokens) :].tolist() == answer.all_tokens and e.predictions == len(
                answer.all_tokens
            )
            assert e.columns["old"] == pytest.approx(answer.logprobs, abs=1e-4)
            assert e.columns["reference"] == pytest.approx(answer.logprobs, abs=1e-4)
        accumulate(policy, objective, pack(examples, 200))
        told = objective.take_metrics()
    assert told["ratio"] == pytest.approx(1.0, abs=1e-4) and told["kl"] == pytest.approx(0.0, abs=1e-6)
    assert told["clipped"] == 0.0 and policy.logit_map.temperature == 1.0


def test_what_is_drawn_otherwise_than_scored_fails_its_gate() -> None:
    """The mutation: answers drawn at a temperature that the loss knows nothing of."""
    policy, _ = tuned("lora")
    source = rollouts(policy, GrpoObjective(spec_of(rollout={"temperature": 0.7})), lambda a: float(len(a.ids)))
    source.documents_for_step(prompts(), 0)  # outside source.sampling()
    assert source.gate is not None and source.gate.state == "failed"
    again = rollouts(policy, GrpoObjective(spec_of(rollout={"temperature": 0.7})), lambda a: float(len(a.ids)))
    with again.sampling():
        again.documents_for_step(prompts(), 0)
    assert again.gate is not None and again.gate.state == "passed"


def test_several_answers_read_their_prompt_once() -> None:
    policy, _ = tuned("lora")
    asked = [p.ids.tolist() for p in prompts()]
    seen: list[tuple[int, int]] = []
    hook = policy.model.model.layers[0].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])),
        with_kwargs=True,
    )
    many = generate(policy, asked, stop_ids=(), sampling=Sampling(5, answers_per_prompt=6), batch_size=24)
    hook.remove()
    encoding, decoding = seen[:-5], seen[-5:]
    assert decoding == [(6 * len(asked), 1)] * 5
    # the last token of a prompt goes through the model with its answers
    assert 0 < sum(rows * tokens for rows, tokens in encoding) <= sum(len(ids) - 1 for ids in asked)
    once = generate(policy, asked, stop_ids=(), sampling=Sampling(5), batch_size=24)
    assert [a.ids for a in many] == [a.ids for a in once for _ in range(6)]  # greedy: all the same
    drawn = generate(policy, asked, stop_ids=(), sampling=Sampling(5, 1.0, 3, 6), batch_size=24)
    assert len({tuple(a.ids) for a in drawn[:6]}) > 1
    assert [a.ids for a in generate(policy, asked, stop_ids=(), sampling=Sampling(5, 1.0, 3, 6), batch_size=24)] == [
        a.ids for a in drawn
    ]


def test_drawn_tokens_follow_their_distribution() -> None:
    """2,000 draws of one token against the exact probabilities, at a temperature."""
    policy, _ = tuned("lora")
    prompt = prompts(1)[0].ids.tolist()
    with torch.no_grad():
        logits = policy.model(torch.tensor([prompt])).logits[0, -1]
    p = torch.softmax(logits / 0.5, -1).numpy()
    drawn = generate(policy, [prompt], stop_ids=(), sampling=Sampling(1, 0.5, 1, 2000), batch_size=2000)
    counts = np.bincount([a.ids[0] for a in drawn], minlength=len(p))
    top = np.argsort(-p)[:20]
    expected = 2000 * p[top]
    statistic = float(((counts[top] - expected) ** 2 / expected).sum())
    assert statistic < 45.3  # the 99.9th percentile of chi-squared with 20 degrees of freedom


def test_minibatches_are_a_partition_and_the_source_begins_where_it_was() -> None:
    policy, _ = tuned("lora")
    objective = GrpoObjective(spec_of(rollout={"num_iterations": 2, "num_minibatches": 3}))
    source = rollouts(policy, objective, lambda a: float(len(a.ids)))
    with source.sampling():
        parts = [source.documents_for_step(prompts(5), step)[0] for step in range(6)]
        for epoch in (parts[:3], parts[3:]):
            found = [(d.source, d.ids.tobytes()) for part in epoch for d in part]
            assert len(found) == 15 and len({source for source, _ in found}) == 5
        assert all(len({d.source for d in part}) * 3 == len(part) for part in parts)  # groups stay whole
        again = rollouts(policy, objective, lambda a: float(len(a.ids)))
        assert all(
            np.array_equal(a.ids, b.ids)
            for a, b in zip(again.documents_for_step(prompts(5), 0)[0], parts[0], strict=True)
        )
        with pytest.raises(RuntimeError, match="first step"):
            rollouts(policy, objective, lambda a: 0.0).documents_for_step(prompts(5), 1)


def test_groups_without_a_lesson_are_counted() -> None:
    policy, _ = tuned("lora")
    objective = GrpoObjective(spec_of(beta=0.0, answers=2))
    examples = rows(1, count=4, answers=2)
    rewards = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    rollout = Rollout(examples, rewards, [True] * 7 + [False], lambda value: [])
    columns = objective.rollout_columns(policy, rollout)
    learned = [replace(e, columns=c) for e, c in zip(examples, columns, strict=True)]
    assert objective.has_signal(learned) and not objective.has_signal(learned[:4])
    accumulate(policy, objective, pack(learned, 500))
    told = objective.take_metrics()
    assert told["all_right"] == 0.25 and told["all_wrong"] == 0.5 and told["cut"] == pytest.approx(1 / 8)
    assert told["reward"] == pytest.approx(3 / 8) and "kl" not in told


def test_in_rloo_divergence_is_part_of_the_worth() -> None:
    """An answer further from the reference is worth beta nats less for each."""
    policy, _ = tuned("lora")
    objective, examples = GrpoObjective(spec_of("rloo", beta=0.5, answers=2)), rows(1, count=1, answers=2)
    read: dict[object, list[np.ndarray]] = {
        policy.logprobs: [np.full(e.predictions, -1.0) for e in examples],
        policy.reference_logprobs: [np.full(e.predictions, -1.0 - i) for i, e in enumerate(examples)],
    }
    columns = objective.rollout_columns(policy, Rollout(examples, [1.0, 1.0], [True, True], lambda value: read[value]))
    apart = 0.5 * examples[1].predictions
    assert columns[0]["advantage"][0] == pytest.approx(apart) and columns[1]["advantage"][0] == pytest.approx(-apart)
