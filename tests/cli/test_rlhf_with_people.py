"""The example of RLHF with a person in it: generate, rank on the page, reward model, PPO and DPO."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

from label_person import label_command
from processes import inside

EXAMPLE = Path(__file__).parents[2] / "examples" / "rlhf"
HOUSE = runpy.run_path(str(EXAMPLE / "house.py"))


def test_a_person_ranks_and_a_policy_learns(tiny_base: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """The commands of run.sh on a tiny base; a scripted person ranks by the rules of the house, through the page."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLE.parent)
    few = ("training.max_steps=2", "training.examples_per_step=4", "data.limit=16")
    runs = ("sft", "reward", "ppo", "dpo")
    base = (f"model.name={tiny_base}", f"model.template={tmp_path / 'plain.jinja'}")
    (tmp_path / "plain.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ('</s>' if m['role'] == 'assistant' else '\n') }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    code, _, err = inside(capsys, "train", EXAMPLE / "sft.yaml", *base, *few)
    assert code == 0, err
    prompts = ("--data", EXAMPLE / "prompts.jsonl", "--limit", 6, "--n", 3, "--distinct", "--max-new-tokens", 8)
    code, _, err = inside(capsys, "generate", "runs/rlhf/sft", *prompts, "-o", "candidates.jsonl")
    assert code == 0, err
    rows = {row["prompt"]: row for row in map(json.loads, Path("candidates.jsonl").read_text().splitlines())}
    with label_command("rank", "candidates.jsonl", "-o", "labels", "--repeat", 0) as (_, (person,)):
        page = person.enter()
        while page.address != "/done":
            row = next(row for prompt, row in rows.items() if prompt in page.prompt)
            # a random policy makes as many faults everywhere: the shorter answer is the better one then
            worth = [(len(HOUSE["faults"](answer, row)), len(answer)) for answer in page.answers]
            ranks = {f"rank_{place}": 1 + sorted(set(worth)).index(value) for place, value in enumerate(worth)}
            page = person.vote(**ranks)
    code, out, err = inside(capsys, "label", "result", "labels", "--export", "rated", "-o", "runs/rlhf/ranked.jsonl")
    assert code == 0 and "6 votes of 1 person" in out, err
    for name in runs[1:]:
        steps = ("training.max_steps=1", "training.examples_per_step=2") if name == "ppo" else few
        # six rankings of noise teach a reward model nothing, which its gate says
        short = ("objective.rollout.max_new_tokens=4", "objective.reward.accept=true") if name == "ppo" else ()
        code, _, err = inside(capsys, "train", EXAMPLE / f"{name}.yaml", *steps, *short)
        assert code == 0, (name, err)
    for name in runs:
        assert json.loads(Path(f"runs/rlhf/{name}/run.json").read_text())["status"] == "finished"
    fingerprint = json.loads(Path("runs/rlhf/ppo/run.json").read_text())["fingerprints"]
    assert fingerprint["reward"]
