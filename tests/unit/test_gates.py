"""Each gate passes on a sound model and fails on a broken one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from builders import documents, example, in_one_batch, policy_of, tuned
from models import tiny_model
from processes import inside
from rung.config.method import LoraConfig
from rung.config.objective import RolloutConfig, SftConfig
from rung.config.training import OptimizerConfig
from rung.errors import CheckpointError, GateError
from rung.files import find_damage, write_folder
from rung.methods.protocol import TrainableSet
from rung.methods.registry import attach_method
from rung.models import attention
from rung.models.generate import Sampling
from rung.objectives.sft import SftObjective
from rung.training import gates
from rung.training.checkpoint import newest_checkpoint, remove_old_checkpoints
from rung.training.optimizer import count_trained, make_optimizer
from rung.training.rollout import RolloutSource
from rung.training.run_folder import Gate
from rung.types import PackedBatch


@pytest.fixture
def leaking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention that forgets the segments: every token sees everything before it."""
    genuine = attention.tree_attention

    def leaky(module: object, *args: object, segments: object = None, **kwargs: object) -> object:
        return genuine(module, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "tree_attention", leaky)  # `register` hands transformers whatever stands there
    yield
    monkeypatch.undo()
    attention.register()


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gemma2"])
def test_packing(shape: str) -> None:
    assert gates.check_packing(policy_of(tiny_model(shape)), in_one_batch(documents(shared=18))).state == "passed"


def test_packing_that_leaks(leaking: None) -> None:
    gate = gates.check_packing(policy_of(tiny_model()), in_one_batch(documents()))
    assert gate.state == "failed" and gate.measured > gate.limit
    with pytest.raises(GateError, match=r"step0\.packing"):
        gates.enforce(gate)


@pytest.mark.parametrize("shape", ["llama", "gemma2", "gpt2"])
def test_our_own_functions_and_their_mutation(shape: str) -> None:
    policy, _ = tuned("lora", shape)
    before = [vars(m).get("forward") for m in policy.model.modules()]
    gate = gates.check_fused(policy, in_one_batch(documents(shared=18)))
    assert gate is not None and gate.state == "passed"
    assert [vars(m).get("forward") for m in policy.model.modules()] == before
    if shape != "gpt2":
        policy.model.model.norm.forward.eps = 0.5
        gate = gates.check_fused(policy, in_one_batch(documents(shared=18)))
        assert gate is not None and gate.state == "failed"


def test_the_fused_gate_is_not_skipped_where_products_are_in_bfloat16() -> None:
    """Its base is narrow and what it trains is wide, as with a base held narrow; but it can run its own forward."""
    model = tiny_model(dtype=torch.bfloat16)
    method = attach_method(model, LoraConfig(), seed=0)
    gate = gates.check_fused(policy_of(model, method, compute=torch.bfloat16), in_one_batch(documents(shared=18)))
    assert gate is not None and gate.state == "passed"


@pytest.mark.parametrize(
    ("differences", "held"),
    [
        ([0.2, -0.1, 0.49], True),
        ([0.1] * 30 + [-0.1] * 30 + [0.55, -0.2] + [0.12] * 30, True),  # rounding, and its largest of many
        ([0.08] * 300 + [-1.05], True),
        ([0.3, -0.4, 0.55], False),  # all of them far
        ([0.02] * 300 + [0.6], False),  # one of them far
        ([0.25] * 10 + [1.6], False),
        ([float("nan")] * 3, False),
    ],
)
def test_rounding_in_bfloat16_is_told_from_a_fault(differences: list[float], held: bool) -> None:
    found = torch.tensor(differences)
    narrow = policy_of(tiny_model(dtype=torch.bfloat16), compute=torch.bfloat16)
    assert (gates.compare_logprobs("x", found, narrow).state == "passed") == held
    wide = gates.compare_logprobs("x", found, policy_of(tiny_model()))
    assert wide.state == "failed" and wide.limit == gates.TOLERANCE[torch.float32], "in float32 nothing is forgiven"


def test_decoding_and_its_mutation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gates.check_decoding(policy_of(tiny_model()), documents()).state == "passed"
    genuine = attention.attend_one_token
    monkeypatch.setattr(
        attention,
        "attend_one_token",
        lambda q, p, k, v, *rest: genuine(q, p, k[:, :, 1:], v[:, :, 1:], None, *rest[1:]),
    )
    assert gates.check_decoding(policy_of(tiny_model()), documents()).state == "failed"


def test_identity_and_its_mutation() -> None:
    model = tiny_model()
    method = attach_method(model, LoraConfig(), seed=0)
    policy = policy_of(model, method)
    gate = gates.check_identity(policy, method, in_one_batch(documents()))
    assert gate is not None and gate.state == "passed" and gate.measured == 0.0
    trained, lora = tuned("lora")
    gate = gates.check_identity(trained, lora, in_one_batch(documents()))
    assert gate is not None and gate.state == "failed"


def test_a_reference_and_its_mutation() -> None:
    """Weights that only claim to be the base's are found out, even by one number."""
    model = tiny_model()
    method = attach_method(model, LoraConfig(), seed=0)
    policy, other = policy_of(model, method), tiny_model()
    policy.reference = policy_of(other)
    gate = gates.check_reference(policy, method, in_one_batch(documents()))
    assert gate is not None and gate.state == "passed"
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight[3, 5] += 3.0
    gate = gates.check_reference(policy, method, in_one_batch(documents()))
    assert gate is not None and gate.state == "failed"
    with pytest.raises(GateError, match=r"step0\.reference"):
        gates.enforce(gate)


def test_trainable_and_its_mutation() -> None:
    _, method = tuned("lora")
    optimizer = make_optimizer(method.trainable(), OptimizerConfig())
    assert gates.check_trainable(method, count_trained(optimizer)).state == "passed"
    next(iter(method.trainable().values())).requires_grad_(False)
    optimizer = make_optimizer(method.trainable(), OptimizerConfig())
    assert gates.check_trainable(method, count_trained(optimizer)).state == "failed"


def test_movement_names_what_stood_still() -> None:
    policy, method = tuned("lora")
    movement = gates.MovementGate(policy.model, method.trainable())
    optimizer = make_optimizer(method.trainable(), OptimizerConfig())
    verdict = None
    for _ in range(2):
        for i, parameter in enumerate(method.trainable().values()):
            parameter.grad = torch.zeros_like(parameter) if i == 3 else torch.ones_like(parameter)
        optimizer.step()
        verdict = movement.observe(optimizer)
    assert verdict is not None and verdict.state == "failed" and "not moved" in str(verdict.measured)
    assert list(method.trainable())[3] in str(verdict.measured)


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])])
def test_save_refuses_and_keeps_the_old_folder(bad: torch.Tensor, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    write_folder(folder, lambda aside: save_file({"w": torch.ones(2)}, aside / "w.safetensors"))
    before = (folder / "w.safetensors").read_bytes()
    with pytest.raises(GateError, match="tensor w"):
        write_folder(folder, lambda aside: save_file({"w": bad}, aside / "w.safetensors"))
    assert (folder / "w.safetensors").read_bytes() == before and find_damage(folder) is None
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_verify_finds_every_damage(tmp_path: Path) -> None:
    def fill(aside: Path) -> None:
        save_file({"w": torch.ones(64)}, aside / "w.safetensors")

    for number in range(5):
        write_folder(tmp_path / f"step-{number}", fill)
    flipped = bytearray((tmp_path / "step-4" / "w.safetensors").read_bytes())
    flipped[-3] ^= 4
    (tmp_path / "step-4" / "w.safetensors").write_bytes(bytes(flipped))
    (tmp_path / "step-3" / "w.safetensors").write_bytes(bytes(flipped[:40]))
    (tmp_path / "step-2" / "manifest.json").write_text("{}")
    (tmp_path / "step-1" / "w.safetensors").unlink()
    warnings: list[str] = []
    assert newest_checkpoint(tmp_path, warnings.append) == tmp_path / "step-0"
    assert [w.split()[1] for w in warnings] == ["step-4", "step-3", "step-2", "step-1"]
    remove_old_checkpoints(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-3", "step-4"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not write"):
        write_folder(tmp_path / "file" / "below", lambda aside: None)


def stepped(method: object, optimizer: torch.optim.Optimizer, still: set[str]) -> None:
    for name, parameter in method.trainable().items():  # type: ignore[attr-defined]
        parameter.grad = torch.zeros_like(parameter) if name in still else torch.ones_like(parameter)
    optimizer.step()


def test_movement_waits_for_tasks_that_have_not_come() -> None:
    """A table is judged after two steps with documents of its task; one that then stood still fails."""
    policy, method = tuned("prompt", virtual_tokens=2, tasks=("often", "rare"))
    optimizer, movement = make_optimizer(method.trainable(), OptimizerConfig()), None
    for broken in (False, True):
        movement = gates.MovementGate(policy.model, method.trainable())
        found = []
        for tasks in (["often"], ["rare"], ["often", "rare"]):
            reached = method.trainable_for_tasks(tasks)
            stepped(method, optimizer, {n for n in method.trainable() if n not in reached or (broken and "rare" in n)})
            found.append(movement.observe(optimizer, None, reached))
        assert [gate and gate.state for gate in found] == [None, None, "failed" if broken else "passed"]
        assert movement.observe(optimizer) is None  # one verdict a run


def test_movement_counts_anew_what_begins_anew() -> None:
    """The first step after a rewind moves B alone: A has no gradient while B is zero."""
    policy, method = tuned("lora")
    optimizer = make_optimizer(method.trainable(), OptimizerConfig())
    movement, names = gates.MovementGate(policy.model, method.trainable()), set(method.trainable())
    a = {name for name in names if ".lora_A." in name}
    found = []
    for moving, still in (
        (None, a),
        (TrainableSet(names, restart_moments=True, changes_permanently=True), a),
        (TrainableSet(names), set()),
    ):
        stepped(method, optimizer, still)
        found.append(movement.observe(optimizer, moving))
    assert [gate and gate.state for gate in found] == [None, None, "passed"]


@pytest.mark.parametrize(("packing", "count"), [("tree", 3), ("flat", 3), ("none", 4)])
def test_gates_test_the_packing_that_trains(
    packing: str, count: int, config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequence[PackedBatch]] = []
    genuine = gates.check_packing
    monkeypatch.setattr(
        gates, "check_packing", lambda policy, batches: seen.append(batches) or genuine(policy, batches)
    )
    assert inside(capsys, "train", config, f"training.packing={packing}", "training.max_steps=1")[0] == 0
    assert len(seen[0]) == count
    assert packing == "tree" or all(s.parent is None for batch in seen[0] for s in batch.segments)


def test_one_far_token_of_many_ends_no_rollout() -> None:
    """In bfloat16 rounding moves a few of thousands of sampled tokens far; another mask moves all of them."""
    policy = policy_of(tiny_model(dtype=torch.bfloat16), compute=torch.bfloat16)
    prompts = [example(list(range(3, 12)), 9, line=line) for line in range(12)]
    rollout = RolloutConfig(num_generations=2, max_new_tokens=24)
    source = RolloutSource(policy, SftObjective(SftConfig()), rollout, (), None, None, 0, 400)  # type: ignore[arg-type]
    documents, answers = source._answer(prompts, Sampling(24, 1.0, 0, 2))
    genuine = source._check_decoder(documents, answers)
    assert genuine.name == "rollout.distribution" and genuine.state == "passed"

    def moved(by: Callable[[int], float]) -> Gate:
        scored = source._values_by_document(documents, policy.logprobs)
        by_answer = ([float(value) + by(i) for i, value in enumerate(values)] for values in scored)
        changed = [replace(answer, logprobs=own) for answer, own in zip(answers, by_answer, strict=True)]
        return source._check_decoder(documents, changed)

    assert moved(lambda i: 0.7 if i == 3 else 0.06).state == "passed"
    assert moved(lambda i: 0.7).state == "failed"
