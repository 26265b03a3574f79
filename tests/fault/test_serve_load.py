"""Many clients at once: each request is answered whole or told to come later, and memory stays what it was."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from benchmarks.serving import Load, measure, put_load, rung_server

from serving_clients import served


def test_more_clients_than_rows_and_places(tiny_base: Path) -> None:
    with served(tiny_base, max_rows=4, max_waiting=6) as (port, engine):
        url = f"http://127.0.0.1:{port}"
        load = asyncio.run(put_load(url, str(tiny_base), clients=24, seconds=2.0, pid=os.getpid(), headers={}))
        assert not load.failed and len(load.first_token) > 20 and load.refused > 0
        assert engine.counters.answers == len(load.first_token) and engine.counters.refused == load.refused
        deadline = time.monotonic() + 10
        while engine.active_rows and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.counters.cancelled == 0


def test_the_growth_of_memory_is_that_after_the_first_half() -> None:
    assert Load(memory=[1, 50, 100, 100, 100, 110, 100, 100]).growth == pytest.approx(0.1)
    assert Load(memory=[1, 100, 100, 100]).growth == 0


@pytest.mark.soak
def test_two_hundred_clients_for_a_minute() -> None:
    with rung_server() as server:
        load = measure(server, 200, 60)
    print(load.summary())
    assert not load.failed and load.refused > 0 and len(load.first_token) > 100
    assert load.growth <= 0.05
