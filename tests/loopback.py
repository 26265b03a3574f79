"""A server of tests/server.py on this machine, as tests see it; the fixture `local` starts one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Local:
    """Its address, its rules and what it was asked."""

    url: str
    log: Path
    rules: Path

    def rule(self, **rules: object) -> None:
        self.rules.write_text(json.dumps(rules))

    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]
