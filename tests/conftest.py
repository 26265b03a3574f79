"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
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


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 tokens, trained here: pad 0, bos 1, eos 2, a ChatML template whose stop is not the eos."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 5, trainer)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **special)
    assert len(tokenizer) == 320
    assert tokenizer.decode(tokenizer("naïve 🙂")["input_ids"]) == "naïve 🙂"
    return tokenizer


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that `RUNG_DATA` names; the test is skipped without it."""
    folder = os.environ.get("RUNG_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("RUNG_DATA names no folder")
    return Path(folder)
