"""Rung adapts a language model to a task, climbs only as high as the task needs, and proves each step.

    import rung

    run = rung.train("train.yaml")           # a YAML file, a mapping or a rung.RunConfig
    model = rung.load(run.path)
    print(model.answer("What changed?"))

Importing it is light: torch and transformers are loaded by the first call that computes. Every name below is looked up
in the module that defines it when it is first used; their types are in `__init__.pyi`. The command line calls the same
functions.
"""

from __future__ import annotations

from importlib import import_module
from logging import ERROR, getLogger
from typing import Any

from rung import errors as errors  # light, and `rung.errors.PlanError` works without a further import

__version__ = "0.1.0"
getLogger("bitsandbytes").setLevel(ERROR)  # which peft imports, and which misses kernels that it looks for on a hub

_MODULES = {
    "commands.climb": ("climb",),
    "commands.compare": ("compare",),
    "commands.evaluate": ("evaluate",),
    "commands.export": ("ExportRequest", "export"),
    "commands.export_gguf": ("GgufRequest",),
    "commands.forgetting": ("measure_forgetting",),
    "commands.generate": ("GenerateRequest", "generate"),
    "commands.merge": ("merge",),
    "commands.merge_adapters": ("FusePlan", "fuse"),
    "commands.plan": ("plan",),
    "commands.push": ("PushRequest", "push"),
    "commands.train": ("train",),
    "config.climb": ("ClimbConfig", "OnTopConfig", "RungConfig", "SearchConfig"),
    "config.code": ("CodeLimitsConfig",),
    "config.constitution": (
        *("ConstitutionConfig", "ConstitutionRunConfig", "PreferencesConfig", "PrincipleConfig"),
        *("RevisionFiltersConfig", "RevisionsConfig", "WriterConfig"),
    ),
    "config.data": ("DataConfig", "WeightedPath"),
    "config.evaluation": ("ChoicesConfig", "EvaluationConfig", "RetrievalConfig"),
    "config.io": ("load_config", "load_synth_config"),
    "config.judge": ("JudgeConfig",),
    "config.method": (
        *("BottleneckConfig", "FullConfig", "HeadConfig", "LayerLotteryConfig", "LoraConfig", "LotteryConfig"),
        *("MixtureConfig", "PTuningConfig", "PeftTunerConfig", "PrefixConfig", "PromptConfig", "QloraConfig"),
        "VirtualTokenPositions",
    ),
    "config.model": ("ModelConfig",),
    "config.objective": (
        *("AdaptiveKlConfig", "CodeRewardConfig", "DistillConfig", "FunctionRewardConfig", "GrpoConfig"),
        *("JudgeRewardConfig", "ModelRewardConfig", "PpoConfig", "PpoStopConfig", "PreferenceConfig"),
        *("RegexRewardConfig", "RewardConfig", "RolloutConfig", "SftConfig", "TeacherPromptConfig", "VerifierConfig"),
    ),
    "config.run": ("RunConfig",),
    "config.server": ("ModelServerConfig", "RolloutServerConfig"),
    "config.synth": (
        *(
            "DocumentsConfig",
            "ExamplesConfig",
            "FiltersConfig",
            "ImproveConfig",
            "ImproveRunConfig",
            "MakesConfig",
            "PriceConfig",
        ),
        *("SelectionConfig", "TeachConfig", "TeachRunConfig", "TeacherConfig"),
    ),
    "config.training": ("OptimizerConfig", "TrainingConfig"),
    "console": ("Interrupted",),
    "errors": ("CheckpointError", "ConfigError", "DataError", "GateError", "NoSignalError", "PlanError", "RungError"),
    "human_labels.result": ("label_result",),
    "labeling.run": ("LabelRequest", "PageRequest", "label"),
    "models.generate": ("Sampling",),
    "planning.advise": ("Advice",),
    "results.base": ("Estimate", "GateResult"),
    "results.evaluation": (
        *("ComparisonResult", "EvaluationResult", "ForgettingComparison"),
        *("GenerationResult", "HarnessResult", "MetricComparison"),
    ),
    "results.exports": ("ExportResult", "ExportedFile", "FuseResult", "MergeResult", "PushResult"),
    "results.labels": ("LabelResult",),
    "results.ladder": ("HumanPreference", "Ladder"),
    "results.synth": (
        *("ConstitutionResult", "CriticAgreement", "ImproveResult", "ImproveRound"),
        *("RevisionRound", "SynthCost", "SynthResult"),
    ),
    "results.training": ("RunResult",),
    "runs.load": ("LoadedRun", "load"),
    "serving.harness": ("HarnessRequest", "evaluate_tasks"),
    "synth.run": ("synthesize",),
    "types": ("Message",),
}
"""Module of each public name."""
_MODULE_OF = {name: f"rung.{module}" for module, names in _MODULES.items() for name in names}

__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rung' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
