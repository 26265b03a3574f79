"""`rung chat`: a conversation with a run or a base, with `--compare` beside the base of the run.

Two models answer the same turns, but each remembers its own answers. The base of an adapter run is the same model with
the adapter switched off; the base of a full run is a second model in memory. The prompt is encoded anew for every
answer. `cli` makes one `Conversation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from rich.columns import Columns
from rich.console import Console

from rung.console import plain, text_panel, write_text
from rung.errors import ConfigError, DataError
from rung.models.generate import Sampling, generate
from rung.runs.load import LoadedRun, library_of_target, open_base, open_target, refuse_climb
from rung.types import Message

console = Console(highlight=False)


@dataclass
class ChatModel:
    """One model and the turns of its conversation."""

    name: str
    model: LoadedRun
    prepare_turn: Callable[[], AbstractContextManager[object]]
    """Entered around every answer; switches the adapter off if this is the base of the run."""
    turns: list[Message]
    task: str | None = None
    """The task to answer as, for a method that learns something for each task."""

    def answer(self, sampling: Sampling, *, stream: bool) -> str:
        """Answer the last turn and remember the answer. Raises `DataError` if the conversation is too long."""
        policy, chat = self.model.policy, self.model.chat
        prompt = chat.with_control_tokens(None).prompt_ids(self.turns)
        max_new_tokens = policy.base.context - policy.method.virtual_tokens - len(prompt)
        if max_new_tokens < 1:
            raise DataError("the conversation is longer than the model's context", hint="/new starts over")

        def print_token(tokens: Sequence[int]) -> bool:
            # Decoded as a whole each time: the text of one token depends on the tokens before it.
            previous_text, text = chat.assistant_text(tokens[:-1]), chat.assistant_text(tokens)
            if not text.endswith("\ufffd"):  # half a character: wait for its other bytes
                write_text(text[len(previous_text.rstrip("\ufffd")) :])
            return False

        limited = Sampling(min(sampling.max_new_tokens, max_new_tokens), sampling.temperature, sampling.seed)
        on_token, stop_ids = print_token if stream else None, chat.generation_stop_ids
        with self.prepare_turn():
            answers = generate(policy, [prompt], stop_ids=stop_ids, sampling=limited, task=self.task, on_token=on_token)
        # Without the stop token, which the template writes again when the turn becomes part of the next prompt.
        text = chat.assistant_text(answers[0].ids).strip()
        self.turns.append(Message("assistant", text))
        return text


class Conversation:
    """A conversation of a person with one or two models."""

    def __init__(
        self, target: str, *, compare: bool, sampling: Sampling, system: str | None, task: str | None = None
    ) -> None:
        self.system = [Message("system", system)] if system else []
        self.sampling = sampling
        refuse_climb(target)
        self.library = library_of_target(target)  # before a model is loaded: a missing document is found at once
        self.speakers = _open_models(target, compare)
        if task is not None and not any(speaker.model.tasks for speaker in self.speakers):
            raise ConfigError("this model learned nothing for tasks of their own", where="--task", given=task)
        for speaker in self.speakers:
            speaker.task = task
        self.forget()

    def forget(self) -> None:
        """Start over with only the system turn."""
        for speaker in self.speakers:
            # In place, so that every speaker keeps a list of its own.
            speaker.turns[:] = self.system

    def talk(self, question: str | None) -> None:
        """Ask one question, or read questions until an empty line."""
        if question is not None:
            self.say(question)
            return
        names = " and ".join(speaker.name for speaker in self.speakers)
        console.print(plain(f"talking to {names}; an empty line leaves, /new starts over"))
        while True:
            try:
                line = console.input("[bold]you[/bold] > ")
            except EOFError:
                return
            if not line.strip():
                return
            if line.strip() == "/new":
                self.forget()
                continue
            try:
                self.say(line)
            except DataError as error:
                console.print(plain(error))

    def say(self, text: str) -> None:
        """Ask every model a question and print the answers."""
        text = text.encode("utf-8", "replace").decode()  # a terminal may send half a character
        if self.library is not None:
            text = self.library.prepend_passages(text)
        saved_turns = [list(speaker.turns) for speaker in self.speakers]
        for speaker in self.speakers:
            speaker.turns.append(Message("user", text))
        try:
            self._answer()
        except DataError:  # too long: the conversation goes on without this question
            for speaker, turns in zip(self.speakers, saved_turns, strict=True):
                speaker.turns[:] = turns
            raise

    def _answer(self) -> None:
        if len(self.speakers) == 1:
            self.speakers[0].answer(self.sampling, stream=True)
            write_text("\n")
            return
        # Two answers stand side by side, so neither can be streamed.
        answers = [(s.name, s.answer(self.sampling, stream=False)) for s in self.speakers]
        width = max(20, console.width // 2 - 2)
        console.print(Columns([text_panel(answer, name, width) for name, answer in answers]))


def _open_models(target: str, compare: bool) -> list[ChatModel]:
    loaded_run = open_target(target)
    if loaded_run.config is None:
        if compare:
            raise ConfigError("--compare wants a run: a base has nothing to be compared with", given=target)
        return [ChatModel(target, loaded_run, nullcontext, [])]
    model = ChatModel(f"tuned ({loaded_run.config.method.kind})", loaded_run, nullcontext, [])
    if not compare:
        return [model]
    if (Path(target) / "adapter").is_dir():
        # The same weights answer twice, so no second model is loaded. Virtual tokens belong to the adapter.
        base = replace(loaded_run, chat=loaded_run.chat.without_virtual_tokens())
        switch = loaded_run.policy.method.disabled
    else:
        base, switch = open_base(loaded_run.config.model), nullcontext
    return [ChatModel(f"base ({loaded_run.config.model.name})", base, switch, []), model]
