"""Rung adapts a language model to a task, climbs only as high as the task needs, and proves each step.

Importing it stays light: torch and transformers come with the first call that computes.
"""

from rung.errors import CheckpointError, ConfigError, DataError, GateError, PlanError, RungError

__version__ = "0.1.0"
__all__ = ["CheckpointError", "ConfigError", "DataError", "GateError", "PlanError", "RungError", "__version__"]
