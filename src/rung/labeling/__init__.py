"""The page on which people rank, compare, rate and correct answers, on top of `human_labels` and `web`."""
