"""Rung adapts a language model to a task, climbs only as high as the task needs, and proves each step.

    import rung

    run = rung.train("train.yaml")           # a YAML file, a mapping or a rung.RunConfig
    model = rung.load(run.path)
    print(model.answer("What changed?"))

Importing it is light: torch and transformers are loaded by the first call that computes. Every name below is looked up
in the module that defines it when it is first used; the command line calls the same functions.
"""

from __future__ import annotations

from importlib import import_module
from logging import ERROR, getLogger
from typing import TYPE_CHECKING, Any

from rung.errors import CheckpointError, ConfigError, DataError, GateError, PlanError, RungError

if TYPE_CHECKING:
    from rung.commands.climb import climb
    from rung.commands.compare import compare
    from rung.commands.evaluate import evaluate
    from rung.commands.forgetting import measure_forgetting
    from rung.commands.generate import GenerateRequest, generate
    from rung.commands.merge import merge
    from rung.commands.merge_adapters import FusePlan, fuse
    from rung.commands.plan import plan
    from rung.commands.train import train
    from rung.config.climb import ClimbConfig, OnTopConfig, RungConfig, SearchConfig
    from rung.config.data import DataConfig, WeightedPath
    from rung.config.evaluation import EvaluationConfig, RetrievalConfig
    from rung.config.io import load_config
    from rung.config.judge import JudgeConfig
    from rung.config.method import (
        BottleneckConfig,
        FullConfig,
        HeadConfig,
        LayerLotteryConfig,
        LoraConfig,
        LotteryConfig,
        MixtureConfig,
        PeftTunerConfig,
        PrefixConfig,
        PromptConfig,
        PTuningConfig,
        QloraConfig,
        VirtualTokenPositions,
    )
    from rung.config.model import ModelConfig
    from rung.config.objective import (
        AdaptiveKlConfig,
        DistillConfig,
        FunctionRewardConfig,
        GrpoConfig,
        ModelRewardConfig,
        PpoConfig,
        PpoStopConfig,
        PreferenceConfig,
        RegexRewardConfig,
        RewardConfig,
        RolloutConfig,
        SftConfig,
        VerifierConfig,
    )
    from rung.config.run import RunConfig
    from rung.config.training import OptimizerConfig, TrainingConfig
    from rung.console import Interrupted
    from rung.models.generate import Sampling
    from rung.planning.advise import Advice
    from rung.results import (
        ComparisonResult,
        Estimate,
        EvaluationResult,
        ForgettingComparison,
        FuseResult,
        GateResult,
        GenerationResult,
        Ladder,
        MergeResult,
        MetricComparison,
        RunResult,
    )
    from rung.runs.load import LoadedRun, load
    from rung.types import Message

__version__ = "0.1.0"
getLogger("bitsandbytes").setLevel(ERROR)  # which peft imports, and which misses kernels that it looks for on a hub

_MODULES = {
    "commands.climb": ("climb",),
    "commands.compare": ("compare",),
    "commands.evaluate": ("evaluate",),
    "commands.forgetting": ("measure_forgetting",),
    "commands.generate": ("GenerateRequest", "generate"),
    "commands.merge": ("merge",),
    "commands.merge_adapters": ("FusePlan", "fuse"),
    "commands.plan": ("plan",),
    "commands.train": ("train",),
    "config.climb": ("ClimbConfig", "OnTopConfig", "RungConfig", "SearchConfig"),
    "config.data": ("DataConfig", "WeightedPath"),
    "config.evaluation": ("EvaluationConfig", "RetrievalConfig"),
    "config.io": ("load_config",),
    "config.judge": ("JudgeConfig",),
    "config.method": (
        *("BottleneckConfig", "FullConfig", "HeadConfig", "LayerLotteryConfig", "LoraConfig", "LotteryConfig"),
        *("MixtureConfig", "PTuningConfig", "PeftTunerConfig", "PrefixConfig", "PromptConfig", "QloraConfig"),
        "VirtualTokenPositions",
    ),
    "config.model": ("ModelConfig",),
    "config.objective": (
        *("AdaptiveKlConfig", "DistillConfig", "FunctionRewardConfig", "GrpoConfig", "ModelRewardConfig"),
        *("PpoConfig", "PpoStopConfig", "PreferenceConfig", "RegexRewardConfig", "RewardConfig", "RolloutConfig"),
        *("SftConfig", "VerifierConfig"),
    ),
    "config.run": ("RunConfig",),
    "config.training": ("OptimizerConfig", "TrainingConfig"),
    "console": ("Interrupted",),
    "models.generate": ("Sampling",),
    "planning.advise": ("Advice",),
    "results": (
        *("ComparisonResult", "Estimate", "EvaluationResult", "ForgettingComparison", "FuseResult", "GateResult"),
        *("GenerationResult", "Ladder", "MergeResult", "MetricComparison", "RunResult"),
    ),
    "runs.load": ("LoadedRun", "load"),
    "types": ("Message",),
}
"""Module of each public name but the errors, which are imported above because they are light."""
_MODULE_OF = {name: f"rung.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [
    "AdaptiveKlConfig",
    "Advice",
    "BottleneckConfig",
    "CheckpointError",
    "ClimbConfig",
    "ComparisonResult",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DistillConfig",
    "Estimate",
    "EvaluationConfig",
    "EvaluationResult",
    "ForgettingComparison",
    "FullConfig",
    "FunctionRewardConfig",
    "FusePlan",
    "FuseResult",
    "GateError",
    "GateResult",
    "GenerateRequest",
    "GenerationResult",
    "GrpoConfig",
    "HeadConfig",
    "Interrupted",
    "JudgeConfig",
    "Ladder",
    "LayerLotteryConfig",
    "LoadedRun",
    "LoraConfig",
    "LotteryConfig",
    "MergeResult",
    "Message",
    "MetricComparison",
    "MixtureConfig",
    "ModelConfig",
    "ModelRewardConfig",
    "OnTopConfig",
    "OptimizerConfig",
    "PTuningConfig",
    "PeftTunerConfig",
    "PlanError",
    "PpoConfig",
    "PpoStopConfig",
    "PreferenceConfig",
    "PrefixConfig",
    "PromptConfig",
    "QloraConfig",
    "RegexRewardConfig",
    "RetrievalConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "RunResult",
    "RungConfig",
    "RungError",
    "Sampling",
    "SearchConfig",
    "SftConfig",
    "TrainingConfig",
    "VerifierConfig",
    "VirtualTokenPositions",
    "WeightedPath",
    "__version__",
    "climb",
    "compare",
    "evaluate",
    "fuse",
    "generate",
    "load",
    "load_config",
    "measure_forgetting",
    "merge",
    "plan",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rung' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
