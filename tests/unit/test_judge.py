"""What a judge is asked and how its verdicts are read: a real tiny model, and real files."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

from builders import policy_of
from models import tiny_model
from rung.config.io import parse_config
from rung.config.judge import JudgeConfig
from rung.data.chat import ChatTemplate
from rung.errors import ConfigError, DataError
from rung.evaluation.judge import (
    MARKS,
    AnswerPair,
    AskJudge,
    JudgeVerdict,
    judge_both_orders,
    judge_by_logprobs,
    judge_prompt,
    parse_verdict,
    read_human_labels,
)
from rung.results.evaluation import JudgeAgreement
from rung.runs.judge import AnsweredQuestion, Judge, JudgeScorer
from rung.scoring.pairwise import Outcome, win_share
from rung.types import Message, Record, Source

PAIR = AnswerPair("What is in it?", "apples and pears", "stones", "rows line 1", "a box", "apples")
SPEC = JudgeConfig(model="tiny")


def text(*settings: bool, config: JudgeConfig = SPEC) -> str:
    return "\n".join(m.content for m in judge_prompt(PAIR, config, *settings))


def test_both_orders_are_asked_and_read_back() -> None:
    shown = text(False, False)
    assert "a box\n\nWhat is in it?" in shown
    assert shown.index("[Answer A]\napples and pears") < shown.index("[Answer B]\nstones")
    assert text(True, False).index("[Answer A]\nstones") < text(True, False).index("[Answer B]\napples and pears")
    always_a = judge_both_orders([PAIR, PAIR], SPEC, lambda prompts: [JudgeVerdict("A", None)] * len(prompts))
    assert [(j.verdicts.first_shown_first, j.verdicts.second_shown_first) for j in always_a] == [
        ("first", "second")
    ] * 2
    assert always_a[0].verdicts.outcome == "tie"
    good = judge_both_orders(
        [PAIR], SPEC, lambda prompts: [JudgeVerdict("AB"["[Answer B]\napples" in p[1].content], 0) for p in prompts]
    )
    assert good[0].verdicts.outcome == "first"


def test_what_the_spec_says_is_what_the_judge_reads() -> None:
    assert "Expected answer" not in text(False, False)
    asked = text(False, True, config=JudgeConfig(model="x", server="http://s/v1", reference=True, criteria="Be brief."))
    assert "[Expected answer]\napples" in asked and "Be brief." in asked and "[[C]] for a tie" in asked
    assert "correct, helpful" in text(False, False)


@pytest.mark.parametrize(
    ("words", "mark"),
    [("[[A]]", "A"), ("Not [[A]], in the end [[B]]", "B"), ("[[C]] ", "C"), ("A", None), ("", None), ("[[D]]", None)],
)
def test_the_last_mark_counts_and_without_one_nothing_does(words: str, mark: str | None) -> None:
    assert parse_verdict(words) == JudgeVerdict(mark, words)


def test_log_probabilities_are_those_of_each_prompt_alone(tiny_tokenizer: object) -> None:
    model = tiny_model(max_position_embeddings=512)
    policy, chat = policy_of(model), ChatTemplate(tiny_tokenizer)  # type: ignore[arg-type]
    prompts = [(Message("user", f"{'word ' * n} which?"),) for n in (1, 5, 2)]
    with torch.no_grad():
        found = judge_by_logprobs(policy, chat)(prompts)
        for said, turns in zip(found, prompts, strict=True):
            ids = chat.prompt_ids(turns)
            alone = {}
            for mark in MARKS:
                (token,) = chat.encode([mark], mid_document=True)[0]
                logits = model(torch.tensor([ids])).logits[0, -1]
                alone[mark] = float(torch.log_softmax(logits, -1)[token])
            assert said.basis == pytest.approx(alone, abs=1e-4)
            assert said.mark == max(alone, key=alone.__getitem__)
    assert len({round(said.basis["A"], 4) for said in found}) == 3


def test_a_prompt_without_room_is_unreadable(tiny_tokenizer: object) -> None:
    policy, chat = policy_of(tiny_model(max_position_embeddings=64)), ChatTemplate(tiny_tokenizer)  # type: ignore[arg-type]
    long, short = judge_by_logprobs(policy, chat)([(Message("user", "word " * 200),), (Message("user", "w"),)])
    assert long.mark is None and "have room" in long.basis and short.mark in MARKS


def labelled(folder: Path, *rows: dict[str, object]) -> str:
    file = folder / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


ROW = {"question": "q", "first": "a", "second": "b"}


def test_labels_of_one_person_or_of_several(tmp_path: Path) -> None:
    pairs, labels = read_human_labels(
        labelled(tmp_path, {**ROW, "human": "tie", "group": 3}, {**ROW, "human": ["first", None], "context": "c"})
    )
    assert labels == [["tie"], ["first", None]]
    assert pairs[0].cluster == "3" and pairs[1].context == "c" and pairs[1].cluster.endswith("line 2")


@pytest.mark.parametrize("bad", [{"human": "A"}, {"human": None}, {"human": []}, {"human": ["first", 1]}, {"first": 1}])
def test_labels_that_are_none_are_refused(bad: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2"):
        read_human_labels(labelled(tmp_path, {**ROW, "human": "first"}, {**ROW, "human": "first", **bad}))


def test_a_judge_spec_is_checked() -> None:
    run = {"data": {"path": "x"}, "output": "y"}
    with pytest.raises(ConfigError, match="requests to a `server`"):
        parse_config({**run, "evaluation": {"judge": {"model": "m", "concurrency": 2}}})
    with pytest.raises(ConfigError, match="server"):
        parse_config({**run, "evaluation": {"judge": {"model": "m", "server": "localhost"}}})


def test_a_share_of_wins_counts_each_comparison_once() -> None:
    """Every outcome of three comparisons against a sum of 1, 1/2 and 0, in either order of the pair."""
    values: dict[Outcome | None, float] = {"first": 1.0, "tie": 0.5, "second": 0.0, None: 0.0}
    for outcomes in product(values, repeat=3):
        seen = {("a", other): outcome for other, outcome in zip("bcd", outcomes, strict=True)}
        expected = sum(values[outcome] for outcome in outcomes) / 3
        assert win_share("a", "bcd", seen) == expected
        turned: dict[Outcome | None, Outcome | None] = {"first": "second", "second": "first", "tie": "tie", None: None}
        assert win_share("a", "bcd", {(other, "a"): turned[o] for (_, other), o in seen.items()}) == expected
    assert win_share("a", "aab", {("a", "b"): "first"}) == 2.0 / 3
    assert win_share("a", "", {}) == 0.0


class RuleJudge(Judge):
    """A judge whose mark is a function of the answers shown as A and as B; it counts the pairs."""

    def __init__(self, mark: Callable[[str, str], str | None], config: JudgeConfig = SPEC) -> None:
        self.config, self._mark, self.prompts = config, mark, list[str]()

    def _ask_function(self, folder: Path, title: str | None) -> AskJudge:
        def ask(prompts: object) -> list[JudgeVerdict]:
            verdicts = []
            for _, user in prompts:  # type: ignore[attr-defined]
                self.prompts.append(user.content)
                shown = user.content.split("[Answer A]\n")[1].rpartition("\n\nWhich answer")[0]
                verdicts.append(JudgeVerdict(self._mark(*shown.split("\n\n[Answer B]\n")), None))
            return verdicts

        return ask


def by_length(first: str, second: str) -> str | None:
    """The longer answer is better; nothing is said about an answer with a question mark."""
    if "?" in first + second:
        return None
    return "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def row(answer: str = "xx", question: str = "q") -> Record:
    return Record((Message("user", question), Message("assistant", answer)), Source("rows", 1), "c", group="g")


TRUSTED = JudgeAgreement(trusted=True, reason="as people say")


def test_scores_of_a_group_are_shares_of_wins() -> None:
    judge = RuleJudge(by_length)
    scores = JudgeScorer(judge, "group", TRUSTED)(
        [
            AnsweredQuestion(row(), ("aaa", "b", "aaa", "cc")),
            AnsweredQuestion(row(), ("d",)),
            AnsweredQuestion(row(), ("e?", "f")),
        ]
    )
    # aaa ties with its equal and beats b and cc; b loses all; cc beats b; alone there is nothing to win
    assert scores == [[2.5 / 3, 0.0, 2.5 / 3, 1 / 3], [0.0], [0.0, 0.0]]
    # three distinct answers and one pair, each in both orders: equal ones are not asked about
    assert len(judge.prompts) == 2 * (3 + 1)
    assert all("c\n\nq" in prompt and "Expected answer" not in prompt for prompt in judge.prompts)
    with_reference = RuleJudge(by_length, JudgeConfig(model="x", reference=True))
    JudgeScorer(with_reference, "group", TRUSTED)([AnsweredQuestion(row(), ("a", "bb"))])
    assert all("[Expected answer]\nxx" in prompt for prompt in with_reference.prompts)


def test_scores_against_the_expected_answer(capfd: pytest.CaptureFixture[str]) -> None:
    judge = RuleJudge(by_length)
    answers = ("a", "bb", "ccc", "xx", "?", "ccc")
    scores = JudgeScorer(judge, "expected", TRUSTED)([AnsweredQuestion(row(), answers)])
    assert scores == [[0.0, 0.5, 1.0, 0.5, 0.0, 1.0]]
    assert len(judge.prompts) == 2 * 4
    assert "1 of 4 comparisons have no readable verdict" in "".join(capfd.readouterr())


def test_a_judge_that_looks_at_the_order_alone_makes_ties() -> None:
    """Both orders are averaged, so a judge with a position bias ranks nothing."""
    answers = ("a", "bb", "ccc")
    assert len(list(combinations(answers, 2))) == 3
    for mark in ("A", "B"):
        judge = RuleJudge(lambda first, second, mark=mark: mark)  # type: ignore[misc]
        assert JudgeScorer(judge, "group", TRUSTED)([AnsweredQuestion(row(), answers)]) == [[0.5, 0.5, 0.5]]
