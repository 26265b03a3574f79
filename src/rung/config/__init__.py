"""The typed configuration of a run: classes, defaults, validation, YAML reading and error messages.

No module here imports torch, so config errors and `rung show` are instant.
"""
