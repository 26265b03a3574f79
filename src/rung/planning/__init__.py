"""Estimates of a run's memory and time before it starts. Nothing here imports torch or reads weights."""
