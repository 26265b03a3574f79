"""`rung data check`: what a data file contains and what a model would see of it, before any training.

Only a tokenizer is loaded, never a model, so a check takes seconds; what depends on weights is not seen. The inspection
itself is in `data/check.py`; this file resolves what to inspect and renders the rows that are shown.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.text import Text

from rung.config.data import DataConfig
from rung.config.io import is_config_name, load_config
from rung.config.model import ModelConfig
from rung.console import StyledLine, plain
from rung.data.chat import ChatTemplate
from rung.data.check import colored_tokens, inspect_data
from rung.data.formats import naming_config, read_records
from rung.data.splits import weighted_paths
from rung.data.tokenize import TokenizeOptions, tokenize_records
from rung.errors import DataError


def check_data(file: str, *, show: int, model: str | None) -> tuple[dict[str, Any], list[str]]:
    """The report as JSON and as lines of text. If `file` is a config, its whole `data` section is checked.

    Lengths are in tokens if a model is named, in characters otherwise. `show` rows are printed with their supervised
    tokens colored. Raises `DataError` for a file that cannot be read at all.
    """
    base = ModelConfig(name=model) if model else None
    target: str | DataConfig = file
    if is_config_name(file):
        config = load_config(file).config
        target, base = config.data, base or config.model
    if show and base is None:
        # Supervised tokens can only be shown with some tokenizer; the default model's is as good as any.
        base = ModelConfig()
    chat = _chat_of(base) if base else None
    with naming_config("rung data check CONFIG.yaml", file) if isinstance(target, str) else nullcontext():
        report = inspect_data(target, chat)
    # Captured: the caller decides where the lines are printed.
    console = Console()
    with console.capture() as capture:
        console.print(report)
        if show and chat:
            for text in _colored_rows(target, chat, show):
                console.print(text)
    return report.to_json(), [StyledLine(line) for line in capture.get().removesuffix("\n").split("\n")]


def _chat_of(base: ModelConfig) -> ChatTemplate:
    from rung.models.load import (  # not at the top: torch and transformers take eight seconds
        load_end_ids,
        load_tokenizer,
    )

    return ChatTemplate.of_model(load_tokenizer(base), base, load_end_ids(base))


def _colored_rows(target: str | DataConfig, chat: ChatTemplate, count: int) -> list[Text]:
    """The first rows as text, with the supervised tokens colored."""
    config = target if isinstance(target, DataConfig) else DataConfig(path=target)
    chat = chat.with_control_tokens(config.control_tokens)
    records = read_records(config, weighted_paths(config)[0].path).records[:count]
    if not records:
        return []
    # The options of a training run, so that the colors show what would be learned.
    options: TokenizeOptions = {"loss_on": config.loss_on, "rejects": "drop"}
    options["with_candidates"] = records[0].score is not None
    try:
        tokenized = tokenize_records(chat, records, **options)
    # the report above names these rows
    except DataError:
        return []
    return [plain(f"{e.source}\n", "bold") + colored_tokens(e, chat) + plain("\n") for e in tokenized.examples]
