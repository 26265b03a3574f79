"""`rung data check`: what a file holds, before anything is trained on it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from rung.config.data import DataSpec
from rung.config.io import load_config
from rung.config.model import ModelSpec
from rung.data.chat import Chat
from rung.data.check import check, coloured
from rung.data.formats import read_records
from rung.data.splits import weighted_paths
from rung.data.tokenize import tokenize_records
from rung.models.load import load_tokenizer


def check_data(file: str, *, show: int, model: str | None) -> tuple[dict[str, Any], list[str]]:
    """The report as JSON and as lines. `file` may be a config: then its whole `data` section is checked.

    Lengths are counted in tokens when a model is named, in characters otherwise. `show` rows are printed with their
    supervised tokens coloured. Raises `DataError` for a file that cannot be read at all.
    """
    base = ModelSpec(name=model) if model else None
    target: str | DataSpec = file
    if file.endswith((".yaml", ".yml")):
        spec = load_config(file).spec
        target, base = spec.data, base or spec.model
    if show and base is None:
        base = ModelSpec()
    chat = Chat(load_tokenizer(base), base.template) if base else None
    report = check(target, chat)
    console = Console()
    with console.capture() as captured:
        console.print(report)
        if show and chat:
            for text in _rows(target, chat, show):
                console.print(text)
    return report.to_json(), captured.get().splitlines()


def _rows(target: str | DataSpec, chat: Chat, count: int) -> list[Text]:
    """The first rows as the model will see them."""
    spec = target if isinstance(target, DataSpec) else DataSpec(path=target)
    records = read_records(spec, weighted_paths(spec)[0].path).records[:count]
    if not records:
        return []
    tokenised = tokenize_records(chat, records, loss_on=spec.loss_on, rivals=records[0].score is not None)
    return [
        Text.assemble((f"{example.source}\n", "bold"), coloured(example, chat), "\n") for example in tokenised.examples
    ]
