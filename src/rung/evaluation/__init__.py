"""Evaluation: prompts, answers and per-item scores of held-out questions; judges and reward models.

Everything here needs a model. What can be computed from stored answers and scores is in `rung.scoring`, without torch.
"""
