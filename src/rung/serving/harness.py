"""`rung eval --tasks`: lm-evaluation-harness asks a run or base that is served for it.

The harness has hundreds of public tasks with prompts, filters and metrics that others compare by. It runs in a process
of its own (`lm_eval` of this environment, or the one on PATH) and asks `/v1/completions` of a server in this process,
behind a key that only the two have. It gets the tokenizer of the run, so that texts become the run's tokens. Scores and
standard errors are the harness's own; `cli` calls `evaluate_tasks`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rung.console import interruptible, print_status, status, terminable
from rung.errors import ConfigError, PlanError
from rung.files import is_run_folder
from rung.results.evaluation import HarnessResult, HarnessScore
from rung.runs.artifact import write_tokenizer_files
from rung.runs.load import config_of_run, refuse_climb, target_kind
from rung.serving.catalog import is_gguf_file
from rung.serving.run import ServeRequest, opened, require_installed
from rung.training.run_folder import RunFolder, read_manifest
from rung.web.server import QUIET, listen

if TYPE_CHECKING:
    from rung.data.chat import ChatTemplate
    from rung.serving.engine import Engine

CONCURRENT_REQUESTS = 8
REQUEST_SECONDS = 24 * 3600
"""The harness counts the time in the queue too."""
LAST_LINES = 3
"""Lines of the harness that an error shows."""
NAME = "model"
"""By which the harness asks: a path may hold what its options cannot."""


@dataclass(frozen=True)
class HarnessRequest:
    """What the harness is told."""

    tasks: tuple[str, ...]
    """Names of tasks or groups."""
    include_path: Path | None = None
    """Folder with task files of one's own."""
    limit: int | None = None
    """Items of each task."""
    shots: int | None = None
    """Worked examples in a prompt; by default as many as the task says."""
    uses_chat_template: bool = False
    """Whether a prompt is a turn of a conversation, in the form that the run was trained on."""


def evaluate_tasks(target: str | Path, request: HarnessRequest) -> HarnessResult:
    """Score a run or base on tasks of lm-evaluation-harness; a run keeps the scores in its folder and report.

    Raises `ConfigError` for a target that has no log-probabilities of prompts, `PlanError` where the harness or the
    server is not installed, and where the harness fails.
    """
    target = str(target)
    _require_scorable(target)
    require_installed()
    command = _harness_command()
    if request.include_path is not None and not request.include_path.is_dir():
        raise ConfigError("no folder is here", where="--include-path", given=request.include_path)
    key = secrets.token_urlsafe()
    start_time = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="rung-harness-") as scratch:
        folder = Path(scratch)
        with terminable(), _served(target, key) as (port, engine):
            chat, limit = engine.models[NAME].model.chat, engine.batches[NAME].max_tokens
            (folder / "tokenizer").mkdir()
            write_tokenizer_files(folder / "tokenizer", chat)
            options = _model_options(port, folder / "tokenizer", chat, limit)
            with status(f"lm-evaluation-harness asks {target}"):
                _run_harness([*command, *_arguments(request, options, folder / "out")], key, engine)
        result = _read_results(target, folder / "out", request)
    result = result.replace(seconds=time.perf_counter() - start_time)
    if is_run_folder(target):
        _store(Path(target), result)
    return result


def _require_scorable(target: str) -> None:
    """Raise `ConfigError` for a target whose prompts have no log-probabilities here."""
    refuse_climb(target)
    kind = target_kind(target)
    if kind == "server" or is_gguf_file(target):
        hint = "a run, or a base as a folder or by its name"
        raise ConfigError("--tasks needs the log-probabilities of prompts", given=target, allowed=hint)
    if kind == "run" and config_of_run(Path(target)).objective.kind == "reward":
        raise PlanError("a reward model gives scores and writes nothing", where=target)
    if kind == "run" and config_of_run(Path(target)).evaluation.context == "retrieved":
        print_status("the tasks are asked without retrieved passages, with which this run was trained")


def _harness_command() -> list[str]:
    if find_spec("lm_eval") is not None:
        return [sys.executable, "-m", "lm_eval"]
    if (found := shutil.which("lm_eval")) is not None:
        return [found]
    hint = "pip install 'rung[harness]', or 'lm-eval[api]' and transformers in an environment whose bin is on PATH"
    raise PlanError("lm-evaluation-harness is not installed", given="--tasks", hint=hint)


@contextmanager
def _served(target: str, key: str) -> Iterator[tuple[int, Engine]]:
    """A server of the target in a thread of this process: its port, and its engine, which is to compute."""
    import uvicorn

    from rung.serving.app import make_app

    request = ServeRequest(port=0, max_waiting=2**20)
    with listen(request.host, request.port) as listening, opened({NAME: target}, request) as (engine, _):
        server = uvicorn.Server(uvicorn.Config(make_app(engine, key=key), ws="none", **QUIET))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1], engine
        finally:
            server.should_exit = True
            thread.join()


def _model_options(port: int, tokenizer: Path, chat: ChatTemplate, limit: int) -> str:
    options = {
        "model": NAME,
        "base_url": f"http://127.0.0.1:{port}/v1/completions",
        "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "add_bos_token": chat.adds_bos,
        "max_length": limit,
        "num_concurrent": CONCURRENT_REQUESTS,
        "timeout": REQUEST_SECONDS,
        "max_retries": 1,
    }
    return ",".join(f"{name}={value}" for name, value in options.items())


def _arguments(request: HarnessRequest, options: str, output: Path) -> list[str]:
    arguments = ["run", "--model", "local-completions", "--model_args", options, "--tasks", ",".join(request.tasks)]
    arguments += ["--output_path", str(output), "--batch_size", "1"]
    if request.include_path is not None:
        arguments += ["--include_path", str(request.include_path)]
    if request.limit is not None:
        arguments += ["--limit", str(request.limit)]
    if request.shots is not None:
        arguments += ["--num_fewshot", str(request.shots)]
    return [*arguments, "--apply_chat_template"] if request.uses_chat_template else arguments


def _run_harness(command: Sequence[str], key: str, engine: Engine) -> None:
    """Run the harness, whose progress a terminal shows. Raises `PlanError` with its last words where it fails."""
    # it sends this key, and none that its user has for another server
    environment = {**os.environ, "OPENAI_API_KEY": key, "TOKENIZERS_PARALLELISM": "false"}
    environment["NO_PROXY"] = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1")))
    shows_progress = sys.stderr.isatty()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603 -- lm_eval
            command, env=environment, stdout=log, stderr=None if shows_progress else log, stdin=subprocess.DEVNULL
        )
        try:
            # a flag, not an exception: the engine and the locks of its threads are left as they should be
            with interruptible("once the harness has ended", process.terminate) as stop_requested:
                code = engine.compute_during(process.wait)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if stop_requested():
            raise KeyboardInterrupt
        if code:
            raise PlanError("lm-evaluation-harness failed", given=_last_words(log) or f"exit code {code}")


def _last_words(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
    errors = [line for line in lines if re.search(r"(error|exception)\b", line, re.IGNORECASE)]
    return " / ".join(dict.fromkeys((errors or [line for line in lines if line])[-LAST_LINES:]))


def _read_results(target: str, output: Path, request: HarnessRequest) -> HarnessResult:
    files = sorted(output.rglob("results_*.json"))
    if not files:
        raise PlanError("lm-evaluation-harness wrote no results", given=", ".join(request.tasks))
    found = json.loads(files[-1].read_text())
    scores = [score for task in found["results"] for score in _scores(found, task, request)]
    if not scores:
        raise PlanError("these tasks have no scores", given=", ".join(request.tasks))
    return HarnessResult(target=target, scores=tuple(scores))


def _scores(found: Mapping[str, Any], task: str, request: HarnessRequest) -> Iterator[HarnessScore]:
    """The scores of a task: its keys are `metric,filter`, and the standard error is `metric_stderr,filter`."""
    results = found["results"][task]
    for key, value in results.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = results.get(f"{metric}_stderr,{chosen}")
        yield HarnessScore(
            task=task,
            metric=metric,
            filter=chosen,
            uses_chat_template=request.uses_chat_template,
            limit=request.limit,
            harness_version=str(found.get("lm_eval_version", "unknown")),
            value=float(value),
            standard_error=float(error) if isinstance(error, int | float) else None,
            examples=found.get("n-samples", {}).get(task, {}).get("effective"),
            shots=found.get("n-shot", {}).get(task),
            task_version=str(found.get("versions", {}).get(task, "")),
            higher_is_better=found.get("higher_is_better", {}).get(task, {}).get(metric),
        )


def _store(run: Path, result: HarnessResult) -> None:
    """Keep the scores in the run, by task and form of the prompts, and write its report again."""
    from rung.report.html import write_report

    manifest = read_manifest(run)
    asked = {(score.task, score.uses_chat_template) for score in result.scores}
    kept = [score for score in manifest.get("harness", ()) if (score["task"], score["uses_chat_template"]) not in asked]
    RunFolder(run, manifest).update(harness=[*kept, *(score.to_json() for score in result.scores)])
    write_report(run)
