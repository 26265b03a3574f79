"""The one decoder, used by evaluation, chat and later by rollouts.

Prompts that begin alike share the work: their longest common prefix is encoded once and held once for all
rows. Rows that have stopped leave the batch.

Suffixes: B rows, S slots (padding and own tokens, without the prefix).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rung.errors import PlanError
from rung.models.kv_cache import Prefix, new_cache, single_row_kv
from rung.models.policy import Policy, concatenate_kv, model_inputs

PREFILL_TOKENS = 16_384
"""Prompt tokens encoded at once: long prompts come in smaller batches, so that memory does not follow their length."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    answers: int = 1
    """To each prompt, which is encoded once for all of them."""


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """Generated tokens, the stop apart."""

    ids: list[int]
    stop: int | None
    """The stop that was reached; None where the answer was cut."""
    logprobs: list[float]
    """Log-probability in nats of each generated token, the stop included when it was reached, in the distribution that
    it was drawn from; of greedy answers in the model's own."""

    @property
    def stopped(self) -> bool:
        """Whether a stop was reached."""
        return self.stop is not None

    @property
    def all_tokens(self) -> list[int]:
        """Every token that was generated, the stop among them."""
        return self.ids if self.stop is None else [*self.ids, self.stop]


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    sampling: Sampling,
    batch: int = 32,
    task: str | None = None,
    on_token: Callable[[int], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[GeneratedAnswer]:
    """Answers in the order of the prompts, those to one next to each other, short and long prompts batched apart.

    `batch` is how many answers are made at once; those to one prompt are never parted. `task` is that of all prompts,
    for methods that learned something for each. `on_token` receives each token as it is made and is for a single
    prompt; `on_batch` the number of prompts just answered. Raises `ValueError` for an empty prompt, `PlanError` for
    virtual tokens inside one that this policy knows nothing of.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt needs at least one token")
    known = policy.vocab_size + policy.method.inserted_tokens
    if any(max(prompt) >= known for prompt in prompts):
        raise PlanError("a prompt holds virtual tokens that this model has not learned", where="method.positions")
    found: list[list[GeneratedAnswer]] = [[] for _ in prompts]
    shared = _common_prefix(prompts)
    virtual = policy.method.virtual_tokens
    longest = virtual + max(map(len, prompts), default=0) + sampling.max_new_tokens
    if longest > _sliding_window(policy):
        if virtual:
            raise PlanError(
                "virtual tokens would leave the model's sliding window while it answers",
                given=f"{longest} tokens with {virtual} virtual ones",
                allowed=f"at most {_sliding_window(policy)}",
            )
        shared = 0  # a window counts slots, and padding between the prefix and a row's own tokens would take some
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    random = torch.Generator(policy.device).manual_seed(sampling.seed)
    with policy.autocast():
        prefix = _encode(policy, prompts[0][:shared], task)
        answers = sampling.answers
        for rows in _batches(order, [len(prompt) - shared for prompt in prompts], max(1, batch // answers)):
            rests = [list(prompts[i][shared:]) for i in rows]
            decoding = _Decoding(policy, prefix, virtual + shared, rests, task, frozenset(stop_ids), sampling, random)
            made = decoding.run(on_token)
            for place, i in enumerate(rows):
                found[i] = made[place * answers : (place + 1) * answers]
            if on_batch is not None:
                on_batch(len(rows))
    return [answer for own in found for answer in own]


def generate_by_task(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    tasks: Sequence[str | None],
    *,
    stop_ids: Sequence[int],
    sampling: Sampling,
    batch: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> list[GeneratedAnswer]:
    """`generate` for prompts of several tasks: what stands before a prompt may differ from task to task."""
    found: dict[int, list[GeneratedAnswer]] = {}
    each = sampling.answers
    for task in sorted(set(tasks), key=str):
        own = [i for i, of in enumerate(tasks) if of == task]
        asked = [prompts[i] for i in own]
        made = generate(policy, asked, stop_ids=stop_ids, sampling=sampling, batch=batch, task=task, on_batch=on_batch)
        found |= {i: made[k * each : (k + 1) * each] for k, i in enumerate(own)}
    return [answer for i in range(len(prompts)) for answer in found[i]]


class _Decoding:
    """One batch on its way to its answers."""

    def __init__(
        self,
        policy: Policy,
        prefix: Prefix | None,
        before: int,
        rests: list[list[int]],
        task: str | None,
        stop_ids: frozenset[int],
        sampling: Sampling,
        random: torch.Generator,
    ) -> None:
        self.policy, self.stop_ids, self.sampling, self.random = policy, stop_ids, sampling, random
        longest = max(len(rest) for rest in rests)
        device = policy.device
        self.ids_BS = torch.zeros(len(rests), longest, dtype=torch.long, device=device)
        self.mask_BS = torch.zeros_like(self.ids_BS)
        self.positions_BS = torch.zeros_like(self.ids_BS)
        for row, rest in enumerate(rests):  # padding stands in front of a row's own tokens
            own = slice(longest - len(rest), longest)
            self.ids_BS[row, own] = torch.tensor(rest, device=device)
            self.mask_BS[row, own] = 1
            self.positions_BS[row, own] = torch.arange(before, before + len(rest), device=device)
        self.entering = policy.embed(self.ids_BS, task)
        self.prefix = prefix
        self.cache = new_cache()

    def run(self, on_token: Callable[[int], None] | None) -> list[GeneratedAnswer]:
        entering, positions, answers = self.entering, self.positions_BS, self.sampling.answers
        count = answers * len(positions)
        self.alive = list(range(count))
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]
        self.stops: list[int | None] = [None] * count
        for made in range(self.sampling.max_new_tokens):
            out = self.policy.model(
                **model_inputs(entering),
                attention_mask=self.mask_BS,
                position_ids=positions,
                past_key_values=self.cache,
                prefix=self.prefix,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = out.logits[:, -1].float()
            if made == 0 and answers > 1:
                each = torch.arange(len(logits), device=logits.device).repeat_interleave(answers)
                self.cache.batch_select_indices(each)
                self.mask_BS, positions, logits = self.mask_BS[each], positions[each], logits[each]
            chosen, logprob = self._choose(logits)
            kept = self._take(chosen.tolist(), logprob.tolist(), on_token)
            if not kept:
                break
            self._compact(kept, len(chosen))
            entering = chosen[kept, None]
            positions = positions[kept, -1:] + 1
            self.mask_BS = torch.cat([self.mask_BS, self.mask_BS.new_ones(len(kept), 1)], dim=1)
        return [GeneratedAnswer(*parts) for parts in zip(self.tokens, self.stops, self.logprobs, strict=True)]

    def _choose(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(logits_BV / (self.sampling.temperature or 1.0), dim=-1)
        if self.sampling.temperature == 0.0:
            chosen = logprobs.argmax(dim=-1)
        else:
            chosen = self._draw(logprobs)
        return chosen, logprobs.gather(1, chosen[:, None])[:, 0]

    def _draw(self, logprobs_BV: Tensor) -> Tensor:
        """One token a row, by inverting its distribution: one random number, where `multinomial` draws V of them."""
        cumulative_BV = logprobs_BV.exp().cumsum(dim=-1, dtype=torch.float64)
        drawn_B = torch.rand(len(logprobs_BV), 1, generator=self.random, dtype=torch.float64, device=logprobs_BV.device)
        below_B = drawn_B * cumulative_BV[:, -1:]
        return torch.searchsorted(cumulative_BV, below_B, right=True)[:, 0].clamp(max=logprobs_BV.shape[1] - 1)

    def _take(self, chosen: list[int], logprobs: list[float], on_token: Callable[[int], None] | None) -> list[int]:
        """Record one token per living row; return the positions within the batch that go on."""
        kept = []
        for position, (row, token, logprob) in enumerate(zip(self.alive, chosen, logprobs, strict=True)):
            self.logprobs[row].append(logprob)
            if token in self.stop_ids:
                self.stops[row] = token
                continue
            self.tokens[row].append(token)
            kept.append(position)
            if on_token is not None:
                on_token(token)
        self.alive = [self.alive[position] for position in kept]
        return kept

    def _compact(self, kept: list[int], size: int) -> None:
        if len(kept) == size:
            return
        rows = torch.tensor(kept, device=self.mask_BS.device)
        self.cache.batch_select_indices(rows)
        self.mask_BS = self.mask_BS[rows]


def _batches(order: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Rows in ascending order of length, at most `most` and at most `PREFILL_TOKENS` padded tokens at once."""
    rows: list[int] = []
    for row in order:
        if rows and (len(rows) == most or (len(rows) + 1) * lengths[row] > PREFILL_TOKENS):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _encode(policy: Policy, ids: Sequence[int], task: str | None) -> Prefix | None:
    """Keys and values of what stands before every row: virtual tokens, then the ids that all prompts begin with."""
    found = policy.virtual_kv(task)
    virtual = None if found is None else [found[layer] for layer in sorted(found)]
    if not ids:
        return virtual
    cache = new_cache()
    row = torch.tensor([list(ids)], device=policy.device)
    start = policy.method.virtual_tokens
    positions = torch.arange(start, start + len(ids), device=policy.device)[None]
    policy.model(
        **model_inputs(policy.embed(row, task)),
        position_ids=positions,
        past_key_values=cache,
        prefix=virtual,
        use_cache=True,
        logits_to_keep=1,
    )
    own = single_row_kv(cache)
    return own if virtual is None else [concatenate_kv(*pair) for pair in zip(virtual, own, strict=True)]


def _sliding_window(policy: Policy) -> float:
    config = policy.model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return window or float("inf")


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, leaving each at least one of its own."""
    if len(prompts) < 2:
        return 0
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(shared, *(len(prompt) - 1 for prompt in prompts))
