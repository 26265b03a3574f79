"""What an action was worth above what was expected: against a group, or against a value model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
STD_EPSILON = 1e-4
"""Added to a group's standard deviation before it divides."""


def group_normalized_advantages(rewards_G: Floats) -> Floats:
    """(r - mean) / (standard deviation + 1e-4) (Shao et al. 2024, section 4.1.2)."""
    if rewards_G.max() == rewards_G.min():  # rounding would leave a little
        return np.zeros_like(rewards_G)
    std = float(rewards_G.std(ddof=1)) + STD_EPSILON
    return np.asarray((rewards_G - rewards_G.mean()) / std)


def mean_baseline_advantages(rewards_G: Floats) -> Floats:
    """R - mean: hard and easy prompts weigh what their rewards differ (Liu et al. 2025, section 3.2)."""
    is_constant = rewards_G.max() == rewards_G.min()
    return np.zeros_like(rewards_G) if is_constant else np.asarray(rewards_G - rewards_G.mean())


def leave_one_out_advantages(rewards_G: Floats) -> Floats:
    """R - mean of the others, an unbiased baseline (Ahmadian et al. 2024, eq. 7)."""
    n = len(rewards_G)
    if rewards_G.max() == rewards_G.min():
        return np.zeros_like(rewards_G)
    return np.asarray(rewards_G - (rewards_G.sum() - rewards_G) / (n - 1))


def generalized_advantage_estimates(rewards_T: Floats, values_T: Floats, gamma: float, decay: float) -> Floats:
    """Generalized advantage estimates of one answer, which ends after T tokens (Schulman et al. 2016, eq. 16).

    `values_T` is what was expected before each token. A_t = sum over l of (gamma decay)^l delta_(t+l), with
    delta_t = r_t + gamma V_(t+1) - V_t and nothing to expect after the end.
    """
    next_values = np.append(values_T[1:], 0.0)
    delta = rewards_T + gamma * next_values - values_T
    advantages = np.zeros_like(delta)
    advantage = 0.0
    for t in range(len(delta) - 1, -1, -1):
        advantage = float(delta[t]) + gamma * decay * advantage
        advantages[t] = advantage
    return advantages


def whiten(parts: list[Floats]) -> list[Floats]:
    """All values of all answers with mean 0 and variance 1; values that hardly vary become 0."""
    all_values = np.concatenate(parts)
    std = float(all_values.std())
    return [np.asarray((part - all_values.mean()) / (std + 1e-8)) for part in parts]
