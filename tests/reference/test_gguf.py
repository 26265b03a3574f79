"""GGUF files in llama.cpp, the oracle: log-probabilities, ids and stops, and mutations that it must see."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, quants
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from builders import policy_of
from conftest import CHATML, SPECIAL, TEXT
from models import SHAPES, tiny_model
from rung.data.chat import ChatTemplate
from rung.errors import GateError, PlanError
from rung.exporting import gguf_layout, gguf_vocabulary, proof
from rung.exporting.gguf_file import GgufModel, write_adapter
from rung.exporting.gguf_layout import architecture_of, context_length
from rung.exporting.gguf_vocabulary import GgufVocabulary, read_vocabulary
from rung.exporting.llama_cpp import LlamaCpp
from rung.exporting.proof import (
    FileProof,
    ProofRow,
    RunLogprobs,
    compare_logprobs,
    next_token_logprobs,
    table_gelu,
)
from rung.exporting.quantization import FILE_TYPES, TensorRole, kind_of, quantize
from rung.exporting.weights import LoraUpdate, ModelWeights
from rung.models.fused_modules import original_forwards
from rung.models.load import load_model_config
from rung.types import Message

pytest.importorskip("xllamacpp")

SILU = ("llama", "mistral", "qwen2", "qwen3", "phi3")
GELU = ("phi", "gemma", "gemma2", "gemma3_text", "gpt2")
LIMIT = 1e-4
"""Nats between float32 in torch and float32 in ggml, on these tiny models."""
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "phi3": {"original_max_position_embeddings": 256},
    # wider than a tiny model's own, so that a wrong width or scale is no coincidence
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    # one of the seeds by which no value lies so near to the middle of two of float16 that both sides round differently
    "gemma3_text": {"seed": 5},
}


@pytest.fixture(scope="module")
def chat(tiny_tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer)


@pytest.fixture(scope="module")
def vocabulary(chat: ChatTemplate) -> GgufVocabulary:
    return read_vocabulary(chat, 320)


def rows(chat: ChatTemplate) -> list[ProofRow]:
    made = []
    for question, answer in (("What is the capital of France?", "Paris, of course.\n"), ("12 apples? 🙂", "15")):
        turns = [Message("user", question)]
        ids = chat.encode([answer + "<|im_end|>"], mid_document=True)[0]
        made.append(ProofRow(chat.prompt_ids(turns), ids, [{"role": "user", "content": question}]))
    return made


def saved(tmp_path: Path, shape: str, **changes: Any) -> tuple[Any, Path]:
    """A tiny model and its folder."""
    model = tiny_model(shape, **{**CHANGES.get(shape, {}), **changes})
    model.save_pretrained(tmp_path / shape)
    return model, tmp_path / shape


def written(folder: Path, vocabulary: GgufVocabulary, type_name: str = "f32") -> Path:
    file = folder.with_suffix(f".{type_name}.gguf")
    GgufModel(ModelWeights(folder), load_model_config(folder), vocabulary, {"name": "x"}).write(
        file, FILE_TYPES[type_name]
    )
    return file


def compared(
    model: Any, file: Path, chat: ChatTemplate, type_name: str = "f32", *, adapter: Path | None = None
) -> FileProof:
    policy = policy_of(model)
    logprobs, table = next_token_logprobs(policy, rows(chat)), None
    if architecture_of(model.config).reads_gelu_from_a_table:
        with original_forwards(model), table_gelu(model):
            table = next_token_logprobs(policy, rows(chat))
    with LlamaCpp(file, 128, threads=1, adapter=adapter) as llama:
        return compare_logprobs(llama, rows(chat), RunLogprobs(logprobs, table), type_name)


@pytest.mark.parametrize("shape", [*SILU, *GELU])
def test_every_shape_answers_in_llama_cpp_as_it_does_here(
    shape: str, chat: ChatTemplate, vocabulary: GgufVocabulary, tmp_path: Path
) -> None:
    """GELU is taken from ggml's table on both sides; the true difference is that of a table in float16."""
    model, folder = saved(tmp_path, shape)
    found = compared(model, written(folder, vocabulary), chat)
    assert found.positions > 8 and found.gate.state == "passed"
    if shape in SILU:
        assert found.table_difference is None and found.largest_difference < LIMIT
    else:
        assert found.table_difference is not None and found.table_difference < LIMIT
        assert found.table_difference < found.largest_difference < 0.02


VARIANTS = {
    "untied, biases": ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
    "heads of another width": ("llama", {"head_dim": 16}),
    "llama3 frequencies": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "linear scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [2.0, 3.0, 4.0, 8.0],
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "part of a head rotated": ("phi", {"partial_rotary_factor": 0.5}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_settings_of_a_model_reach_the_file(
    name: str, chat: ChatTemplate, vocabulary: GgufVocabulary, tmp_path: Path
) -> None:
    shape, changes = VARIANTS[name]
    model, folder = saved(tmp_path, shape, **changes)
    found = compared(model, written(folder, vocabulary), chat)
    difference = found.largest_difference if found.table_difference is None else found.table_difference
    assert difference < LIMIT


@pytest.fixture
def mutated(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    mutation = request.param
    if mutation == "order of q and k":
        monkeypatch.setattr(gguf_layout, "interleaved_rows", lambda rows, heads: torch.arange(rows))
    if mutation == "norm of epsilon 1":
        monkeypatch.setattr(
            "gguf.GGUFWriter.add_layer_norm_rms_eps",
            lambda w, _: w.add_float32("llama.attention.layer_norm_rms_epsilon", 1.0),
        )
    if mutation == "base of the frequencies":
        monkeypatch.setattr(
            "gguf.GGUFWriter.add_rope_freq_base", lambda w, _: w.add_float32("llama.rope.freq_base", 500.0)
        )
    yield mutation


@pytest.mark.parametrize("mutated", ["order of q and k", "norm of epsilon 1", "base of the frequencies"], indirect=True)
def test_a_file_that_is_not_the_model_is_seen(
    mutated: str, chat: ChatTemplate, vocabulary: GgufVocabulary, tmp_path: Path
) -> None:
    model, folder = saved(tmp_path, "llama")
    found = compared(model, written(folder, vocabulary), chat)
    assert found.gate.state == "failed" and found.largest_difference > 0.01


def test_a_window_that_llama_cpp_does_not_know_ends_the_context(
    chat: ChatTemplate, vocabulary: GgufVocabulary, tmp_path: Path
) -> None:
    config = tiny_model("mistral").config
    assert context_length(config, architecture_of(config)) == 5
    config.sliding_window = None
    assert context_length(config, architecture_of(config)) == 256
    longrope = tiny_model("phi3", **VARIANTS["longrope"][1]).config
    assert longrope.max_position_embeddings == 512 and context_length(longrope, architecture_of(longrope)) == 256
    # gemma's windows are in the file, and rows are longer than they
    assert SHAPES["gemma2"]["sliding_window"] == 5 and min(len(row.ids) for row in rows(chat)) > 10


REFUSED = {
    "opt": ("opt", {}),
    "activation": ("llama", {"hidden_act": "relu"}),
    "rope_type": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "query_pre_attn_scalar": ("gemma2", {"query_pre_attn_scalar": 100}),
    "scale_attn_by_inverse_layer_idx": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "layer_types": ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"]}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(words: str) -> None:
    shape, changes = REFUSED[words]
    with pytest.raises(PlanError, match=words):
        architecture_of(tiny_model(shape, **changes).config)


@pytest.mark.parametrize("type_name", ["f16", "bf16", "q8_0", "q5_1", "q4_0", "q4_k_m"])
def test_types_of_fewer_bits(type_name: str, chat: ChatTemplate, vocabulary: GgufVocabulary, tmp_path: Path) -> None:
    """Rounding costs what its bits say, and no more; a tiny model has rows of 32, so K kinds become wider ones."""
    model, folder = saved(tmp_path, "llama", hidden_size=64, intermediate_size=96)
    found = compared(model, written(folder, vocabulary, type_name), chat, type_name)
    assert found.gate.state == "passed"
    limits = {"f16": 2e-3, "bf16": 0.02, "q8_0": 0.05, "q5_1": 0.15, "q4_0": 0.4, "q4_k_m": 0.2}
    assert limits[type_name] / 50 < found.mean_difference < limits[type_name]


def test_both_packages_round_alike() -> None:
    """The file is the same whichever of them writes it."""
    libgguf = pytest.importorskip("libgguf")
    values = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    for kind in (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1):
        assert libgguf.quantize_rows_raw(kind, values, 8, 512) == quants.quantize(values, kind).tobytes()
    for kind in (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):
        restored = quants.dequantize(quantize(values, kind), kind).reshape(8, 512)
        error = np.sqrt(np.mean((restored - values) ** 2))
        assert error < {Kind.Q2_K: 0.4, Kind.Q3_K: 0.2, Kind.Q4_K: 0.09, Kind.Q5_K: 0.05, Kind.Q6_K: 0.03}[kind]


def kinds(type_name: str, part: str, *, columns: int = 1024, layers: int = 32, groups: int = 1) -> list[str]:
    """Kinds of a matrix in every layer."""
    names = [f"blk.{layer}.{part}.weight" for layer in range(layers)]
    roles = [TensorRole(name, (columns, columns), layers, False, groups) for name in names]
    return [kind_of(FILE_TYPES[type_name], role).name for role in roles]


def test_the_mix_is_that_of_llama_quantize() -> None:
    """What `llama-quantize` printed for models of 32 layers: the values and down matrices of some layers get more."""
    more = [i for i, kind in enumerate(kinds("q4_k_m", "ffn_down")) if kind == "Q6_K"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert kinds("q4_k_m", "attn_v") == kinds("q4_k_m", "ffn_down")
    assert set(kinds("q4_k_m", "attn_q")) == {"Q4_K"}
    assert kinds("q4_k_s", "attn_v")[3:5] == ["Q5_K", "Q4_K"] and kinds("q4_k_s", "ffn_down")[3:5] == ["Q5_K", "Q4_K"]
    assert kinds("q3_k_m", "attn_v")[1:3] == ["Q5_K", "Q4_K"] and set(kinds("q3_k_m", "attn_output")) == {"Q4_K"}
    assert set(kinds("q2_k", "attn_v", groups=4)) == {"Q4_K"} and set(kinds("q2_k", "attn_v")) == {"Q3_K"}
    assert set(kinds("q6_k", "ffn_up")) == {"Q6_K"} and set(kinds("q8_0", "ffn_down")) == {"Q8_0"}
    # 576 is no multiple of 256, 48 is none of 32
    assert set(kinds("q4_k_m", "attn_q", columns=576)) == {"Q5_0"}
    assert set(kinds("q6_k", "attn_q", columns=576)) == {"Q8_0"} and set(kinds("q4_0", "attn_q", columns=48)) == {"F16"}
    head = TensorRole("token_embd.weight", (100, 1024), 32, True, 1)
    assert kind_of(FILE_TYPES["q4_k_m"], head) is Kind.Q6_K and kind_of(FILE_TYPES["q4_0"], head) is Kind.Q6_K
    norm = TensorRole("blk.0.attn_norm.weight", (1024,), 32, False, 1)
    assert kind_of(FILE_TYPES["q4_0"], norm) is Kind.F32


def test_an_adapter_in_llama_cpp(chat: ChatTemplate, vocabulary: GgufVocabulary, tmp_path: Path) -> None:
    """Ranks and scales of each matrix its own: llama.cpp has one alpha, so the scale goes into B."""
    model, folder = saved(tmp_path, "llama")
    generator = torch.Generator().manual_seed(3)
    updates = {}
    for number, role in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
        name = f"model.layers.{number % 2}.self_attn.{role}"
        weight, rank = model.get_submodule(name).weight, 2 + number
        first, second = (torch.randn(shape, generator=generator) * 0.2 for shape in ((len(weight), rank), (rank, 32)))
        updates[name] = LoraUpdate(first, second, 0.5 + number)
    base = written(folder, vocabulary)
    weights = ModelWeights(folder, updates)
    adapter = write_adapter(tmp_path / "adapter.gguf", weights, load_model_config(folder), {}).path
    before = next_token_logprobs(policy_of(model), rows(chat))
    with torch.no_grad():
        for name, update in updates.items():
            weight = model.get_submodule(name).weight
            weight.copy_(update.added_to(weight))
    assert compared(model, base, chat, adapter=adapter).largest_difference < LIMIT
    assert (next_token_logprobs(policy_of(model), rows(chat))[0] - before[0]).abs().max() > 0.1
    # merged while they are written: the same file as of the merged model
    merged = tmp_path / "merged.gguf"
    GgufModel(weights, load_model_config(folder), vocabulary, {}).write(merged, FILE_TYPES["f32"])
    assert compared(model, merged, chat).largest_difference < LIMIT


FAULTS = {
    "digits split": lambda v, stop: v.with_pre_tokenizer("smollm"),
    "template": lambda v, stop: dataclasses.replace(v, template=CHATML.replace("'\n'", "'\n\n'")),
    "BOS in front": lambda v, stop: dataclasses.replace(v, adds_bos=True),
    "token moved": lambda v, stop: dataclasses.replace(v, tokens=[*v.tokens[:-2], v.tokens[-1], v.tokens[-2]]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_proof_sees_other_tokens(name: str, chat: ChatTemplate, vocabulary: GgufVocabulary, tmp_path: Path) -> None:
    _, folder = saved(tmp_path, "llama")
    faulty = FAULTS[name](vocabulary, chat.stop_ids[0])
    question = f"2024 and 1500 {chat.decode([[318, 319]])[0]}"
    row = ProofRow(chat.prompt_ids([Message("user", question)]), [1], [{"role": "user", "content": question}])
    with LlamaCpp(written(folder, vocabulary), 128, threads=1) as llama:
        proof.check_texts(llama, chat, [*rows(chat), row])
    with LlamaCpp(written(folder, faulty), 128, threads=1) as llama, pytest.raises(GateError, match="other tokens"):
        proof.check_texts(llama, chat, [*rows(chat), row])


def test_the_proof_sees_a_stop_that_is_not_obeyed(
    chat: ChatTemplate, vocabulary: GgufVocabulary, tmp_path: Path
) -> None:
    _, folder = saved(tmp_path, "llama")
    stop, tokens, types = chat.stop_ids[0], list(vocabulary.tokens), list(vocabulary.types)
    # llama.cpp knows the usual stops by their text as well
    tokens[stop], types[stop] = b"<|over|>", gguf_vocabulary.TokenType.USER_DEFINED
    faulty = dataclasses.replace(vocabulary, tokens=tokens, types=types, special_ids={"eos": chat.eos_id or 2})
    # a row without the stop in it, whose ids are the same in both
    row = ProofRow(chat.encode(["apples and pears"])[0], [], None, text="apples and pears")
    with LlamaCpp(written(folder, faulty), 128, threads=1) as llama, pytest.raises(GateError, match="after a stop"):
        proof.check_texts(llama, chat, [row])


def sentencepiece_tokenizer(*, adds_space: bool) -> PreTrainedTokenizerFast:
    """BPE with spaces as a letter and bytes to fall back to, as Llama 2, Mistral, Phi-3 and Gemma have it."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps if adds_space else steps[1:])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        if adds_space
        else [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=special, show_progress=False)
    backend.train_from_iterator([text.replace(" ", "▁") for text in TEXT * 5], trainer)
    # bytes are tokens of the model and not text to look for
    parts = json.loads(backend.to_str())
    parts["added_tokens"] = [t for t in parts["added_tokens"] if not t["content"].startswith("<0x")]
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    backend = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template="{{ bos_token }}" + CHATML, **names)


@pytest.mark.parametrize("adds_space", [True, False])
def test_a_vocabulary_of_sentencepiece(adds_space: bool, tmp_path: Path) -> None:
    """Scores from ranks give the same merges; BOS is written by the template alone, and stands there once."""
    chat = ChatTemplate(sentencepiece_tokenizer(adds_space=adds_space))
    vocabulary = read_vocabulary(chat, 500)
    assert vocabulary.model == "llama" and not vocabulary.adds_bos and vocabulary.adds_space is adds_space
    assert len(vocabulary.tokens) == 500 and vocabulary.types[499] is gguf_vocabulary.TokenType.UNUSED
    model, folder = saved(tmp_path, "mistral", vocab_size=500)
    file = written(folder, vocabulary)
    with LlamaCpp(file, 128, threads=1) as llama:
        proof.check_texts(llama, chat, rows(chat))
    assert compared(model, file, chat).largest_difference < LIMIT


def test_the_pre_tokenizer_is_found_by_trying(chat: ChatTemplate, vocabulary: GgufVocabulary) -> None:
    """A name that the parts do not give is found on rows, and one that does not exist is refused."""
    texts = ["in 2024 there were 1500", "naïve 🙂  two  spaces"]
    assert proof.choose_pre_tokenizer(vocabulary, chat, texts).pre == "gpt-2"
    wrong = vocabulary.with_pre_tokenizer("smollm")
    assert proof.choose_pre_tokenizer(wrong, chat, texts).pre == "gpt-2"


def test_known_pre_tokenizers() -> None:
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    symbols = "| ?[^\\s\\p{L}\\p{N}]+"
    rest, level = "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+", {"type": "ByteLevel"}
    known = {
        "gpt-2": [level],
        "smollm": [{"type": "Digits", "individual_digits": True}, level],
        "llama-bpe": [
            {**split, "pattern": {"Regex": rest + "|\\p{N}{1,3}" + symbols}},
            level,
        ],
        "qwen2": [{**split, "pattern": {"Regex": rest + "|\\p{N}" + symbols}}, level],
    }
    for name, steps in known.items():
        parts = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
        assert gguf_vocabulary.known_pre_tokenizer(parts) == name
    assert gguf_vocabulary.known_pre_tokenizer({"pre_tokenizer": {"type": "Whitespace"}}) is None


def test_tokenizers_that_llama_cpp_does_not_have(tiny_tokenizer: PreTrainedTokenizerFast, chat: ChatTemplate) -> None:
    with pytest.raises(PlanError, match="beyond the embedding"):
        read_vocabulary(chat, 319)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "<|im_end|>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHATML, eos_token="<|im_end|>")
    with pytest.raises(PlanError, match="WordLevel"):
        read_vocabulary(ChatTemplate(tokenizer), 3)


def test_a_file_holds_the_tensors_and_nothing_else(vocabulary: GgufVocabulary, tmp_path: Path) -> None:
    """Tied heads are left out, vectors stay in float32, and names are llama.cpp's."""
    _, folder = saved(tmp_path, "qwen2")
    reader = GGUFReader(written(folder, vocabulary, "f16"))
    kinds_by_name = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert kinds_by_name["output.weight"] is Kind.F16
    assert kinds_by_name["blk.1.attn_q.bias"] is Kind.F32
    assert kinds_by_name["blk.0.ffn_norm.weight"] is Kind.F32
    assert len(kinds_by_name) == 3 + 2 * 12
    _, tied = saved(tmp_path, "llama")
    assert "output.weight" not in {tensor.name for tensor in GGUFReader(written(tied, vocabulary)).tensors}


def test_a_pre_tokenizer_is_not_taken_for_a_similar_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen's keeps line breaks with the punctuation before them, GPT-2's does not: rows of one line do not show it."""
    split = (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+"
        "|\\s+(?!\\S)|\\s+"
    )
    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["The end.\n\nNext:\n", "it'S 3 33 333\n"] * 9, trainer)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    chat = ChatTemplate(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **special))
    vocabulary = read_vocabulary(chat, len(chat.tokenizer))
    assert vocabulary.pre == "qwen2"
    unknown = dataclasses.replace(vocabulary, pre=None)
    # no merge joins digits here, so Llama 3's gives the same ids
    assert proof.choose_pre_tokenizer(unknown, chat, ["one line"]).pre in ("llama-bpe", "qwen2")
    monkeypatch.setattr(proof, "TRICKY_TEXTS", ())
    assert proof.choose_pre_tokenizer(unknown, chat, ["one line"]).pre == "gpt-2"
    with pytest.raises(PlanError, match="only llama.cpp"):
        unknown.write(None)  # type: ignore[arg-type]


def test_the_name_in_the_file_changes_no_ids(chat: ChatTemplate) -> None:
    """llama.cpp strips spaces behind control tokens where the name of a model contains phi-3."""
    assert gguf_vocabulary.general_name(chat, "support-Phi-3") == "support-phi_3"
    stripping = copy.copy(chat)
    stripping.tokenizer = copy.deepcopy(chat.tokenizer)
    stripping.tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True)]})
    assert gguf_vocabulary.general_name(stripping, "mine") == "mine (phi-3 tokenizer)"


def test_a_file_of_few_bits_must_be_nearer_to_the_run_than_to_the_base(
    chat: ChatTemplate, vocabulary: GgufVocabulary, tmp_path: Path
) -> None:
    """The mutation: an adapter that is lost moves the answers less than four bits may."""
    model, folder = saved(tmp_path, "llama")
    file = written(folder, vocabulary, "q4_0")
    base = next_token_logprobs(policy_of(model), rows(chat))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    run = RunLogprobs(next_token_logprobs(policy_of(model), rows(chat)), base=base)
    with LlamaCpp(file, 128, threads=1) as llama, pytest.raises(GateError, match="nearer to the base"):
        compare_logprobs(llama, rows(chat), run, "q4_0")


def test_ends_of_the_base_beyond_three_are_named(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    chat = ChatTemplate(tiny_tokenizer, end_ids=[2, 40, 41, 42])
    _, folder = saved(tmp_path, "llama")
    with LlamaCpp(written(folder, read_vocabulary(chat, 320)), 128, threads=1) as llama:
        ignored = proof.check_texts(llama, chat, rows(chat))
    assert ignored == tiny_tokenizer.convert_ids_to_tokens([41, 42])
