"""The command line: verbs parse, call once and print. Everything heavy is imported inside a verb."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rung import __version__
from rung.commands.exit_codes import exit_code_of, exit_process
from rung.errors import REFUSED, ConfigError, PlanError

app = typer.Typer(
    help="Adapt a language model to a task, climb only as high as the task needs, and prove each step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Look at data before anything is trained.", no_args_is_help=True)
models_app = typer.Typer(help="List the bases Rung knows by name, or bring one.", invoke_without_command=True)
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")

ConfigPath = Annotated[str, typer.Argument(help="A YAML config.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, for example training.epochs=2", metavar="[KEY=VALUE]...")
]
Run = Annotated[str, typer.Argument(help="A run folder, or the name of a base.", metavar="RUN")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run.")]


@models_app.callback()
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the bases Rung knows by name, with size and license."""
    if context.invoked_subcommand:
        return
    from rung.config.catalog import CATALOG
    from rung.models.download import base_folder

    rows = [{**b.model_dump(), "here": (base_folder(b) / "config.json").exists()} for b in CATALOG.values()]
    lines = [
        f"{r['name']:<16} {r['parameters'] / 1e6:.0f}M parameters  {r['license']:<11} "
        f"{r['download_bytes'] / 1e6:.0f} MB to download  {'here' if r['here'] else 'not fetched'}\n    {r['note']}"
        for r in rows
    ]
    _show({"models": rows}, [*lines, "Also: any transformers folder, GGUF file, run folder or hub id."], as_json)


@models_app.command()
def fetch(name: Annotated[str, typer.Argument(help="A name from: rung models")], as_json: AsJson = False) -> None:
    """Bring a base into the cache, verified and converted once."""
    from rung.config.catalog import CATALOG
    from rung.errors import did_you_mean

    if name not in CATALOG:
        near = did_you_mean(name, list(CATALOG))
        raise ConfigError(
            "no such base", given=name, allowed=", ".join(CATALOG), hint=f"did you mean {near}?" if near else None
        )
    from rung.models.download import download_base as bring

    path = bring(name)
    _show({"path": str(path)}, [f"{name} is in {path}"], as_json)


@data_app.command("check")
def data_check(
    file: Annotated[str, typer.Argument(help="A data file, a `datasets` name, or a config.", metavar="FILE")],
    show: Annotated[int, typer.Option("--show", help="Print this many rows with the supervised tokens colored.")] = 0,
    model: Annotated[str | None, typer.Option("--model", help="Count in tokens of this base.")] = None,
    as_json: AsJson = False,
) -> None:
    """Format, rows kept and rejected with reasons, lengths, duplicates, leakage. Exit 2 when a row is rejected."""
    from rung.commands.data_check import check_data

    report, lines = check_data(file, show=show, model=model)
    _show(report, lines, as_json)
    if report["rejected"]:
        raise typer.Exit(2)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    memory: Annotated[str | None, typer.Option("--memory", help="What there is, for example 24GiB.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="A known device, for example h100.")] = None,
    tokens: Annotated[
        float | None, typer.Option("--tokens", min=1, max=1e18, help="Tokens of an epoch, if known.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Memory and time of a run before anything is loaded, of every method, and what would make it fit.

    Exit 3 where the config's own method does not fit into --memory.
    """
    from rung.commands.plan import plan as make_plan
    from rung.report.plans import plan_lines

    advice = make_plan(config, overrides=overrides or (), memory=memory, device=device, tokens=tokens)
    _show(advice.to_json(), plan_lines(advice, config), as_json)
    if advice.plan.fits is False:
        raise typer.Exit(REFUSED)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop before the first step; write nothing.")] = False,
    beyond_memory: Annotated[
        bool, typer.Option("--beyond-memory", help="Start even what the plan says does not fit into memory.")
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
        prepared = preview(run_config)
        return _show(prepared, dry_run_lines(prepared), as_json)
    result = train_run(run_config, resume=resume, overwrite=overwrite, beyond_memory=beyond_memory)
    if result.report is not None:  # of several processes the first one speaks
        _show(result.to_json(), run_lines(result.to_json(), result.path, result.report), as_json)


@app.command()
def climb(
    config: ConfigPath, overrides: Overrides = None, overwrite: Overwrite = False, as_json: AsJson = False
) -> None:
    """Measure the rungs on one held-out test set, print the ladder, recommend. Goes on where it stands."""
    from rung.config.io import resolve_config

    run_config = resolve_config(config, overrides or ())  # before torch is imported: a config error is instant
    from rung.commands.climb import climb as run_climb
    from rung.report.tables import ladder_lines

    ladder = run_climb(run_config, overwrite=overwrite).to_json()
    _show(ladder, ladder_lines(ladder), as_json)


@app.command("eval")
def evaluate(
    target: Run,
    overrides: Overrides = None,
    config: Annotated[str | None, typer.Option("--config", help="The task; none is the run's own.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most this many test items.")] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="A run or a base: differences, and what evaluation.judge prefers.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="With a judge: where to write each pair, as jsonl.")
    ] = None,
    forgetting: Annotated[
        str | None, typer.Option("--forgetting", help="A data file or a config: what the run unlearned of it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a run, or a base, on a task's test split."""
    if output is not None and baseline is None:
        raise ConfigError(
            "pairs come of two systems", where="--output", given=output, hint="name the other: --baseline"
        )
    from rung.report.tables import comparison_lines, forgetting_lines, score_lines

    if forgetting is not None:
        if baseline is not None or config is not None:
            where = "--baseline" if baseline is not None else "--config"
            what = "what a run forgets is measured against its base, on the data of --forgetting"
            raise ConfigError(what, where=where, given=baseline or config)
        from rung.commands.forgetting import measure_forgetting

        forgotten = measure_forgetting(target, forgetting, limit=limit).to_json()
        return _show(forgotten, forgetting_lines(forgotten), as_json)
    if baseline is not None:
        from rung.commands.compare import compare

        compared = compare(
            target, baseline, config=config, overrides=overrides or (), limit=limit, output=output
        ).to_json()
        return _show(compared, comparison_lines(compared), as_json)
    from rung.commands.evaluate import evaluate as evaluate_target

    result = evaluate_target(target, config=config, overrides=overrides or (), limit=limit).to_json()
    _show(result, score_lines(result), as_json)


@app.command()
def chat(
    target: Run,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the base too, side by side.")] = False,
    question: Annotated[str | None, typer.Option("--question", help="Ask this and leave.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 256,
    system: Annotated[str | None, typer.Option("--system", help="A system turn.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="Of a run that learned something for each task.")] = None,
) -> None:
    """Talk to a run or a base. An empty line or Ctrl-D leaves; /new starts over."""
    from rung.commands.chat import Conversation
    from rung.models.generate import Sampling

    sampling = Sampling(max_new_tokens, temperature)
    Conversation(target, compare=compare, sampling=sampling, system=system, task=task).talk(question)


@app.command()
def generate(  # noqa: PLR0913 -- options of a command line, each named where it is given
    target: Annotated[str, typer.Argument(help="A run folder, a base, or the URL of a server.", metavar="RUN")],
    data: Annotated[str, typer.Option("--data", help="A data file: its prompts are answered.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the answers, as jsonl.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Answers to each prompt.")] = 4,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 256,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most this many prompts.")] = None,
    distinct: Annotated[bool, typer.Option("--distinct", help="Keep one of equal answers.")] = False,
    reward: Annotated[Path | None, typer.Option("--reward", help="A reward run that scores them, best first.")] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="A run or a base: how much likelier each answer is here, in nats.")
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="As data.format; prompt_only for rows without answers.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    model: Annotated[str | None, typer.Option("--model", help="Of a server: the model's name there.")] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", min=1, help="Of a server: requests at once, 8 unless set.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sample answers to the prompts of a file: to be ranked, scored, or learned from."""
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
    _show(result.to_json(), [line, f"mean of an answer: {means}"], as_json)


@app.command()
def merge(
    target: Run,
    folder: Annotated[Path, typer.Argument(help="Where to write the merged model.")],
    original: Annotated[
        bool, typer.Option("--original", help="Of a qlora run: onto the base as it was before it was quantized.")
    ] = False,
    by_shard: Annotated[
        bool, typer.Option("--by-shard", help="Tensor by tensor, as where the model does not fit into memory.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fold an adapter into its base and write a plain transformers model, checked in a fresh process."""
    from rung.commands.merge import merge as merge_run

    result = merge_run(Path(target), folder, "original" if original else "trained", by_shard=by_shard)
    lines = [f"merged into {folder}", f"{result.measure}: {result.difference:.2e}"]
    if original:
        lines.append(f"largest difference to the run on its quantized base: {result.moved_from_run:.2e}")
    _show(result.to_json(), lines, as_json)


@app.command()
def fuse(
    runs: Annotated[list[Path], typer.Argument(help="Runs of one base: LoRA adapters, or full runs of the layers.")],
    folder: Annotated[Path, typer.Option("--output", "-o", help="Where to write the fused run.")],
    how: Annotated[str, typer.Option(help="sum; or ties:0.2, dare:0.2, magnitude:0.2, the share they keep.")] = "sum",
    weights: Annotated[str | None, typer.Option(help="One for each run, as 0.7,0.3; none is 1 for each.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the result; none keeps a sum exact.")] = None,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
    learn: Annotated[str | None, typer.Option(help="A config whose training rows the weights are searched on.")] = None,
    as_json: AsJson = False,
) -> None:
    """Combine several runs of one base into one plain LoRA, on their true updates."""
    from rung.commands.merge_adapters import FusePlan, parse_method, parse_weights
    from rung.commands.merge_adapters import fuse as fuse_runs

    plan = FusePlan(*parse_method(how), parse_weights(weights), rank, seed, learn)
    result = fuse_runs(runs, folder, plan)
    shares = ", ".join(f"{run.name} {weight:g}" for run, weight in zip(runs, result.weights, strict=True))
    lines = [
        f"fused into {folder}: {shares}",
        f"lost to the rank of the result: {result.lost:.2%} of the update's norm",
    ]
    _show(result.to_json(), lines, as_json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run or climb folder.", metavar="RUN")], as_json: AsJson = False
) -> None:
    """Rebuild the HTML report of a run or a climb."""
    from rung.report.html import write_report

    path = write_report(folder)
    _show({"report": str(path)}, [str(path)], as_json)


@app.command()
def schema() -> None:
    """Print the JSON schema of a config, for editors."""
    from rung.config.run import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


@app.command()
def show(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved config and where each value came from."""
    from rung.config.io import config_to_dict, load_config
    from rung.config.io import describe_config as shown

    loaded = load_config(config, overrides or ())
    _show(
        {"config": config_to_dict(loaded.config), "origins": dict(loaded.origins)}, shown(loaded).splitlines(), as_json
    )


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rung {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Adapt a language model to a task, climb only as high as the task needs, and prove each step."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count not in ("", "1") and context.invoked_subcommand != "train":
        what = "a launcher started several processes: each would train for itself and write over the others"
        raise PlanError(what, where="WORLD_SIZE", given=count, hint="start rung by itself: only rung train is shared")


def main(arguments: list[str] | None = None) -> None:
    """Run a verb and leave with its exit code: 0, 2 input at fault, 3 refused, 1 a bug, 130 interrupted."""
    exit_process(_exit_code(sys.argv[1:] if arguments is None else arguments))


def _exit_code(arguments: list[str]) -> int:
    return exit_code_of(lambda: app(arguments, standalone_mode=False), as_json="--json" in arguments)


def _show(value: Any, lines: list[str], as_json: bool) -> None:
    """One JSON object, or lines for a person."""
    typer.echo(json.dumps(value, indent=2, default=str) if as_json else "\n".join(lines))
