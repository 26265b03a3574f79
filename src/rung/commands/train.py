"""`rung train`: one run from a config into its folder, with its report.

The work is in `runs/train.py`; this file is the one entry for the command line and for `rung.train`, so that both
resolve configs and report results in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rung.config.io import ConfigSource, resolve_config
from rung.report.html import write_report
from rung.results.training import PreviewResult, RunResult
from rung.runs.train import StartMode, dry_run, train_run
from rung.training.distributed import join_process_group


def train(
    config: ConfigSource,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    beyond_memory: bool = False,
) -> RunResult:
    """Train one run into the folder named by the config's `output`.

    `config` is a file, a mapping or a `RunConfig`; `overrides` are `key=value`, as on the command line. `resume`
    continues the run in the folder, `overwrite` replaces it, `beyond_memory` starts a run that does not fit by plan.
    Under torchrun every process calls this; the first one writes.

    Raises:
        ConfigError, DataError: the config or the data cannot be used.
        PlanError: the run does not fit, or the combination is not supported.
        CheckpointError: the folder holds another run, or is damaged.
        GateError: a gate failed.
    """
    run_config, start = resolve_config(config, overrides), StartMode(resume, overwrite, beyond_memory)
    with join_process_group() as world:
        manifest = train_run(run_config, start, world)
    # After the process group is left: the report needs no other process.
    report = str(write_report(Path(run_config.output))) if world.is_rank0 else None
    return RunResult.model_validate({**manifest, "path": run_config.output, "report": report})


def preview(config: ConfigSource, *, overrides: Sequence[str] = ()) -> PreviewResult:
    """Do everything up to the first step: data, model, preflight. Writes nothing."""
    return PreviewResult.model_validate(dry_run(resolve_config(config, overrides)))
