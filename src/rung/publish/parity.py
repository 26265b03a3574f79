"""Gate 5: a published model, loaded in a fresh process, gives the log-probabilities of the run it came from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rung.engine.gates import TOLERANCE
from rung.engine.record import Gate
from rung.errors import GateError

_READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=False).eval()
rows = json.load(sys.stdin)
with torch.no_grad():
    logprobs = [model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)[:-1] for ids in rows]
chosen = [p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist() for p, ids in zip(logprobs, rows)]
json.dump(chosen, sys.stdout)
"""


def reload_logprobs(folder: Path, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Log-probability of every token but the first of each row, from plain transformers in another process.

    Raises `GateError` when the model does not load there.
    """
    done = subprocess.run(  # noqa: S603 - our own words only
        [sys.executable, "-W", "ignore", "-c", _READ, str(folder)],
        input=json.dumps([list(row) for row in rows]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise GateError("gate publish.parity failed: the written model does not load", where=str(folder), given=reason)
    return [torch.tensor(row) for row in json.loads(done.stdout)]


def check_parity(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> Gate:
    """Largest difference in nats between the run's and the reloaded model's log-probabilities."""
    worst = max(float((a.float() - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    limit = TOLERANCE[torch.float32]
    return Gate("publish.parity", "passed" if worst <= limit else "failed", worst, limit)
