"""Turns rows into the same token ids for both sides: `python -m benchmarks.prepare WORK quick|whole FOLDER MODEL`.

Everything goes once through Rung's own path from row to ids. The peer gets the ids, the labels and the order of Rung's
steps; `prepared.json` says what each step must hold, so that either side can be checked against it.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.flops import Document, Flops, Trained, step_flops
from benchmarks.workloads import RANK, Answering, Training
from rung.config.io import load_config
from rung.config.model import ModelConfig
from rung.config.run import RunConfig
from rung.evaluation.prompting import PromptFormat
from rung.models.policy import NoMethod, Policy
from rung.objectives.reward import ScoreHead
from rung.planning.architecture import ModelShape, read_shape
from rung.runs.dataset import read_splits, tokenize_splits
from rung.runs.load import load_base_on_device, open_base
from rung.types import Example


def prepare_training(work: Training, folder: Path, model: Path) -> dict[str, Any]:
    """Write `peer.jsonl` in the order of the steps; return what each step holds."""
    config = load_config(str(folder / "train.yaml")).config
    steps = _steps(config, work.epochs)
    with (folder / "peer.jsonl").open("w") as lines:
        lines.writelines(json.dumps(_PEER_ROWS[work.objective](row)) + "\n" for step in steps for row in step)
    if work.objective == "reward":  # drawn by each side for itself it would be another
        head = ScoreHead.fresh(Policy(load_base_on_device(config.model), NoMethod()), config.seed)
        (folder / "head.json").write_text(json.dumps(head.weight.tolist()))
    shape = read_shape(ModelConfig(name=str(model)))
    trained = Trained(None) if work.method == "full" else Trained(RANK, min(work.layers or (0,)))
    first = len(steps) // work.epochs
    return {
        "steps": [_step(step, work, shape, trained, first_epoch=i < first) for i, step in enumerate(steps)],
        "longest": max(len(example) for step in steps for row in step for example in row),
    }


def prepare_answering(work: Answering, folder: Path) -> dict[str, Any]:
    """Prompt ids with the first rows as worked examples in front of every question."""
    config = load_config(str(folder / "train.yaml")).config
    records = read_splits(config).train
    chat = open_base(config.model).chat
    framing = PromptFormat(shots=tuple(records[: work.shots]))
    pad = chat.tokenizer.pad_token_id
    return {
        "prompts": [chat.prompt_ids(framing.turns(record)) for record in records[work.shots :]],
        "stop_ids": list(chat.stop_ids),
        "answers": work.answers,
        "seed": work.seed,
        "pad_id": chat.stop_ids[0] if pad is None else pad,
    }


def _steps(config: RunConfig, epochs: int) -> list[list[list[Example]]]:
    """The rows of every step: Rung draws a new order in each epoch, from the seed and the epoch's number."""
    splits = read_splits(config)
    rows = tokenize_splits(config, splits, load_base_on_device(config.model)).train.rows
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([config.seed, epoch]).permutation(len(rows))
        size = config.training.examples_per_step
        steps += [[list(rows[i]) for i in order[at : at + size]] for at in range(0, len(order), size)]
    return steps


def _labelled(row: list[Example]) -> dict[str, list[int]]:
    (example,) = row
    labels = np.where(example.supervised, example.ids, -100)
    return {"input_ids": example.ids.tolist(), "labels": labels.tolist()}


def _prompted(row: list[Example]) -> dict[str, list[int]]:
    chosen, rejected = row
    prompt = int(chosen.supervised.argmax())
    ids = {"prompt_ids": chosen.ids[:prompt], "chosen_ids": chosen.ids[prompt:], "rejected_ids": rejected.ids[prompt:]}
    return {name: part.tolist() for name, part in ids.items()}


def _compared(row: list[Example]) -> dict[str, list[int]]:
    return {"chosen_ids": row[0].ids.tolist(), "rejected_ids": row[1].ids.tolist()}


_PEER_ROWS: dict[str, Callable[[list[Example]], dict[str, list[int]]]] = {
    "sft": _labelled,
    "preference": _prompted,
    "reward": _compared,
}
"""A row as the peer's trainer takes it, already tokenized."""


def _step(
    rows: list[list[Example]], work: Training, shape: ModelShape, trained: Trained, *, first_epoch: bool
) -> dict[str, Any]:
    examples = [row[place] for place in range(len(rows[0])) for row in rows]  # better answers first, as the peer does
    documents = [Document(tuple(e.ids.tolist()), tuple(e.supervised.tolist())) for e in examples]
    joined = np.concatenate([e.ids for e in examples]).astype(np.int64)

    def flops(*, shared: bool) -> Flops:
        found = step_flops(documents, shape, trained, first_epoch=first_epoch, shared=shared)
        if work.objective == "preference":  # the reference reads the same documents without an adapter
            alone = step_flops(documents, shape, Trained(None), shared=shared)
            return found | {kind: found[kind] + alone[kind] for kind in ("block_forward", "head_forward")}
        if work.objective == "reward":  # a single number in place of a vocabulary
            return found | {kind: 0.0 for kind in found if kind.startswith("head")}
        return found

    return {
        "tokens": sum(len(e) for e in examples),
        "supervised": int(sum(e.supervised.sum() for e in examples)),
        "digest": zlib.crc32(joined.tobytes()),
        "flops": flops(shared=False),
        "flops_shared": flops(shared=True),
    }


def main() -> None:
    """Write `prepared.json`."""
    from benchmarks.workloads import WORKLOADS

    key, quick, folder, model = sys.argv[1], sys.argv[2] == "quick", Path(sys.argv[3]), Path(sys.argv[4])
    work = WORKLOADS[key].shortened() if quick else WORKLOADS[key]
    if isinstance(work, Training):
        prepared = prepare_training(work, folder, model)
    else:
        prepared = prepare_answering(work, folder)
    (folder / "prepared.json").write_text(json.dumps(prepared))


if __name__ == "__main__":
    main()
