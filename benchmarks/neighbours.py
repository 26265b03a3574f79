"""Rung and TRL beside other processes: `.venv/bin/python -m benchmarks.neighbours`, about an hour.

A laptop is never idle. Each work runs alone, beside one and beside two processes that compute all the time, and beside
a second training of Rung, in alternation. What counts is the share of the speed alone that is left. Rung is measured
as it comes and with the waiting of torch (threads that spin for 3 ms), which is what it replaces.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

import yaml

from benchmarks.bench import Bench, console, sides_of
from benchmarks.machine import processor
from benchmarks.results_page import RESULTS, machine_class, replace_section
from benchmarks.runner import OURS, ROOT, RunError, Store, run
from benchmarks.sides import Sides, speed
from benchmarks.workloads import Training, Workload, default

BUSY = (sys.executable, "-c", "while True: pass")
NEIGHBOURS = ("alone", "1 busy", "2 busy", "another run")
TORCH_WAITING = {"GOMP_SPINCOUNT": "300000"}
"""What libgomp does where nothing is set; a value that is set switches Rung's own way off."""
PEER_STEPS = 2
"""Of the peer's training: one that is cold and does not count, and one that does."""
PROMPTS, NEW_TOKENS = 16, 48
"""Of `rung generate`, which samples four answers to each prompt."""
WORKS = {"a": "LoRA training", "e": "evaluation", "generate": "rung generate"}


@dataclass(frozen=True)
class Case:
    """One side on one work. `measure` returns tokens per second."""

    work: str
    side: str
    measure: Callable[[], float]


def cases(bench: Bench, works: Sequence[str]) -> list[Case]:
    """All sides of the works, prepared."""
    sides = {
        "Rung": bench.sides,
        "Rung, waiting of torch": replace(bench.sides, env={**bench.sides.env, **TORCH_WAITING}),
    }
    found = []
    if not (bench.folder / "a/train.yaml").exists():  # another run trains it too
        bench.prepare(bench.work("a"), bench.folder / "a")
    for key in works:
        if key == "generate":
            rows = bench.folder / "prompts.jsonl"
            texts = [json.dumps(row) + "\n" for row in bench.rows_of(bench.work("a"))[:PROMPTS]]
            rows.write_text("".join(texts), encoding="utf-8")
            found += [Case(key, name, partial(generated, side, rows)) for name, side in sides.items()]
            continue
        work, folder = bench.work(key), bench.folder / key
        bench.prepare(work, folder)
        found += [Case(key, name, partial(rung_speed, side, work, folder)) for name, side in sides.items()]
        name = "TRL as it comes" if key == "a" else "transformers as it comes"
        found.append(Case(key, name, partial(peer_speed, bench.sides, work, folder)))
    return found


def rung_speed(sides: Sides, work: Workload, folder: Path) -> float:
    """Tokens per second of Rung."""
    return speed(sides.rung(work, folder))


def peer_speed(sides: Sides, work: Workload, folder: Path) -> float:
    """Tokens per second of the peer as it comes."""
    steps = PEER_STEPS if isinstance(work, Training) else None
    return speed(sides.peer(work, folder, default(work), steps=steps))


def generated(sides: Sides, rows: Path) -> float:
    """Answers of `rung generate` per minute, loading included."""
    target = rows.with_name("answers.jsonl")
    target.unlink(missing_ok=True)
    command = [*(OURS / "rung", "generate", str(sides.model), "--data", rows, "-o", target)]
    command += ["--max-new-tokens", str(NEW_TOKENS), "--limit", str(PROMPTS)]
    done = run(command, rows.with_name("generate.log"), sides.env)
    return 60 * 4 * PROMPTS / done.seconds


@contextmanager
def beside(neighbours: str, bench: Bench) -> Iterator[None]:
    """Other processes, for as long as the block runs."""
    if neighbours == "another run":
        config = bench.folder / "neighbour.yaml"
        settings = yaml.safe_load((bench.folder / "a/train.yaml").read_text())
        settings["training"]["epochs"] = 1000
        config.write_text(yaml.safe_dump({**settings, "output": str(bench.folder / "neighbour")}))
        commands = [[str(OURS / "rung"), "train", str(config), "--overwrite"]]
    else:
        commands = [list(BUSY)] * {"alone": 0, "1 busy": 1, "2 busy": 2}[neighbours]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            processes.append(subprocess.Popen(command, env=bench.sides.env, cwd=ROOT, **quiet))
        time.sleep(15 if neighbours == "another run" else 1)  # until it computes
        if any(process.poll() is not None for process in processes):
            raise RunError(f"the neighbour has ended: {commands}")
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def table(store: Store) -> list[str]:
    """Speed of each side beside each neighbour, and the share of its speed alone."""
    lines = [f"| work | side | {' | '.join(NEIGHBOURS)} |", "|" + "---|" * (len(NEIGHBOURS) + 2)]
    sides = dict.fromkeys((e["work"], e["side"]) for e in store.all(kind="speed"))
    for work, side in sides:
        cells = []
        for neighbours in NEIGHBOURS:
            shares, speeds = [], []
            for entry in store.all(kind="speed", work=work, side=side, neighbours=neighbours):
                alone = store.one(kind="speed", work=work, side=side, neighbours="alone", pair=entry["pair"])
                speeds.append(entry["speed"])
                shares += [entry["speed"] / alone["speed"]] if alone else []
            share = "" if neighbours == "alone" or not shares else f": {_spread(shares, '.0%')}"
            cells.append(f"{_spread(speeds, '.3g')}{share}" if speeds else "")
        lines.append(f"| {WORKS[work]} | {side} | {' | '.join(cells)} |")
    return lines


def _spread(values: Sequence[float], form: str) -> str:
    """Median and range."""
    range_of = f" ({min(values):{form}}-{max(values):{form}})" if len(values) > 1 else ""
    return f"{median(values):{form}}{range_of}"


def alone_cost(store: Store) -> list[str]:
    """Speed of Rung alone over its speed alone with torch's waiting, in pairs."""
    lines = []
    for work, title in WORKS.items():
        ratios = []
        for entry in store.all(kind="speed", work=work, side="Rung", neighbours="alone"):
            same = {"work": work, "neighbours": "alone", "pair": entry["pair"]}
            if other := store.one(kind="speed", side="Rung, waiting of torch", **same):
                ratios.append(entry["speed"] / other["speed"])
        if ratios:
            lines.append(f"- {title}: {_spread(ratios, '.3f')}")
    return lines


def text(store: Store, machine: Mapping[str, object], arguments: Sequence[str]) -> str:
    """The section of RESULTS.md."""
    command = shlex.join(
        [".venv/bin/python", "-m", "benchmarks.neighbours", *(a for a in arguments if a != "--resume")]
    )
    name = machine_class(machine["instructions"])  # type: ignore[arg-type]
    return "\n".join(
        [
            f"## Beside other work, {name}",
            "",
            f"```\n{command}\n```",
            "",
            f"- {machine['processor']}, {machine['cores']} cores; {date.today()}",
            "- tokens/s (`rung generate`: answers a minute, loading included), median and range; then the share of the "
            "same side's speed alone",
            "",
            *table(store),
            "",
            "Speed alone, Rung over Rung with the waiting of torch (1: watching the other processes costs nothing):",
            "",
            *alone_cost(store),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the section. 2 when something could not run."""
    parser = argparse.ArgumentParser(prog="neighbours", description="Rung and TRL beside other processes.")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each case")
    parser.add_argument("--peer-pairs", type=int, default=1, help="runs of each case of TRL, which take minutes")
    parser.add_argument("--only", default=",".join(WORKS), help="a, e, generate")
    parser.add_argument("--beside", default=",".join(NEIGHBOURS), help=", ".join(NEIGHBOURS))
    parser.add_argument("--resume", action="store_true", help="keep what was measured and run what is missing")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks/.results/neighbours")
    given = list(sys.argv[1:] if arguments is None else arguments)
    asked = parser.parse_args(given)
    works, neighbours = asked.only.split(","), asked.beside.split(",")
    if unknown := [*(set(works) - WORKS.keys()), *(set(neighbours) - set(NEIGHBOURS))]:
        parser.error(f"there is no {unknown[0]!r}: {', '.join(WORKS)}; {', '.join(NEIGHBOURS)}")
    settings = [name for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS") if os.environ.get(name)]
    if settings:
        parser.error(f"unset {', '.join(settings)}: it replaces what is measured")
    try:
        store = Store.open(asked.work / "measured.jsonl", {}, resume=asked.resume)
        bench = Bench(asked.work, store, sides_of(asked.work), asked.pairs, quick=False, rows=None)
        measure(bench, works, neighbours, asked.pairs, asked.peer_pairs)
    except (RunError, ValueError, OSError) as error:
        console.print(f"neighbours: {error}", markup=False, style="red")
        return 2
    machine = processor()
    section = text(store, machine, given)
    console.print(section, markup=False)
    replace_section(f"beside other work {machine_class(machine['instructions'])}", section, RESULTS)
    return 0


def measure(bench: Bench, works: Sequence[str], neighbours: Sequence[str], pairs: int, peer_pairs: int) -> None:
    """Run every case that the store lacks."""
    all_cases = cases(bench, works)
    for pair in range(pairs):
        for name in neighbours:
            missing = [
                case
                for case in all_cases
                if (case.side.startswith("Rung") or pair < peer_pairs)
                and not bench.store.one(kind="speed", work=case.work, side=case.side, neighbours=name, pair=pair)
            ]
            if not missing:
                continue
            with beside(name, bench):
                # the other way round in every second pair: what runs first may find the machine otherwise
                for case in missing if pair % 2 == 0 else reversed(missing):
                    entry = {"kind": "speed", "work": case.work, "side": case.side, "neighbours": name, "pair": pair}
                    entry["speed"] = round(case.measure(), 2)
                    bench.store.add(entry)
                    console.print(f"  {name:<12} {case.work:<9} {case.side:<26} {entry['speed']}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
