"""Scoring: metrics, rewards, intervals, tests and the recommendation, as pure functions on text and numbers.

No model and no torch: scores of stored answers can be recomputed in milliseconds and tested against scipy.
"""
