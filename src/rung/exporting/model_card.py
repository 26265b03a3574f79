"""The model card of an export: what was trained on what, what it scores and costs, and how each tool loads it.

Everything comes from the run's manifest and from what the export measured. What is not known is said in a sentence, so
that no card has an empty field. The YAML in front is huggingface_hub's, with the scores as `model-index`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from rung.config.model_catalog import CATALOG
from rung.planning.hub import is_hub_id
from rung.results.base import Estimate
from rung.results.exports import ExportedFile


@dataclass(frozen=True)
class CardFacts:
    """What a card says."""

    title: str
    base: str
    """Name of the base in the run's config."""
    manifest: Mapping[str, Any]
    """Of the run; empty for a base."""
    commands: Sequence[str]
    """How the export is used, one command a line with its reason after `#`."""
    files: Sequence[ExportedFile] = ()
    notes: Sequence[str] = ()
    base_license: str | None = None

    @property
    def scores(self) -> dict[str, Estimate]:
        """Scores of the run on its test split, by metric."""
        stored = self.manifest.get("metrics", {}).get("scores", {})
        return {name: Estimate.model_validate(score) for name, score in stored.items()}

    @property
    def license(self) -> str | None:
        """License of the base, where it is known."""
        known = CATALOG.get(self.base)
        return known.license if known is not None else self.base_license


def public_name(base: str) -> str:
    """A base as others know it: its id on the hub, or the name of its folder or file without the path."""
    known = CATALOG.get(base)
    if known is not None and known.hub_id is not None:
        return known.hub_id
    return base if is_hub_id(base) else Path(base).name


def model_card(facts: CardFacts) -> str:
    """The text of README.md; it names no folder of this machine but in its commands."""
    parts = [f"# {facts.title}", _origin(facts), *_trained(facts), *_scored(facts), *_written(facts)]
    parts += [_use(facts.commands), "## License", _license(facts)]
    return f"---\n{_data(facts)}\n---\n\n" + "\n\n".join(parts) + "\n"


def with_commands(card: str, title: str, commands: Sequence[str]) -> str:
    """A card with other commands, and the title of a repository."""
    name = title.partition("/")[2]
    head, _, rest = card.partition("\n# ")
    before, use, after = rest.partition("\n")[2].partition("## Use\n")
    if use:  # what an author wrote around the commands stays
        lead, _, rest = after.partition("```bash\n")
        before += f"{use}{lead}```bash\n" + "\n".join(commands) + "\n```" + rest.partition("\n```")[2]
    return f"{head}\n# {name}\n{before}"


def _use(commands: Sequence[str]) -> str:
    return "## Use\n\n```bash\n" + "\n".join(commands) + "\n```"


def _data(facts: CardFacts) -> str:
    base = public_name(facts.base)
    hub_id = base if is_hub_id(base) else None
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="private",
            dataset_name=_data_names(facts) or "test split of the run",
            dataset_split="test",
            metric_type=metric,
            metric_value=score.mean,
            metric_name=f"{metric} (95 % interval {score.low:.3f} to {score.high:.3f})",
        )
        for metric, score in facts.scores.items()
    ]
    options: dict[str, Any] = {"license": facts.license.lower() if facts.license else None, "base_model": hub_id}
    if results:
        options |= {"eval_results": results, "model_name": facts.title}
    tags = ["rung", *(["gguf"] if facts.files else [])]
    objective = facts.manifest.get("config", {}).get("objective", {}).get("kind")
    tag = "text-classification" if objective == "reward" else "text-generation"
    return str(ModelCardData(pipeline_tag=tag, tags=tags, **options).to_yaml()).strip()


def _origin(facts: CardFacts) -> str:
    base = public_name(facts.base)
    if not facts.manifest:
        return f"`{base}` as it is: nothing was trained."
    if runs := facts.manifest.get("fused_from"):
        how = facts.manifest.get("fused", {}).get("how", "sum")
        names = ", ".join(f"`{str(run).rpartition('/')[2]}`" for run in runs)
        return f"`{base}` with the updates of several runs combined ({how}): {names}."
    method = facts.manifest["config"]["method"]
    details = [f"rank {method['rank']}"] if "rank" in method else []
    objective = facts.manifest["config"]["objective"]["kind"]
    how = ", ".join([method["kind"], *details])
    return f"`{base}`, trained with {how} and the objective {objective}."


def _data_names(facts: CardFacts) -> str:
    sets = facts.manifest.get("data", {}).get("splits", {}).get("sets", [])
    return ", ".join(str(entry["path"]).rpartition("/")[2] for entry in sets)


def _trained(facts: CardFacts) -> list[str]:
    manifest = facts.manifest
    if not manifest:
        return []
    splits = manifest.get("data", {}).get("splits", {})
    rows = splits.get("train", {}).get("rows")
    names = _data_names(facts)
    lines = {
        "Data": f"{names}{f', {rows:,} rows' if rows else ''}" if names else None,
        "Steps": f"{manifest['steps']:,}" if manifest.get("steps") else None,
        "Tokens": f"{manifest['tokens']:,}" if manifest.get("tokens") else None,
        "Trained parameters": f"{manifest['trainable_parameters']:,}" if manifest.get("trainable_parameters") else None,
        "Validation loss": f"{loss:.4f} nats per token" if (loss := manifest.get("validation_loss")) else None,
        "Training time": f"{manifest['train_seconds']:,.0f} s" if manifest.get("train_seconds") else None,
        "Base, SHA-256": manifest.get("fingerprints", {}).get("base"),
        "Seed": str(manifest["config"].get("seed", 0)),
    }
    return ["## Training", _table(("", ""), [(name, value) for name, value in lines.items() if value])]


def _scored(facts: CardFacts) -> list[str]:
    if not facts.manifest:
        return []
    if not facts.scores:
        return ["## Scores", "The run was not scored on its test split before the export (`rung eval RUN` does it)."]
    metrics = facts.manifest["metrics"]
    rows = [
        (name, f"{score.mean:.3f}", f"{score.low:.3f} to {score.high:.3f}", f"{score.examples} in {score.clusters}")
        for name, score in facts.scores.items()
    ]
    table = _table(("metric", "mean", "95 % interval", "questions in clusters"), rows)
    tokens, seconds = metrics.get("prompt_tokens"), metrics.get("seconds_per_query")
    cost = (
        f"A query has {tokens:,.0f} tokens of prompt and took {seconds:.2f} s in batches." if tokens and seconds else ""
    )
    return ["## Scores", table, *([cost] if cost else [])]


def _written(facts: CardFacts) -> list[str]:
    if not facts.files:
        return list(facts.notes)
    metric = next((name for file in facts.files for name in file.scores), None)
    heads = ["file", "bytes", "stored as", "largest difference", "mean difference"]
    heads += [f"{metric}, 95 % interval", "to the run", "seconds a query"] if metric else []
    rows = []
    for file in facts.files:
        kinds = ", ".join(f"{name} {size / sum(file.kinds.values()):.0%}" for name, size in file.kinds.items())
        measured = [_number(file.largest_difference), _number(file.mean_difference)]
        if metric:
            score = file.scores[metric]
            measured += [_interval(score.after), _interval(score.difference), f"{file.seconds_per_query:.2f}"]
        rows.append((f"`{file.file}`", f"{file.bytes:,}", kinds, *measured))
    proof = "Differences are those of log-probabilities in llama.cpp to the run's own, in nats, on rows of its data."
    if any(file.gate.state == "not_reached" for file in facts.files):
        proof = (
            "These files were not compared with the run in llama.cpp when they were written, so nothing proves them."
        )
    tables = [
        f"`{file.file}`: {_number(file.table_difference)} nats to the run with GELU from ggml's table in float16."
        for file in facts.files
        if file.table_difference is not None
    ]
    return ["## Files", _table(heads, rows), proof, *tables, *facts.notes]


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2g}"


def _interval(score: Estimate) -> str:
    return f"{score.mean:.3f} ({score.low:.3f} to {score.high:.3f})"


def _license(facts: CardFacts) -> str:
    data = "The license of the training data is not recorded in a run; whoever publishes this model has to know it."
    base = public_name(facts.base)
    if facts.license is None:
        return f"The license of the base `{base}` is not recorded in its folder; it holds for this model too. {data}"
    return f"The base `{base}` is under {facts.license}, which holds for this model too. {data}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)
