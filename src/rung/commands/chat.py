"""`rung chat`: talks to a run or a base, on request beside the base it grew from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel

from rung.config.io import parse_config
from rung.config.model import ModelConfig
from rung.data.chat import ChatTemplate
from rung.errors import ConfigError, DataError
from rung.evaluation.retrieval import Library
from rung.models.generate import Sampling, generate
from rung.models.policy import Policy
from rung.runs.dataset import load_library
from rung.runs.load import config_of_run, open_base, open_run
from rung.training.run_folder import is_climb, read_manifest
from rung.types import Message

out = Console(highlight=False)


@dataclass
class ChatModel:
    """One model and its own memory of the conversation."""

    name: str
    policy: Policy
    chat: ChatTemplate
    prepare_turn: Callable[[], AbstractContextManager[object]]
    """Entered around every answer: switches an adapter off for the base's side."""
    turns: list[Message]
    task: str | None = None
    """Of several that a model learned something for."""
    tasks: tuple[str, ...] = ()
    """All of them."""

    def answer(self, sampling: Sampling, *, stream: bool) -> str:
        """Say something to the last turn and remember it. Raises `DataError` when the conversation is too long."""
        prompt = self.chat.prompt_ids(self.turns)
        room = self.policy.base.context - self.policy.method.virtual_tokens - len(prompt)
        if room < 1:
            raise DataError("the conversation is longer than the model's context", hint="/new starts over")
        shown: list[int] = []

        def show(token: int) -> None:
            before = self.chat.assistant_text(shown)
            shown.append(token)
            now = self.chat.assistant_text(shown)
            if not now.endswith("\ufffd"):  # half a character: wait for its other bytes
                sys.stdout.write(now[len(before.rstrip("\ufffd")) :])
                sys.stdout.flush()

        limit = Sampling(min(sampling.max_new_tokens, room), sampling.temperature, sampling.seed)
        with self.prepare_turn():
            ids = generate(
                self.policy,
                [prompt],
                stop_ids=self.chat.stop_ids,
                sampling=limit,
                task=self.task,
                on_token=show if stream else None,
            )[0].ids
        text = self.chat.assistant_text(ids).strip()
        self.turns.append(Message("assistant", text))
        return text


class Conversation:
    """A person on one side, one or two models on the other."""

    def __init__(
        self, target: str, *, compare: bool, sampling: Sampling, system: str | None, task: str | None = None
    ) -> None:
        self.system = [Message("system", system)] if system else []
        self.sampling = sampling
        self.library = _library(target)  # before anything is loaded
        self.speakers = _open_models(target, compare)
        if task is not None and not any(speaker.tasks for speaker in self.speakers):
            raise ConfigError("this model learned nothing for tasks of their own", where="--task", given=task)
        for speaker in self.speakers:
            speaker.task = task
        self.forget()

    def forget(self) -> None:
        """Start over with the system turn alone."""
        for speaker in self.speakers:
            speaker.turns[:] = self.system

    def talk(self, question: str | None) -> None:
        """One question, or questions until an empty line."""
        if question is not None:
            self.say(question)
            return
        out.print(f"talking to {' and '.join(s.name for s in self.speakers)}; an empty line leaves, /new starts over")
        while True:
            try:
                asked = out.input("[bold]you[/bold] > ")
            except EOFError:
                return
            if not asked.strip():
                return
            if asked.strip() == "/new":
                self.forget()
                continue
            try:
                self.say(asked)
            except DataError as error:
                out.print(str(error), markup=False)

    def say(self, text: str) -> None:
        """Put a question to every speaker."""
        text = text.encode("utf-8", "replace").decode()  # a terminal may send half a character
        if self.library is not None:
            text = self.library.prepend_passages(text)
        before = [list(speaker.turns) for speaker in self.speakers]
        for speaker in self.speakers:
            speaker.turns.append(Message("user", text))
        try:
            self._answer()
        except DataError:  # too long: the conversation goes on without this question
            for speaker, turns in zip(self.speakers, before, strict=True):
                speaker.turns[:] = turns
            raise

    def _answer(self) -> None:
        if len(self.speakers) == 1:
            self.speakers[0].answer(self.sampling, stream=True)
            sys.stdout.write("\n")
            return
        answers = [(s.name, s.answer(self.sampling, stream=False)) for s in self.speakers]
        width = max(20, out.width // 2 - 2)
        out.print(Columns([Panel(answer, title=name, width=width) for name, answer in answers]))


def _library(target: str) -> Library | None:
    """Where a run that was trained on retrieved passages looks up what stands before a question."""
    path = Path(target)
    if not (path / "run.json").exists() or (config := config_of_run(path)).evaluation.context != "retrieved":
        return None
    return load_library(config)


def _open_models(target: str, compare: bool) -> list[ChatModel]:
    path = Path(target)
    if not (path / "run.json").exists():
        if compare:
            raise ConfigError("--compare wants a run: a base has nothing to be compared with", given=target)
        policy, chat = open_base(ModelConfig(name=target))
        return [ChatModel(target, policy, chat, nullcontext, [])]
    if is_climb(path):
        raise ConfigError("this is a climb, not a run", given=target, hint=f"its runs stand in {path / 'rungs'}")
    policy, chat, config = open_run(path)
    tasks = getattr(config.method, "tasks", ())
    tuned = ChatModel(f"tuned ({config.method.kind})", policy, chat, nullcontext, [], tasks=tasks)
    if not compare:
        return [tuned]
    if (path / "adapter").is_dir():
        return [
            ChatModel(f"base ({config.model.name})", policy, chat.without_virtual_tokens(), policy.method.disabled, []),
            tuned,
        ]
    model = parse_config(read_manifest(path)["config"], str(path)).model
    base, base_chat = open_base(model)
    return [ChatModel(f"base ({model.name})", base, base_chat, nullcontext, []), tuned]
