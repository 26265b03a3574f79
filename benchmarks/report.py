"""From measurements to one table, on the terminal and in RESULTS.md."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.flops import seconds_at
from benchmarks.runner import Entry, Store
from benchmarks.sides import differences, speed, weights
from benchmarks.workloads import Training, Workload

SIDES = {"rung": "Rung", "default": "peer as it comes", "tuned": "peer tuned"}
FIRST_STEPS, FIRST_LIMIT, LAST_LIMIT = 3, 1e-3, 1e-2
"""Relative difference allowed between the losses of Rung and the peer as it comes: in the first steps, and afterwards.

Both take the same rows in the same order from the same weights, so only the order of additions differs. It grows with
the steps, because every update depends on the one before.
"""
HEADER = ("work", "side", "tokens/s", "Rung is faster", "peak memory", "Rung needs", "loss last / mean", "useful share")
HOW_TO_READ = """\
- **tokens/s**: median over the pairs, and the range. In training: tokens of the documents (padding and repeated work do
  not count, shared beginnings count in every document) over the seconds of all steps but the first, which is cold;
  with several epochs the other steps of the first one stand in for it. In evaluation:
  generated tokens over the seconds from the first prompt to the last answer.
- **Rung is faster**, **Rung needs**: Rung to this peer; speed is compared within each pair and the median is shown with
  its range. The target stands in brackets.
- **peak memory**: largest resident memory from the first step to the last (from the first prompt to the last answer),
  read from VmHWM, which both sides reset at the same point. Whole processes, with loading and saving, stand below.
- **loss**: nats per learned token of the last step, and the mean over all steps. A peer that packs or groups has other
  rows in its steps, so its losses may differ; the peer as it comes must agree with Rung step by step.
- **useful share**: the time that the work cannot do without would take at the measured rate of matrix products, over
  the time it took. Counted are each document's own tokens (see `benchmarks/flops.py`); in brackets, tokens that the
  rows of a step begin with in common are counted once, so that skipping them does not flatter.
- **as it comes**: TRL's `SFTConfig`, `DPOConfig` or `RewardConfig` untouched but for `use_cpu=True, bf16=False` (its
  default does not start here) and the work's own settings; transformers' `generate`, padded on the left, in batches of
  20, and of 64 sequences in rollouts. A reward model's head is given to both sides. **tuned**: the fastest of the
  candidates below, tried anew in every bench. TRL's packing is right on a CPU: without FlashAttention transformers
  builds a block-diagonal mask from the positions, so documents do not see one another; the mask is dense, so their
  attention costs as much as if they did. Pairs it cannot pack, and a reference computed beforehand is the same work at
  another time where there is one epoch.
"""


def page_head() -> str:
    """What stands before all sections of RESULTS.md."""
    parts = [
        "# Rung beside its peer",
        "Rung and TRL 1.16 with PEFT 0.21 on the same rows in the same order, from the same weights, with the same "
        "optimizer, learning rate and steps, in alternation. One section for each class of processors.",
        "### How to read it",
        HOW_TO_READ.rstrip(),
    ]
    return "\n\n".join(parts)


@dataclass(frozen=True)
class Report:
    """What a bench found. `works` are those with at least one run."""

    works: Mapping[str, Workload]
    store: Store
    machine: Mapping[str, Any]
    folder: Path
    arguments: Sequence[str]

    def runs(self, key: str, side: str) -> list[Entry]:
        """The runs of a side, by pair."""
        return sorted(self.store.all(kind="run", work=key, side=side), key=lambda e: e["pair"])

    @cached_property
    def problems(self) -> list[str]:
        """Where the sides did not do the same work, or did not come to the same losses."""
        return [problem for key, work in self.works.items() for problem in self._problems(key, work)]

    def _problems(self, key: str, work: Workload) -> list[str]:
        if not isinstance(work, Training):
            return []
        prepared = self._prepared(key)
        found = [p for side in SIDES for e in self.runs(key, side) for p in differences(work, prepared, side, e)]
        for ours, theirs in zip(self.runs(key, "rung"), self.runs(key, "default"), strict=False):
            if ours["trainable"] != theirs["trainable"]:
                found.append(f"{key}: Rung trains {ours['trainable']} numbers, the peer {theirs['trainable']}")
            for i, apart in enumerate(_apart(ours, theirs)):
                limit = FIRST_LIMIT if i < FIRST_STEPS else LAST_LIMIT
                if apart > limit:
                    found.append(f"{key}: losses of step {i + 1} differ by {apart:.1e} (relative), at most {limit:.0e}")
        return sorted(set(found))

    @cached_property
    def lines(self) -> list[tuple[str, ...]]:
        """The table."""
        return [self._line(key, side) for key in self.works for side in SIDES if self.runs(key, side)]

    def _line(self, key: str, side: str) -> tuple[str, ...]:
        work, runs = self.works[key], self.runs(key, side)
        name = f"{key}  {work.title}" if side == "rung" else ""
        told = SIDES[side] + (f": {runs[0]['candidate']}" if side == "tuned" else "")
        faster, needs = ("", "") if side == "rung" else self._ratios(key, side)
        memory = f"{median(e['peak_bytes'] for e in runs) / 1e9:.2f} GB"
        return (name, told, _spread([speed(e) for e in runs], ".3g"), faster, memory, needs, *self._ends(key, side))

    def _ratios(self, key: str, side: str) -> tuple[str, str]:
        target = self.works[key].target
        pairs = list(zip(self.runs(key, "rung"), self.runs(key, side), strict=False))
        wanted = target.default if side == "default" else target.tuned
        faster = _spread([speed(ours) / speed(theirs) for ours, theirs in pairs], ".2f", "x")
        needs = f"{median(o['peak_bytes'] for o, _ in pairs) / median(t['peak_bytes'] for _, t in pairs):.2f}x"
        least = target.memory if side == "default" else None
        return faster + (f" [{wanted:g}x]" if wanted else ""), needs + (f" [{least:g}x]" if least else "")

    def _ends(self, key: str, side: str) -> tuple[str, str]:
        """Losses and share, or how many answers are Rung's."""
        runs = self.runs(key, side)
        work = self.works[key]
        if not isinstance(work, Training):
            if work.sampled:
                return (f"{sum(map(len, runs[0]['answers']))} tokens", "")
            ours = self.runs(key, "rung")[0]["answers"]
            same = sum(a == b for a, b in zip(ours, runs[0]["answers"], strict=True))
            tokens = sum(map(len, runs[0]["answers"]))
            return (f"{same}/{len(ours)} alike, {tokens} tokens", "")
        losses = [s["loss"] for s in runs[0]["steps"]]
        if work.dtype != "float32":  # the rates are those of float32 products
            return f"{losses[-1]:.4f} / {mean(losses):.4f}", ""
        shares = [self._share(key, e, "flops") for e in runs], [self._share(key, e, "flops_shared") for e in runs]
        return f"{losses[-1]:.4f} / {mean(losses):.4f}", f"{median(shares[0]):.0%} ({median(shares[1]):.0%})"

    def _share(self, key: str, entry: Entry, count: str) -> float:
        """Against the rates before and after the pair, over the steps that the speed counts."""
        around = [self.store.one(kind="rates", work=key, at=at) for at in (entry["pair"], entry["pair"] + 1)]
        prepared, taken = self._prepared(key)["steps"], entry["steps"]
        aligned = len(prepared) == len(taken)  # a peer that packs cuts steps of its own: all of them count
        counts = weights(entry) if aligned else [1.0] * len(taken)
        wanted = counts if aligned else [1.0] * len(prepared)
        ideal = sum(
            w * mean(seconds_at(step[count], found["rates"]) for found in around if found)
            for w, step in zip(wanted, prepared, strict=True)
        )
        return ideal / float(sum(w * step["seconds"] for w, step in zip(counts, taken, strict=True)))

    def _prepared(self, key: str) -> dict[str, Any]:
        prepared: dict[str, Any] = json.loads((self.folder / key / "prepared.json").read_text())
        return prepared

    @property
    def machine_lines(self) -> list[str]:
        """What was measured on."""
        m, rates = self.machine, self.store.all(kind="rates")
        narrow = [key for key, work in self.works.items() if isinstance(work, Training) and work.dtype != "float32"]
        but_for = f", but for {', '.join(narrow)}" if narrow else ""
        lines = [
            f"{m['processor']}, {m['cores']} cores, {m['memory_gib']} GiB; instructions: {' '.join(m['instructions'])}",
            f"{date.today()}; torch {rates[0]['torch']}, {rates[0]['threads']} threads "
            f"(OMP_NUM_THREADS {m['threads_asked']}); float32 on both sides{but_for}",
        ]
        names = {"block_forward": "of a block", "head_forward": "at the vocabulary head"}
        told = (f"{_spread([e['rates'][k] / 1e9 for e in rates], '.0f')} GFLOP/s {t}" for k, t in names.items())
        return [
            *lines,
            f"matrix products at the model's shapes: {', '.join(told)} (forward, {len(rates)} measurements)",
        ]

    def show(self, console: Console) -> None:
        """Print the table and what is wrong with it."""
        console.print()
        for line in self.machine_lines:
            console.print(line, markup=False)
        table = Table(*HEADER)
        for work, side, *cells in self.lines:
            key, _, title = work.partition("  ")
            name, _, candidate = side.partition(": ")
            if title:
                table.add_section()
                console.print(f"{key}  {title}", markup=False)
            if candidate:
                console.print(f"   {side}", markup=False)
            table.add_row(key, name, *(escape(cell) for cell in cells))
        console.print(table)
        for problem in self.problems:
            console.print(problem, style="red", markup=False)

    def markdown(self, name: str) -> str:
        """The section of this name, which says what was measured and on which class of processors."""
        checks = [f"- {p}" for p in self.problems]
        if not checks and (agreement := self._agreement()):
            checks = ["Every step of both sides held the same tokens, and the losses agree step by step:"]
            checks += [f"- {line}" for line in agreement]
        title = name[0].upper() + name[1:]
        parts = [
            f"## {title}",
            f"```\n{self._command()}\n```",
            "\n".join(f"- {line}" for line in self.machine_lines),
            _markdown(HEADER, self.lines),
            *([f"### {title}: was it the same work?", "\n".join(checks)] if checks else []),
            f"### {title}: cold steps and whole processes",
            _markdown(*self._details()),
            f"### {title}: what the peer was tuned over",
            _markdown(("work", "candidate", "tokens/s", "peak memory"), self._tuning()),
        ]
        return "\n\n".join(parts) + "\n"

    def _command(self) -> str:
        options = shlex.join(self.arguments)
        return f'make bench BENCH="{options}"' if options else "make bench"

    def _agreement(self) -> list[str]:
        lines = []
        for key, work in self.works.items():
            pairs = list(zip(self.runs(key, "rung"), self.runs(key, "default"), strict=False))
            if isinstance(work, Training) and pairs:
                apart = [_apart(*pair) for pair in pairs]
                first, worst = max(a[0] for a in apart), max(max(a) for a in apart)
                lines.append(f"{key}: relative difference of the loss {first:.1e} in step 1, at most {worst:.1e}")
        return lines

    def _details(self) -> tuple[Sequence[str], list[tuple[str, ...]]]:
        header = ("work", "side", "first step", "tokens/s with it", "whole process", "its peak", "peak without imports")
        lines: list[tuple[str, ...]] = []
        for key, work in self.works.items():
            for side, title in SIDES.items():
                runs = self.runs(key, side)
                if not runs:
                    continue
                of = _median_of(runs)
                first = f"{of(lambda e: e['steps'][0]['seconds']):.2f} s" if isinstance(work, Training) else ""
                lines.append(
                    (
                        *(key, title, first),
                        f"{of(lambda e: speed(e, cold=True)):.3g}",
                        f"{of(lambda e: e['process_seconds']):.0f} s",
                        f"{of(lambda e: e['process_peak_bytes']) / 1e9:.2f} GB",
                        f"{of(lambda e: e['peak_bytes'] - e['imported_bytes']) / 1e9:.2f} GB",
                    )
                )
        return header, lines

    def _tuning(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = []
        for key in self.works:
            for e in self.store.all(kind="tune", work=key):
                found = ("failed", "") if "error" in e else (f"{speed(e):.3g}", f"{e['peak_bytes'] / 1e9:.2f} GB")
                lines.append((key, e["candidate"], *found))
        return lines


def _apart(ours: Entry, theirs: Entry) -> list[float]:
    """Relative difference of the losses, step by step."""
    pairs = zip(ours["steps"], theirs["steps"], strict=False)
    return [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs]


def _median_of(runs: Sequence[Entry]) -> Callable[[Callable[[Entry], float]], float]:
    return lambda value: median(value(e) for e in runs)


def _spread(values: Sequence[float], form: str, unit: str = "") -> str:
    middle = f"{median(values):{form}}{unit}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}-{max(values):{form}})"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
