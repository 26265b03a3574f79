"""What stands beside saved weights, so that they are served as they were trained, and on the right base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import GenerationConfig

from rung.data.chat import Chat
from rung.engine.record import write_json
from rung.errors import CheckpointError
from rung.model.load import Base

ORIGIN = "rung.json"
"""Beside saved weights: base, fingerprint and template."""


def write_origin(target: Path, chat: Chat, base: Base) -> None:
    """What the weights stand on and were trained with, beside them: a copied folder still says it."""
    template = hashlib.sha256(chat.template.encode()).hexdigest()
    write_json(target / ORIGIN, {"base": base.name, "base_fingerprint": base.fingerprint, "template": template})


def check_origin(folder: Path, base: Base) -> None:
    """Refuse weights that name another base. Raises `CheckpointError`."""
    if not (folder / ORIGIN).exists():
        return
    origin = json.loads((folder / ORIGIN).read_text())
    if origin["base_fingerprint"] != base.fingerprint:
        raise CheckpointError(
            "this adapter was trained on another base",
            where=str(folder),
            given=f"{base.name}: {base.fingerprint[:16]}",
            allowed=f"{origin['base']}: {origin['base_fingerprint'][:16]}",
        )


def write_text_side(target: Path, chat: Chat) -> None:
    """Tokenizer, template and stop ids, so that a server frames text exactly as training did."""
    own = chat.tokenizer.chat_template
    chat.tokenizer.chat_template = chat.template
    try:
        chat.tokenizer.save_pretrained(target)
    finally:
        chat.tokenizer.chat_template = own
    pad = chat.tokenizer.pad_token_id
    config = GenerationConfig(eos_token_id=list(chat.stop_ids), pad_token_id=chat.stop_ids[0] if pad is None else pad)
    config.save_pretrained(target)
