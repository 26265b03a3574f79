"""Runs a study of methods: `.venv/bin/python -m benchmarks.study methods`, or tasks, or rules.

Every entry trains in a process of its own on the same rows, and answers the same held-out questions in another; what it
gained is a paired difference to the untuned base. Tables go to --work; README and docs quote them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runner import OURS, ROOT, RunError, Store, run
from benchmarks.studies import STUDIES, ZERO_SHOT, Entry, Study
from rung.evaluation.evaluate import Evaluation
from rung.results.base import Estimate
from rung.scoring.intervals import ALPHA
from rung.scoring.recommendation import paired_gain
from rung.scoring.significance import holm

KEPT = ("trainable_parameters", "peak_memory_bytes", "tokens_per_second", "train_seconds", "train_loss")
Measured = dict[str, Any]


@dataclass(frozen=True)
class Running:
    """A study on its way."""

    study: Study
    store: Store
    work: Path
    seeds: int

    def measure(self, name: str) -> None:
        """What is missing of one entry."""
        entry = None if name == ZERO_SHOT else self.study.entries[name]
        for seed in range(self.seeds if entry else 1):
            if self.store.one(name=name, seed=seed) is None:
                costs = self._make(name, entry, seed) if entry else {}
                folder = self.folder(name, seed) if entry else "-"
                items = self.items(name, seed)
                asked = [self.study.config, folder, items, self.study.questions]
                found = self._run([OURS / "python", "-m", "benchmarks.measured", *asked], items.with_suffix(".log"))
                self.store.add({"name": name, "seed": seed, **costs, **json.loads(found.splitlines()[-1])})

    def _make(self, name: str, entry: Entry, seed: int) -> Measured:
        """Train an entry, or fuse what it is made of."""
        folder = self.folder(name, seed)
        log = folder.parent / f"{folder.name}.train.log"
        if entry.fuse:
            parts = [self.folder(part, seed) for part in entry.fuse]
            weights = ["--learn", entry.learn] if entry.learn else ["--weights", entry.weights]
            self._run([OURS / "rung", "fuse", *parts, "-o", folder, "--how", entry.how, *weights], log)
            return {}
        settings = {**self.study.common, **entry.settings, "seed": seed, "output": str(folder)}
        given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        begun = (folder / "run.json").exists()  # by a study that was stopped: the run goes on, or is there already
        self._run([OURS / "rung", "train", self.study.config, *given, *(["--resume"] if begun else [])], log)
        manifest = json.loads((folder / "run.json").read_text())
        return {key: manifest[key] for key in KEPT}

    def _run(self, command: list[Any], log: Path) -> str:
        run(list(map(str, command)), log, {**os.environ, "HF_HUB_OFFLINE": "1"})
        return log.read_text()

    def folder(self, name: str, seed: int) -> Path:
        """Of an entry's run."""
        return self.work / f"{name.replace(' ', '-').replace(',', '')}-{seed}"

    def items(self, name: str, seed: int) -> Path:
        """Its answers."""
        return self.work / f"{self.folder(name, seed).name}.items.parquet"

    def scores(self, name: str, metric: int = 0) -> np.ndarray:
        """[seeds, questions], of the first metric or another."""
        found = [Evaluation.read(self.items(e["name"], e["seed"])) for e in self.store.all(name=name)]
        return np.stack([e.scores(e.metrics[metric]) for e in found])

    def gain(self, name: str, than: str = ZERO_SHOT, metric: int = 0) -> Estimate:
        """Paired, with the spread between seeds."""
        clusters = Evaluation.read(self.items(than, 0)).clusters
        return paired_gain(self.scores(than, metric), self.scores(name, metric), clusters)

    def tables(self) -> str:
        """Markdown."""
        names = [name for name in (ZERO_SHOT, *self.study.entries) if self.store.all(name=name)]
        base = self.store.one(name=ZERO_SHOT, seed=0) or {}
        metric = next(iter(base["scores"]))
        others = [f"{name} over zero-shot" for name in list(base["scores"])[1:]]
        head = ("", "trainable", "peak memory", "tokens/s", "on disk", "a query", metric, "over zero-shot", *others)
        head += ("forgets",)
        rows = [self._row(name, base) for name in names]
        parts = [_markdown([*head, *sorted(base["tasks"])], rows)]
        done = [rule for rule in self.study.rules if {rule.better, rule.than} <= set(names)]
        if done:
            gains = [self.gain(rule.better, rule.than) for rule in done]
            head = ["rule", "difference", "p", "p by Holm", "verdict"]
            parts.append(_markdown(head, judge_rules([rule.says for rule in done], gains)))
        return "\n".join(parts)

    def _row(self, name: str, base: Measured) -> list[str]:
        found = self.store.all(name=name)
        first = found[0]
        gains = [self.gain(name, metric=i) for i in range(len(base["scores"]))]
        trained, merged = first.get("trainable_parameters"), first.get("merged")
        score = np.mean([next(iter(e["scores"].values()))["mean"] for e in found])
        forgets = np.mean([e["unrelated_nats"] for e in found]) - base["unrelated_nats"]
        query = f"{first['seconds_per_query'] * 1000:.0f} ms"
        if merged:
            query += f", merged {merged['seconds_per_query'] * 1000:.0f} ms"
        return [
            name,
            f"{trained:,} ({trained / (base['held_bytes'] / 4):.2%})" if trained else "",
            f"{max(e['peak_memory_bytes'] for e in found) / 1e9:.2f} GB" if trained else "",
            f"{np.mean([e['tokens_per_second'] for e in found]):.0f}" if trained else "",
            _size(first["artifact_bytes"]) if name != ZERO_SHOT else "",
            query,
            f"{score:.2f}",
            *(f"{g.mean:+.2f} [{g.low:+.2f}, {g.high:+.2f}]" if name != ZERO_SHOT else "" for g in gains),
            f"{forgets:+.2f}" if name != ZERO_SHOT else "",
            *(f"{np.mean([e['tasks'][task] for e in found]):.2f}" for task in sorted(base["tasks"])),
        ]


def judge_rules(rules: Sequence[str], gains: Sequence[Estimate]) -> list[list[str]]:
    """A row for each rule: it holds, or does not, when its p-value corrected for all rules (Holm 1979) is at most 0.05.

    At 95 % each, 13 rules of which none is true would give a verdict on one of them every second time.
    """
    rows = []
    raw = [1.0 if gain.p_value is None else gain.p_value for gain in gains]
    for says, gain, p, corrected in zip(rules, gains, raw, holm(raw), strict=True):
        better = "holds" if gain.mean > 0 else "does not hold"
        difference = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
        verdict = better if corrected <= ALPHA else "cannot tell"
        rows.append([says, difference, f"{p:.2g}", f"{corrected:.2g}", verdict])
    return rows


def main() -> int:
    """0 when all asked for were measured, 2 when one could not run."""
    parser = argparse.ArgumentParser(prog="study", description="Methods side by side on one example, measured.")
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--only", help="entries, with commas between")
    parser.add_argument("--seeds", type=int, help="training seeds of each; none is what the study says")
    parser.add_argument("--resume", action="store_true", help="keep what was measured and run what is missing")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks/.studies")
    asked = parser.parse_args()
    study = STUDIES[asked.study]
    seeds, work = asked.seeds or study.seeds, (asked.work / asked.study).resolve()
    names = [ZERO_SHOT, *(asked.only.split(",") if asked.only else study.entries)]
    if unknown := set(names) - {ZERO_SHOT, *study.entries}:
        parser.error(f"no entry {min(unknown)!r}: there are {', '.join(study.entries)}")
    if not asked.resume:
        shutil.rmtree(work, ignore_errors=True)
    try:
        store = Store.open(work / "measured.jsonl", {"seeds": seeds}, resume=asked.resume)
        running = Running(study, store, work, seeds)
        for name in names:
            running.measure(name)
            print(" | ".join(running._row(name, store.all(name=ZERO_SHOT)[0])), flush=True)
    except (RunError, ValueError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    (work / "tables.md").write_text(running.tables())
    print(running.tables())
    return 0


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.0f} kB"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
