"""Rollouts drawn by a vLLM server: the adapter goes there as a peft folder, token ids and log-probabilities come back.

For each rollout the current adapter is written completely, loaded under a name that no other rollout has, asked, and
unloaded. `training/server_gate.py` compares its log-probabilities with the policy's. What a resumed run asks again is
drawn again, so it is no longer the same run bit for bit (decision 0034). `training/rollout.py` calls `answer`.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rung.files import write_folder
from rung.inference.vllm_client import AdapterServer
from rung.models.generate import GeneratedAnswer, Sampling
from rung.models.policy import Policy

FOLDER = "sampler"
"""Folder of a run with the adapter that a server is asked for."""


@dataclass
class ServerSampler:
    """Draws answers of the policy on a server."""

    server: AdapterServer
    policy: Policy
    folder: Path
    """Where adapters are written, one folder for each; nothing of it stays."""
    drawn: int = field(default=0, init=False)

    def begin(self) -> None:
        """Unload and remove what a killed process left. Raises `ConfigError` where the server lacks the base."""
        self.server.unload_all(self.server.adapter_prefix(self.folder))
        shutil.rmtree(self.folder, ignore_errors=True)

    def answer(
        self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling
    ) -> list[GeneratedAnswer]:
        """Answers of the current weights in the order of the prompts; all answers to one prompt are adjacent.

        Raises `CheckpointError` where one of them is missing or not what was asked for; no adapter stays loaded.
        """
        # random digits too: a resumed run repeats the numbers with other weights
        name = f"{self.server.adapter_prefix(self.folder)}{self.drawn}-{secrets.token_hex(4)}"
        self.drawn += 1
        folder, method = self.folder / name, self.policy.method
        write_folder(folder, method.save)  # type: ignore[attr-defined]
        vocab_size = self.policy.base.vocab_size
        try:
            with self.server.adapter(name, folder):
                return self.server.complete(name, prompts, stop_ids, sampling, vocab_size)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
