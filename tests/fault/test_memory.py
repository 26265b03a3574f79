"""What a command holds does not follow how much it is given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models import tiny_model
from processes import inside

MEGABYTE = 2**20


def peak(log: Path, *arguments: object) -> int:
    """Bytes of resident memory that a process of its own held at most."""
    command = [sys.executable, "-m", "rung", *map(str, arguments)]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, log.read_text()
    return usage.ru_maxrss * 1024


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_memory_does_not_follow_the_number_of_questions(verb: str, config: Path, tmp_path: Path, capsys: Any) -> None:
    """Twenty times as many: the logits of all of them at once would be some 80 MB more."""
    rows = [{"question": f"what is in it, {i}?", "answer": "pears" if i % 3 else "apples"} for i in range(2_200)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (f"data.path={tmp_path / 'many.jsonl'}", "data.group=null", "data.test=0.9", "data.validation=0")
    assert inside(capsys, "train", config, *data, "training.max_steps=1", "evaluation.max_new_tokens=4")[0] == 0
    held = []
    for count in (90, 1_800):
        more = ("--data", tmp_path / "many.jsonl", "--n", 1, "--max-new-tokens", 4, "-o", tmp_path / f"{count}.jsonl")
        asked = (verb, tmp_path / "run", "--limit", count, *(more if verb == "generate" else ()))
        held.append(peak(tmp_path / "log", *asked))
    assert held[1] - held[0] < 30 * MEGABYTE, [h // MEGABYTE for h in held]


MERGE = """
import sys, threading, torch
from pathlib import Path
from rung.commands.merge_shards import merge_shards
from rung.exporting.weights import LoraUpdate
base, target, repeats = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
draw = torch.Generator().manual_seed(0)
updates = {
    f"l{i}": LoraUpdate(torch.randn(3072, 4, generator=draw), torch.randn(4, 3072, generator=draw), 1.0)
    for i in range(int((base / "count").read_text()))
}
target.mkdir()
seen, states = [], []
def watch():
    while not done.wait(0.002):
        seen.append(int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024)
done = threading.Event()
thread = threading.Thread(target=watch)
thread.start()
for number in range(repeats):
    (target / str(number)).mkdir()
    states.append(merge_shards(base, updates, target / str(number))[0].state)
done.set()
thread.join()
assert set(states) == {"passed"}
print(max(seen))
"""


def test_a_merge_by_shard_holds_no_more_of_a_larger_base(tmp_path: Path) -> None:
    """Eight matrices of 36 MB in one file, and two: 216 MB more on the disk, mapped but never copied at once."""
    held = []
    for count in (2, 8):
        base = tmp_path / f"base-{count}"
        base.mkdir()
        (base / "config.json").write_text("{}")
        (base / "count").write_text(str(count))
        matrices = {f"l{i}.weight": torch.full((3072, 3072), 0.5) for i in range(count)}
        save_file(matrices, base / "model.safetensors")
        # As many matrices in both, so that a short peak has as many chances to be seen; no holes of the allocator.
        command = [sys.executable, "-c", MERGE, str(base), str(tmp_path / f"merged-{count}"), str(8 // count)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        held.append(int(out.stdout))
        shutil.rmtree(tmp_path / f"merged-{count}")
    assert held[1] - held[0] < 36 * MEGABYTE, [h // MEGABYTE for h in held]


QUANTIZE = """
import gc, sys, threading, torch
from pathlib import Path
from rung.config.method import QloraConfig
from rung.config.model import ModelConfig
from rung.methods.registry import attach_method
from rung.models.load import load_base
import bitsandbytes
def held():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
def peak(stream):
    gc.collect()
    seen, done = [held()], threading.Event()
    def watch():
        while not done.wait(0.002):
            seen.append(held())
    thread = threading.Thread(target=watch)
    thread.start()
    base = load_base(config, device=torch.device("cpu"), stream_linears=stream)
    attach_method(base.model, QloraConfig(rank=4), seed=0)
    done.set()
    thread.join()
    return max(seen) - seen[0]
config = ModelConfig(name=sys.argv[1], dtype="bfloat16")
peak(True)  # what is imported and set up once
print(peak(True), peak(False))
"""


def test_a_base_is_quantized_without_being_held(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """101 MB in the file, 13 MB in four bits: it is mapped, and no more than a matrix of it is copied at once."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
    tiny_model(num_key_value_heads=8, **sizes).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    parameters = 6 * (4 * 512 * 512 + 3 * 512 * 2048)
    # every matrix is a mapping of its own, so that what the process holds is what is alive, without holes
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
    command = [sys.executable, "-c", QUANTIZE, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    streamed, whole = map(int, found.stdout.split())
    # Half a byte a parameter and its scales, and room for a matrix of 4 MB and its copies.
    assert streamed < 0.54 * parameters + 30 * MEGABYTE, streamed
    assert whole > streamed + parameters, "loaded as a whole, the base is two bytes a parameter before it shrinks"


EXPORT = """
import json, sys, threading
from pathlib import Path
from gguf import TokenType
from rung.exporting.gguf_file import GgufModel
from rung.exporting.gguf_vocabulary import GgufVocabulary
from rung.exporting.quantization import FILE_TYPES
from rung.exporting.weights import ModelWeights
from rung.models.load import load_model_config
def held():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
folder = Path(sys.argv[1])
tokens, types = [str(i).encode() for i in range(320)], [TokenType.NORMAL] * 320
vocabulary = GgufVocabulary("gpt2", "gpt-2", tokens, types, [], [], {"eos": 2}, False, False, None)
seen, done, before = [], threading.Event(), held()
def watch():
    while not done.wait(0.002):
        seen.append(held())
thread = threading.Thread(target=watch)
thread.start()
GgufModel(ModelWeights(folder), load_model_config(folder), vocabulary, {}).write(folder / "x.gguf", FILE_TYPES["q8_0"])
done.set()
thread.join()
print(max(seen) - before)
"""


def test_an_export_holds_blocks_and_no_model(tmp_path: Path) -> None:
    """Two layers and eight, 38 MB of weights each; the files are mapped, and a block of 32 MiB is converted at once."""
    held = []
    for layers in (2, 8):
        folder = tmp_path / f"base-{layers}"
        changes = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 8}
        tiny_model("qwen2", num_hidden_layers=layers, dtype=torch.bfloat16, **changes).save_pretrained(folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
        command = [sys.executable, "-c", EXPORT, str(folder)]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stderr
        held.append(int(out.stdout.splitlines()[-1]))
        shutil.rmtree(folder)
    assert max(held) < 200 * MEGABYTE and held[1] - held[0] < 32 * MEGABYTE, [h // MEGABYTE for h in held]
