"""The sides of a comparison: each takes a workload in its folder, runs it in a process and says what it took."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.runner import OURS, PEERS, Entry, Finished, run
from benchmarks.workloads import ALPHA, BASE, RANK, WORKLOADS, Answering, Candidate, Training, Workload


@dataclass(frozen=True)
class Sides:
    """What all processes of a bench have in common."""

    model: Path
    """Folder of the base, loadable by transformers."""
    env: Mapping[str, str]
    imported_bytes: int
    """Resident memory of a Rung process right after its imports; the peers report theirs themselves."""

    def rung(self, work: Workload, folder: Path) -> Entry:
        """One run of Rung."""
        if isinstance(work, Answering):
            return self._answers(work, folder, OURS / "python", "benchmarks.ours_eval", {})
        done = run([OURS / "rung", "train", folder / "train.yaml", "--overwrite"], folder / "rung.log", self.env)
        manifest = json.loads((folder / "run" / "run.json").read_text())
        steps = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
        return {
            "steps": [{"seconds": s["seconds"], "loss": s["loss"], "tokens": s["tokens"]} for s in steps],
            "train_seconds": manifest["train_seconds"],
            "trainable": manifest["trainable_parameters"],
            "peak_bytes": manifest["peak_memory_bytes"],
            "imported_bytes": self.imported_bytes,
            **_process(done),
        }

    def peer(self, work: Workload, folder: Path, candidate: Candidate, *, steps: int | None = None) -> Entry:
        """One run of the peer with a candidate's settings, on the rows of all or of the first steps."""
        if isinstance(work, Answering):
            settings = dict(candidate.settings)
            return self._answers(work, folder, PEERS / "python", "benchmarks.peer_eval", settings)
        job = {
            **asdict(work),
            "model": str(self.model),
            "rows": str(folder / "peer.jsonl"),
            "examples": work.examples_per_step * (steps or work.steps),
            "micro_batches": min(candidate.micro_batches, work.examples_per_step),
            "rank": RANK,
            "alpha": ALPHA,
            "settings": dict(candidate.settings),
        }
        return self._module(PEERS / "python", "benchmarks.peer_train", job, folder)

    def _answers(self, work: Answering, folder: Path, python: Path, module: str, settings: Mapping[str, Any]) -> Entry:
        prepared = json.loads((folder / "prepared.json").read_text())
        shared = {"model": str(self.model), "base": BASE, "max_new_tokens": work.max_new_tokens}
        return self._module(python, module, {**prepared, **shared, "settings": settings}, folder)

    def _module(self, python: Path, module: str, job: Mapping[str, Any], folder: Path) -> Entry:
        asked, told = folder / "job.json", folder / "result.json"
        asked.write_text(json.dumps(job))
        done = run([python, "-m", module, asked, told], folder / f"{module.rpartition('.')[2]}.log", self.env)
        return {**json.loads(told.read_text()), **_process(done)}


def speed(entry: Entry, *, cold: bool = False) -> float:
    """Tokens per second: of documents in training, without the first step unless `cold`; of answers in evaluation."""
    if "answers" in entry:
        return sum(map(len, entry["answers"])) / float(entry["seconds"])
    steps = list(zip([1.0] * len(entry["steps"]) if cold else weights(entry), entry["steps"], strict=True))
    return float(sum(w * s["tokens"] for w, s in steps) / sum(w * s["seconds"] for w, s in steps))


def weights(entry: Entry) -> list[float]:
    """How often each step counts: the first, which is cold, not at all.

    Where later epochs cost less than the first, the others of the first epoch stand in for it: the share of the epochs
    stays what it was.
    """
    count = len(entry["steps"])
    if count == 1:
        return [1.0]
    work = WORKLOADS.get(entry.get("work", ""))
    epochs = work.epochs if isinstance(work, Training) else 1
    first = max(1, count // epochs)
    stand_in = first / (first - 1) if epochs > 1 and first > 1 else 1.0
    return [0.0, *[stand_in] * (first - 1), *[1.0] * (count - first)]


def differences(work: Training, prepared: Mapping[str, Any], side: str, entry: Entry) -> list[str]:
    """What a run was given other than what was prepared. Packing and grouping may reorder rows, never lose a token."""
    wanted, found = prepared["steps"], entry["steps"]
    if sum(s["tokens"] for s in found) != sum(s["tokens"] for s in wanted):
        return [f"{work.key}: {side} trained on {sum(s['tokens'] for s in found)} tokens, not the ones prepared"]
    if side == "tuned":
        learned = sum(s["supervised"] for s in wanted)
        same = "supervised" not in found[0] or sum(s["supervised"] for s in found) == learned
        return [] if same else [f"{work.key}: {side} learned another number of tokens than {learned}"]
    keys = [key for key in ("tokens", "supervised") if key in found[0]]
    problems = [
        f"{work.key}: step {i} of {side} held {f[key]} {key}, not {w[key]}"
        for i, (f, w) in enumerate(zip(found, wanted, strict=True), 1)
        for key in keys
        if f[key] != w[key]
    ]
    if side == "default" and [s["digests"] for s in found] != [[s["digest"]] for s in wanted]:
        problems.append(f"{work.key}: {side} saw the rows in another order")
    return problems


def _process(done: Finished) -> Entry:
    return {"process_seconds": done.seconds, "process_peak_bytes": done.peak_bytes}
