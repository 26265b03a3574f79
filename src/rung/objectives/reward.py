"""Reward modeling: a scalar head on the last token of an answer learns to score better answers above others.

The loss compares pairs, so scores have no absolute level unless `center_rewards_coefficient` fixes it. The adapter and
head are published in the form of transformers' sequence classification. PPO and GRPO use the finished model as a judge.

Suffixes: D documents of a batch, P pairs, H width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from rung.config.objective import RewardConfig
from rung.models.policy import Policy
from rung.objectives.pairs import answer_pairs, correlation, soft_label_loss
from rung.objectives.protocol import Objective
from rung.types import Counts, LossTerm, PackedBatch


def bradley_terry(chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor) -> Tensor:
    """-log sigmoid(r_w - r_l - m) in nats [P] (Ouyang et al. 2022, eq. 1; the margin m: Touvron et al. 2023, eq. 2)."""
    return -F.logsigmoid(chosen_P - rejected_P - margin_P)


class ScoreHead(nn.Module):
    """A linear map of the last hidden state to one number, in float32 or wider."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    @staticmethod
    def fresh(policy: Policy, seed: int) -> ScoreHead:
        """A random head from N(0, 1 / (H + 1)) (Stiennon et al. 2020, appendix B.1)."""
        embeddings: Tensor = policy.model.get_input_embeddings().weight
        width, generator = embeddings.shape[1], torch.Generator().manual_seed(seed)
        # Drawn on the processor in float32, so that a seed gives the same head on every device and dtype.
        weight = torch.randn(1, width, generator=generator, dtype=torch.float32) / (width + 1) ** 0.5
        return ScoreHead(weight.to(policy.device, torch.promote_types(torch.float32, embeddings.dtype)))

    def forward(self, h: Tensor) -> Tensor:
        """[..., H] -> [...]."""
        # In bfloat16 close scores would become equal.
        with torch.autocast(h.device.type, enabled=False):
            return (h.to(self.weight.dtype) @ self.weight.T)[..., 0]


class RewardObjective(Objective):
    """Sum over rows of the mean loss of a row's pairs, each with the row's weight."""

    # The loss reads hidden states, so the output head stays frozen.
    compares_answers, min_answers, reads_head = True, 2, False
    config: RewardConfig
    head: ScoreHead

    def begin(self, policy: Policy, seed: int) -> None:
        """Create a random head."""
        self.head = ScoreHead.fresh(policy, seed)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The weight of the score head."""
        return {"score.weight": self.head.weight}

    def published_head(self) -> Tensor:
        """The weight of the score head."""
        return self.head.weight.detach()

    def count(self, batch: PackedBatch) -> Counts:
        """Weights of the rows, as pairs."""
        return Counts(sequences=float(batch.sequences), pairs=sum(answer_pairs(batch).weight))

    def scores(self, policy: Policy, batch: PackedBatch) -> Tensor:
        """Scores of every document, [D], on a log-odds scale: a difference of 1.1 is a preference of 3 to 1."""
        # The last token of a document is its stop token, if it has one.
        last_tokens = torch.tensor([int(positions[-1]) for positions in batch.rows], device=batch.ids.device)
        return self.head(policy.hidden_states(batch)[last_tokens])  # type: ignore[no-any-return]

    def loss(self, policy: Policy, batch: PackedBatch) -> list[LossTerm]:
        """One term of the pairs, and one that centers the scores if `center_rewards_coefficient` is above 0."""
        pairs, scores_D = answer_pairs(batch), self.scores(policy, batch)
        chosen_P, rejected_P = pairs.indices(scores_D.device)
        weight_P = scores_D.new_tensor(pairs.weight)
        data_scores = [document.score or 0.0 for document in batch.documents]
        # The margin grows with the difference of the data's scores: clear preferences need a larger gap.
        score_differences = [data_scores[a] - data_scores[b] for a, b in zip(pairs.chosen, pairs.rejected, strict=True)]
        chosen, rejected = scores_D[chosen_P], scores_D[rejected_P]
        margin_P = self.config.margin * scores_D.new_tensor(score_differences)
        losses_P = bradley_terry(chosen, rejected, margin_P)
        if (probability_P := pairs.soft_labels(scores_D)) is not None:
            # The margin is demanded of whichever answer is the better one.
            losses_P = soft_label_loss(losses_P, bradley_terry(rejected, chosen, margin_P), probability_P)
        tokens_D = torch.tensor([int(d.supervised.sum()) for d in batch.documents], device=scores_D.device)
        scores = {"chosen": chosen.detach(), "rejected": rejected.detach()}
        if metrics := pairs.of_preferred({**scores, "longer": tokens_D[chosen_P] - tokens_D[rejected_P]}):
            self.batch_metrics.append(metrics)
        terms = [LossTerm((losses_P * weight_P).sum(), "pairs", "bradley_terry")]
        if self.config.center_rewards_coefficient:
            # (r_w + r_l)^2: pairs leave the level of the scores free, this keeps it at 0 (Eisenstein et al. 2024).
            centering = ((chosen + rejected).square() * weight_P).sum()
            terms.append(LossTerm(self.config.center_rewards_coefficient * centering, "pairs", "centering"))
        return terms

    def summarize(self, metrics: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Of the pairs with a preferred answer: accuracy, scores, correlation of score and length differences."""
        margin = metrics["chosen"] - metrics["rejected"]
        return {
            "accuracy": float((margin > 0).double().mean()),
            "margin": float(margin.mean()),
            "chosen_score": float(metrics["chosen"].mean()),
            "rejected_score": float(metrics["rejected"].mean()),
            "length_correlation": correlation(margin, metrics["longer"]),
        }
