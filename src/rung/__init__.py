"""Rung adapts a language model to a task, climbs only as high as the task needs, and proves each step.

Importing it stays light: torch and transformers come with the first call that computes.
"""

from logging import ERROR, getLogger

from rung.errors import CheckpointError, ConfigError, DataError, GateError, PlanError, RungError

__version__ = "0.1.0"
getLogger("bitsandbytes").setLevel(ERROR)  # which peft imports, and which misses kernels that it looks for on a hub
__all__ = ["CheckpointError", "ConfigError", "DataError", "GateError", "PlanError", "RungError", "__version__"]
