"""What a command holds does not follow how much it is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from processes import inside

MEGABYTE = 2**20


def peak(log: Path, *arguments: object) -> int:
    """Bytes of resident memory that a process of its own held at most."""
    command = [sys.executable, "-m", "rung", *map(str, arguments)]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, log.read_text()
    return usage.ru_maxrss * 1024


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_memory_does_not_follow_the_number_of_questions(verb: str, config: Path, tmp_path: Path, capsys: Any) -> None:
    """Twenty times as many: the logits of all of them at once would be some 80 MB more."""
    rows = [{"question": f"what is in it, {i}?", "answer": "pears" if i % 3 else "apples"} for i in range(2_200)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (f"data.path={tmp_path / 'many.jsonl'}", "data.group=null", "data.test=0.9", "data.validation=0")
    assert inside(capsys, "train", config, *data, "engine.max_steps=1", "evaluate.max_new_tokens=4")[0] == 0
    held = []
    for count in (90, 1_800):
        more = ("--data", tmp_path / "many.jsonl", "--n", 1, "--max-new-tokens", 4, "-o", tmp_path / f"{count}.jsonl")
        asked = (verb, tmp_path / "run", "--limit", count, *(more if verb == "generate" else ()))
        held.append(peak(tmp_path / "log", *asked))
    assert held[1] - held[0] < 30 * MEGABYTE, [h // MEGABYTE for h in held]
