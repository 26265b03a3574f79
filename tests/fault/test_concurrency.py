"""Two processes that want the same folder, the same file or the same cache."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from processes import inside, start


def waited_for(path: Path, seconds: float = 120.0) -> bool:
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.exists()


def test_two_runs_in_one_folder(config: Path, tmp_path: Path, capsys: Any) -> None:
    """Whatever the second says, it touches nothing while the first is at work."""
    settings = ("training.max_steps=100000", "training.epochs=100000")
    with start("train", config, *settings) as first:
        assert waited_for(tmp_path / "run" / "log.jsonl")
        for how in ("--resume", "--overwrite"):
            code, _, err = inside(capsys, "train", config, *settings, how)
            assert code == 3 and "another process is at work here" in err
        code, _, err = inside(capsys, "train", config, *settings)
        assert code == 3 and "--resume" in err
        assert first.poll() is None
        first.kill()
    code, _, err = inside(capsys, "train", config, "--overwrite")
    assert code == 0, err


def test_two_processes_fill_one_cache(config: Path, tmp_path: Path, tiny_base: Path) -> None:
    rows = [{"question": f"what is in box {i}?", "answer": f"{i} pears"} for i in range(6_000)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--dry-run", "--json", f"data.path={tmp_path / 'many.jsonl'}", "data.group=null")
    both = [start("train", config, *asked) for _ in range(2)]
    found = [running.communicate(timeout=300) for running in both]
    assert [running.returncode for running in both] == [0, 0], found
    told = [json.loads(out) for out, _ in found]
    assert json.dumps(told[0]).replace("true", "false") == json.dumps(told[1]).replace("true", "false")
    kept = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert not [p for p in kept if p.suffix == ".tmp"] and len({p.name for p in kept}) == len(kept)
    with start("train", config, *asked) as third:
        out, _ = third.communicate(timeout=300)
    again = json.loads(out)
    assert out.count('"from_cache": true') >= 1 and again["splits"] == told[0]["splits"]
