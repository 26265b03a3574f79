"""Rung and the peer on the same work, in alternation: `make bench`, or `.venv/bin/python -m benchmarks.bench --help`.

For every workload: rows and token ids are made once; the peer's candidates run a few steps each and the fastest is
kept; then come pairs of rate measurement, Rung, peer as it comes, peer tuned, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console

from benchmarks import report
from benchmarks.machine import processor
from benchmarks.results_page import machine_class, replace_section
from benchmarks.rows import make_pairs, make_rows, read_pairs, read_rows
from benchmarks.runner import OURS, PEERS, ROOT, Entry, RunError, Store, run
from benchmarks.sides import Sides, speed
from benchmarks.workloads import (
    BASE,
    GROUPS,
    WORKLOADS,
    Candidate,
    Training,
    Workload,
    candidates,
    computable,
    default,
)

TUNING_STEPS = 3
"""Steps of each candidate; the first one is cold and does not count."""
console = Console(highlight=False, width=max(Console().width, 132))  # the table needs this much


@dataclass(frozen=True)
class Bench:
    """One bench on its way."""

    folder: Path
    store: Store
    sides: Sides
    pairs: int
    quick: bool
    rows: Path | None

    def work(self, key: str) -> Workload:
        """A workload, shortened in a quick bench."""
        return WORKLOADS[key].shortened() if self.quick else WORKLOADS[key]

    def measure(self, key: str) -> None:
        """Everything about one workload that the store does not hold yet."""
        work, folder = self.work(key), self.folder / key
        console.print(f"\n[bold]{key}[/]  {work.title}")
        if not (self.store.all(work=key) and (folder / "prepared.json").exists()):
            self.prepare(work, folder)
        tuned = self._tune(work, folder)
        sides = {"rung": None, "default": default(work), "tuned": tuned}
        for pair in range(self.pairs):
            self._rates(key, pair)
            for side, candidate in sides.items():
                if self.store.one(kind="run", work=key, side=side, pair=pair) is None:
                    run_of = self.sides.peer(work, folder, candidate) if candidate else self.sides.rung(work, folder)
                    head = {"kind": "run", "work": key, "side": side, "pair": pair}
                    entry = self.store.add({**head, "candidate": candidate.name if candidate else None, **run_of})
                    self._say(f"pair {pair + 1}/{self.pairs}  {side:<8}", entry)
        self._rates(key, self.pairs)

    def prepare(self, work: Workload, folder: Path) -> None:
        """Rows, Rung's config, and the ids that both sides get."""
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in self.rows_of(work)), encoding="utf-8")
        training = work if isinstance(work, Training) else Training(work.key, work.title, work.target, seed=work.seed)
        config = training.config(str(data), str(folder / "run"))
        (folder / "train.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        length = "quick" if self.quick else "whole"
        given = ("-m", "benchmarks.prepare", work.key, length, folder, self.sides.model)
        run([OURS / "python", *given], folder / "prepare.log", self.sides.env)

    def rows_of(self, work: Workload) -> list[Entry]:
        """Of the file that was named, or generated."""
        if isinstance(work, Training) and work.objective != "sft":
            pairs = read_pairs(self.rows, work.rows) if self.rows else make_pairs(work.rows, work.seed)
            return [pair.to_json() for pair in pairs]
        rows = read_rows(self.rows, work.rows) if self.rows else make_rows(work.rows, work.seed)
        form = {"plain": work.plain, "system": work.system} if isinstance(work, Training) else {}
        return [row.to_json(**form) for row in rows]

    def _tune(self, work: Workload, folder: Path) -> Candidate:
        """Try each candidate briefly and keep the fastest. One that fails is out, and its reason is kept."""
        steps = min(TUNING_STEPS, work.steps) if isinstance(work, Training) else None
        for candidate in candidates(work):
            if self.store.one(kind="tune", work=work.key, candidate=candidate.name):
                continue
            head = {"kind": "tune", "work": work.key, "candidate": candidate.name}
            try:
                entry = self.store.add({**head, **self.sides.peer(work, folder, candidate, steps=steps)})
                self._say(f"tuning    {candidate.name}", entry)
            except RunError as error:
                self.store.add({**head, "error": str(error)})
                console.print(f"  tuning    {candidate.name}: failed\n{error}", markup=False, soft_wrap=True)
        tried = {e["candidate"]: speed(e) for e in self.store.all(kind="tune", work=work.key) if "error" not in e}
        if not tried:
            raise RunError(f"no candidate of workload {work.key} ran")
        return next(c for c in candidates(work) if c.name == max(tried, key=lambda name: tried[name]))

    def _rates(self, key: str, at: int) -> None:
        if self.store.one(kind="rates", work=key, at=at) is None:
            log = self.folder / "machine.log"
            run([OURS / "python", "-m", "benchmarks.machine", self.sides.model], log, self.sides.env)
            self.store.add({"kind": "rates", "work": key, "at": at, **json.loads(log.read_text().splitlines()[-1])})

    def _say(self, what: str, entry: Entry) -> None:
        memory = f"{entry['peak_bytes'] / 1e9:.2f} GB"
        loss = f"  loss {entry['steps'][-1]['loss']:.4f}" if "steps" in entry else ""
        console.print(f"  {what}: {speed(entry):.1f} tokens/s  {memory}{loss}", markup=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """0 when every check passed, 1 when the sides did not do the same work, 2 when something could not run."""
    asked = _parse(arguments)
    settings = {"quick": asked.quick, "rows": str(asked.rows) if asked.rows else None}
    try:
        store = Store.open(asked.work / "measured.jsonl", settings, resume=asked.resume)
        bench = Bench(asked.work, store, sides_of(asked.work), asked.pairs, asked.quick, asked.rows)
        for key in asked.only:
            bench.measure(key)
    except (RunError, ValueError, OSError) as error:
        console.print(f"bench: {error}", markup=False, style="red")
        return 2
    machine = {**processor(), "threads_asked": os.environ.get("OMP_NUM_THREADS", "default")}
    works = {key: bench.work(key) for key in WORKLOADS if store.all(kind="run", work=key)}
    found = report.Report(works, store, machine, asked.work, sys.argv[1:] if arguments is None else arguments)
    found.show(console)
    part = _part(bench, works)
    target = asked.results or (ROOT / "benchmarks" if part else asked.work) / "RESULTS.md"
    name = f"{part or 'bench'} {machine_class(machine['instructions'])}"
    replace_section(name, found.markdown(name), target, head=report.page_head())
    console.print(f"\nwritten to {target}")
    return int(bool(found.problems))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="Rung and TRL on the same work, in alternation.")
    parser.add_argument("--only", type=_keys, default=computable(), metavar="a,b", help="these workloads")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("--quick", action="store_true", help="two steps and one pair: shows that all runs")
    parser.add_argument(
        "--rows",
        type=Path,
        help="a jsonl file of your own: question and answer, or messages; for pairs prompt, chosen and rejected",
    )
    parser.add_argument("--resume", action="store_true", help="keep what was measured and run what is missing")
    parser.add_argument("--results", type=Path, help="where to write the table; a partial bench keeps it in --work")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks/.results", help="folder for everything else")
    asked = parser.parse_args(arguments)
    asked.work = asked.work.resolve()
    asked.pairs = 1 if asked.quick else max(1, asked.pairs)
    return asked


def _keys(text: str) -> list[str]:
    keys = text.split(",")
    if unknown := [key for key in keys if key not in WORKLOADS]:
        raise argparse.ArgumentTypeError(f"no workload {unknown[0]!r}: there are {', '.join(WORKLOADS)}")
    if beyond := set(keys) - set(computable()):
        raise argparse.ArgumentTypeError(f"this processor has no units for bfloat16: {', '.join(sorted(beyond))}")
    return keys


def sides_of(folder: Path) -> Sides:
    """The base's folder and what Rung's imports weigh."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    if not (PEERS / "python").exists():
        raise RunError("there is no .venv-peers: run make bench, or scripts/install-peers")
    log = folder / "setup.log"
    run([OURS / "rung", "models", "fetch", BASE, "--json"], log, env)
    text = log.read_text()
    model = Path(json.loads(text[text.index("{") :])["path"])
    weigh = "import rung.cli, rung.runs.train; from benchmarks.memory import resident; print(resident())"
    run([OURS / "python", "-c", weigh], log, env)
    return Sides(model, env, int(log.read_text().split()[-1]))


def _part(bench: Bench, works: dict[str, Workload]) -> str | None:
    """The section of the repository's page for these results: at least three pairs of all works or of a group."""
    pairs = min(len(bench.store.all(kind="run", work=key, side="tuned")) for key in works) if works else 0
    if bench.quick or pairs < 3:
        return None
    parts = {"bench": computable(), **GROUPS}
    return next((name for name, keys in parts.items() if set(keys) == works.keys()), None)


if __name__ == "__main__":
    sys.exit(main())
