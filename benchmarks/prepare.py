"""Turns rows into the same token ids for both sides: `python -m benchmarks.prepare WORK quick|whole FOLDER MODEL`.

Everything goes once through Rung's own path from row to ids. The peer gets the ids, the labels and the order of Rung's
steps; `prepared.json` says what each step must hold, so that either side can be checked against it.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.flops import Document, Shape, Trained, step_flops
from benchmarks.workloads import RANK, Answering, Training
from rung import opened, run
from rung.evaluate.baselines import Framing
from rung.spec.io import load
from rung.spec.run import RunSpec
from rung.types import Example


def prepare_training(work: Training, folder: Path, model: Path) -> dict[str, Any]:
    """Write `peer.jsonl` in the order of the steps; return what each step holds."""
    spec = load(str(folder / "train.yaml")).spec
    steps = _steps(spec, work.epochs)
    with (folder / "peer.jsonl").open("w") as lines:
        for example in (example for step in steps for example in step):
            labels = np.where(example.supervised, example.ids, -100)
            lines.write(json.dumps({"input_ids": example.ids.tolist(), "labels": labels.tolist()}) + "\n")
    shape = Shape.read(model)
    trained = Trained(None) if work.method == "full" else Trained(RANK, min(work.layers or (0,)))
    first = len(steps) // work.epochs
    return {
        "steps": [_step(step, shape, trained, first_epoch=i < first) for i, step in enumerate(steps)],
        "longest": max(len(example) for step in steps for example in step),
    }


def prepare_answering(work: Answering, folder: Path) -> dict[str, Any]:
    """Prompt ids with the first rows as worked examples in front of every question."""
    spec = load(str(folder / "train.yaml")).spec
    records = run.read_splits(spec).train
    _, chat = opened.open_base(spec.model)
    framing = Framing(shots=tuple(records[: work.shots]))
    pad = chat.tokenizer.pad_token_id
    return {
        "prompts": [chat.prompt_ids(framing.turns(record)) for record in records[work.shots :]],
        "stop_ids": list(chat.stop_ids),
        "pad_id": chat.stop_ids[0] if pad is None else pad,
    }


def _steps(spec: RunSpec, epochs: int) -> list[list[Example]]:
    """The documents of every step: Rung draws a new order in each epoch, from the seed and the epoch's number."""
    splits = run.read_splits(spec)
    examples = run.tokenise(spec, splits, run.load(spec.model)).train.examples
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([spec.seed, epoch]).permutation(len(examples))
        size = spec.engine.examples_per_step
        steps += [[examples[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
    return steps


def _step(examples: list[Example], shape: Shape, trained: Trained, *, first_epoch: bool) -> dict[str, Any]:
    documents = [Document(tuple(e.ids.tolist()), tuple(e.supervised.tolist())) for e in examples]
    joined = np.concatenate([e.ids for e in examples]).astype(np.int64)
    return {
        "tokens": sum(len(e) for e in examples),
        "supervised": int(sum(e.supervised.sum() for e in examples)),
        "digest": zlib.crc32(joined.tobytes()),
        "flops": step_flops(documents, shape, trained, first_epoch=first_epoch),
        "flops_shared": step_flops(documents, shape, trained, first_epoch=first_epoch, shared=True),
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
