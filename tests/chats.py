"""Chat templates of the field in short, tokenizers that carry them, and conversations, for tests of `Chat`."""

from __future__ import annotations

import copy
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rung.data.template import PLAIN_TEMPLATE
from rung.types import Message, Record, Source

AT = Source("d.jsonl", 3)
LLAMA3 = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson + '<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{{ '<|eom_id|>' }}"
    "{% else %}{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'].split('</think>')[-1] if not loop.last else m['content'] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": (None, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "zephyr": (ZEPHYR, "</s>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "llama2": (LLAMA2, " </s>"),
    "plain": (PLAIN_TEMPLATE, "</s>"),
}


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None, **special: str) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template or changed.chat_template
    for name, token in special.items():
        setattr(changed, name, token)
    return changed


def record(*contents: str, **more: Any) -> Record:
    roles = ("user", "assistant")
    return Record(tuple(Message(roles[i % 2], c) for i, c in enumerate(contents)), AT, **more)


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """A SentencePiece-like vocabulary, which writes a space of its own before a text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["User: what is it?\n Assistant: it is a cat.\n[INST] [/INST]"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"bos_token": "<s>", "eos_token": "</s>"})
