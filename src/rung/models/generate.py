"""The only decoder: evaluation, chat and rollouts use it.

The longest common prefix of the prompts is encoded once and its keys and values are stored once for all rows; rows that
have stopped leave the batch. Sampling is plain temperature sampling without top-k or top-p, so that the log-probability
of each token is that of the distribution it was drawn from. Speed is that of transformers' modules, one token a call.

Suffixes: B rows, S slots (padding and the row's tokens, without the prefix), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from rung.errors import PlanError
from rung.models.base_model import widest_float
from rung.models.kv_cache import Prefix, new_cache
from rung.models.policy import Policy, model_inputs
from rung.models.rotary import long_tokens
from rung.models.tree_attention import concatenate_kv
from rung.planning.memory import PREFILL_TOKENS

Callback = Callable[[int], None]
"""Receives tokens, or numbers of prompts."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    answers_per_prompt: int = 1
    """Each prompt is encoded once for all its answers."""


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """Generated tokens, without the stop token."""

    ids: list[int]
    stop: int | None
    """The stop token that ended the answer; None if the answer was truncated."""
    logprobs: list[float]
    """Log-probability in nats of each generated token, including the stop token, under the distribution it was drawn
    from; for greedy answers under the model at temperature 1."""

    @property
    def stopped(self) -> bool:
        """Whether a stop token ended the answer."""
        return self.stop is not None

    @property
    def all_tokens(self) -> list[int]:
        """All generated tokens, including the stop token."""
        return self.ids if self.stop is None else [*self.ids, self.stop]


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    sampling: Sampling,
    batch_size: int = 32,
    task: str | None = None,
    on_token: Callback | None = None,
    on_batch: Callback | None = None,
) -> list[GeneratedAnswer]:
    """Return answers in the order of the prompts; all answers to one prompt are adjacent.

    `batch_size` counts answers decoded at once; the answers to one prompt share a batch. `task` is the task of all
    prompts, for methods that learn something per task. `on_token` receives each token and is for a single prompt;
    `on_batch` receives the number of prompts just answered. Raises `ValueError` for an empty prompt, `PlanError` for a
    virtual token inside a prompt that this policy has not learned.
    """
    options = _Options(stop_ids, batch_size, task, on_token, on_batch)
    if (boundary := policy.rope_boundary) is None or not prompts:
        return _generate(policy, prompts, [sampling.max_new_tokens] * len(prompts), sampling, options)
    return _generate_across(boundary, policy, prompts, sampling, options)


class _Options(NamedTuple):
    """Arguments of `generate` that are the same for all of its parts."""

    stop_ids: Sequence[int]
    batch_size: int
    task: str | None
    on_token: Callback | None
    on_batch: Callback | None


def _generate_across(
    boundary: int, policy: Policy, prompts: Sequence[Sequence[int]], sampling: Sampling, options: _Options
) -> list[GeneratedAnswer]:
    """`generate` for a model whose rotary frequencies change where a document grows beyond `boundary` tokens.

    Prompts of each side are answered apart. An answer that reaches the boundary continues as a longer prompt: all
    its keys are computed again, as transformers does for Phi-3.
    """
    virtual_count, per_prompt = policy.method.virtual_tokens, sampling.answers_per_prompt
    lengths = [virtual_count + len(prompt) for prompt in prompts]
    if virtual_count and max(lengths) + sampling.max_new_tokens > boundary:
        reason = "the frequencies of virtual tokens would change while the model answers"
        given = f"{max(lengths) + sampling.max_new_tokens} tokens with {virtual_count} virtual ones"
        raise PlanError(reason, given=given, allowed=f"at most {boundary}")
    answers: dict[int, list[GeneratedAnswer]] = {}
    for is_long in (False, True):
        side = [i for i, length in enumerate(lengths) if (length > boundary) == is_long]
        if not side:
            continue
        # the call that chooses a token reads all tokens before it
        limits = [sampling.max_new_tokens if is_long else boundary - lengths[i] + 1 for i in side]
        limits = [min(limit, sampling.max_new_tokens) for limit in limits]
        with long_tokens(policy.model, is_long):
            part = _generate(policy, [prompts[i] for i in side], limits, sampling, options)
        answers |= {i: part[k * per_prompt : (k + 1) * per_prompt] for k, i in enumerate(side)}
    flat = [answer for i in range(len(prompts)) for answer in answers[i]]
    crossing = [k for k, a in enumerate(flat) if not a.stopped and len(a.ids) < sampling.max_new_tokens]
    if not crossing:
        return flat
    longer = [[*prompts[k // per_prompt], *flat[k].ids] for k in crossing]
    limits = [sampling.max_new_tokens - len(flat[k].ids) for k in crossing]
    # another seed: the same numbers drawn twice would be one sample
    next_sampling = replace(sampling, seed=sampling.seed + 1, answers_per_prompt=1)
    with long_tokens(policy.model, True):
        rest = _generate(policy, longer, limits, next_sampling, options._replace(on_batch=None))
    for k, answer in zip(crossing, rest, strict=True):
        ids, logprobs = [*flat[k].ids, *answer.ids], [*flat[k].logprobs, *answer.logprobs]
        flat[k] = GeneratedAnswer(ids, answer.stop, logprobs)
    return flat


def _generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: Sampling,
    options: _Options,
) -> list[GeneratedAnswer]:
    """`generate`, with at most `limits` new tokens for each prompt."""
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt needs at least one token")
    id_count = policy.base.vocab_size + policy.method.inserted_tokens
    if any(max(prompt) >= id_count for prompt in prompts):
        raise PlanError("a prompt holds virtual tokens that this model has not learned", where="method.positions")
    answers_by_prompt: list[list[GeneratedAnswer]] = [[] for _ in prompts]
    prefix_length = _common_prefix_length(prompts)
    virtual_count = policy.method.virtual_tokens
    totals = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    max_length = virtual_count + max(totals, default=0)
    if max_length > _sliding_window(policy):
        if virtual_count:
            reason = "virtual tokens would leave the model's sliding window while it answers"
            allowed = f"at most {_sliding_window(policy)}"
            raise PlanError(reason, given=f"{max_length} tokens with {virtual_count} virtual ones", allowed=allowed)
        prefix_length = 0  # a window counts slots, and padding between the prefix and a row's tokens would use some
    # By length, so that a batch holds little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    # One generator for the whole call: answers depend on the seed and on the batches, not on earlier calls.
    generator = torch.Generator(policy.device).manual_seed(sampling.seed)
    with policy.autocast():
        prefix, start = _encode_prefix(policy, prompts[0][:prefix_length], options.task), virtual_count + prefix_length
        per_prompt, lengths = sampling.answers_per_prompt, [len(prompt) - prefix_length for prompt in prompts]
        decoding = _Decoding(policy, prefix, frozenset(options.stop_ids), sampling, generator)
        for rows in _batches(order, lengths, max(1, options.batch_size // per_prompt)):
            suffixes = [list(prompts[i][prefix_length:]) for i in rows]
            batch_answers = decoding.run(suffixes, [limits[i] for i in rows], start, options.task, options.on_token)
            for slot, i in enumerate(rows):
                answers_by_prompt[i] = batch_answers[slot * per_prompt : (slot + 1) * per_prompt]
            if options.on_batch is not None:
                options.on_batch(len(rows))
    return [answer for prompt_answers in answers_by_prompt for answer in prompt_answers]


def generate_by_task(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    tasks: Sequence[str | None],
    *,
    stop_ids: Sequence[int],
    sampling: Sampling,
    batch_size: int = 32,
    on_batch: Callback | None = None,
) -> list[GeneratedAnswer]:
    """`generate` for prompts of several tasks, one call per task: virtual tokens may differ between tasks."""
    answers: dict[int, list[GeneratedAnswer]] = {}
    n = sampling.answers_per_prompt
    options: Any = {"stop_ids": stop_ids, "sampling": sampling, "batch_size": batch_size, "on_batch": on_batch}
    for task in sorted(set(tasks), key=str):
        indices = [i for i, prompt_task in enumerate(tasks) if prompt_task == task]
        task_answers = generate(policy, [prompts[i] for i in indices], task=task, **options)
        answers |= {i: task_answers[k * n : (k + 1) * n] for k, i in enumerate(indices)}
    return [answer for i in range(len(prompts)) for answer in answers[i]]


@dataclass
class _Decoding:
    """Decoding of one batch after another."""

    policy: Policy
    prefix: Prefix | None
    stop_ids: frozenset[int]
    sampling: Sampling
    generator: torch.Generator

    def run(
        self, suffixes: list[list[int]], limits: list[int], start: int, task: str | None, on_token: Callback | None
    ) -> list[GeneratedAnswer]:
        """Answers of at most `limits` tokens to prompts whose suffixes start at position `start`."""
        slots, device, self.cache = max(map(len, suffixes)), self.policy.device, new_cache()
        # Left padding: the last slot of every row predicts.
        ids_BS = torch.tensor([[0] * (slots - len(s)) + s for s in suffixes], device=device)
        lengths_B1 = torch.tensor([[len(s)] for s in suffixes], device=device)
        offsets_BS = torch.arange(slots, device=device) - (slots - lengths_B1)
        self.mask_BS = (offsets_BS >= 0).long()
        inputs, positions = self.policy.embed(ids_BS, task), (start + offsets_BS) * self.mask_BS
        per_prompt = self.sampling.answers_per_prompt
        count = per_prompt * len(positions)
        self.active_rows = list(range(count))
        self.limits = [limit for limit in limits for _ in range(per_prompt)]
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]
        self.stops: list[int | None] = [None] * count
        for step in range(max(limits)):
            out = _run_model(self.policy, inputs, positions, self.cache, self.prefix, attention_mask=self.mask_BS)
            logits = out.logits[:, -1].float()
            # After the prompts: each prompt is encoded once, then its row is repeated for every answer.
            if step == 0 and per_prompt > 1:
                source_row = torch.arange(len(logits), device=logits.device).repeat_interleave(per_prompt)
                self.cache.batch_select_indices(source_row)
                self.mask_BS, positions, logits = self.mask_BS[source_row], positions[source_row], logits[source_row]
            tokens, logprob = self._choose_tokens(logits)
            kept_positions = self._record_tokens(tokens.tolist(), logprob.tolist(), on_token)
            if not kept_positions:
                break
            self._drop_finished_rows(kept_positions, len(tokens))
            inputs = tokens[kept_positions, None]
            positions = positions[kept_positions, -1:] + 1
            self.mask_BS = torch.cat([self.mask_BS, self.mask_BS.new_ones(len(kept_positions), 1)], dim=1)
        return [GeneratedAnswer(*parts) for parts in zip(self.tokens, self.stops, self.logprobs, strict=True)]

    def _choose_tokens(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(logits_BV / (self.sampling.temperature or 1.0), dim=-1)
        tokens = logprobs.argmax(dim=-1) if self.sampling.temperature == 0.0 else self._sample(logprobs)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    def _sample(self, logprobs_BV: Tensor) -> Tensor:
        """Sample one token a row by inverting the cumulative distribution.

        It takes one random number a row; `multinomial` draws V of them.
        """
        # In float64: sums over a vocabulary in float32 lose the rare tokens.
        device, dtype = logprobs_BV.device, widest_float(logprobs_BV.device)
        cumulative_BV = logprobs_BV.exp().cumsum(dim=-1, dtype=dtype)
        options: Any = {"generator": self.generator, "dtype": dtype, "device": device}
        uniform_B = torch.rand(len(logprobs_BV), 1, **options)
        # The last sum is 1 only up to rounding, so the threshold is scaled by it.
        threshold_B = uniform_B * cumulative_BV[:, -1:]
        return torch.searchsorted(cumulative_BV, threshold_B, right=True)[:, 0].clamp(max=logprobs_BV.shape[1] - 1)

    def _record_tokens(self, tokens: list[int], logprobs: list[float], on_token: Callback | None) -> list[int]:
        """Record one token per active row; return the batch positions that continue."""
        kept_positions = []
        for position, (row, token, logprob) in enumerate(zip(self.active_rows, tokens, logprobs, strict=True)):
            self.logprobs[row].append(logprob)
            if token in self.stop_ids:
                self.stops[row] = token
                continue
            self.tokens[row].append(token)
            if len(self.tokens[row]) < self.limits[row]:
                kept_positions.append(position)
            if on_token is not None:
                on_token(token)
        self.active_rows = [self.active_rows[position] for position in kept_positions]
        return kept_positions

    def _drop_finished_rows(self, kept_positions: list[int], size: int) -> None:
        if len(kept_positions) == size:
            return
        rows = torch.tensor(kept_positions, device=self.mask_BS.device)
        self.cache.batch_select_indices(rows)
        self.mask_BS = self.mask_BS[rows]


def _batches(row_order: Sequence[int], lengths: Sequence[int], max_rows: int) -> Iterator[list[int]]:
    """Batches of at most `max_rows` rows and `PREFILL_TOKENS` padded tokens; `row_order` ascends by length."""
    rows: list[int] = []
    for row in row_order:
        if rows and (len(rows) == max_rows or (len(rows) + 1) * lengths[row] > PREFILL_TOKENS):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _encode_prefix(policy: Policy, ids: Sequence[int], task: str | None) -> Prefix | None:
    """Keys and values that precede every row: virtual tokens, then the common prefix of the prompts."""
    virtual_by_layer = policy.virtual_kv(task)
    virtual = None if virtual_by_layer is None else [virtual_by_layer[layer] for layer in sorted(virtual_by_layer)]
    if not ids:
        return virtual
    cache, row, start = new_cache(), torch.tensor([list(ids)], device=policy.device), policy.method.virtual_tokens
    positions = torch.arange(start, start + len(ids), device=policy.device)[None]
    _run_model(policy, policy.embed(row, task), positions, cache, virtual)
    # Contiguous copies, so that the larger buffers behind the views can be freed.
    prompt_kv = [(layer.keys.contiguous(), layer.values.contiguous()) for layer in cache.layers]
    return prompt_kv if virtual is None else [concatenate_kv(*pair) for pair in zip(virtual, prompt_kv, strict=True)]


def _run_model(
    policy: Policy, inputs: Tensor, positions: Tensor, cache: Cache, prefix: Prefix | None, **mask: Tensor
) -> Any:
    """Append ids or embeddings to the cache; the logits of each row's last slot."""
    context = {"position_ids": positions, "past_key_values": cache, "prefix": prefix, **mask}
    return policy.model(**model_inputs(inputs), **context, use_cache=True, logits_to_keep=1)


def _sliding_window(policy: Policy) -> float:
    config = policy.model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return window or float("inf")


def _common_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the prompts' common prefix; each prompt keeps at least one token outside it."""
    if len(prompts) < 2:
        return 0
    return min(len(commonprefix([list(prompt) for prompt in prompts])), *(len(prompt) - 1 for prompt in prompts))
