"""TRL's preference losses on one batch: `python dpo_losses.py JOB.json RESULT.json`, in an environment that has TRL."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer


class AsTheyAre(DPOTrainer):
    """Rows that are tokenized already, which TRL's own does not take."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


def losses(job: dict[str, Any]) -> dict[str, float]:
    """Of each kind, in float64, on all rows as one batch."""
    found = {}
    for name, settings in job["losses"].items():
        with tempfile.TemporaryDirectory() as folder:
            config = DPOConfig(
                folder,
                use_cpu=True,
                bf16=False,
                report_to="none",
                gradient_checkpointing=False,
                per_device_train_batch_size=len(job["rows"]),
                **settings,
            )
            models = [AutoModelForCausalLM.from_pretrained(job[m], dtype="float64") for m in ("policy", "reference")]
            rows = Dataset.from_list(job["rows"])
            trainer = AsTheyAre(model=models[0], ref_model=models[1], args=config, train_dataset=rows)
            (batch,) = trainer.get_train_dataloader()
            found[name] = float(trainer.compute_loss(trainer.model, batch).detach())
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(losses(json.loads(Path(sys.argv[1]).read_text()))))
