"""Advantages: the reward of an action relative to a baseline, which is its group of answers or a value model.

Pure functions on numpy arrays in float64, tested against direct sums. Group baselines need several answers to each
prompt and no value model; `objectives/grpo.py` uses them, `objectives/ppo.py` the generalized estimates.

Suffixes: G answers of a group, T tokens of one answer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
STD_EPSILON = 1e-4
"""Added to a group's standard deviation, which may be near 0, before the division."""


def group_normalized_advantages(rewards_G: Floats) -> Floats:
    """(r - mean) / (standard deviation + 1e-4) (Shao et al. 2024, section 4.1.2)."""
    # Exactly 0 for equal rewards: r - mean leaves a rounding error, which the small divisor would magnify.
    if rewards_G.max() == rewards_G.min():
        return np.zeros_like(rewards_G)
    # The sample standard deviation, as in torch's `std` and TRL.
    std = float(rewards_G.std(ddof=1)) + STD_EPSILON
    return np.asarray((rewards_G - rewards_G.mean()) / std)


def mean_baseline_advantages(rewards_G: Floats) -> Floats:
    """R - mean, without the division that favors prompts with similar rewards (Liu et al. 2025, section 3.2)."""
    is_constant = rewards_G.max() == rewards_G.min()
    return np.zeros_like(rewards_G) if is_constant else np.asarray(rewards_G - rewards_G.mean())


def leave_one_out_advantages(rewards_G: Floats) -> Floats:
    """R - mean of the other answers, an unbiased baseline (Ahmadian et al. 2024, eq. 7)."""
    if rewards_G.max() == rewards_G.min():
        return np.zeros_like(rewards_G)
    return np.asarray(rewards_G - (rewards_G.sum() - rewards_G) / (len(rewards_G) - 1))


def generalized_advantage_estimates(rewards_T: Floats, values_T: Floats, gamma: float, decay: float) -> Floats:
    """Generalized advantage estimates of one answer, which ends after T tokens (Schulman et al. 2016, eq. 16).

    `values_T` is the value before each token. A_t = sum over l of (gamma decay)^l delta_(t+l), with
    delta_t = r_t + gamma V_(t+1) - V_t and V = 0 after the end.
    """
    delta = rewards_T + gamma * np.append(values_T[1:], 0.0) - values_T
    advantages, advantage = np.zeros_like(delta), 0.0
    # Backwards, by A_t = delta_t + gamma decay A_(t+1): linear in T.
    for t in range(len(delta) - 1, -1, -1):
        advantage = float(delta[t]) + gamma * decay * advantage
        advantages[t] = advantage
    return advantages


def whiten(parts: list[Floats]) -> list[Floats]:
    """Shift and scale the values of all answers together to mean 0 and variance 1; constant values become 0."""
    all_values = np.concatenate(parts)
    std = float(all_values.std())
    return [np.asarray((part - all_values.mean()) / (std + 1e-8)) for part in parts]
