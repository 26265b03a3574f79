"""A labeling server that is killed, and many people at once: no acknowledged vote is lost."""

from __future__ import annotations

import http.client
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from label_person import label_command, label_page
from rung.human_labels.store import LabelStore
from rung.labeling.run import LabelRequest, open_or_create


@pytest.fixture
def candidates(tmp_path: Path) -> Path:
    rows = [{"prompt": f"question {i}", "answers": [f"answer {k} to {i}" for k in range(2)]} for i in range(4000)]
    path = tmp_path / "candidates.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def killed_while_voting(folder: Path, candidates: Path, seconds: float) -> int:
    """Kill -9 the server at a moment while a person votes; votes that it acknowledged. Asserts that all are kept."""
    acknowledged = 0
    with label_command("compare", candidates, "-o", folder) as (running, (person,)):
        page = person.enter()
        word, before = page.fields["form_token"], int(page.progress.split()[0])
        timer = threading.Timer(seconds, running.kill)
        timer.start()
        try:
            while True:
                body = f"form_token={word}&revision=0&choice=left&seconds=1"
                status, headers, _ = person.raw("POST", page.address, body)
                assert status == 303
                acknowledged += 1
                page.address = headers["location"]
        except (OSError, http.client.HTTPException):
            pass  # the server is gone
        timer.join()
    store = LabelStore.open(folder)
    kept = len(store.votes()) - before
    assert store._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.close()
    # the last vote may be on the disk though its answer was on the way
    assert acknowledged <= kept <= acknowledged + 1
    return acknowledged


def test_a_kill_loses_no_acknowledged_vote(tmp_path: Path, candidates: Path) -> None:
    moments = [killed_while_voting(tmp_path / "labels", candidates, 0.013 * i) for i in range(5)]
    assert sum(moments) > 5


@pytest.mark.soak
def test_fifty_kills_lose_no_acknowledged_vote(tmp_path: Path, candidates: Path) -> None:
    moments = [killed_while_voting(tmp_path / "labels", candidates, 0.0037 * i) for i in range(50)]
    assert sum(moments) > 50


def many_people(candidates: Path, seconds: float, people: int) -> tuple[int, float]:
    """Votes of people at once who answer as fast as they can; their number and the 95th percentile of a vote's time."""
    request = LabelRequest("compare", (str(candidates),), people=people, overlap=1.0, repeat=0.0, limit=300)
    store = open_or_create(candidates.parent / "many", request)
    times: list[float] = []
    counts = [0] * people

    def work(number: int) -> None:
        person = everybody[number]
        address = person.enter().address
        word = store.form_token(number)
        while time.monotonic() < ends:
            start = time.perf_counter()
            status, headers, _ = person.raw("POST", address, f"form_token={word}&revision=0&choice=left&seconds=1")
            times.append(time.perf_counter() - start)
            assert status == 303
            counts[number] += 1
            address = headers["location"]
            # a person reads for a second; twenty that wait for nothing would measure this machine's queue
            time.sleep(0.5)

    with label_page(store) as everybody:
        ends = time.monotonic() + seconds
        threads = [threading.Thread(target=work, args=(number,)) for number in range(people)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    kept = [len(store.progress(person)[0]) for person in range(people)]
    store.close()
    assert kept == counts
    return sum(counts), float(np.quantile(times, 0.95))


def test_people_at_once_lose_nothing(candidates: Path) -> None:
    votes, _ = many_people(candidates, 2.0, 8)
    assert votes > 16


@pytest.mark.soak
def test_twenty_people_for_a_minute(candidates: Path) -> None:
    votes, slow = many_people(candidates, 60.0, 20)
    print(f"{votes} votes, 95 % within {slow * 1000:.0f} ms")
    assert votes > 1500 and slow < 0.1
