"""Virtual tokens against peft's own prompt and prefix tuning, one document at a time, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from builders import documents, in_one_batch, logits_of, policy_of, tuned
from models import tiny_model
from rung.config.method import METHOD_CONFIGS
from rung.config.objective import SftConfig
from rung.errors import CheckpointError, ConfigError, DataError, PlanError
from rung.methods.lora import without_peft_warnings
from rung.methods.prompt_learning import frequent_ids, text_ids
from rung.methods.registry import attach_method
from rung.models.base_model import BaseModel
from rung.models.generate import Sampling, generate
from rung.models.packing import MIN_PREFIX_AHEAD, pack, pack_separately
from rung.models.policy import Policy
from rung.objectives.sft import SftObjective
from rung.training.gates import check_decoding, check_packing
from rung.training.step import CalibrationBatch, accumulate
from rung.types import Example
from tolerances import FLOAT64, LLAMA_GRADIENT

SFT = SftObjective(SftConfig())
COUNT = 4
SHAPES = ["llama", "qwen3", "phi", "gpt2"]


def theirs(kind: str, shape: str, rows: Tensor) -> tuple[PeftModel, Tensor]:
    """peft's model with these numbers, and the parameter that holds them."""
    plain = tiny_model(shape, dtype=torch.float64)
    plain.set_attn_implementation("sdpa")
    config = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}[kind]
    model = without_peft_warnings(get_peft_model, plain, config(task_type="CAUSAL_LM", num_virtual_tokens=COUNT))
    parameter = model.prompt_encoder["default"].embedding.weight
    parameter.data = rows.detach().clone().double()
    return model, parameter


def naive_loss(model: PeftModel, examples: list[Example]) -> Tensor:
    """Weighted mean over supervised tokens, document by document, through peft."""
    total = sum(e.weight * int(e.supervised.sum()) for e in examples)
    losses = []
    for e in examples:
        ids = torch.tensor(e.ids, dtype=torch.long)[None]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(e) :]
        predicted = torch.from_numpy(np.flatnonzero(e.supervised))
        chosen = logits.log_softmax(-1)[predicted - 1, ids[0, predicted]]
        losses.append(-e.weight * chosen.sum() / total)
    return torch.stack(losses).sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("shared", [0, MIN_PREFIX_AHEAD + 9])
def test_loss_and_gradient_are_those_of_peft(kind: str, shape: str, shared: int) -> None:
    examples = documents(6, count=7, shared=shared)
    policy, method = tuned(kind, shape, dtype=torch.float64, virtual_tokens=COUNT)
    ((_, parameter),) = method.trainable().items()
    model, their_parameter = theirs(kind, shape, parameter)
    expected = naive_loss(model, examples)
    expected.backward()
    expected = expected.detach()
    limit = FLOAT64 if shape in ("phi", "gpt2") else LLAMA_GRADIENT
    for batches in (pack(examples, 50), pack_separately(examples), pack(examples, 10_000)):
        parameter.grad = None
        loss = accumulate(policy, SFT, batches)
        assert float(loss) == pytest.approx(float(expected), rel=limit)
        assert (parameter.grad - their_parameter.grad).norm() / their_parameter.grad.norm() < limit


@pytest.mark.parametrize("shape", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("prompt", {}),
        ("prefix", {}),
        ("prefix", {"projection": 6}),
        ("p_tuning", {"encoder": "lstm"}),
        ("p_tuning", {"encoder": "mlp", "layers": "all"}),
    ],
    ids=str,
)
def test_the_files_load_in_plain_peft(kind: str, config: dict[str, object], shape: str, tmp_path: Path) -> None:
    policy, method = tuned(kind, shape, virtual_tokens=COUNT, **config)
    method.save(tmp_path)
    plain = tiny_model(shape)
    plain.set_attn_implementation("eager")
    model = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    (document,) = documents(1, count=1)
    ids = torch.tensor(document.ids, dtype=torch.long)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(document) :]
        ours = logits_of(policy, pack_separately([document])[0])
    assert (logits - ours).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("shape", ["llama", "gpt2", "gemma2", "mistral"])
def test_packing_and_decoding_agree(kind: str, shape: str) -> None:
    policy, _ = tuned(kind, shape, virtual_tokens=3)
    short = [d for d in documents(0, count=30) if len(d) < 8] if shape in ("gemma2", "mistral") else documents()
    assert check_packing(policy, in_one_batch(documents())).state == "passed"
    if shape in ("llama", "gpt2"):
        assert check_decoding(policy, short).state == "passed"


def test_an_answer_that_leaves_the_window_is_refused() -> None:
    policy, _ = tuned("prompt", "mistral", virtual_tokens=3)
    with pytest.raises(PlanError, match="sliding window"):
        generate(policy, [[5, 6, 7]], stop_ids=[], sampling=Sampling(4))


def test_a_shared_beginning_of_prompts_changes_nothing() -> None:
    policy, _ = tuned("prefix", virtual_tokens=3)
    prompts = [[9, 8, 7, 6, 5, i] for i in range(20, 25)]
    together = generate(policy, prompts, stop_ids=[], sampling=Sampling(5))
    alone = [generate(policy, [prompt], stop_ids=[], sampling=Sampling(5))[0] for prompt in prompts]
    assert [a.ids for a in together] == [a.ids for a in alone]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(np.array(a.logprobs) - np.array(b.logprobs)).max() < 1e-4


def test_gradients_reach_virtual_tokens_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: keys and values that pass nothing on leave the prompt without a gradient."""
    policy, method = tuned("prompt", virtual_tokens=3)
    calls = []
    genuine = policy.prefix_kv
    monkeypatch.setattr(policy, "prefix_kv", lambda *given: calls.append(1) or genuine(*given))
    accumulate(policy, SFT, pack(documents(6, count=7), 30))
    assert len(calls) == 1 and method.trainable()["prompt_embeddings"].grad.abs().max() > 0
    monkeypatch.setattr("rung.models.policy.PrefixCache.backward", lambda self: None)
    method.trainable()["prompt_embeddings"].grad = None
    accumulate(policy, SFT, pack(documents(6, count=7), 30))
    assert method.trainable()["prompt_embeddings"].grad is None


def test_prompts_begin_with_real_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    rows = model.get_input_embeddings().weight
    text = "a question of two words"
    for config in ({"init": "text", "init_text": text}, {"init": "vocabulary"}):
        method = attach_method(model, METHOD_CONFIGS["prompt"](virtual_tokens=7, **config), seed=0)
        policy = Policy(BaseModel(model, tiny_tokenizer, "tiny", "tiny", torch.float32), method)
        method.calibrate(CalibrationBatch(policy, SFT, documents(), 100))
        if config["init"] == "text":
            ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
            expected = rows[torch.tensor((ids * 7)[:7])]
            assert torch.equal(method.tables[""].detach(), expected)
        else:
            found = [int((rows == row).all(dim=1).nonzero()[0]) for row in method.tables[""].detach()]
            assert len(set(found)) == 7 and not set(found) & set(tiny_tokenizer.all_special_ids)


def test_a_prefix_begins_as_the_keys_and_values_of_real_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A document behind it reads as one behind those tokens."""
    model = tiny_model()
    method = attach_method(model, METHOD_CONFIGS["prefix"](virtual_tokens=5), seed=0)
    policy = Policy(BaseModel(model, tiny_tokenizer, "tiny", "tiny", torch.float32), method)
    method.calibrate(CalibrationBatch(policy, SFT, documents(), 100))
    (document,) = documents(1, count=1)
    ids = frequent_ids(tiny_tokenizer, 5, 0)
    whole = Example(
        np.array([*ids, *document.ids], np.int32), np.array([False] * 5 + [*document.supervised]), document.source
    )
    expected = policy_of(model).logprobs(pack_separately([whole])[0])
    assert (policy.logprobs(pack_separately([document])[0]) - expected).abs().max() < 1e-4


def test_what_cannot_be_is_said(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no token"):
        text_ids(tiny_tokenizer, "", 3)
    with pytest.raises(ConfigError, match=r"method\.virtual_tokens"):
        frequent_ids(tiny_tokenizer, 100_000, 0)
    with pytest.raises(ValueError, match="go together"):
        METHOD_CONFIGS["prompt"](init="text")
    _, method = tuned("prompt", virtual_tokens=3)
    _, lora = tuned("lora")
    lora.save(tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        method.load(tmp_path)


TWO = ("finance", "support")


def of_tasks(examples: list[Example]) -> list[Example]:
    return [replace(e, task=TWO[i % 2]) for i, e in enumerate(examples)]


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p_tuning"])
def test_each_task_reads_behind_its_own(kind: str) -> None:
    """As if each were run alone, however the step is packed."""
    examples = of_tasks(documents(6, count=8, shared=20))
    policy, method = tuned(kind, "gpt2", dtype=torch.float64, virtual_tokens=COUNT, tasks=TWO)
    with torch.no_grad():
        for name, parameter in method.trainable().items():
            parameter.mul_(30.0 if name.startswith("prompt_embeddings") else 1.0)  # far apart
    found = []
    for batches in (pack(examples, 10_000), pack(examples, 40), pack_separately(examples)):
        for parameter in method.trainable().values():
            parameter.grad = None
        loss = float(accumulate(policy, SFT, batches))
        found.append((loss, torch.cat([p.grad.flatten() for p in method.trainable().values()])))
        assert all(len({d.task for d in batch.documents}) == 1 for batch in batches)
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=FLOAT64)
        assert (gradient - found[0][1]).norm() / found[0][1].norm() < FLOAT64
    swapped = [replace(e, task=TWO[i % 2 == 0]) for i, e in enumerate(examples)]
    assert abs(float(accumulate(policy, SFT, pack(swapped, 40))) - found[0][0]) > 100 * FLOAT64


def test_answers_follow_the_task_and_an_unknown_one_is_refused() -> None:
    policy, _ = tuned("prompt", virtual_tokens=COUNT, tasks=TWO)
    said = [generate(policy, [[5, 6, 7]], stop_ids=[], sampling=Sampling(5), task=task)[0].logprobs for task in TWO]
    assert said[0] != said[1]
    for task in ("other", None):
        with pytest.raises(DataError, match="finance, support"):
            generate(policy, [[5, 6, 7]], stop_ids=[], sampling=Sampling(5), task=task)


@pytest.mark.parametrize("kind", ["prompt", "p_tuning"])
def test_tasks_are_saved_each_in_peft_s_files(kind: str, tmp_path: Path) -> None:
    policy, method = tuned(kind, virtual_tokens=COUNT, tasks=TWO)
    method.save(tmp_path)
    (document,) = of_tasks(documents(1, count=1))
    ids = torch.tensor(document.ids, dtype=torch.long)[None]
    for number, task in enumerate(TWO):
        plain = tiny_model()
        plain.set_attn_implementation("eager")
        model = PeftModel.from_pretrained(plain, str(tmp_path / f"task-{number}")).eval()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(document) :]
            ours = logits_of(policy, pack_separately([replace(document, task=task)])[0])
        assert (logits - ours).abs().max() < 1e-4
    again = attach_method(tiny_model(), METHOD_CONFIGS[kind](virtual_tokens=COUNT, tasks=TWO), seed=9)
    again.load(tmp_path)
    batch = pack_separately([document])[0]
    assert torch.equal(policy_of(again.model, again).logprobs(batch), policy.logprobs(batch))


def test_tasks_share_the_encoder() -> None:
    _, method = tuned("p_tuning", virtual_tokens=COUNT, tasks=TWO, encoder="mlp", hidden=6)
    names = method.trainable()
    assert sorted(n for n in names if not n.startswith("encoder.")) == [f"prompt_embeddings.{task}" for task in TWO]
    assert (
        sum(p.numel() for p in names.values()) == method.declared_parameters() == 2 * 4 * 32 + 33 * 6 + 7 * 6 + 7 * 32
    )
