"""`rung data check`: what a file holds, before anything is trained on it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from rung.config.data import DataConfig
from rung.config.io import load_config
from rung.config.model import ModelConfig
from rung.data.chat import ChatTemplate
from rung.data.check import colored_tokens, inspect_data
from rung.data.formats import read_records
from rung.data.splits import weighted_paths
from rung.data.tokenize import tokenize_records
from rung.models.load import load_tokenizer


def check_data(file: str, *, show: int, model: str | None) -> tuple[dict[str, Any], list[str]]:
    """The report as JSON and as lines. `file` may be a config: then its whole `data` section is checked.

    Lengths are counted in tokens when a model is named, in characters otherwise. `show` rows are printed with their
    supervised tokens colored. Raises `DataError` for a file that cannot be read at all.
    """
    base = ModelConfig(name=model) if model else None
    target: str | DataConfig = file
    if file.endswith((".yaml", ".yml")):
        config = load_config(file).config
        target, base = config.data, base or config.model
    if show and base is None:
        base = ModelConfig()
    chat = ChatTemplate(load_tokenizer(base), base.template) if base else None
    report = inspect_data(target, chat)
    console = Console()
    with console.capture() as capture:
        console.print(report)
        if show and chat:
            for text in _colored_rows(target, chat, show):
                console.print(text)
    return report.to_json(), capture.get().splitlines()


def _colored_rows(target: str | DataConfig, chat: ChatTemplate, count: int) -> list[Text]:
    """The first rows as the model will see them."""
    config = target if isinstance(target, DataConfig) else DataConfig(path=target)
    records = read_records(config, weighted_paths(config)[0].path).records[:count]
    if not records:
        return []
    tokenized = tokenize_records(chat, records, loss_on=config.loss_on, with_candidates=records[0].score is not None)
    return [
        Text.assemble((f"{example.source}\n", "bold"), colored_tokens(example, chat), "\n")
        for example in tokenized.examples
    ]
