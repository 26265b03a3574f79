"""One training run of TRL: `.venv-peers/bin/python -m benchmarks.peer_train JOB.json RESULT.json`.

The rows come as token ids with labels, already in the order of all epochs, so the peer takes one pass without
shuffling. Each step reports what it was really given, so that the bench can prove that both sides did the same work.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, pack_dataset

from benchmarks.memory import peak, reset_peak, resident

IMPORTED = resident()
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


TRAINERS = {
    "sft": (SFTTrainer, SFTConfig),
    "preference": (DPOTrainer, DPOConfig),
    "reward": (RewardTrainer, RewardConfig),
}


class Recorder:
    """Every micro-batch also notes its loss and what was in it; to be mixed into one of TRL's own trainers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[dict[str, Any]] = []

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """As it is where it was tokenized already, which TRL's own notices for all but DPO."""
        if "prompt_ids" in dataset.column_names:
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch forward and backward. Its loss is its share of the whole step's."""
        ids, labels, mask = inputs["input_ids"], inputs.get("labels"), inputs.get("attention_mask")
        real = ids if mask is None else ids[mask.bool()]
        entry = {
            "tokens": real.numel(),
            "computed": ids.numel(),
            "digest": zlib.crc32(real.to(torch.int64).numpy().tobytes()),
        }
        if labels is not None:
            entry["supervised"] = int((labels[..., 1:] != -100).sum())
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.seen.append({**entry, "loss": loss.item()})
        return loss


class Clock(TrainerCallback):
    """Wall time from the first forward to the last step; a step's time includes fetching its rows."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.micro: list[int] = []
        self.trainer: Recorder | None = None

    def on_step_begin(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **___: Any) -> None:
        """Start at the first step, with loading and preparation behind."""
        if state.global_step == 0:
            reset_peak()
            self.ends.append(time.perf_counter())

    def on_step_end(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **___: Any) -> None:
        """Note the end of a step, and how many micro-batches there were until then."""
        self.ends.append(time.perf_counter())
        self.micro.append(len(self.trainer.seen) if self.trainer else 0)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job and return what was measured."""
    with open(job["rows"], encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][: job["examples"]]
    data = Dataset.from_list(rows)
    clock = Clock()
    its_trainer, its_config = TRAINERS[job["objective"]]
    recording = type("Recording", (Recorder, its_trainer), {})
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, **arguments(job, data)}
        if job["objective"] == "reward":
            start = {"model": classifier(job)}
        else:
            start = {"model": job["model"], "peft_config": lora(job)}
            settings["model_init_kwargs"] = {"dtype": "float32"}
        trainer = recording(args=its_config(**settings), train_dataset=data, callbacks=[clock], **start)
        clock.trainer = trainer
        trainer.train()
    return {**report(trainer, clock), "imported_bytes": IMPORTED, "peak_bytes": peak()}


def arguments(job: dict[str, Any], data: Dataset) -> dict[str, Any]:
    """The work's own settings, then the candidate's; all else stays as TRL sets it."""
    chosen = {
        "use_cpu": True,
        "bf16": job["dtype"] == "bfloat16",  # TRL's default autocasts to bfloat16
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1,
        "per_device_train_batch_size": job["examples_per_step"] // job["micro_batches"],
        "gradient_accumulation_steps": job["micro_batches"],
        "train_sampling_strategy": "sequential",
        "seed": job["seed"],
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **job["settings"],
    }
    if chosen.get("packing"):
        # About as many tokens a step as without. One packed row at a time: TRL lays the rows of a micro-batch end to
        # end, under one dense mask over all of them.
        steps = math.ceil(len(data) / job["examples_per_step"])
        packs = len(pack_dataset(data, chosen["max_length"]))
        chosen |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": max(1, round(packs / steps))}
    return chosen


def classifier(job: dict[str, Any]) -> torch.nn.Module:
    """A base with a scalar head and an adapter, all numbers as Rung draws them: TRL would draw the head first."""
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = 0
    head = json.loads(Path(job["rows"]).with_name("head.json").read_text())
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor(head).view_as(model.score.weight))
    torch.manual_seed(job["seed"])
    return get_peft_model(model, lora(job))


def lora(job: dict[str, Any]) -> LoraConfig | None:
    """The adapter, or none in full fine-tuning."""
    if job["method"] == "full":
        return None
    return LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        target_modules=LINEARS,
        layers_to_transform=job["layers"],
        task_type="SEQ_CLS" if job["objective"] == "reward" else "CAUSAL_LM",
    )


def report(trainer: Recorder, clock: Clock) -> dict[str, Any]:
    """Per step: seconds, loss, tokens given and computed, learned tokens, digest of the ids of each micro-batch."""
    steps = []
    for i, end in enumerate(clock.micro):
        parts = trainer.seen[clock.micro[i - 1] if i else 0 : end]
        steps.append(
            {
                "seconds": clock.ends[i + 1] - clock.ends[i],
                **{key: sum(part[key] for part in parts) for key in parts[0] if key != "digest"},
                "digests": [part["digest"] for part in parts],
            }
        )
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {"steps": steps, "trainable": trainable, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(train(json.loads(Path(sys.argv[1]).read_text()))))
