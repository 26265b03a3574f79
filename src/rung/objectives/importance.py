"""Truncated importance weights: answers drawn by a server are learned from as answers of the policy.

The server computes with other kernels, and often another precision, than the policy: the same weights give other
probabilities. Without correction the gradient is that of a sampler which is not the policy. `training/rollout.py`
stores the log-ratios as a column of the documents; GRPO, its variants and PPO multiply their policy loss by weights.
"""

from __future__ import annotations

from torch import Tensor


def truncated_importance_weights(logratio: Tensor, cap: float) -> Tensor:
    """min(p_policy / p_sampler, C), without gradient (Yao et al. 2025; Espeholt et al. 2018, eq. 1, rho).

    `logratio` is log p_policy - log p_sampler in nats of each token, or of each answer, under the weights that the
    rollout was drawn with. Equal probabilities give 1.
    """
    # truncated from above alone: a large weight would let one token decide the step, a small one cannot
    return logratio.detach().exp().clamp(max=cap)


def importance_metrics(logratio: Tensor, cap: float) -> dict[str, float]:
    """Mean and largest ratio before truncation, and the share of truncated ones."""
    ratio = logratio.exp()
    truncated = float((ratio > cap).double().mean())
    return {
        "importance_ratio": float(ratio.mean()),
        "importance_ratio_max": float(ratio.max()),
        "importance_truncated": truncated,
    }
