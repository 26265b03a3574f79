"""The other models of a run: what its policy is compared with, scored by or taught by."""

from __future__ import annotations

from collections.abc import Sequence

from rung.data.chat import Chat
from rung.data.prompts import Prompted
from rung.engine.progress import say
from rung.engine.rollout import Judge
from rung.errors import ConfigError
from rung.model.generate import Answer
from rung.model.load import Base
from rung.model.policy import Policy, Untouched
from rung.opened import load
from rung.scoring.verifiers import Verifier, verifier
from rung.spec.run import RunSpec
from rung.types import Example


def reference_of(spec: RunSpec, base: Base) -> Policy | None:
    """The model that an objective compares with, where it is not the base with the method off."""
    named = getattr(spec.objective, "against", None)
    if named is None:
        return None
    if named == "base" and spec.method.kind != "full":
        return None
    other = spec.model if named == "base" else spec.model.model_copy(update={"name": named, "revision": None})
    why = "the base moves" if named == "base" else "it is named"
    say(f"the reference is a second model in memory, because {why}")
    found = load(other)
    if found.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ConfigError("the reference has another vocabulary", where="objective.reference", given=named)
    return Policy(found, Untouched())


def verifier_of(spec: RunSpec) -> Verifier | None:
    """What says how much an answer is worth, where the config has one. Raises `ConfigError` where it cannot be had."""
    source = getattr(spec.objective, "reward", None)
    return None if source is None else verifier(source)


def judge(verify: Verifier, chat: Chat, prompted: Prompted) -> Judge:
    """What answers to these prompts are worth by a function of their text."""

    def worth(documents: Sequence[Example], answers: Sequence[Answer]) -> list[float]:
        texts = [chat.assistant_text(a.drawn).strip() for a in answers]
        return [verify(text, prompted.records[d.row]) for text, d in zip(texts, documents, strict=True)]

    return worth
