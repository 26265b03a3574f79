"""What the tests in a browser share; they load no torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _on_the_test_device() -> Iterator[None]:
    """In place of the fixture of all other tests, which loads torch: a page computes nothing."""
    yield
