"""What all tests share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loopback import Local

if TYPE_CHECKING:
    from vllm_server import Engine

# Before anything asks torch for a card: on a machine with one, the tests run on its processor unless they are told.
if os.environ.get("RUNG_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, its own library included

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] + '<end_of_turn>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SPECIAL = (
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|eom_id|>", "<start_of_turn>", "<end_of_turn>"),
)
TEXT = [
    "What is the capital of France? The capital of France is Paris.\n",
    "User: How many apples are there?\nAssistant: There are 12 apples, and 3 more make 15.\n",
    "the answer is that of the user and the assistant, in the system of the tool\n",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules of few long tests come first: begun last, each would keep one worker busy while the others are done."""
    long = ("fault", "distributed", "cli")
    parts = [next((i for i, part in enumerate(long) if part in item.path.parts), len(long)) for item in items]
    items[:] = [item for _, item in sorted(zip(parts, items, strict=True), key=lambda pair: pair[0])]


@pytest.fixture(scope="session", autouse=True)
def _on_the_test_device() -> Iterator[None]:
    """With `RUNG_TEST_DEVICE`, batches that are packed for no device are on it, as the tests' models are."""
    from models import DEVICE

    if DEVICE.type == "cpu":
        yield
        return
    from rung.models import packing

    on_device = packing._to_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_to_tensor", lambda parts, device: on_device(parts, device or DEVICE))
        yield


def byte_level_tokenizer(tokens: int, template: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of so many tokens, trained here: pad 0, bos 1, eos 2."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 5, trainer)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)
    assert len(tokenizer) == tokens
    assert tokenizer.decode(tokenizer("naïve 🙂")["input_ids"]) == "naïve 🙂"
    return tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """320 tokens, a ChatML template whose stop is not the eos."""
    return byte_level_tokenizer(320, CHATML)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that `RUNG_DATA` names; the test is skipped without it."""
    folder = os.environ.get("RUNG_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("RUNG_DATA names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def peers() -> Path:
    """The Python that `make bench` installs TRL for; the test is skipped without it."""
    python = Path(__file__).parents[1] / ".venv-peers/bin/python"
    if not python.exists():
        pytest.skip("there is no .venv-peers, which make bench installs")
    return python


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder that transformers loads: a random llama of two layers with the tiny tokenizer."""
    from models import tiny_model

    folder = tmp_path_factory.mktemp("bases") / "tiny-llama"
    tiny_model(max_position_embeddings=512).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another base than the tiny one: a qwen2 with more tokens, another template and a model card."""
    from models import tiny_model

    folder = tmp_path_factory.mktemp("bases") / "tiny-qwen"
    tiny_model("qwen2", vocab_size=340, max_position_embeddings=384).save_pretrained(folder)
    byte_level_tokenizer(340, GEMMA).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A tiny model\n")
    return folder


@pytest.fixture(scope="module")
def vllm_engine(tiny_base: Path) -> Iterator[Engine]:
    """A server of the tiny base that speaks vLLM's protocol."""
    from vllm_server import serving

    with serving(tiny_base) as engine:
        yield engine


@pytest.fixture
def vllm(vllm_engine: Engine) -> Engine:
    """The server as if it had just been started."""
    vllm_engine.rules, vllm_engine.requests, vllm_engine.first_state, vllm_engine.completed = {}, [], {}, 0
    return vllm_engine


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 questions in 40 groups whose answers a tiny model can learn."""
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [
        {
            "context": f"box {i % 40}",
            "question": f"what is in it, {i}?",
            "answer": "apples" if i % 2 else "pears",
            "box": i % 40,
        }
        for i in range(120)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of a run that takes a second; its output is `run` in the test's own folder."""
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "run.yaml"
    file.write_text(
        # one routine: two processes that measured could choose differently, and their bits would differ
        f"model: {{name: {tiny_base}, dtype: float32, matmul: onednn}}\n"
        f"data: {{path: {questions}, group: box, test: 0.25}}\n"
        "method: {kind: lora, rank: 4}\n"
        "training: {examples_per_step: 8, max_steps: 6, learning_rate: 1.0e-2}\n"
        "evaluation: {metrics: [exact, numeric, perplexity], max_new_tokens: 8, shots: 2, "
        "instruction: Name the fruit.}\n"
        f"output: {tmp_path / 'run'}\n"
    )
    return file


@pytest.fixture
def compared(config: Path, tmp_path: Path) -> Path:
    """The config of a run on pairs: fruit against stones."""
    rows = [
        {"prompt": f"what is in box {i}?", "chosen": "apples", "rejected": "stones", "box": i % 20} for i in range(80)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = config.read_text().replace(
        config.read_text().split("data: {path: ")[1].split(",")[0], str(tmp_path / "pairs.jsonl")
    )
    config.write_text(text + "objective: {kind: preference, beta: 0.5}\n")
    return config


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    log, rules = tmp_path / "requests.jsonl", tmp_path / "rules.json"
    log.touch()
    rules.write_text("{}")
    script = Path(__file__).parent / "server.py"
    with subprocess.Popen(
        [sys.executable, str(script), str(log), str(rules)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield Local(f"http://127.0.0.1:{int(process.stdout.readline())}/v1", log, rules)
        process.kill()
