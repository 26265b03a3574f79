"""Answers to held-out questions, scored item by item."""
