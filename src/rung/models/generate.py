"""The only way to generate: evaluation, chat and rollouts call it.

The longest common prefix of the prompts is encoded once and its keys and values are stored once for all rows
(`models/decoding.py` decodes them). Sampling is plain temperature sampling without top-k or top-p, so that the
log-probability of each token is that of the distribution it was drawn from. Speed is that of transformers' modules,
one token a call; on a card the calls are replayed as a graph (`models/static_decoding.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from os.path import commonprefix
from typing import Any, NamedTuple

import torch

from rung.errors import PlanError
from rung.models.decoding import Decoder, OnAnswered, OnToken, Request
from rung.models.decoding import GeneratedAnswer as GeneratedAnswer
from rung.models.decoding import Sampling as Sampling
from rung.models.policy import Policy
from rung.models.rotary import long_tokens
from rung.models.static_decoding import StaticDecoder, decodes_statically, merges_adapter
from rung.models.tree_attention import KVByLayer, concatenate_kv
from rung.models.weight_files import is_in_parts
from rung.models.weight_layout import order_weights


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    sampling: Sampling,
    batch_size: int = 32,
    task: str | None = None,
    on_token: OnToken | None = None,
    on_batch: OnAnswered | None = None,
) -> list[GeneratedAnswer]:
    """Return answers in the order of the prompts; all answers to one prompt are adjacent.

    `batch_size` counts answers decoded at once, at least those of one prompt. `task` is the task of all
    prompts, for methods that learn something per task. `on_token` receives the tokens of an answer after each new one
    and may end the answer; `on_batch` receives the number of prompts just answered.
    Raises `ValueError` for an empty prompt, `PlanError` for a virtual token inside a prompt that this policy has not
    learned.
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
    on_token: OnToken | None
    on_batch: OnAnswered | None


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
        begun, options = [flat[k].ids for k in crossing], options._replace(on_batch=None)
        rest = _generate(policy, longer, limits, next_sampling, options, begun)
    for k, answer in zip(crossing, rest, strict=True):
        ids, logprobs = [*flat[k].ids, *answer.ids], [*flat[k].logprobs, *answer.logprobs]
        flat[k] = replace(answer, ids=ids, logprobs=logprobs)
    return flat


def _generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: Sampling,
    options: _Options,
    begun: Sequence[Sequence[int]] | None = None,
) -> list[GeneratedAnswer]:
    """`generate` with at most `limits[i]` new tokens for prompt i, whose last tokens `begun[i]` are of an answer."""
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt needs at least one token")
    id_count = policy.base.vocab_size + policy.method.inserted_tokens
    if any(max(prompt) >= id_count for prompt in prompts):
        raise PlanError("a prompt holds virtual tokens that this model has not learned", where="method.positions")
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
    order_weights(policy.model)
    # One generator for the whole call: answers depend on the seed and on the batches, not on earlier calls.
    generator = torch.Generator(policy.device).manual_seed(sampling.seed)
    # a graph would replay neither the hooks nor the messages by which ranks gather a model that they share in parts
    is_static = decodes_statically(policy.device) and not is_in_parts(policy.model)
    places = min(options.batch_size, len(prompts) * sampling.answers_per_prompt)
    merges = is_static and merges_adapter(policy, places * max(totals, default=0))
    merged = policy.method.merged() if merges else nullcontext()
    with policy.autocast(), merged:
        prefix, start = _encode_prefix(policy, prompts[0][:prefix_length], options.task), virtual_count + prefix_length
        decoder = Decoder(
            *(policy, prefix, start, frozenset(options.stop_ids), sampling, generator, options.batch_size),
            *(options.task, options.on_token, options.on_batch),
        )
        begun = begun or [()] * len(prompts)
        requests = [Request(i, p[prefix_length:], limits[i], begun[i]) for i, p in enumerate(prompts)]
        answers = StaticDecoder(decoder).run(requests) if is_static else decoder.run(requests)
    return [answer for i in range(len(prompts)) for answer in answers[i]]


def _encode_prefix(policy: Policy, ids: Sequence[int], task: str | None) -> KVByLayer | None:
    """Keys and values that precede every row: virtual tokens, then the common prefix of the prompts."""
    virtual = policy.virtual_kv(task)
    if not ids:
        return virtual
    row = policy.embed(torch.tensor(list(ids), device=policy.device), task)
    return concatenate_kv(virtual, policy.prefix_kv(row, policy.method.virtual_tokens, virtual))


def generate_by_task(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    tasks: Sequence[str | None],
    *,
    stop_ids: Sequence[int],
    sampling: Sampling,
    batch_size: int = 32,
    on_batch: OnAnswered | None = None,
    on_token: OnToken | None = None,
) -> list[GeneratedAnswer]:
    """`generate` for prompts of several tasks, one call per task: virtual tokens may differ between tasks."""
    answers: dict[int, list[GeneratedAnswer]] = {}
    n = sampling.answers_per_prompt
    options: Any = {"stop_ids": stop_ids, "sampling": sampling, "batch_size": batch_size, "on_batch": on_batch}
    options["on_token"] = on_token
    for task in sorted(set(tasks), key=str):
        indices = [i for i, prompt_task in enumerate(tasks) if prompt_task == task]
        task_answers = generate(policy, [prompts[i] for i in indices], task=task, **options)
        answers |= {i: task_answers[k * n : (k + 1) * n] for k, i in enumerate(indices)}
    return [answer for i in range(len(prompts)) for answer in answers[i]]


def _sliding_window(policy: Policy) -> float:
    config = policy.model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return window or float("inf")


def _common_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the prompts' common prefix; each prompt keeps at least one token outside it."""
    if len(prompts) < 2:
        return 0
    return min(len(commonprefix([list(prompt) for prompt in prompts])), *(len(prompt) - 1 for prompt in prompts))
