"""`rung plan`, and the plan that `rung train` makes of its own rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from processes import inside
from rung.commands import plan as plans
from rung.config.io import load_config
from rung.planning.advise import advise, parse_size
from rung.planning.devices import DEVICES, Device
from rung.runs import checks

LIGHT = """
import sys
from rung.cli import _exit_code
code = _exit_code(sys.argv[1:])
heavy = [name for name in ("torch", "transformers", "numpy", "peft") if name in sys.modules]
sys.exit(f"loaded {heavy}" if heavy else code)
"""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A config of a 7B model: nothing of it is here but its config."""
    shape = {
        **{"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"intermediate_size": 11008, "vocab_size": 32000, "dtype": "bfloat16", "tie_word_embeddings": False},
    }
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    (tmp_path / "rows.jsonl").write_text("x" * 4000)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{name: {folder}, dtype: bfloat16}}\ndata: {{path: {tmp_path / 'rows.jsonl'}}}\n"
        f"method: {{kind: full}}\noutput: {tmp_path / 'run'}\n"
    )
    return config


def test_it_loads_nothing(large: Path) -> None:
    command = [sys.executable, "-c", LIGHT, "plan", str(large), "--device", "h100", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == 3, found.stderr  # 80 GB do not hold full fine-tuning
    said = json.loads(found.stdout)
    assert said["parameters"] == 6_738_415_616  # Llama 2 7B
    assert said["plan"]["fits"] is False and said["limit_bytes"] == 81_559 * 2**20
    assert said["plan"]["seconds"] > 0 and "not measured" in said["rate"]["source"]
    assert {m["method"] for m in said["methods"]} >= {"full", "lora", "qlora, 4 bits", "prompt", "mixture"}


def test_what_does_not_fit_comes_with_the_cheapest_change_that_does(large: Path, capsys: Any) -> None:
    fitting = []
    for memory in ("200GiB", "90GiB", "24GiB", "14GiB", "1GiB"):
        code, out, _ = inside(capsys, "plan", large, "--memory", memory, "--json")
        said = json.loads(out)
        assert code == (0 if said["plan"]["fits"] else 3)
        change = said["change"]
        assert (change is None) == (said["plan"]["fits"] or memory == "1GiB")
        fitting.append(change and " ".join(change["overrides"]))
        if change:
            assert change["plan"]["fits"] and change["plan"]["memory"]["needed_bytes"] <= parse_size(memory)  # type: ignore[operator]
            config = load_config(str(large), change["overrides"]).config
            assert advise(config, limit=parse_size(memory)).plan.fits  # as it is printed, it can be typed
    assert fitting[0] is None and "int8" in fitting[1] and "lora" in fitting[2] and "qlora" in fitting[3]


def test_every_lever_moves_what_it_is_said_to(large: Path) -> None:
    def peak(*settings: str) -> int:
        return advise(load_config(str(large), settings).config).plan.memory.peak

    lora = "method={kind: lora}"
    assert peak(lora) < peak()
    assert peak(lora, "training.tokens_per_micro_batch=2048") > peak(lora, "training.tokens_per_micro_batch=512")
    assert peak(lora, "training.examples_per_step=64") == peak(lora)
    assert peak("training.optimizer.state_dtype=int8") < peak()
    assert peak(lora, "model.dtype=float32", "model.fused=false") > peak(lora)
    assert peak("method={kind: lora, rank: 64}") > peak(lora)
    assert peak("method={kind: lora, layers: last}") < peak(lora)
    assert peak("method={kind: qlora}") < peak("method={kind: qlora, bits: 8}")
    assert peak("objective={kind: preference}") > peak()
    assert peak(lora, "data.max_length=4096") > peak(lora)


@pytest.mark.parametrize(
    "given", [("--memory", "much"), ("--memory", "0GiB"), ("--device", "h10"), ("--device", "?"), ("--memory", "-1")]
)
def test_wrong_sizes_and_devices(large: Path, capsys: Any, given: tuple[str, str]) -> None:
    code, _, err = inside(capsys, "plan", large, *given)
    assert code == 2 and "allowed" in err
    if given[1] == "h10":
        assert "h100" in err


def test_what_the_commands_after_it_hold(large: Path, capsys: Any) -> None:
    """Keys and values of every answer; the whole model in float32, which a full run has no need of."""

    def after(*overrides: str) -> dict[str, int]:
        code, out, _ = inside(capsys, "plan", large, *overrides, "--json")
        assert code == 0
        return json.loads(out)["plan"]["after"]  # type: ignore[no-any-return]

    few, many = (after("method.kind=lora", f"evaluation.batch={n}", "data.max_length=500") for n in (8, 16))
    kept = (500 + 64) * 2 * 4096 * 32 * 2  # bfloat16
    made = 500 * 2 * 4 * (11008 + 4096)
    assert many["evaluation"] - few["evaluation"] == 8 * (kept + made + 2 * 4 * 32000)
    assert few["merging"] == many["merging"] > 4 * 6_738_415_616
    assert set(after()) == {"evaluation"}
    code, out, _ = inside(capsys, "plan", large, "method.kind=lora")
    assert "rung merge: the whole model" in out


def test_sizes() -> None:
    assert parse_size("24GiB") == 24 * 2**30 and parse_size("1.5GB") == 1_500_000_000 and parse_size("512 MiB") == 2**29
    assert parse_size("2g") == 2 * 10**9 and parse_size("7") == 7
    assert all(device.name == name for name, device in DEVICES.items())


def test_it_is_read_by_people(large: Path, capsys: Any) -> None:
    code, out, _ = inside(capsys, "plan", large, "--memory", "24GiB", "--tokens", 1_000_000)
    assert code == 3  # full fine-tuning of 7B does not fit
    assert "6.7B parameters" in out and "1.0M tokens an epoch, as given" in out
    assert "It does not fit" in out and "'method={kind: lora}'" in out
    for term in ("weights", "gradients", "moments", "activations", "libraries", "peak"):
        assert term in out


def test_the_device_of_a_plan_is_named(large: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card of this machine where it has one and nothing else is asked for."""
    lora = "method={kind: lora}"
    card = Device("NVIDIA A100-SXM4-80GB", 80 * 2**30, 312e12)
    monkeypatch.setattr(plans, "find_local_device", lambda: card)
    for options, name, devices in (
        ((), "NVIDIA A100-SXM4-80GB, 80.0 GiB", 1),
        (("--device", "cpu"), "the processor of this machine", 1),
        (("--device", "CPU", "--memory", "24GiB"), "the processor of this machine", 1),
        (("--memory", "24GiB"), "NVIDIA A100-SXM4-80GB, 24.0 GiB", 1),
        (("--device", "l40s", "--devices", "4"), "4 x l40s, 45.0 GiB each", 4),
        (("--device", "h200", "--memory", "60GiB"), "h200, 60.0 GiB", 1),
    ):
        assert f"device   {name}" in inside(capsys, "plan", large, lora, *options)[1]
        said = json.loads(inside(capsys, "plan", large, lora, *options, "--json")[1])
        assert said["devices"] == devices and (said["device"] == "cpu") == ("processor" in name)
    code, out, _ = inside(capsys, "plan", large, "method={kind: qlora}", "--device", "t4", "data.max_length=2048")
    assert code == 0 and "rung eval does not: it needs" in out and "evaluation.batch" in out
    code, _, err = inside(capsys, "plan", large, "method={kind: mixture}", "--device", "h100", "--devices", "2")
    assert code == 3 and "router's load is counted in each process" in err and "--devices" in err
    large_steps = "training.tokens_per_micro_batch=20000"
    for name, tokens in (("l40s", 8192), ("rtx4090", 2048)):
        out = inside(capsys, "plan", large, lora, large_steps, "--device", name)[1]
        assert f"  training.tokens_per_micro_batch={tokens}\n" in out, out


def test_a_run_ends_with_plan_and_reality(config: Path, tmp_path: Path, capsys: Any) -> None:
    code, out, _ = inside(capsys, "train", config, f"output={tmp_path / 'run'}")
    assert code == 0 and "planned" in out
    plan = json.loads((tmp_path / "run" / "run.json").read_text())["plan"]
    assert plan["measured"]["steps"] > 1e8 and plan["peak_bytes"] > plan["footprint_bytes"]
    assert plan["at"] in plan["stages"]


def test_what_cannot_fit_does_not_start_unless_told(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "free_memory", lambda device: 10**8)
    code, _, err = inside(capsys, "train", config, f"output={tmp_path / 'run'}")
    assert code == 3 and "needs" in err and "--beyond-memory" in err
    assert not (tmp_path / "run").exists()
    code, _, err = inside(capsys, "train", config, f"output={tmp_path / 'run'}", "--beyond-memory")
    assert code == 0 and "goes on because of --beyond-memory" in err


def test_a_run_that_its_own_rows_make_too_large_leaves_no_steps(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest micro-batch would fit, the run's own does not."""
    least = []

    def there(device: Any) -> int:
        least.append(device)
        return 10**12 if len(least) == 1 else 10**8

    monkeypatch.setattr(checks, "free_memory", there)
    code, _, err = inside(capsys, "train", config, f"output={tmp_path / 'run'}")
    assert code == 3 and "needs" in err
    assert not (tmp_path / "run" / "log.jsonl").exists()
