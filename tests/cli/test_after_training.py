"""What a finished run is good for: scoring, talking, merging, reporting, and being a base itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from builders import documents
from models import tiny_model
from processes import inside
from rung.commands.evaluate import evaluate_on_task, evaluation_task
from rung.config.model import ModelConfig
from rung.data.chat import ChatTemplate
from rung.errors import CheckpointError, ConfigError
from rung.models.load import load_base
from rung.models.packing import pack_separately
from rung.runs.load import open_run, open_runs
from rung.training.run_folder import read_items
from rung.types import Message


@pytest.fixture
def run(config: Path, tmp_path: Path, capsys: Any) -> Path:
    assert inside(capsys, "train", config)[0] == 0
    return tmp_path / "run"


def test_eval_keeps_items_and_metrics(run: Path, config: Path, capsys: Any) -> None:
    code, out, err = inside(capsys, "eval", run, "--json")
    assert code == 0, err
    scores = json.loads(out)["scores"]
    assert scores.keys() == {"exact", "numeric", "perplexity"}
    items = read_items(run / "eval.parquet")[0]
    assert len(items) == scores["exact"]["examples"] > 5
    assert scores["exact"]["mean"] == pytest.approx(sum(i["scores"]["exact"] for i in items) / len(items))
    nats, tokens = sum(i["nats"] for i in items), sum(i["answer_tokens"] for i in items)
    assert scores["perplexity"]["mean"] == pytest.approx(torch.tensor(nats / tokens).exp().item(), rel=1e-6)
    assert json.loads((run / "run.json").read_text())["metrics"]["scores"] == scores
    assert inside(capsys, "eval", run, "--limit", 3)[0] == 0


def test_eval_of_a_base_on_a_task(config: Path, tiny_base: Path, capsys: Any) -> None:
    code, out, _ = inside(capsys, "eval", tiny_base, "--config", config, "--limit", 4, "--json")
    assert code == 0 and json.loads(out)["examples"] == 4
    code, _, err = inside(capsys, "eval", tiny_base)
    assert code == 2 and "--config" in err


def test_an_answer_may_have_several_references(config: Path, questions: Path, tiny_base: Path, tmp_path: Path) -> None:
    """The score is the best over all of them; what the model says is known after a first pass."""
    file = tmp_path / "questions.jsonl"
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    evaluations, said = [], {}
    for _ in range(2):
        file.write_text("".join(json.dumps({**row, **said.get(row["question"], {})}) + "\n" for row in rows))
        overrides = [f"data.path={file}", "evaluation.metrics=[exact,token_f1]"]
        task, _, records, _ = evaluation_task(str(tiny_base), config=config, overrides=overrides, limit=4)
        evaluations.append(evaluate_on_task(str(tiny_base), task, records))
        said = {item.question: {"references": ["none", item.answer]} for item in evaluations[-1].items}
    first, second = evaluations
    assert first.scores("exact").tolist() == [0.0] * 4 and second.scores("exact").tolist() == [1.0] * 4
    assert [item.answer for item in first.items] == [item.answer for item in second.items]
    assert all(item.references == ("none", item.answer) for item in second.items)


def test_perplexity_against_transformers(run: Path, config: Path, tiny_base: Path, capsys: Any) -> None:
    assert inside(capsys, "eval", tiny_base, "--config", config, "--json")[0] == 0
    assert inside(capsys, "eval", run)[0] == 0
    item = read_items(run / "eval.parquet")[0][0]
    assert inside(capsys, "merge", run, run.parent / "merged")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(run.parent / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "merged")
    turns = [{"role": "user", "content": f"{item['context']}\n\n{item['question']}"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = [
        *tokenizer(prompt, add_special_tokens=False)["input_ids"],
        *tokenizer(item["expected"] + "<|im_end|>")["input_ids"],
    ]
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1).detach()
    learned = range(len(ids) - item["answer_tokens"], len(ids))
    assert item["nats"] == pytest.approx(-sum(float(logprobs[i - 1, ids[i]]) for i in learned), abs=1e-3)


def test_merge_is_checked_and_refuses_what_it_cannot(run: Path, tmp_path: Path, capsys: Any) -> None:
    code, out, err = inside(capsys, "merge", run, tmp_path / "merged", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["difference"] < found["limit"] < found["moved_from_base"]
    assert inside(capsys, "merge", run, tmp_path / "merged")[0] == 3
    assert inside(capsys, "merge", tmp_path / "nowhere", tmp_path / "m2")[0] == 3


def test_merged_but_changed_model_fails_parity(run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """The mutation: a merge that loses the adapter."""
    from rung.methods.lora import Lora

    monkeypatch.setattr(Lora, "merge", lambda self: self.peft.unload())
    code, _, err = inside(capsys, "merge", run, tmp_path / "merged")
    assert code == 3 and "publish.parity" in err
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_that_does_not_load_fails_parity(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:

    monkeypatch.setattr(
        "rung.commands.merge.write_tokenizer_files", lambda target, chat: (target / "config.json").write_text("{}")
    )
    code, _, err = inside(capsys, "merge", run, tmp_path / "merged")
    assert code == 3 and "does not load" in err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("flags", [[], ["--compare"]])
def test_chat_answers_one_question(flags: list[str], run: Path, capsys: Any) -> None:
    code, out, err = inside(capsys, "chat", run, "--question", "what is in it?", "--max-new-tokens", 5, *flags)
    assert code == 0, err
    assert out.strip()
    assert ("base" in out) == bool(flags)


def test_conversation_remembers_and_forgets(run: Path) -> None:
    from rung.commands.chat import Conversation
    from rung.models.generate import Sampling

    talk = Conversation(str(run), compare=True, sampling=Sampling(4), system="Be brief.")
    talk.say("one")
    talk.say("two")
    for speaker in talk.speakers:
        assert [m.role for m in speaker.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert talk.speakers[0].turns[2] != talk.speakers[1].turns[2]
    talk.forget()
    assert [len(s.turns) for s in talk.speakers] == [1, 1]


def test_wrong_base_is_refused(run: Path, tiny_base: Path, tmp_path: Path, capsys: Any, tiny_tokenizer: Any) -> None:
    manifest = json.loads((run / "run.json").read_text())
    other = tmp_path / "other"
    tiny_model(seed=5, max_position_embeddings=512).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    manifest["config"]["model"]["name"] = str(other)
    (run / "run.json").write_text(json.dumps(manifest))
    code, _, err = inside(capsys, "eval", run)
    assert code == 3 and "another base" in err


def test_renamed_adapter_key_is_refused(run: Path, capsys: Any) -> None:
    from safetensors.torch import load_file, save_file

    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name.replace("lora_A", "lora_X")] = tensors.pop(name)
    save_file(tensors, file)
    code, _, err = inside(capsys, "eval", run)
    assert code == 3 and "damaged: adapter_model.safetensors is not what its manifest says" in err
    rewritten(run / "adapter")  # even where the manifest goes along
    code, _, err = inside(capsys, "eval", run)
    assert code == 3 and "1 missing, 1 left over" in err


@pytest.mark.parametrize("verb", ["eval", "chat", "merge", "fuse"])
def test_a_damaged_adapter_is_refused(verb: str, run: Path, tmp_path: Path, capsys: Any) -> None:
    """Cut short, gone, or with a number changed: never answered with, never a traceback."""
    file = run / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    more = {"chat": ["--question", "what?"], "merge": [tmp_path / "m"], "fuse": [run, "-o", tmp_path / "f"]}
    for damaged in (whole[:-100], bytes(flipped), b"", None):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        code, _, err = inside(capsys, verb, run, *more.get(verb, []))
        assert code == 3 and "damaged" in err, err
        file.write_bytes(whole)


def test_fusing_looks_at_the_base_that_is_there(run: Path, config: Path, tmp_path: Path, capsys: Any) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "moved-base"
    shutil.copytree(json.loads((run / "run.json").read_text())["config"]["model"]["name"], base)
    one = tmp_path / "one"
    assert inside(capsys, "train", config, f"model.name={base}", f"output={one}")[0] == 0
    weights = {name: value + 0.1 for name, value in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    code, _, err = inside(capsys, "fuse", one, one, "-o", tmp_path / "f")
    assert code == 3 and "another base" in err and not (tmp_path / "f").exists()


def rewritten(folder: Path) -> None:
    """Let the manifest say what the files are now."""
    import hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_a_run_is_a_base(method: str, config: Path, tmp_path: Path, capsys: Any) -> None:
    assert inside(capsys, "train", config, f"method={{kind: {method}}}")[0] == 0
    first = tmp_path / "run"
    code, out, err = inside(capsys, "train", config, f"model.name={first}", f"output={tmp_path / 'second'}", "--json")
    assert code == 0, err
    assert (
        json.loads(out)["fingerprints"]["base"] != json.loads((first / "run.json").read_text())["fingerprints"]["base"]
    )
    start = json.loads((tmp_path / "second" / "log.jsonl").read_text().split("\n")[0])["loss"]
    assert start < json.loads((first / "log.jsonl").read_text().split("\n")[0])["loss"]
    assert inside(capsys, "eval", tmp_path / "second", "--limit", 2)[0] == 0


def test_full_run_loads_in_plain_transformers(config: Path, tmp_path: Path, capsys: Any) -> None:
    assert inside(capsys, "train", config, "method={kind: full}", "training.learning_rate=1.0e-3")[0] == 0
    folder = tmp_path / "run" / "model"
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    row = torch.tensor([[5, 6, 7, 8, 9]])
    run = open_run(tmp_path / "run")
    policy, chat = run.policy, run.chat
    assert (plain(row).logits - policy.model(row, use_cache=False).logits).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(folder).chat_template == chat.template
    assert plain.generation_config.eos_token_id == [4, 2]


def test_a_base_without_template_learns_to_stop(
    config: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, capsys: Any
) -> None:
    """GPT-2 and Phi-2 have no turn to end; with the plain template their end-of-text token becomes the stop."""
    base = tmp_path / "gpt2"
    tiny_model("gpt2").save_pretrained(base)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="</s>", bos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(base)
    code, _, err = inside(capsys, "train", config, f"model.name={base}")
    assert code == 2 and "model.template: plain" in err
    settings = [f"model.name={base}", "model.template=plain", "method={kind: full}", "training.max_steps=120"]
    assert inside(capsys, "train", config, *settings, "training.learning_rate=5.0e-3", "training.epochs=20")[0] == 0
    _, out, _ = inside(capsys, "eval", base, "--config", config, "model.template=plain", "--json")
    before = json.loads(out)
    _, out, _ = inside(capsys, "eval", tmp_path / "run", "--json")
    after = json.loads(out)
    assert before["cut_off"] == before["examples"] and after["cut_off"] == 0
    assert after["scores"]["exact"]["mean"] > before["scores"]["exact"]["mean"] == 0.0


def test_report_is_rebuilt(run: Path, capsys: Any) -> None:
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert inside(capsys, "report", run)[0] == 0
    assert (run / "report.html").read_bytes() == before
    assert inside(capsys, "report", run.parent / "nowhere")[0] == 3


def test_a_moved_run_still_works(run: Path, tmp_path: Path, capsys: Any) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(run, moved)
    assert inside(capsys, "eval", moved, "--limit", 2)[0] == 0


def test_a_run_keeps_its_template_as_a_base(config: Path, tmp_path: Path, capsys: Any) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    assert inside(capsys, "train", config, f"model.template={template}")[0] == 0
    settings = [f"model.name={tmp_path / 'run'}", f"output={tmp_path / 'second'}"]
    text = template.read_text()
    template.unlink()
    assert inside(capsys, "train", config, *settings)[0] == 0
    for run in ("run", "second"):
        assert open_run(tmp_path / run).chat.template == text


def test_a_copied_adapter_still_names_its_base(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(run, mine)
    origin = mine / "adapter" / "rung.json"
    found = json.loads(origin.read_text())
    assert found["base_fingerprint"] == json.loads((run / "run.json").read_text())["fingerprints"]["base"]
    assert len(found["template"]) == 64
    origin.write_text(json.dumps({**found, "base_fingerprint": "0" * 64}))
    rewritten(mine / "adapter")
    with pytest.raises(CheckpointError, match="another base"):
        open_run(mine)


def test_a_conversation_survives_what_it_cannot_take(run: Path, capsys: Any) -> None:
    from rung.commands.chat import Conversation
    from rung.errors import DataError
    from rung.models.generate import Sampling

    talk = Conversation(str(run), compare=False, sampling=Sampling(3, 0.7), system=None)
    talk.say("half a character: \udcff")
    with pytest.raises(DataError, match="longer than"):
        talk.say("word " * 2000)
    talk.say("and on")
    assert [m.role for m in talk.speakers[0].turns] == ["user", "assistant", "user", "assistant"]


def test_several_adapters_share_one_base_and_never_touch_it(config: Path, tmp_path: Path, capsys: Any) -> None:
    """Bit for bit after a thousand switches."""
    methods = {
        "low": "kind: lora",
        "ga": "kind: lora, init: lora_ga, rank: 4",
        "narrow": "kind: bottleneck, width: 4",
        "soft": "kind: prompt, virtual_tokens: 3",
        "experts": "kind: mixture, experts: 2",
        "cached": "kind: prefix, virtual_tokens: 3",
        "encoded": "kind: p_tuning, virtual_tokens: 3, hidden: 8",
        "scaled": "kind: peft, config: {peft_type: IA3, feedforward_modules: []}",
    }
    for name, method in methods.items():
        given = [f"method={{{method}}}", "training.max_steps=2", f"output={tmp_path / name}"]
        assert inside(capsys, "train", config, *given)[0] == 0
    shelf = open_runs([tmp_path / name for name in methods])
    weights = [{p.data_ptr() for n, p in run.policy.model.named_parameters() if "embed" in n} for run in shelf.values()]
    assert all(own == weights[0] for own in weights)
    batch = pack_separately(documents(1, count=1))[0]
    alone = {name: open_run(tmp_path / name).policy.logprobs(batch) for name in methods}
    before = {name: run.policy.reference_logprobs(batch) for name, run in shelf.items()}
    assert all((found - before["low"]).abs().max() < 1e-5 for found in before.values())
    with torch.no_grad():
        for turn in range(1000):
            name = list(methods)[turn % len(methods)]
            policy = shelf[name].policy
            assert torch.equal(policy.logprobs(batch), alone[name])
            if turn % 7 == 0:
                assert torch.equal(policy.reference_logprobs(batch), before[name])


def test_what_shares_no_base(run: Path, config: Path, tmp_path: Path, capsys: Any) -> None:
    assert inside(capsys, "train", config, "method={kind: head}", f"output={tmp_path / 'whole'}")[0] == 0
    with pytest.raises(ConfigError, match="whole model"):
        open_runs([run, tmp_path / "whole"])
    with pytest.raises(ConfigError, match="one name"):
        open_runs([run, run])


def test_answers_of_a_widened_base_are_the_same(config: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["method={kind: qlora}", "training.max_steps=2"]
    assert inside(capsys, "train", config, *given)[0] == 0
    scores = []
    for widened in ("false", "true"):
        asked = [*given, f"evaluation.dequantize={widened}", "evaluation.metrics=[perplexity]"]
        code, out, err = inside(capsys, "eval", tmp_path / "run", *asked, "--config", config, "--json")
        assert code == 0, err
        scores.append(json.loads(out)["scores"]["perplexity"]["mean"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    code, _, err = inside(capsys, "train", config, "evaluation.dequantize=true", f"output={tmp_path / 'other'}")
    assert code == 2 and "quantizes" in err


def test_a_quantized_run_merges_onto_either_base(config: Path, tmp_path: Path, capsys: Any) -> None:
    """Onto what it was trained on, or onto what that was made from: two models, and the second says how far it is."""
    settings = ("method.kind=qlora", "method.rank=4", f"output={tmp_path / 'narrow'}")
    assert inside(capsys, "train", config, *settings)[0] == 0
    found = []
    for flags in ((), ("--original",)):
        code, out, err = inside(capsys, "merge", tmp_path / "narrow", tmp_path / f"m{len(flags)}", "--json", *flags)
        assert code == 0, err
        found.append(json.loads(out))
        assert found[-1]["difference"] < found[-1]["limit"] < found[-1]["moved_from_base"]
    assert found[0]["moved_from_run"] < found[0]["limit"] < found[1]["moved_from_run"]
    rows = torch.tensor([[5, 6, 7, 8]])
    trained, original = (AutoModelForCausalLM.from_pretrained(tmp_path / m).eval()(rows).logits for m in ("m0", "m1"))
    assert (trained - original).abs().max() > 1e-3


def test_an_adapter_that_makes_up_for_quantizing_stays_on_its_base(config: Path, tmp_path: Path, capsys: Any) -> None:
    settings = ("method={kind: qlora, rank: 4, init: loftq}", f"output={tmp_path / 'narrow'}")
    assert inside(capsys, "train", config, *settings)[0] == 0
    code, _, err = inside(capsys, "merge", tmp_path / "narrow", tmp_path / "merged", "--original")
    assert code == 2 and "count twice" in err
    assert inside(capsys, "merge", tmp_path / "narrow", tmp_path / "merged")[0] == 0
    code, _, err = inside(capsys, "train", config, f"model.name={tmp_path / 'narrow'}", f"output={tmp_path / 'next'}")
    assert code == 3 and "quantized base" in err


def test_a_run_in_bfloat16_is_merged_in_float32(config: Path, tmp_path: Path, capsys: Any) -> None:
    assert inside(capsys, "train", config, "model.dtype=bfloat16", f"output={tmp_path / 'low'}")[0] == 0
    code, out, err = inside(capsys, "merge", tmp_path / "low", tmp_path / "merged", "--json")
    assert code == 0, err
    assert json.loads(out)["difference"] < 2e-3


def test_only_a_quantized_run_has_another_base(run: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = inside(capsys, "merge", run, tmp_path / "merged", "--original")
    assert code == 2 and "qlora" in err


def test_one_of_several_adapters_may_widen_its_base_alone(tiny_base: Path) -> None:
    """Tuners that compute in full width widen what they stand on; the others go on as they were."""
    base = load_base(ModelConfig(name=str(tiny_base), dtype="bfloat16"))
    twin = base.share_weights()
    held = next(base.model.parameters())
    assert next(twin.model.parameters()).data_ptr() == held.data_ptr()
    twin.model.float()
    assert held.dtype is torch.bfloat16 and next(twin.model.parameters()).dtype is torch.float32


AS_BASES = [
    "model.name={run}",
    "objective={{kind: grpo, reward: {{kind: exact}}, reference: {run}, "
    "rollout: {{num_generations: 2, max_new_tokens: 4}}}}",
    "objective={{kind: distill, teacher: {run}}}",
]
"""Ways to build on a finished run."""


@pytest.mark.parametrize("setting", AS_BASES)
@pytest.mark.parametrize("damage", ["a bit", "a name", "no safetensors", "not finished"])
def test_nothing_is_built_on_a_damaged_run(
    damage: str, setting: str, run: Path, config: Path, tmp_path: Path, capsys: Any
) -> None:
    """As a base, a reference or a teacher: refused before anything is trained, never half of an adapter."""
    mine = tmp_path / "mine"
    shutil.copytree(run, mine)
    weights = mine / "adapter" / "adapter_model.safetensors"
    if damage == "a bit":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(bytes(data))
    elif damage == "a name":
        state = {name.replace("lora_B", "lora_C"): value for name, value in load_file(weights).items()}
        save_file(state, weights)
        rewritten(mine / "adapter")
    elif damage == "no safetensors":
        weights.rename(weights.with_suffix(".bin"))
        manifest = json.loads((mine / "adapter" / "manifest.json").read_text())
        del manifest["files"][weights.name]
        (mine / "adapter" / "manifest.json").write_text(json.dumps(manifest))
    else:
        manifest = json.loads((mine / "run.json").read_text())
        (mine / "run.json").write_text(json.dumps({**manifest, "status": "failed"}))
    given = (setting.format(run=mine), f"output={tmp_path / 'next'}")
    code, _, err = inside(capsys, "train", config, *given)
    assert code == 3, err
    assert str(mine) in err and not (tmp_path / "next").exists()


def test_a_merge_that_changes_nothing_is_no_merge(run: Path, tmp_path: Path, capsys: Any) -> None:
    """An adapter of zeros, as a lost one would be: parity alone would pass it."""
    weights = run / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(weights).items()}, weights)
    rewritten(run / "adapter")
    code, _, err = inside(capsys, "merge", run, tmp_path / "merged")
    assert code == 3 and "says what its base says" in err and not (tmp_path / "merged").exists()


def test_text_is_framed_as_it_was(config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edited template is damage; a tokenizer that has become another one is noticed by a known conversation."""
    assert inside(capsys, "train", config)[0] == 0
    adapter = tmp_path / "run" / "adapter"
    known = json.loads((adapter / "rung_prompt.json").read_text())
    chat = open_run(tmp_path / "run").chat
    assert chat.prompt_ids([Message("user", known["messages"][0]["content"])]) == known["ids"]
    plain = AutoTokenizer.from_pretrained(adapter)  # as any server has it
    asked = plain.apply_chat_template(known["messages"], add_generation_prompt=True, return_dict=False)
    assert list(asked) == known["ids"]
    own = ChatTemplate.encode
    monkeypatch.setattr(ChatTemplate, "encode", lambda self, texts: [ids + ids[-1:] for ids in own(self, texts)])
    code, _, err = inside(capsys, "eval", tmp_path / "run", "--limit", "2")
    assert code == 3 and "framed otherwise" in err
    monkeypatch.undo()
    template = adapter / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    code, _, err = inside(capsys, "eval", tmp_path / "run", "--limit", "2")
    assert code == 3 and "damaged" in err


def test_a_tokenizer_with_more_tokens_than_the_model(
    config: Path, tmp_path: Path, questions: Path, tiny_tokenizer: PreTrainedTokenizerFast, capsys: Any
) -> None:
    """Tokens that no text of the data has may be missing; one that has been used is named."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    used = max(max(tiny_tokenizer(" ".join(map(str, row.values()))).input_ids) for row in rows)
    assert used < len(tiny_tokenizer) - 1
    for rows_of_model, expected in ((used + 1, 0), (used - 20, 2)):
        folder = tmp_path / f"base-{rows_of_model}"
        tiny_model(vocab_size=rows_of_model).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        code, _, err = inside(capsys, "train", config, f"model.name={folder}", f"output={folder}-run")
        assert code == expected, err
    assert "no embedding of" in err and "questions.jsonl" in err and not Path(f"{folder}-run").exists()


def test_scores_stand_beside_those_without_what_was_learned_from(
    config: Path, questions: Path, tmp_path: Path, capsys: Any
) -> None:
    """Half of another task's questions are word for word those that the run learned from."""
    assert inside(capsys, "train", config)[0] == 0
    code, out, err = inside(capsys, "eval", tmp_path / "run", "--json")
    assert code == 0, err
    own = json.loads(out)["contamination"]
    assert own["tiers"]["exact"]["items"] == 0 and own["items"] == 21  # the splits of a run never overlap
    known = [json.loads(line) for line in questions.read_text().splitlines()]
    leaky = [row for row in known if row["box"] in (1, 2, 3, 4, 6, 11)]  # boxes 3, 6 and 11 were held out
    (tmp_path / "leaky.jsonl").write_text("".join(json.dumps(row) + "\n" for row in leaky))
    (tmp_path / "one.jsonl").write_text(json.dumps({"question": "elsewhere", "answer": "x"}) + "\n")
    task = tmp_path / "leaky.yaml"
    task.write_text(
        f"data: {{path: {tmp_path / 'one.jsonl'}, test: {tmp_path / 'leaky.jsonl'}, validation: 0}}\n"
        f"evaluation: {{metrics: [token_f1], max_new_tokens: 8}}\noutput: {tmp_path / 'none'}\n"
    )
    code, out, err = inside(capsys, "eval", tmp_path / "run", "--config", task, "--json")
    assert code == 0, err
    found = json.loads(out)
    exact = found["contamination"]["tiers"]["exact"]
    assert exact["items"] > 0 and exact["items"] + exact["scores_without"]["token_f1"]["examples"] == found["examples"]
    assert exact["scores_of_them"]["token_f1"]["examples"] == exact["items"]
    code, out, _ = inside(capsys, "eval", tmp_path / "run", "--config", task)
    assert "seen in training" in out and "without exact" in out
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    manifest["config"]["data"]["path"] = str(tmp_path / "moved.jsonl")
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    code, out, _ = inside(capsys, "eval", tmp_path / "run", "--config", task, "--json")
    assert code == 0 and "unknown" in json.loads(out)["contamination"]


def test_answers_that_are_not_to_be_learned_are_not_expected(config: Path, tmp_path: Path, capsys: Any) -> None:
    """A test row whose final answer has weight 0 is left out of the scores, not scored or refused."""
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a", "weight": i % 2}]}
        for i in range(8)
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert inside(capsys, "train", config, "training.max_steps=1")[0] == 0
    task = tmp_path / "task.yaml"
    other = tmp_path / "train.jsonl"
    other.write_text(json.dumps(rows[1]).replace("q1", "another") + "\n")
    data = f"{{path: {other}, validation: 0, test: {tmp_path / 'test.jsonl'}}}"
    task.write_text(f"data: {data}\nevaluation: {{metrics: [exact]}}\noutput: x\n")
    code, out, err = inside(capsys, "eval", tmp_path / "run", "--config", task, "--json")
    assert code == 0 and json.loads(out)["examples"] == 4, err
