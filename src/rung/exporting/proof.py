"""The gate `publish.gguf`: a written file is loaded in llama.cpp and compared with the run on the run's own rows.

Three comparisons: the ids of each conversation by the template and tokenizer in the file, the log-probabilities of the
next token inside the answers, and whether every stop of the run ends an answer. Each has caught a real fault of other
exports: a pre-tokenizer of another family, rows of q and k in the wrong order, a stop that is printed and not obeyed.
`commands/export_gguf.py` proves every file and removes what fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from torch import Tensor, nn
from transformers import activations

from rung.data.chat import ChatTemplate
from rung.errors import GateError, PlanError
from rung.exporting.gguf_vocabulary import PRE_TOKENIZERS, GgufVocabulary
from rung.exporting.llama_cpp import CERTAIN, LlamaCpp
from rung.models.packing import pack_separately
from rung.models.policy import Policy
from rung.training.gates import TOLERANCE
from rung.training.run_folder import Gate
from rung.types import Example, Source

POSITIONS_PER_ROW = 16
"""Positions inside an answer at which the next token is compared."""
TOP_TOKENS = 40
"""Most probable tokens compared at each position; all others together rarely have one percent."""
MEAN_LIMITS = {"f16": 0.05, "bf16": 0.05, "q8": 0.3, "q6": 0.3, "q5": 0.3, "q4": 1.0, "q3": 2.0, "q2": 3.0}
"""Largest mean difference, in nats, by the beginning of the type's name: two to ten times what rounding costs a model
of 135M parameters, where it costs most (docs/export.md). Rows in a wrong order cost several nats on average."""


@dataclass(frozen=True)
class ProofRow:
    """One row of the run's data, as the run reads it."""

    prompt: Sequence[int]
    answer: Sequence[int]
    """With its stop."""
    messages: Sequence[Mapping[str, Any]] | None
    """The turns of the prompt; None for plain text."""
    tools: Sequence[Any] | None = None
    text: str = ""
    """Plain text."""

    @property
    def positions(self) -> list[int]:
        """Positions of the last token read before each compared one: spread over the answer, its first included."""
        count = min(POSITIONS_PER_ROW, len(self.answer))
        offsets = sorted({round(x) for x in np.linspace(0, len(self.answer) - 1, count)})
        return [len(self.prompt) - 1 + offset for offset in offsets]

    @property
    def ids(self) -> list[int]:
        """Prompt and answer."""
        return [*self.prompt, *self.answer]


@dataclass(frozen=True)
class RunLogprobs:
    """Log-probabilities of the next token at the positions of each row, [positions, V]."""

    logprobs: Sequence[Tensor]
    """By the run."""
    with_table_gelu: Sequence[Tensor] | None = None
    """By the run with GELU from ggml's table, for models that have it."""
    base: Sequence[Tensor] | None = None
    """By the base of a run with an adapter."""


@dataclass(frozen=True, slots=True)
class FileProof:
    """What was measured of one file."""

    gate: Gate
    largest_difference: float
    """Of log-probabilities of the most probable tokens, in nats."""
    mean_difference: float
    """Weighted by the run's probabilities, in nats."""
    table_difference: float | None
    """Largest difference to the run with GELU from ggml's table."""
    rows: int
    positions: int


@torch.no_grad()
def next_token_logprobs(policy: Policy, rows: Sequence[ProofRow]) -> list[Tensor]:
    """The run's log-probabilities [positions, V] of each row, float32 on the CPU."""
    logprobs = []
    for number, row in enumerate(rows):
        ids = np.array(row.ids, dtype=np.int32)
        example = Example(ids, np.arange(len(ids)) > 0, Source("proof", number))
        (batch,) = pack_separately([example], policy.device)
        hidden = policy.hidden_states(batch)[torch.from_numpy(batch.rows[0])[row.positions]]
        with policy.autocast():
            logits = policy.logit_map.apply_(policy.head(hidden).clone())
        logprobs.append(logits.float().log_softmax(-1).cpu())
    return logprobs


class TableGelu(nn.Module):
    """GELU as ggml computes it on a processor: looked up in a table over float16, and linear beyond 10."""

    def forward(self, x: Tensor) -> Tensor:
        """The activation of x, in its dtype."""
        rounded = nn.functional.gelu(x.half().float(), approximate="tanh").half().to(x.dtype)
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, rounded))


_TANH_GELUS = (activations.NewGELUActivation, activations.GELUTanh, activations.FastGELUActivation)


@contextmanager
def table_gelu(model: nn.Module) -> Iterator[None]:
    """Inside, a model whose modules compute by themselves (`fused: false`) takes GELU from ggml's table."""
    replaced = {name: module for name, module in model.named_modules() if isinstance(module, _TANH_GELUS)}
    try:
        for name in replaced:
            model.set_submodule(name, TableGelu())
        yield
    finally:
        for name, module in replaced.items():
            model.set_submodule(name, module)


def check_texts(llama: LlamaCpp, chat: ChatTemplate, rows: Sequence[ProofRow]) -> list[str]:
    """Ends of text of the base that end no answer in llama.cpp, which has room for three in a file.

    Raises `GateError` where llama.cpp reads a row as other tokens than the run, or goes on after a learned stop.
    """
    for row in rows:
        _check_ids(llama, row)
    ignored = [token for token in chat.generation_stop_ids if not _obeys_stop(llama, rows[0].prompt, token)]
    names = [str(chat.tokenizer.convert_ids_to_tokens(token)) for token in ignored]
    if any(token in chat.stop_ids for token in ignored):
        summary = "gate publish.gguf failed: llama.cpp goes on after a stop of the run"
        raise GateError(summary, where=llama.model.name, given=", ".join(names))
    return names


def compare_logprobs(
    llama: LlamaCpp,
    rows: Sequence[ProofRow],
    run: RunLogprobs,
    type_name: str,
) -> FileProof:
    """Compare log-probabilities with the run's. Raises `GateError` for a file that is nearer to the base."""
    given = [llama.top_logprobs([row.ids[: position + 1] for position in row.positions], TOP_TOKENS) for row in rows]
    largest, mean = _differences(given, run.logprobs)
    # a few bits hide a lost adapter, but not which of both models it is
    if run.base is not None and (to_base := _differences(given, run.base)[1]) <= mean:
        allowed = f"{mean:.2g} nats to the run"
        summary = "gate publish.gguf failed: the file is nearer to the base than to the run"
        raise GateError(summary, where=llama.model.name, given=f"{to_base:.2g} nats to the base", allowed=allowed)
    table = None if run.with_table_gelu is None else _differences(given, run.with_table_gelu)
    table_largest = None if table is None else table[0]
    if type_name == "f32":
        # two values that round to different entries of the table differ more than sums do, in single places
        measured = largest if table is None else table[1]
        gate = Gate.at_most("publish.gguf", measured, TOLERANCE[torch.float32])
    else:
        limit = next(limit for start, limit in MEAN_LIMITS.items() if type_name.startswith(start))
        gate = Gate.at_most("publish.gguf", mean, limit)
    positions = sum(len(row.positions) for row in rows)
    return FileProof(gate, largest, mean, table_largest, len(rows), positions)


def _differences(given: Sequence[Sequence[Mapping[int, float]]], logprobs: Sequence[Tensor]) -> tuple[float, float]:
    """The largest difference, and the mean weighted by the run's probabilities."""
    largest = weighted = weight = 0.0
    for row, run_row in zip(given, logprobs, strict=True):
        for top, run in zip(row, run_row, strict=True):
            expected = run[list(top)]
            difference = (torch.tensor(list(top.values())) - expected).abs()
            # a NaN must not be passed over, as max() would
            largest = max(largest, float(difference.max().nan_to_num(nan=math.inf)))
            weighted += float((expected.exp() * difference).sum())
            weight += float(expected.exp().sum())
    return largest, weighted / weight


def _check_ids(llama: LlamaCpp, row: ProofRow) -> None:
    if row.messages is None:
        expected, given = row.ids, llama.tokenize(row.text, as_prompt=True)
    else:
        expected = list(row.prompt)
        given = llama.tokenize(llama.render(row.messages, row.tools), as_prompt=True)
    if given == expected:
        return
    pairs = enumerate(zip_longest(given, expected))
    place = next(i for i, (first, second) in pairs if first != second)
    summary = "gate publish.gguf failed: llama.cpp reads a row as other tokens than the run"
    at = f"from token {place}: {given[place : place + 4]}"
    raise GateError(summary, where=llama.model.name, given=at, allowed=str(expected[place : place + 4]))


def _obeys_stop(llama: LlamaCpp, prompt: Sequence[int], token: int) -> bool:
    """Whether a token that is made certain ends the answer at once."""
    answer = llama.answer(prompt, 2, bias=[(token, CERTAIN)])
    return answer.stopped and all(other == token for other in answer.ids)


TRICKY_TEXTS = (
    "The end.\n\nNext:\n- one;\n- (two)\n\n\n* three!\r\n\r\n",
    "It's what they'RE saying: I'Ll, we'd, she'S",
    "if (x==1) {\n\treturn  y[ 0 ];\n\n    }\t\t// ...---===\n",
    "3 33 333 3333 33333 3.14 1,234,567.89 2024-11-30 12:34:56",
    "   spaces   and\u00a0others \n \n\n  ",
    "naïve café, Straße, Привет мир, 東京は今日も晴れ, 한국어, العربية, हिन्दी 🙂👩‍👩‍👧‍👦",
    "snake_case camelCase HTTPServer2Go https://example.org/a?b=c&d=%20 user@example.org",
)
"""Where pre-tokenizers differ: breaks after punctuation, contractions, tabs, runs of digits and spaces, scripts."""


def choose_pre_tokenizer(vocabulary: GgufVocabulary, chat: ChatTemplate, texts: Sequence[str]) -> GgufVocabulary:
    """The vocabulary with the first pre-tokenizer of llama.cpp that gives the run's ids on these and tricky texts.

    Raises `PlanError` if none does.
    """
    if vocabulary.model != "gpt2":
        return vocabulary
    texts = [*TRICKY_TEXTS, *texts]
    expected = chat.encode(texts)
    names = dict.fromkeys(name for name in (vocabulary.pre, *PRE_TOKENIZERS) if name is not None)
    with TemporaryDirectory(prefix="rung-gguf-") as folder:
        for name in names:
            candidate, file = vocabulary.with_pre_tokenizer(name), Path(folder) / "probe.gguf"
            _write_probe(file, candidate)
            with LlamaCpp(file, 512, threads=1) as llama:
                given = (llama.tokenize(text, as_prompt=False) for text in texts)
                if all(a == b for a, b in zip(given, expected, strict=True)):
                    return candidate
    hint = "rung export --as merged writes a transformers folder"
    raise PlanError("llama.cpp has no pre-tokenizer that gives the ids of this tokenizer", hint=hint)


def _write_probe(path: Path, vocabulary: GgufVocabulary) -> None:
    """A model of one layer of zeros with a vocabulary: enough to tokenize."""
    width = 32
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    vocabulary.write(writer)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(vocabulary.tokens), width), "output_norm": (width,)}
    shapes |= {f"blk.0.{name}": (width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (width, width) for name in ("ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {f"blk.0.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32 if len(shape) == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
