"""Files saved beside the weights, so that a model is served as it was trained, and on the right base.

Beside every adapter or model are its tokenizer, chat template and stop tokens, the fingerprint of its base, and the
token ids of a known conversation, which any server can be checked against. A few kilobytes replace a class of silent
errors: text that is framed differently from training (FAILURES 20). `runs/train.py`, `merge.py` and `merge_adapters.py`
write them, `runs/load.py` checks them. The parity check of gate 5 is here as well.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from rung.data.chat import ChatTemplate
from rung.errors import CheckpointError, GateError
from rung.models.base_model import BaseModel
from rung.training.gates import TOLERANCE
from rung.training.run_folder import Gate, read_json, write_json
from rung.types import Message

ORIGIN_FILE = "rung.json"
"""File with the base, its fingerprint and a hash of the template."""
KNOWN_PROMPT_FILE = "rung_prompt.json"
"""File with a conversation and its token ids."""
KNOWN_CONVERSATION = "What does it cost,  in 2024, for 12 of them: 3.50 or 42? Straße 7, 東京 🙂"
"""Digits, repeated spaces, and characters of one to four bytes: the places where tokenizers differ."""


def write_origin(target: Path, chat: ChatTemplate, base: BaseModel) -> None:
    """Write the base and template of the weights, so that a copied folder still names them."""
    template = hashlib.sha256(chat.template.encode()).hexdigest()
    write_json(target / ORIGIN_FILE, {"base": base.name, "base_fingerprint": base.fingerprint, "template": template})


def check_origin(folder: Path, base: BaseModel) -> None:
    """Raise `CheckpointError` for weights that were trained on another base."""
    # Without the file the fingerprint in `run.json` is still compared, by `check_fingerprint`.
    if not (folder / ORIGIN_FILE).exists():
        return
    origin = read_json(folder / ORIGIN_FILE)
    if origin["base_fingerprint"] != base.fingerprint:
        summary, given = "this adapter was trained on another base", f"{base.name}: {base.fingerprint[:16]}"
        allowed = f"{origin['base']}: {origin['base_fingerprint'][:16]}"
        raise CheckpointError(summary, where=str(folder), given=given, allowed=allowed)


def check_prompt(folder: Path, chat: ChatTemplate) -> None:
    """Raise `CheckpointError` if the known conversation gives other token ids than when the weights were saved."""
    if not (folder / KNOWN_PROMPT_FILE).exists():
        return
    known_prompt = read_json(folder / KNOWN_PROMPT_FILE)
    ids = chat.prompt_ids([Message(turn["role"], turn["content"]) for turn in known_prompt["messages"]])
    if ids != known_prompt["ids"]:
        summary = "text is framed otherwise here than in training"
        where = str(folder / KNOWN_PROMPT_FILE)
        hint = "another version of tokenizers or transformers? run.json has those of the run"
        raise CheckpointError(summary, where=where, given=ids, allowed=str(known_prompt["ids"]), hint=hint)


def pad_token_outside_stops(chat: ChatTemplate) -> int:
    """A token for padding that does not end an answer; the tokenizer's own pad token if possible."""
    tokenizer = chat.tokenizer
    # transformers' sequence classification reads the score off the last token that is not padding. If the stop token
    # were the padding, that would be the token before it (FAILURES 26).
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids, *range(len(tokenizer)))
    return next(int(i) for i in candidates if i is not None and i not in chat.stop_ids)


def write_tokenizer_files(target: Path, chat: ChatTemplate, pad_id: int | None = None) -> None:
    """Write tokenizer, template and stop ids, so that a server frames text as in training, and the known conversation.

    `pad_id` replaces the pad token of the tokenizer.
    """
    tokenizer = chat.tokenizer
    ids = chat.prompt_ids([Message("user", KNOWN_CONVERSATION)])
    write_json(target / KNOWN_PROMPT_FILE, {"messages": [{"role": "user", "content": KNOWN_CONVERSATION}], "ids": ids})
    # `save_pretrained` writes the tokenizer's own attributes, so they are set for the call and put back.
    original = tokenizer.chat_template, tokenizer.pad_token
    tokenizer.chat_template = chat.template
    if pad_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    try:
        tokenizer.save_pretrained(target)
    finally:
        tokenizer.chat_template, tokenizer.pad_token = original
    # `generate` needs some pad token; a stop token is transformers' own choice for tokenizers without one.
    pad = tokenizer.pad_token_id if pad_id is None else pad_id
    # a model that was just written has the sampling settings of its base there
    has_settings = (target / GENERATION_CONFIG_NAME).is_file()
    config = GenerationConfig.from_pretrained(target) if has_settings else GenerationConfig()
    config.eos_token_id, config.pad_token_id = list(chat.generation_stop_ids), chat.stop_ids[0] if pad is None else pad
    config.save_pretrained(target)


def saved_end_ids(folder: Path) -> tuple[int, ...]:
    """The end-of-text tokens in the generation config of a folder; none without one."""
    file = folder / GENERATION_CONFIG_NAME
    ids = read_json(file).get("eos_token_id") if file.is_file() else None
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (int(ids),)


LOGPROBS_SCRIPT = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=False).eval()
rows = json.load(sys.stdin)
with torch.no_grad():
    logprobs = [model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)[:-1] for ids in rows]
chosen = [p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist() for p, ids in zip(logprobs, rows)]
json.dump(chosen, sys.stdout)
"""


def logprobs_in_fresh_process(folder: Path, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Log-probabilities of all tokens but the first of each row, from plain transformers in a fresh process.

    Raises `GateError` if the model does not load there.
    """
    # A fresh process imports nothing of Rung, so no patched module or cached weight can make the check pass. The rows
    # go through stdin, since a command line limits their length.
    command = [sys.executable, "-W", "ignore", "-c", LOGPROBS_SCRIPT, str(folder)]
    text = json.dumps([list(row) for row in rows])
    process = subprocess.run(command, input=text, capture_output=True, text=True, check=False)  # noqa: S603 - our words
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise GateError("gate publish.parity failed: the written model does not load", where=str(folder), given=reason)
    return [torch.tensor(row) for row in json.loads(process.stdout)]


def check_parity(run_logprobs: Sequence[torch.Tensor], reloaded_logprobs: Sequence[torch.Tensor]) -> Gate:
    """The gate on the largest difference, in nats, between the log-probabilities of the run and the reloaded model."""
    largest = max(float((a.float() - b).abs().max()) for a, b in zip(run_logprobs, reloaded_logprobs, strict=True))
    return Gate.at_most("publish.parity", largest, TOLERANCE[torch.float32])
