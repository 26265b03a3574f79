"""The command line: each command parses its options, makes one call and prints the result.

Everything heavy is imported inside the commands, so that `rung --help`, `show` and config errors are instant; the price
is imports in functions. Results go to stdout, as lines for people or as one JSON object with --json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from rung import __version__
from rung.cli.label import label_app
from rung.cli.options import AsJson, show_result
from rung.commands.exit_codes import exit_code_of, exit_process
from rung.console import print_lines
from rung.errors import REFUSED, ConfigError, PlanError, did_you_mean

app = typer.Typer(
    help="Adapt a language model to a task, climb only as high as the task needs, and prove each step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # `exit_codes` reports errors
    rich_markup_mode=None,  # brackets in help texts are text
)
data_app = typer.Typer(help="Inspect data before training.", no_args_is_help=True)
models_app = typer.Typer(help="List known base models, or download one.", invoke_without_command=True)
synth_app = typer.Typer(help="Make training data with a model.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")
app.add_typer(synth_app, name="synth")
app.add_typer(label_app, name="label")

ConfigPath = Annotated[str, typer.Argument(help="YAML config file.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, for example training.epochs=2", metavar="[KEY=VALUE]...")
]
Run = Annotated[str, typer.Argument(help="Run folder, or name of a base model.", metavar="RUN")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0: greedy.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Delete the run in the output folder and start a new one.")
]


@models_app.callback()
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the base models that Rung knows by name, with size and license."""
    if context.invoked_subcommand:
        return
    from rung.config.model_catalog import CATALOG
    from rung.models.download import base_folder

    bases = [{**base.model_dump(), "here": base_folder(base) is not None} for base in CATALOG.values()]
    lines = [
        f"{base['name']:<16} {base['parameters'] / 1e6:,.0f}M parameters  {base['license']:<11} "
        f"{base['download_bytes'] / 1e6:,.0f} MB to download  {'here' if base['here'] else 'not fetched'}"
        f"\n    {base['note']}"
        for base in bases
    ]
    show_result({"models": bases}, [*lines, "Also: any transformers folder, GGUF file, run folder or hub id."], as_json)


@models_app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Name from the list of: rung models")], as_json: AsJson = False
) -> None:
    """Download a base model into the cache; verify its hash and convert it."""
    from rung.config.model_catalog import CATALOG
    from rung.models.download import download_base

    if name not in CATALOG:
        suggestion = did_you_mean(name, list(CATALOG))
        hint = f"did you mean {suggestion}?" if suggestion else None
        raise ConfigError("no such base", given=name, allowed=", ".join(CATALOG), hint=hint)
    path = download_base(name)
    show_result({"path": str(path)}, [f"{name} is in {path}"], as_json)


@data_app.command("check")
def data_check(
    file: Annotated[str, typer.Argument(help="Data file, `datasets` name, or config.", metavar="FILE")],
    show: Annotated[int, typer.Option(help="Print this many rows with supervised tokens in color.")] = 0,
    model: Annotated[str | None, typer.Option(help="Count tokens with the tokenizer of this base model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Report format, kept and rejected rows with reasons, lengths, duplicates and leakage.

    Exit code 2 if a row is rejected.
    """
    from rung.commands.data_check import check_data

    report, lines = check_data(file, show=show, model=model)
    show_result(report, lines, as_json)
    if report["rejected"]:
        raise typer.Exit(2)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    memory: Annotated[str | None, typer.Option(help="Available memory of each device, for example 24GiB.")] = None,
    device: Annotated[
        str | None, typer.Option(help="A known graphics card, for example h100, or cpu; default: that of this machine.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Processes, each on its own device.")] = 1,
    tokens: Annotated[float | None, typer.Option(min=1, max=1e18, help="Tokens per epoch, if known.")] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate memory and time of a run for every method, without loading a model, and advise what would fit.

    Exit code 3 if the method of the config does not fit.
    """
    from rung.commands.plan import plan as make_plan
    from rung.report.plans import plan_lines

    settings = overrides or ()
    advice = make_plan(config, overrides=settings, memory=memory, device=device, devices=devices, tokens=tokens)
    show_result(advice.to_json(), plan_lines(advice, config), as_json)
    if advice.plan.fits is False:
        raise typer.Exit(REFUSED)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in the output folder.")] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop before the first step and write nothing.")] = False,
    beyond_memory: Annotated[
        bool, typer.Option("--beyond-memory", help="Start even if the estimate exceeds the memory.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train one run."""
    from rung.config.io import resolve_config

    run_config = resolve_config(config, overrides or ())  # before torch is imported: a config error is instant
    from rung.commands.train import preview
    from rung.commands.train import train as train_run
    from rung.report.tables import dry_run_lines, run_lines

    if dry_run:
        preview_result = preview(run_config)
        return show_result(preview_result.to_json(), dry_run_lines(preview_result), as_json)
    result = train_run(run_config, resume=resume, overwrite=overwrite, beyond_memory=beyond_memory)
    if result.report is not None:  # with several processes only rank 0 prints
        show_result(result.to_json(), run_lines(result, result.path, result.report), as_json)


@app.command()
def climb(
    config: ConfigPath, overrides: Overrides = None, overwrite: Overwrite = False, as_json: AsJson = False
) -> None:
    """Measure the rungs on one held-out test set, print the ladder and recommend a rung. Resumes where it stopped."""
    from rung.config.io import resolve_config

    run_config = resolve_config(config, overrides or ())  # before torch is imported: a config error is instant
    from rung.commands.climb import climb as run_climb
    from rung.report.tables import ladder_lines

    ladder = run_climb(run_config, overwrite=overwrite)
    show_result(ladder.to_json(), ladder_lines(ladder), as_json)


@app.command("eval")
def evaluate(  # noqa: PLR0913 -- options of a command line, each named where it is given
    target: Run,
    overrides: Overrides = None,
    config: Annotated[str | None, typer.Option(help="Config of the task; default: that of the run.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of test items.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Run or base model to compare with, also by evaluation.judge if set.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="With a judge: jsonl file for the judged pairs.")
    ] = None,
    forgetting: Annotated[
        str | None, typer.Option(help="Data file or config: measure how much the run has forgotten on it.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas: asked in place of the test split.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="With --tasks: folder with task files.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="With --tasks: worked examples in a prompt.")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="With --tasks: prompts are turns of a conversation.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score a run or a base model on the test split of a task, or on public tasks."""
    if tasks is None and (include_path is not None or shots is not None or chat_template):
        where = "--include-path, --shots, --chat-template"
        raise ConfigError("these options are of public tasks", where=where, hint="--tasks NAMES")
    if tasks is not None:
        if overrides or config is not None or baseline is not None or output is not None or forgetting is not None:
            allowed = "--limit, --include-path, --shots, --chat-template"
            raise ConfigError("public tasks bring their own data", where="--tasks", given=tasks, allowed=allowed)
        return _evaluate_tasks(target, tasks, include_path, limit, shots, chat_template, as_json)
    if output is not None and baseline is None:
        summary = "pairs come of two systems"
        raise ConfigError(summary, where="--output", given=output, hint="name the other: --baseline")
    from rung.report.tables import comparison_lines, forgetting_lines, score_lines

    if forgetting is not None:
        # refused instead of ignored: forgetting has data and a baseline of its own
        if baseline is not None or config is not None:
            where = "--baseline" if baseline is not None else "--config"
            what = "what a run forgets is measured against its base, on the data of --forgetting"
            raise ConfigError(what, where=where, given=baseline or config)
        from rung.commands.forgetting import measure_forgetting

        change = measure_forgetting(target, forgetting, limit=limit)
        return show_result(change.to_json(), forgetting_lines(change), as_json)
    if baseline is not None:
        from rung.commands.compare import compare

        comparison = compare(target, baseline, config=config, overrides=overrides or (), limit=limit, output=output)
        return show_result(comparison.to_json(), comparison_lines(comparison), as_json)
    from rung.commands.evaluate import evaluate as evaluate_target

    result = evaluate_target(target, config=config, overrides=overrides or (), limit=limit)
    show_result(result.to_json(), score_lines(result), as_json)


@app.command()
def chat(
    target: Run,
    compare: Annotated[bool, typer.Option("--compare", help="Also show the answer of the base model.")] = False,
    question: Annotated[str | None, typer.Option(help="Answer this question and exit.")] = None,
    temperature: Temperature = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    task: Annotated[str | None, typer.Option(help="Task name, for runs with parameters per task.")] = None,
) -> None:
    """Chat with a run or a base model. An empty line or Ctrl-D exits; /new starts a new conversation."""
    from rung.commands.chat import Conversation
    from rung.models.generate import Sampling

    sampling = Sampling(max_new_tokens, temperature)
    Conversation(target, compare=compare, sampling=sampling, system=system, task=task).talk(question)


@app.command()
def serve(  # noqa: PLR0913 -- options of a command line, each named where it is given
    targets: Annotated[list[str], typer.Argument(help="Run folders or bases, chosen by `model`.", metavar="RUN...")],
    host: Annotated[str, typer.Option(help="Address to listen at; beyond this machine it needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    key: Annotated[
        str | None,
        typer.Option(help="Key that clients must send; better in RUNG_SERVE_KEY, which no process list shows."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Answers generated at once.")] = 16,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 429.")] = 128,
    cache: Annotated[int, typer.Option(min=1, help="MB for the keys and values of running answers.")] = 4096,
    prefix_cache: Annotated[int, typer.Option(min=0, help="MB for beginnings of earlier prompts.")] = 256,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="Type that bases compute in; a run has its own.")
    ] = "auto",
) -> None:
    """Serve runs and bases behind OpenAI's API, until it is stopped."""
    from rung.serving.run import ServeRequest
    from rung.serving.run import serve as serve_models

    limits = {"max_rows": rows, "max_waiting": waiting}
    limits |= {"cache_bytes": cache * 2**20, "beginnings_bytes": prefix_cache * 2**20}
    serve_models(targets, ServeRequest(host, port, key, **limits, dtype=dtype))


@app.command()
def generate(  # noqa: PLR0913 -- options of a command line, each named where it is given
    target: Annotated[str, typer.Argument(help="Run folder, base model, or URL of a server.", metavar="RUN")],
    data: Annotated[str, typer.Option(help="Data file with the prompts, or a config that says how it is read.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output jsonl file.")],
    n: Annotated[int, typer.Option(min=1, help="Answers per prompt.")] = 4,
    temperature: Temperature = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of prompts.")] = None,
    distinct: Annotated[bool, typer.Option("--distinct", help="Drop duplicate answers to a prompt.")] = False,
    reward: Annotated[Path | None, typer.Option(help="Reward run that scores the answers; best first.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Run or base model: log-ratio of each answer to it, in nats.")
    ] = None,
    format: Annotated[str, typer.Option(help="As data.format; prompt_only: rows without answers.")] = "auto",
    seed: Annotated[int, typer.Option(help="Sampling seed.")] = 0,
    model: Annotated[str | None, typer.Option(help="Server only: name of the model.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Server only: concurrent requests; default: 8.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sample answers to the prompts of a file, for ranking, scoring or training."""
    from rung.commands.generate import GenerateRequest, parse_format
    from rung.commands.generate import generate as generate_answers
    from rung.models.generate import Sampling

    sampling = Sampling(max_new_tokens, temperature, seed, n)
    request = GenerateRequest(sampling, limit, distinct, reward, reference, parse_format(format))
    result = generate_answers(target, data, output, request, model=model, concurrency=concurrency)
    line = f"{result.answers:,} answers to {result.prompts:,} prompts in {output}, {result.cut:,} of them cut"
    if result.nothing_to_compare:
        line += f"; {result.nothing_to_compare:,} prompts left out, whose answers score alike"
    means = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in result.means.items())
    show_result(result.to_json(), [line, f"mean of an answer: {means}"], as_json)


@synth_app.command()
def teach(
    config: Annotated[str, typer.Argument(help="YAML config file with a section synth.", metavar="CONFIG")],
    overrides: Overrides = None,
    preview: Annotated[
        int | None, typer.Option(min=1, help="Print so many rows and what each filter said; write nothing.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the rows of another config; replies in the journal stay.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Let a teacher write rows from seeds, documents or a description, and keep those that pass the filters.

    Exit code 3 if fewer rows were kept than the config asks for.
    """
    from rung.config.io import load_synth_config
    from rung.config.synth import TeachRunConfig
    from rung.synth.lines import preview_lines, synth_lines
    from rung.synth.teach import preview as preview_rows
    from rung.synth.teach import teach as teach_rows

    loaded = cast(TeachRunConfig, load_synth_config(config, overrides or (), verb="teach"))
    if preview is not None:
        rows, rejected = preview_rows(loaded, preview)
        show_result({"rows": rows, "rejected": rejected}, preview_lines(rows, rejected), as_json)
        return
    result = teach_rows(loaded, overwrite=overwrite)
    show_result(result.to_json(), synth_lines(result), as_json)
    if result.wanted is not None and result.rows < result.wanted:
        raise typer.Exit(REFUSED)


@synth_app.command()
def improve(
    config: Annotated[str, typer.Argument(help="YAML config file with a section synth.", metavar="CONFIG")],
    overrides: Overrides = None,
    preview: Annotated[
        int | None, typer.Option(min=1, help="Print the first model's answers to so many questions; write nothing.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a model on those of its own answers that a verifier accepts, round by round.

    The same command continues after a stop.
    """
    from rung.config.io import load_synth_config
    from rung.config.synth import ImproveRunConfig
    from rung.synth.improve import Improvement
    from rung.synth.improve import improve as improve_model
    from rung.synth.lines import improve_lines, sampled_lines

    loaded = cast(ImproveRunConfig, load_synth_config(config, overrides or (), verb="improve"))
    if preview is not None:
        sampled = Improvement(loaded).preview(preview)
        rows = [{"question": q.record.question, "answers": q.answers, "accepted": q.accepted} for q in sampled]
        show_result({"questions": rows}, sampled_lines(rows), as_json)
        return
    result = improve_model(loaded)
    show_result(result.to_json(), improve_lines(result), as_json)


@synth_app.command()
def constitution(
    config: Annotated[str, typer.Argument(help="YAML config file with a section synth.", metavar="CONFIG")],
    overrides: Overrides = None,
    preview: Annotated[
        int | None, typer.Option(min=1, help="Show rounds or comparisons of the first N answers; write no data set.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the rows of another config; replies in the journals stay.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Revise answers by written rules, or compare them by the rules, and write rows for training.

    Exit code 3 if the critic agrees with people no more than chance does.
    """
    from rung.config.constitution import ConstitutionRunConfig
    from rung.config.io import load_synth_config
    from rung.synth.constitution import constitution as revise
    from rung.synth.constitution import preview as preview_answers
    from rung.synth.lines import constitution_lines, revision_lines

    loaded = cast(ConstitutionRunConfig, load_synth_config(config, overrides or (), verb="constitution"))
    if preview is not None:
        answers = preview_answers(loaded, preview)
        show_result({"answers": answers}, revision_lines(answers), as_json)
        return
    result = revise(loaded, overwrite=overwrite)
    show_result(result.to_json(), constitution_lines(result), as_json)
    if result.critic is not None and not result.critic.trusted:
        raise typer.Exit(REFUSED)


@app.command()
def merge(
    target: Run,
    folder: Annotated[Path, typer.Argument(help="Output folder of the merged model.")],
    original: Annotated[
        bool, typer.Option("--original", help="qlora only: merge into the base before quantization.")
    ] = False,
    by_shard: Annotated[
        bool, typer.Option("--by-shard", help="Merge tensor by tensor, for models larger than memory.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base and write a transformers model, which is verified in a new process."""
    from rung.commands.merge import merge as merge_run

    result = merge_run(Path(target), folder, "original" if original else "trained", by_shard=by_shard)
    lines = [f"merged into {folder}", f"{result.measure}: {result.difference:.2e}"]
    if original:
        lines.append(f"largest difference to the run on its quantized base: {result.moved_from_run:.2e}")
    show_result(result.to_json(), lines, as_json)


@app.command()
def export(
    target: Run,
    folder: Annotated[Path, typer.Argument(help="Output folder, which must not exist.")],
    kind: Annotated[
        Literal["gguf", "ollama", "vllm", "merged"], typer.Option("--as", help="Form of the export.")
    ] = "gguf",
    types: Annotated[
        str | None,
        typer.Option("--type", help="Types of GGUF files: f32, f16, bf16, q8_0 (default), q6_k, q4_k_m, q4_0, ..."),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write only the LoRA, as a GGUF adapter for its base.")
    ] = False,
    measure: Annotated[
        int | None, typer.Option(min=1, help="Test questions that each GGUF file answers in llama.cpp.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run or a base for llama.cpp, Ollama, vLLM or transformers, with a model card, and prove the result."""
    from rung.commands.export import ExportRequest
    from rung.commands.export import export as export_run
    from rung.commands.export_gguf import GgufRequest
    from rung.report.tables import export_lines

    names = tuple(name.strip() for name in (types or "").split(","))
    is_given = types is not None or adapter or measure is not None
    gguf = GgufRequest(names if types is not None else (), adapter, measure) if is_given else None
    result = export_run(target, folder, ExportRequest(kind, gguf))
    show_result(result.to_json(), export_lines(result), as_json)


@app.command()
def push(
    target: Annotated[str, typer.Argument(help="Run folder, or folder of an export.", metavar="RUN")],
    repository: Annotated[str, typer.Argument(help="Name on the hub.", metavar="OWNER/NAME")],
    public: Annotated[bool, typer.Option("--public", help="Of a new repository; by default it is private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, print the card, send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send a run or an export to the Hugging Face hub, with a model card."""
    from rung.commands.push import PushRequest
    from rung.commands.push import push as push_target
    from rung.report.tables import push_lines

    result = push_target(target, repository, PushRequest(is_public=public, is_dry_run=dry_run))
    show_result(result.to_json(), push_lines(result), as_json)


@app.command()
def fuse(
    runs: Annotated[list[Path], typer.Argument(help="Runs of one base: LoRA adapters, or full fine-tuning runs.")],
    folder: Annotated[Path, typer.Option("--output", "-o", help="Output folder of the combined run.")],
    how: Annotated[
        str, typer.Option(help="sum, or ties:0.2, dare:0.2, magnitude:0.2 with the share of values kept.")
    ] = "sum",
    weights: Annotated[str | None, typer.Option(help="Weight per run, for example 0.7,0.3; default: 1 each.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the result; default: exact for a sum.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed for dare.")] = 0,
    learn: Annotated[str | None, typer.Option(help="Config: search the weights on its training rows.")] = None,
    as_json: AsJson = False,
) -> None:
    """Combine several runs of one base into one LoRA adapter, computed on their full updates."""
    from rung.commands.merge_adapters import FusePlan, parse_method, parse_weights
    from rung.commands.merge_adapters import fuse as fuse_runs

    plan = FusePlan(*parse_method(how), parse_weights(weights), rank, seed, learn)
    result = fuse_runs(runs, folder, plan)
    shares = ", ".join(f"{run.name} {weight:g}" for run, weight in zip(runs, result.weights, strict=True))
    lost = f"lost to the rank of the result: {result.lost:.2%} of the update's norm"
    show_result(result.to_json(), [f"fused into {folder}: {shares}", lost], as_json)


def _evaluate_tasks(
    target: str,
    tasks: str,
    include_path: Path | None,
    limit: int | None,
    shots: int | None,
    chat_template: bool,
    as_json: bool,
) -> None:
    from rung.report.tables import harness_lines
    from rung.serving.harness import HarnessRequest, evaluate_tasks

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise ConfigError("no task is named", where="--tasks", given=repr(tasks))
    request = HarnessRequest(names, include_path, limit, shots, chat_template)
    result = evaluate_tasks(target, request)
    show_result(result.to_json(), harness_lines(result), as_json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Run or climb folder.", metavar="RUN")], as_json: AsJson = False
) -> None:
    """Write the HTML report of a run or a climb again."""
    from rung.report.html import write_report

    path = write_report(folder)
    show_result({"report": str(path)}, [str(path)], as_json)


@app.command()
def schema() -> None:
    """Print the JSON schema of configs, for editors."""
    from rung.config.run import RunConfig

    print_lines([json.dumps(RunConfig.model_json_schema(), indent=2)])


@app.command()
def show(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved config with the origin of each value."""
    from rung.config.io import config_to_dict, describe_config, load_config

    loaded = load_config(config, overrides or ())
    value = {"config": config_to_dict(loaded.config), "origins": dict(loaded.origins)}
    show_result(value, describe_config(loaded).rstrip("\n").split("\n"), as_json)


def _version(requested: bool) -> None:
    if requested:
        print_lines([f"rung {__version__}"])
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Adapt a language model to a task, climb only as high as the task needs, and prove each step."""
    # before any command: torchrun starts this program once per process, and every other command writes as if alone
    process_count = os.environ.get("WORLD_SIZE", "1")
    if process_count not in ("", "1") and context.invoked_subcommand != "train":
        what = "a launcher started several processes: each would train for itself and write over the others"
        where = "WORLD_SIZE"
        raise PlanError(what, where=where, given=process_count, hint="start rung by itself: only rung train is shared")


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its code: 0 success, 1 bug, 2 wrong input, 3 refused, 130 interrupted."""
    exit_process(_exit_code(sys.argv[1:] if arguments is None else arguments))


def _exit_code(arguments: list[str]) -> int:
    # standalone_mode=False: click would print errors and exit by itself
    return exit_code_of(lambda: app(arguments, standalone_mode=False), as_json="--json" in arguments)
