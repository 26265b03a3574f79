"""Several processes take the steps of one: the same gradients, losses and weights, by sums and global counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from builders import documents
from models import tiny_model
from processes import inside, log
from rung.training.distributed import World
from zygote import Zygote

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    folder = tmp_path_factory.mktemp("zygote")
    found = Zygote(folder / "log", PYTHONPATH=f"{HERE}:{HERE.parent}:{os.environ.get('PYTHONPATH', '')}")
    yield found
    found.close()


def steps(
    zygote: Zygote, size: int, method: str, objective: str, output: Path, mutation: str = "none", *more: str
) -> dict[str, Any]:
    children = zygote.launch(size, method, objective, output, mutation, *more, call="shared:train")
    codes = [zygote.wait(child) for child in children]
    assert codes == [0] * size, zygote.log.read_text()[-3000:]
    return load_file(output / "weights.safetensors")


@pytest.mark.parametrize("method", ["lora", "lora-upper", "full"])
@pytest.mark.parametrize("objective", ["sft", "preference"])
def test_ten_steps_are_those_of_one_process(zygote: Zygote, method: str, objective: str, tmp_path: Path) -> None:
    alone = steps(zygote, 1, method, objective, tmp_path / "1")
    logged = log(tmp_path / "1")
    for size in (2, 4):
        shared = steps(zygote, size, method, objective, tmp_path / str(size))
        assert shared.keys() == alone.keys()
        assert max(float((shared[n] - alone[n]).abs().max()) for n in alone) < 1e-9
        for ours, theirs in zip(log(tmp_path / str(size)), logged, strict=True):
            assert ours.keys() == theirs.keys() and ours["tokens"] == theirs["tokens"]
            for name in ours.keys() - {"seconds"}:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-8, abs=1e-9), name


@pytest.mark.parametrize("method", ["lora", "lora-upper", "full"])
@pytest.mark.parametrize("objective", ["sft", "preference"])
def test_a_model_in_parts_takes_the_same_steps(zygote: Zygote, method: str, objective: str, tmp_path: Path) -> None:
    """FSDP2 gathers a layer at a time; the processes have unequal numbers of batches, and compute equal ones.

    Of what moves, embeddings and head are in parts as well, and each process steps its rows alone. Layers of long
    documents are computed again, of each process other ones: what is gathered and summed stays in step.
    """
    alone = steps(zygote, 1, method, objective, tmp_path / "1")
    model = tiny_model()
    split = (
        model.model.layers.parameters()
        if method != "full"
        else (p for n, p in model.named_parameters() if n != "model.norm.weight")
    )
    whole = sum(p.numel() for p in split)
    ways = [(2, "sharded"), (4, "recomputing")]
    if objective == "sft" and method != "lora-upper":
        ways.append((2, "recomputing"))
    for size, how in ways:
        output = tmp_path / f"{size}-{how}"
        shared = steps(zygote, size, method, objective, output, "none", how)
        assert max(float((shared[n] - alone[n]).abs().max()) for n in alone) < 1e-9
        for ours, theirs in zip(log(output), log(tmp_path / "1"), strict=True):
            assert ours["tokens"] == theirs["tokens"] and ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-8)
        held = [int((output / f"held.{rank}").read_text()) for rank in range(size)]
        assert sum(held) == whole and max(held) < 1.1 * whole / size
        layers = [json.loads((output / f"recomputed.{rank}").read_text()) for rank in range(size)]
        if how == "sharded":
            assert not any(map(any, layers))
        else:  # of one micro-batch none, one or both layers, in every process of other ones
            assert all(len(set(numbers)) > 1 for numbers in layers) and len(set(map(tuple, layers))) > 1


LOADED_IN_PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("llama", {}),
    "head": ("gemma", {"modules_to_save": ("lm_head",)}),
    "pissa": ("gpt2", {"init": "pissa"}),
    "corda": ("qwen2", {"init": "corda"}),
    "dora": ("phi3", {"dora": True}),
}
"""Shape of the base and settings of the method, by a name of the case."""


def test_each_process_reads_its_rows_alone(zygote: Zygote, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Nobody holds or reads the whole base; what computes is bit for bit the base that one process loads.

    Starts that need whole matrices gather one at a time: PiSSA's, CorDA's, and DoRA's magnitudes.
    """
    for shape, _ in LOADED_IN_PARTS.values():
        tiny_model(shape, num_hidden_layers=2, hidden_size=64).save_pretrained(tmp_path / shape)
        tiny_tokenizer.save_pretrained(tmp_path / shape)
    children = zygote.launch(2, tmp_path, tmp_path / "found", json.dumps(LOADED_IN_PARTS), call="shared:load_in_parts")
    assert [zygote.wait(child) for child in children] == [0, 0], zygote.log.read_text()[-3000:]
    ranks = [json.loads((tmp_path / f"found.{rank}").read_text()) for rank in range(2)]
    for case in LOADED_IN_PARTS:
        for found in (rank[case] for rank in ranks):
            assert found["logprobs"] < 1e-5 and found["starts"] < 1e-5, (case, found)
            assert found["same fused"], case
            # its rows, and what every process holds: under full vectors, else embeddings, last norm and head
            assert found["local"] < found["read"] < found["whole"] - 0.9 * found["local"], (case, found)


def test_gathered_in_16_bits_the_steps_are_those_of_one_process_to_rounding(zygote: Zygote, tmp_path: Path) -> None:
    """Master weights, sums of gradients and moments stay float32: the published weights have all their bits."""
    alone = steps(zygote, 1, "full-bfloat16", "sft", tmp_path / "1")
    shared = steps(zygote, 2, "full-bfloat16", "sft", tmp_path / "2", "none", "sharded")
    for ours, theirs in zip(log(tmp_path / "2"), log(tmp_path / "1"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)
    for name, value in shared.items():
        assert value.dtype is torch.float32 and not torch.equal(value, value.bfloat16().float()), name
        # ten steps of Adam at 1e-3 move a number by 1e-2 at most
        assert float((value - alone[name]).abs().mean()) < 1e-3, name


def test_replicas_of_a_quantized_base_take_the_steps_of_one_process(
    zygote: Zygote, config: Path, tmp_path: Path
) -> None:
    """Every process quantizes its copy: packed weights and scales are equal on all, and so are the steps."""
    pytest.importorskip("bitsandbytes")
    alone = steps(zygote, 1, "qlora", "sft", tmp_path / "1")
    for size in (2, 4):
        output = tmp_path / str(size)
        shared = steps(zygote, size, "qlora", "sft", output)
        assert max(float((shared[n] - alone[n]).abs().max()) for n in alone) < 1e-9
        for ours, theirs in zip(log(output), log(tmp_path / "1"), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        digests = [json.loads((output / f"quantized.{rank}").read_text()) for rank in range(size)]
        assert len(digests[0]) == 2 * 7 * 3 and all(d == digests[0] for d in digests)  # weights and two kinds of scales
    children = zygote.launch(2, "train", config, "method={kind: qlora}", f"output={tmp_path / 'run'}")
    assert [zygote.wait(child) for child in children] == [0, 0], zygote.log.read_text()[-3000:]
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["processes"] == 2 and {gate["state"] for gate in manifest["gates"]} <= {"passed", "not_reached"}


@pytest.mark.parametrize("mutation", ["counts of its own", "no sum of gradients"])
def test_wrong_sums_are_another_run(zygote: Zygote, mutation: str, tmp_path: Path) -> None:
    alone = steps(zygote, 1, "lora", "sft", tmp_path / "1")
    wrong = steps(zygote, 2, "lora", "sft", tmp_path / "2", mutation)
    assert max(float((wrong[n] - alone[n]).abs().max()) for n in alone) > 1e-6


def test_a_group_of_another_size_does_not_start(zygote: Zygote, tmp_path: Path) -> None:
    for child in zygote.launch(2, tmp_path / "said", call="shared:other_size"):
        zygote.wait(child)
    for rank in range(2):
        said = json.loads((tmp_path / f"said.{rank}").read_text())
        assert said.startswith("PlanError") and "not those that the launcher announced" in said


def test_shares_are_whole_and_even() -> None:
    examples = documents(count=41)
    for size in (2, 3, 4):
        parts = [World(rank, size).split_examples(examples) for rank in range(size)]
        assert sorted(id(e) for part in parts for e in part) == sorted(map(id, examples))
        loads = [sum(map(len, part)) for part in parts]
        assert max(loads) - min(loads) <= max(map(len, examples))
    few = [World(rank, 4).split_examples(examples[:2]) for rank in range(4)]
    assert sorted(map(len, few)) == [0, 0, 1, 1]


def torchrun(size: int, *arguments: object) -> list[str]:
    port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), *port]
    return [*launcher, "-m", "rung", *map(str, arguments)]


def test_the_command_under_torchrun(config: Path, tmp_path: Path, capsys: Any) -> None:
    """One folder, one voice, the losses of one process; and it goes on in one process what two began.

    The start is computed from whole matrices, which processes that share the base gather one at a time.
    """
    given = ("training.checkpoint_every=3", "data.validation=0.2", "training.eval_every=3", "method.init=pissa")
    assert inside(capsys, "train", config, *given, f"output={tmp_path / 'alone'}")[0] == 0
    command = torchrun(2, "train", config, *given, f"output={tmp_path / 'two'}", "--json")
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, found.stderr
    manifest = json.loads(found.stdout)
    assert manifest["status"] == "finished" and manifest["processes"] == 2
    assert found.stderr.count("gate step0.packing: passed") == 1
    for ours, theirs in zip(log(tmp_path / "two"), log(tmp_path / "alone"), strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ("validation_loss" in ours) == ("validation_loss" in theirs)
        assert ours.get("validation_loss", 0.0) == pytest.approx(theirs.get("validation_loss", 0.0), rel=1e-5)
    parts = torchrun(2, "train", config, *given, f"output={tmp_path / 'parts'}", "model.sharded=true")
    found = subprocess.run(parts, capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, found.stderr
    gates = [json.loads((tmp_path / run / "run.json").read_text())["gates"] for run in ("two", "parts")]
    assert [gate["name"] for gate in gates[0]] == [gate["name"] for gate in gates[1]]
    assert {gate["state"] for gate in gates[1]} == {"passed"}
    adapters = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("two", "parts"))
    whole, split = adapters
    assert max(float((whole[n] - split[n]).abs().max()) for n in whole) < 1e-4
    assert inside(capsys, "eval", tmp_path / "parts", "--limit", 2)[0] == 0
    held = json.loads((tmp_path / "two" / "run.json").read_text())
    (tmp_path / "two" / "run.json").write_text(json.dumps({**held, "status": "running"}))
    code, _, err = inside(capsys, "train", config, *given, f"output={tmp_path / 'two'}", "--resume")
    assert code == 0 and "resumed from step-00000003" in err


FULL_IN_PARTS = ("method={kind: full}", "model.sharded=true")


@pytest.mark.parametrize("method", [("method.dropout=0.1",), ("method.layers=[1]",), FULL_IN_PARTS])
def test_one_process_is_killed_and_all_go_on(
    zygote: Zygote, config: Path, tmp_path: Path, method: tuple[str, ...]
) -> None:
    settings = ("training.max_steps=60", "training.epochs=60", "training.checkpoint_every=4", *method)

    def begin(*further: object) -> list[int]:
        return zygote.launch(2, "train", config, *settings, f"output={tmp_path / 'run'}", *further)

    children = begin()
    saved, deadline = tmp_path / "run" / "checkpoints", time.monotonic() + 120
    while not list(saved.glob("step-*28")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(children[1], signal.SIGKILL)
    assert [zygote.wait(child) for child in children] == [3, -signal.SIGKILL]
    assert "another process of this run has ended" in zygote.log.read_text()
    assert [zygote.wait(child) for child in begin("--resume")] == [0, 0], zygote.log.read_text()[-3000:]
    whole = zygote.launch(2, "train", config, *settings, f"output={tmp_path / 'whole'}")
    assert [zygote.wait(child) for child in whole] == [0, 0]
    first, second = (published(tmp_path / run) for run in ("run", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def published(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors"))
    return load_file(file)


@pytest.mark.parametrize("size", [1, 3])
def test_a_checkpoint_in_parts_is_taken_up_by_another_number(
    zygote: Zygote, config: Path, tmp_path: Path, size: int, capsys: Any
) -> None:
    """Two processes wrote their rows; three read theirs from both, or one reads all."""
    settings = (*FULL_IN_PARTS, "training.max_steps=6", "training.epochs=60", "training.checkpoint_every=3")

    def train(processes: int, *further: object) -> None:
        children = zygote.launch(processes, "train", config, *settings, f"output={tmp_path / 'run'}", *further)
        assert [zygote.wait(child) for child in children] == [0] * processes, zygote.log.read_text()[-3000:]

    train(2)
    run = tmp_path / "run"
    assert sorted(p.name for p in (run / "checkpoints" / "step-00000003").glob("part-*")) == [
        "part-00000",
        "part-00001",
    ]
    whole = published(run)
    held = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**held, "status": "running"}))
    train(size, "--resume")
    assert "resumed from step-00000003" in zygote.log.read_text()
    again = published(run)
    assert again.keys() == whole.keys() and all(v.numel() for v in again.values())
    assert max(float((again[n] - whole[n]).abs().max()) for n in whole) < 1e-5
    assert inside(capsys, "eval", run, "--limit", 2)[0] == 0


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("method={kind: mixture}",), "router"),
        (("objective={kind: grpo, reward: {kind: numeric}}",), "own answers"),
        (("method={kind: prompt}", "model.sharded=true"), "under lora and full alone"),
        (("method.init=lora_ga", "model.sharded=true"), "needs the gradients of whole weights"),
        (("method={kind: full}", "model.sharded=true", "training.optimizer.state_dtype=int8"), "blocks of numbers"),
    ],
)
def test_what_several_processes_cannot_share(
    zygote: Zygote, config: Path, tmp_path: Path, settings: tuple[str, ...], why: str
) -> None:
    children = zygote.launch(2, "train", config, *settings)
    assert [zygote.wait(child) for child in children] == [3, 3]
    assert why in zygote.log.read_text() and not (tmp_path / "run").exists()


def test_ctrl_c_under_torchrun_saves_and_goes_on(config: Path, tmp_path: Path, capsys: Any) -> None:
    """The terminal sends it to all, and torchrun passes it on: one request, one checkpoint, exit code of torchrun."""
    settings = ("training.max_steps=4000", "training.epochs=4000")
    command = torchrun(2, "train", config, *settings)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as running:
        steps_taken, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 120
        while not (steps_taken.exists() and steps_taken.read_text().count("\n") > 3) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGINT)
        _, err = running.communicate(timeout=120)
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert running.returncode != 0 and manifest["status"] == "interrupted", err
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert manifest["steps"] == int(saved.name.removeprefix("step-"))
