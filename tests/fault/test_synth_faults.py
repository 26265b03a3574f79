"""`rung synth` under kills and hostile replies: nothing that was answered is asked again, and nothing of it is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from loopback import Local
from zygote import Zygote

CONCURRENCY = 3


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    tmp_path = tmp_path_factory.mktemp("zygote")
    modules = ("rung.synth.run", "rung.synth.lines", "openai", "datasketch", "rouge_score.rouge_scorer")
    found = Zygote(tmp_path / "zygote.log", preload=modules, RUNG_CACHE=str(tmp_path / "cache"))
    yield found
    found.close()


def teach_config(local: Local, folder: Path, rows: int) -> Path:
    seeds = [{"question": f"Why is the {word} in the cellar?", "answer": "Nobody knows."} for word in ("pear", "knife")]
    (folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seeds))
    file = folder / "teach.yaml"
    file.write_text(
        f"synth:\n  kind: teach\n  teacher: {{server: {local.url}, model: big, concurrency: {CONCURRENCY}}}\n"
        f"  seeds: {folder / 'seeds.jsonl'}\n  rows: {rows}\n  attempts: 50\noutput: {folder / 'whole'}\n"
    )
    return file


def answered(local: Local) -> Counter[str]:
    """How often the server answered each request."""
    return Counter(json.dumps(request["asked"], sort_keys=True) for request in local.requests() if not request["how"])


def sweep(zygote: Zygote, local: Local, folder: Path, verb: str, config: Path, kills: int) -> list[int]:
    """Kill as many commands at random moments and run each again; how many replies each had when it was killed.

    The rows are those of a command that was never killed.
    """
    assert zygote.run("synth", verb, config, f"output={folder / 'first'}") == 0, zygote.log.read_text()
    before, started = answered(local), time.monotonic()
    assert zygote.run("synth", verb, config) == 0, zygote.log.read_text()
    took, needed = time.monotonic() - started, (answered(local) - before).total()
    names = ("rows.jsonl", "rejected.jsonl")
    expected = [(folder / "whole" / name).read_bytes() for name in names]
    kept, chance = [], np.random.default_rng(5)
    for number in range(kills):
        output, before = folder / f"killed-{number}", answered(local)
        child = zygote.start("synth", verb, config, f"output={output}")
        time.sleep(chance.uniform() * took)
        os.kill(child, signal.SIGKILL)
        zygote.wait(child)
        time.sleep(0.1)  # what was on its way is no longer waited for
        kept.append(sum(max(0, journal.read_bytes().count(b"\n") - 1) for journal in output.glob("journal-*.jsonl")))
        assert zygote.run("synth", verb, config, f"output={output}") == 0, zygote.log.read_text()[-3000:]
        assert [(output / name).read_bytes() for name in names] == expected
        requests = answered(local) - before
        # at most what was on its way at the kill is asked twice
        assert needed <= requests.total() <= needed + CONCURRENCY, (requests.total(), needed, kept)
        assert not [p.name for p in output.rglob(".*")]
    return kept


def sweep_teach(zygote: Zygote, local: Local, folder: Path, kills: int) -> list[int]:
    """`sweep` of 20 rows that a teacher writes."""
    local.rule(teach=True, slow=0.02)
    return sweep(zygote, local, folder, "teach", teach_config(local, folder, 20), kills)


def test_killed_at_random_moments(zygote: Zygote, local: Local, tmp_path: Path) -> None:
    assert any(sweep_teach(zygote, local, tmp_path, 5))


@pytest.mark.soak
def test_killed_at_fifty_random_moments(zygote: Zygote, local: Local, tmp_path: Path) -> None:
    assert sum(count > 0 for count in sweep_teach(zygote, local, tmp_path, 50)) > 20


MARKS = ("round-0/round.json", "round-1/rows.jsonl", "round-1/run/run.json", "round-1/round.json", "test.json")
"""Files that `improve` writes, one after the other."""


def sweep_improve(zygote: Zygote, config: Path, folder: Path, kills: int) -> set[str]:
    """Kill as many commands of `improve` at random moments and run each again; the stages in which they were killed."""
    reward = folder / "reward.py"
    reward.write_text("def has_e(answer, row):\n    return float('e' in answer)\n")
    text = config.read_text().replace("instruction: Name the fruit.", "stop: [t, n]")
    config.write_text(
        f"synth: {{kind: improve, verifier: {{kind: function, path: '{reward}:has_e'}}, rounds: 1, samples: 2}}\n"
        + text.replace("exact, numeric, perplexity", "exact").replace("test: 0.25", "test: 0.25, validation: 0.25")
    )
    for name in ("first", "whole"):  # the first one fills caches
        started = time.monotonic()
        assert zygote.run("synth", "improve", config, f"output={folder / name}") == 0, zygote.log.read_text()
    took, stages, chance = time.monotonic() - started, set[str](), np.random.default_rng(6)
    names = ("round-1/rows.jsonl", "round-0/round.json", "test.json")
    expected = [(folder / "whole" / name).read_text() for name in names]
    weights = (folder / "whole" / "round-1" / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    for number in range(kills):
        output = folder / f"killed-{number}"
        child = zygote.start("synth", "improve", config, f"output={output}")
        time.sleep((number + chance.uniform()) / kills * took)  # early and late ones
        os.kill(child, signal.SIGKILL)
        zygote.wait(child)
        reached = [mark for mark in MARKS if (output / mark).exists()]
        stages.add(reached[-1] if reached else "nothing")
        took *= 0.9 if "test.json" in reached else 1.02
        assert zygote.run("synth", "improve", config, f"output={output}") == 0, zygote.log.read_text()[-3000:]
        assert [(output / name).read_text() for name in names] == expected
        assert (output / "round-1" / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == weights
        assert not [p.name for p in output.rglob(".*")]
    return stages


def test_improve_is_killed_at_random_moments(zygote: Zygote, config: Path, tmp_path: Path) -> None:
    assert len(sweep_improve(zygote, config, tmp_path, 5)) > 1


@pytest.mark.soak
def test_improve_is_killed_at_fifty_random_moments(zygote: Zygote, config: Path, tmp_path: Path) -> None:
    assert len(sweep_improve(zygote, config, tmp_path, 50)) >= 3


def endure(zygote: Zygote, local: Local, folder: Path, rows: int) -> int:
    """Make rows of a hostile server; how many of its replies were hostile."""
    local.rule(teach=True, hostile=True)
    config = teach_config(local, folder, rows)
    assert zygote.run("synth", "teach", config) == 0, zygote.log.read_text()[-3000:]
    whole = folder / "whole"
    made = (whole / "rows.jsonl").read_text()
    rejected = [json.loads(line) for line in (whole / "rejected.jsonl").read_text().splitlines()]
    result = json.loads((whole / "synth.json").read_text())["result"]
    assert result["rows"] == rows == made.count("\n") and result["tried"] == rows + len(rejected)
    assert {"failed", "refusals"} <= set(result["rejected"]) and "half \ud800" not in made
    assert result["cost"]["failed"] == result["rejected"]["failed"] > 0
    assert all("answer" in json.loads(line) for line in made.splitlines())
    # every reply is in the journal, failures too: without the results the same rows come of no request at all
    before = len(local.requests())
    for name in ("rows.jsonl", "rejected.jsonl", "synth.json"):
        (whole / name).unlink()
    assert zygote.run("synth", "teach", config) == 0, zygote.log.read_text()[-3000:]
    assert (whole / "rows.jsonl").read_text() == made and len(local.requests()) == before
    shutil.rmtree(whole)
    return sum(request["how"] is not None for request in local.requests())


def test_hostile_replies(zygote: Zygote, local: Local, tmp_path: Path) -> None:
    assert endure(zygote, local, tmp_path, 40) > 25


@pytest.mark.soak
def test_five_hundred_hostile_replies(zygote: Zygote, local: Local, tmp_path: Path) -> None:
    assert endure(zygote, local, tmp_path, 750) > 500


def constitution_config(local: Local, folder: Path, makes: str, seeds: int) -> Path:
    rows = [{"prompt": f"How is the fruit in box {i}?"} for i in range(seeds)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "constitution.yaml"
    critic = f"critic: {{server: {local.url}, model: critic, concurrency: {CONCURRENCY}}}"
    teacher = f"teacher: {{server: {local.url}, model: big, concurrency: {CONCURRENCY}}}"
    file.write_text(
        f"output: {folder / 'whole'}\nsynth:\n  kind: constitution\n  {teacher}\n  {critic}\n"
        "  principles: [Nothing is rotten., Nothing is old.]\n"
        f"  makes: {'{kind: revisions, rounds: 2}' if makes == 'revisions' else makes}\n"
        f"  seeds: {folder / 'prompts.jsonl'}\n"
    )
    return file


def sweep_constitution(zygote: Zygote, local: Local, folder: Path, makes: str, kills: int) -> list[int]:
    """`sweep` of revisions or of preferences."""
    local.rule(rotten=True, slow=0.01, preference=1.0)
    config = constitution_config(local, folder, makes, 4 if makes == "revisions" else 12)
    return sweep(zygote, local, folder, "constitution", config, kills)


@pytest.mark.parametrize("makes", ["revisions", "preferences"])
def test_a_constitution_is_killed_at_random_moments(makes: str, zygote: Zygote, local: Local, tmp_path: Path) -> None:
    assert any(sweep_constitution(zygote, local, tmp_path, makes, 3))


@pytest.mark.soak
@pytest.mark.parametrize("makes", ["revisions", "preferences"])
def test_a_constitution_is_killed_at_fifty_moments(makes: str, zygote: Zygote, local: Local, tmp_path: Path) -> None:
    assert sum(count > 0 for count in sweep_constitution(zygote, local, tmp_path, makes, 50)) > 20


@pytest.mark.parametrize("makes", ["revisions", "preferences"])
def test_a_constitution_of_hostile_replies(makes: str, zygote: Zygote, local: Local, tmp_path: Path) -> None:
    """Every question is a row, or is left out with a reason; the same rows come again of no request."""
    local.rule(rotten=True, hostile=True, preference=1.0)
    config, whole = constitution_config(local, tmp_path, makes, 20), tmp_path / "whole"
    assert zygote.run("synth", "constitution", config) == 0, zygote.log.read_text()[-3000:]
    made = (whole / "rows.jsonl").read_text()
    rejected = [json.loads(line) for line in (whole / "rejected.jsonl").read_text().splitlines()]
    result = json.loads((whole / "synth.json").read_text())["result"]
    assert (
        result["seeds"] == 20 and sum(result["rejected"].values()) == len(rejected) and "failed" in result["rejected"]
    )
    if makes == "preferences":
        assert result["rows"] + len(rejected) == 20
    assert sum(request["how"] is not None for request in local.requests()) > 5
    before = len(local.requests())
    for name in ("rows.jsonl", "rejected.jsonl", "synth.json"):
        (whole / name).unlink()
    assert zygote.run("synth", "constitution", config) == 0, zygote.log.read_text()[-3000:]
    assert (whole / "rows.jsonl").read_text() == made and len(local.requests()) == before
