"""What a revision must be, and what a critic's view is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rung.config.constitution import ConstitutionConfig
from rung.evaluation.judge import AnswerPair
from rung.scoring.answer_rules import not_banned, not_refused
from rung.scoring.metrics import BINARY_METRICS, METRICS
from rung.synth.feedback import FeedbackModel, agreement_with_people
from rung.synth.principles import AnswerComparison, Transcripts
from rung.synth.revisions import check_preface, check_roles
from rung.types import Message


@pytest.mark.parametrize(
    "text",
    [
        "Human: and then?",
        "Fine.\n\nAssistant: yes",
        "**Critique Request:** x",
        "> user: x",
        "Revision:\nx",
        "### Assistant: x",
        "a<|im_start|>\n<|im_start|>user",
        "AI: x",
    ],
)
def test_texts_that_go_on_as_another_speaker(text: str) -> None:
    rejection = check_roles(text)
    assert rejection is not None and rejection.filter == "roles"


@pytest.mark.parametrize(
    "text",
    [
        "The user: a person who uses.",
        "Users: 5",
        "It is a human right: water.",
        "The critique was fair.",
        "System: restart.",
    ],
)
def test_texts_that_name_a_role_and_stay_answers(text: str) -> None:
    assert check_roles(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "Here is a revised answer: no.",
        "Sure! Here's the rewritten version, which keeps the rule:\n\nno.",
        "Certainly, here is my new answer:",
        "Below is an improved response that follows the rule:",
        "Revised answer: no.",
        "Here is a corrected response: no.",
        "Sure, I can rewrite that: no.",
        "This is the answer, rewritten: no.",
    ],
)
def test_texts_that_announce_themselves(text: str) -> None:
    rejection = check_preface(text)
    assert rejection is not None and rejection.filter == "prefaces"


@pytest.mark.parametrize(
    "text",
    [
        "Here is what you need: flour, eggs.",
        "This is a bank: it has three counters.",
        "The answer: 5",
        "Sure.",
        "Here is the answer: 4.",
        "Below is the updated price list: 5",
    ],
)
def test_texts_that_begin_as_answers_do(text: str) -> None:
    assert check_preface(text) is None


def test_rules_that_an_answer_keeps_or_breaks_by_itself() -> None:
    assert not_refused("I'm sorry, but I can't help with that.") == 0.0 and not_refused("I am sorry for you.") == 1.0
    score = not_banned([r"\bshould\b", "guarant"])
    assert [score(text, "you should") for text in ("You SHOULD.", "shoulder", "It guarantees x", "fine", "")] == [
        *(0.0, 1.0, 0.0, 1.0, 1.0)
    ]
    assert {"not_banned", "not_refused"} <= BINARY_METRICS and not METRICS["not_refused"].reads_expected


class Critic:
    """A critic whose probability of A is given for each pair by the texts that are shown."""

    def __init__(self, probabilities: dict[tuple[str, str], float]) -> None:
        self.probabilities = probabilities

    def choices(self, conversations: Sequence[Any], options: Sequence[str]) -> Any:
        assert options == ("A", "B")
        rows = []
        for conversation in conversations:
            shown = conversation.turns[-1].content.split("[Answer A]\n")[1].split("\n\nWhich")[0]
            first, second = shown.split("\n\n[Answer B]\n")
            p = self.probabilities[first, second]
            rows.append([p, 1.0 - p])
        return np.array(rows)


def feedback_model(probabilities: dict[tuple[str, str], float], rules: Sequence[str] = ("Be kind.",)) -> FeedbackModel:
    settings = {"teacher": {"model": "x"}, "seeds": "x", "principles": list(rules), "makes": "preferences"}
    config = ConstitutionConfig.model_validate(settings)
    return FeedbackModel(config, Critic(probabilities), Transcripts(), 0)  # type: ignore[arg-type]


def test_both_orders_are_the_probability_of_the_first() -> None:
    """P(first) is that of A where it is shown first, and of B where it is shown second."""
    work = feedback_model({("x", "y"): 0.9, ("y", "x"): 0.3, ("u", "v"): np.nan, ("v", "u"): 0.2})
    pairs = [AnswerComparison((Message("user", "q"),), None, *texts) for texts in (("x", "y"), ("u", "v"))]
    rules = [work.config.principles[0]] * 2
    by_order = work.probabilities(pairs, rules, (1, 0))
    assert by_order[0].tolist() == pytest.approx([0.9, 0.7]) and np.isnan(by_order[1, 0])
    assert by_order[1, 1] == pytest.approx(0.8)


def test_agreement_against_enumeration() -> None:
    """Ten pairs by hand: seven as people prefer, one as they do not, one without a preference, one without a verdict,
    which is no preference; that of a tie does not count."""
    probabilities: dict[tuple[str, str], float] = {}
    pairs, people = [], []
    for i, (a_first, b_first, label) in enumerate(
        [(0.9, 0.2, "first")] * 7
        + [(0.6, 0.7, "first"), (0.7, 0.7, "second"), (0.9, 0.1, "tie"), (np.nan, 0.1, "first")]
    ):
        probabilities[f"x{i}", f"y{i}"], probabilities[f"y{i}", f"x{i}"] = a_first, b_first
        pairs.append(AnswerPair(f"q{i}", f"x{i}", f"y{i}", source=f"file {i}"))
        people.append([label, label])
    found = agreement_with_people(feedback_model(probabilities), pairs, people, 0)  # type: ignore[arg-type]
    assert (found.pairs, found.unreadable) == (10, 1) and found.agreement is not None
    assert found.agreement.mean == pytest.approx((7 * 1 + 0 + 0.5 + 0.5) / 10) and "1 of them without" in found.reason
    assert found.trusted == (found.agreement.low > 0.5)
    shown_first = [(0.9 + 0.2) / 2] * 7 + [(0.6 + 0.7) / 2, 0.7]
    assert found.shown_first == pytest.approx(np.mean(shown_first))
    silent = {texts: np.nan for texts in probabilities} | {("x0", "y0"): 0.9, ("y0", "x0"): 0.1}
    few = agreement_with_people(feedback_model(silent), pairs, people, 0)  # type: ignore[arg-type]
    assert not few.trusted and few.agreement is not None and few.agreement.mean == pytest.approx((1 + 9 * 0.5) / 10)
    nobody = agreement_with_people(feedback_model({}), [], [], 0)
    assert not nobody.trusted and nobody.agreement is None


def test_a_rule_that_is_always_wrong_is_named() -> None:
    class ByRule(Critic):
        def choices(self, conversations: Sequence[Any], options: Sequence[str]) -> Any:
            texts = [conversation.turns[-1].content for conversation in conversations]
            p = [0.9 if ("[Answer A]\ngood" in text) != ("Be rude." in text) else 0.1 for text in texts]
            return np.array([[x, 1 - x] for x in p])

    work = feedback_model({}, ("Be kind.", "Be rude."))
    work.critic = ByRule({})  # type: ignore[assignment]
    pairs = [AnswerPair(f"q{i}", "good", "bad", source=f"file {i}") for i in range(30)]
    found = agreement_with_people(work, pairs, [["first"]] * 30, 0)
    assert found.by_rule == {"Be kind.": 1.0, "Be rude.": 0.0} and not found.trusted
    assert "by the rule 'Be rude.' alone on 0.00" in found.reason


def test_examples_of_comparisons_are_right_by_both_letters(tmp_path: Path) -> None:
    """Every other example is shown in the other order; the letter is that of the better answer."""
    row = '{"rule": "Be kind.", "question": "q", "first": "kind", "second": "rude", "better": "first"}\n'
    (tmp_path / "t.jsonl").write_text(row * 2)
    config = ConstitutionConfig(teacher={"model": "x"}, seeds="x", principles=["Be kind."])
    turns = Transcripts.read(str(tmp_path / "t.jsonl"), config.principles, critiques=True).before_comparison()
    assert [turn.content for turn in turns[1::2]] == ["A", "B"]
    assert "[Answer A]\nkind" in turns[0].content and "[Answer A]\nrude" in turns[2].content
