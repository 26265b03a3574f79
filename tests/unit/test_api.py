"""The public API: what `import rung` gives, by name; that it is light, and that nothing imported later hides it."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import rung

PUBLIC = {
    "functions": [
        *(
            "climb",
            "compare",
            "evaluate",
            "evaluate_tasks",
            "export",
            "fuse",
            "generate",
            "load",
            "load_config",
            "measure_forgetting",
        ),
        *("label", "label_result", "load_synth_config", "merge", "plan", "push", "synthesize", "train"),
    ],
    "config classes": [
        *(
            "AdaptiveKlConfig",
            "BottleneckConfig",
            "ChoicesConfig",
            "ClimbConfig",
            "CodeLimitsConfig",
            "CodeRewardConfig",
        ),
        *("ConstitutionConfig", "ConstitutionRunConfig", "PreferencesConfig", "PrincipleConfig"),
        *("RevisionFiltersConfig", "RevisionsConfig", "WriterConfig"),
        *("DataConfig", "DistillConfig", "EvaluationConfig", "FiltersConfig"),
        *("FullConfig", "FunctionRewardConfig", "GrpoConfig", "HeadConfig", "JudgeConfig", "LayerLotteryConfig"),
        "JudgeRewardConfig",
        *("LoraConfig", "LotteryConfig", "MixtureConfig", "ModelConfig", "ModelRewardConfig", "OnTopConfig"),
        *("OptimizerConfig", "PTuningConfig", "PeftTunerConfig", "PpoConfig", "PpoStopConfig", "PreferenceConfig"),
        *(
            "DocumentsConfig",
            "ExamplesConfig",
            "ImproveConfig",
            "ImproveRunConfig",
            "MakesConfig",
            "PriceConfig",
            "SelectionConfig",
        ),
        *("TeachConfig", "TeachRunConfig", "TeacherConfig", "TeacherPromptConfig"),
        *("PrefixConfig", "PromptConfig", "QloraConfig", "RegexRewardConfig", "RetrievalConfig", "RewardConfig"),
        *("ModelServerConfig", "RolloutServerConfig"),
        *("RolloutConfig", "RunConfig", "RungConfig", "SearchConfig", "SftConfig", "TrainingConfig"),
        *("VerifierConfig", "VirtualTokenPositions", "WeightedPath"),
    ],
    "requests": [
        "ExportRequest",
        "FusePlan",
        "GenerateRequest",
        "GgufRequest",
        "HarnessRequest",
        "LabelRequest",
        "Message",
        "PageRequest",
        "PushRequest",
        "Sampling",
    ],
    "results": [
        *("Advice", "ComparisonResult", "Estimate", "EvaluationResult", "ExportResult", "ExportedFile"),
        *("ForgettingComparison", "FuseResult"),
        *(
            "GateResult",
            "GenerationResult",
            "HarnessResult",
            "HumanPreference",
            "LabelResult",
            "Ladder",
            "LoadedRun",
            "MergeResult",
            "MetricComparison",
            "PushResult",
            "RunResult",
        ),
        *("ConstitutionResult", "CriticAgreement", "RevisionRound"),
        *("ImproveResult", "ImproveRound", "SynthCost", "SynthResult"),
    ],
    "errors": [
        *("CheckpointError", "ConfigError", "DataError", "GateError", "Interrupted", "NoSignalError", "PlanError"),
        "RungError",
    ],
    "version": ["__version__"],
}
"""Every exported member. A name that is added or taken away is added or taken away here, on purpose."""


def test_every_exported_member_is_named_here() -> None:
    named = [name for names in PUBLIC.values() for name in names]
    assert sorted(named) == sorted(rung.__all__) and len(set(named)) == len(named)
    stub = ast.parse(Path(rung.__file__).with_suffix(".pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom) and node.module != "rung"]  # no modules
    typed = [alias.asname for node in imports for alias in node.names]
    assert sorted({*typed, "__version__"} - {None}) == sorted(rung.__all__), "__init__.pyi names other members"
    assert set(named) <= set(dir(rung))


@pytest.mark.parametrize("name", [n for kind, names in PUBLIC.items() for n in names if kind != "version"])
def test_every_exported_member_is_there_and_documented(name: str) -> None:
    member = getattr(rung, name)
    assert inspect.getdoc(member), f"rung.{name} has no docstring"
    assert member.__module__.startswith("rung.")


def test_errors_are_a_module_too() -> None:
    code = "import rung; assert rung.errors.PlanError is rung.PlanError"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_config_classes_are_exported() -> None:
    from rung.config.base import Config
    from rung.config.constitution import ConstitutionRunConfig
    from rung.config.run import RunConfig
    from rung.config.synth import ImproveRunConfig, TeachRunConfig

    def reachable(model: type[Config], seen: set[str]) -> set[str]:
        seen.add(model.__name__)
        pending = [field.annotation for field in model.model_fields.values()]
        while pending:
            annotation = pending.pop()
            if inspect.isclass(annotation) and issubclass(annotation, Config):
                if annotation.__name__ not in seen:
                    reachable(annotation, seen)
            else:
                pending.extend(getattr(annotation, "__args__", ()))
        return seen

    configs = (RunConfig, TeachRunConfig, ImproveRunConfig, ConstitutionRunConfig)
    classes = set().union(*(reachable(config, set()) for config in configs))
    assert classes == set(PUBLIC["config classes"])


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        rung.no_such_name  # noqa: B018


def test_importing_it_takes_under_a_tenth_of_a_second_and_no_torch() -> None:
    code = (
        "import sys, time; started = time.perf_counter(); import rung; seconds = time.perf_counter() - started; "
        "print(seconds, 'torch' in sys.modules)"
    )
    times = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, torch_loaded = done.stdout.split()
        times.append(float(seconds))
        assert torch_loaded == "False"
    assert min(times) < 0.1, times


def test_no_package_hides_a_public_function() -> None:
    """`import rung.plan.x` would bind `rung.plan` to a module: no package or module of the top carries such a name."""
    top = Path(rung.__file__).parent
    inside = {path.stem for path in top.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert not inside & set(PUBLIC["functions"])
    code = (
        "import rung, pkgutil, importlib\n"
        "for module in pkgutil.walk_packages(rung.__path__, 'rung.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        f"assert all(callable(getattr(rung, name)) for name in {PUBLIC['functions']})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
