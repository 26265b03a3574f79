"""Decoding on a card: keys in buffers of a fixed size, and a step that is replayed as a graph without the host.

A step of decoding launches some fifty kernels a layer, each of microseconds, and a host that launches them one by one
keeps a card waiting most of the time. Here a step reads and writes the same tensors every time: each row has its own
slots from the first on (`models/slot_layer.py`), and the chosen tokens stay on the card. So it is recorded once for a
batch (`torch.cuda.graph`) and replayed; the host reads the tokens of `READ_EVERY` steps at once, cuts them where an
answer ended, and gives free places to prompts that wait. The cost: up to `READ_EVERY` - 1 tokens computed beyond the
end of an answer, and room for the longest answer in every place. Where a model cannot be recorded, its steps are
launched one by one. `models/generate.py` chooses it on cards; processors keep
`models/decoding.py`, whose rows end together and whose batch shrinks.

Suffixes: B places of the batch, S slots (without the shared prefix), K key/value heads, C steps between two reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache

from rung.console import print_status
from rung.models.decoding import Decoder, GeneratedAnswer, Request, Row, encoded_together
from rung.models.policy import Policy, model_inputs
from rung.models.slot_layer import SlotLayer, whole_blocks
from rung.models.tree_attention import KVByLayer
from rung.planning.memory import PREFILL_TOKENS

READ_EVERY = 16
"""Steps between two reads of the tokens: a read waits for the card, and a step beyond an end is lost."""
MIN_RECORDED_TOKENS = 32
"""Longest answer from which on a recording is made: it costs the time of several steps."""
WARM_STEPS = 3
"""Steps before the recording, in which libraries choose their kernels (the number of torch's documentation)."""


def decodes_statically(device: torch.device) -> bool:
    """Whether a device decodes with buffers of a fixed size."""
    return device.type == "cuda"


def merges_adapter(policy: Policy, slots: int) -> bool:
    """Whether an adapter is added to the weights while it answers with so many slots in all places.

    In 16 bits most of a small update would be rounded away (docs/log.md), so only where products are computed in
    float32, and where the card has room for the sums beside keys and values.
    """
    if policy.base.compute_dtype.itemsize < 4:
        return False
    device, shape = policy.device, policy.base.shape
    free: int = (
        torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    )
    adapted = (m.base_layer.weight for m in policy.model.modules() if hasattr(m, "base_layer"))
    copies = sum(int(weight.nbytes) for weight in adapted)
    cache = 2 * slots * shape.layers * shape.kv * policy.base.compute_dtype.itemsize
    return copies + cache + copies // 2 <= free


class StaticDecoder:
    """Answers the requests of a `Decoder`, with its model, its sampling and its random numbers."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.rows: list[Row | None] = []

    def run(self, requests: Sequence[Request]) -> dict[int, list[GeneratedAnswer]]:
        """Answers by the number of the prompt."""
        waiting = deque(sorted(requests, key=lambda request: len(request.suffix), reverse=True))
        answers: dict[int, list[Row]] = {request.prompt: [] for request in requests}
        if waiting:
            self._allocate(waiting)
        replay: Callable[[], None] | None = None
        while waiting or any(self.rows):
            self._join(waiting, answers)
            if replay is None:
                # with rows in the batch: the warm steps of empty places would write values that are no numbers
                replay = self._recorded() if self.max_new_tokens >= MIN_RECORDED_TOKENS else self._step
            self._advance(replay)
        return {
            prompt: [GeneratedAnswer(row.tokens, row.stop, row.logprobs, row.ended_by_caller) for row in rows]
            for prompt, rows in answers.items()
        }

    def _allocate(self, requests: Sequence[Request]) -> None:
        """Buffers for the longest request, in as many places as there are answers or the batch allows."""
        decoder, device = self.decoder, self.decoder.policy.device
        per_prompt, longest = decoder.sampling.answers_per_prompt, max(len(r.suffix) for r in requests)
        # as many prompts at once as the plan counts
        prompts = max(1, min(decoder.batch_size // per_prompt, PREFILL_TOKENS // longest, len(requests)))
        # the last token of an answer is chosen and not read
        self.max_new_tokens = max(request.limit for request in requests)
        # one person reads a stream token by token
        is_stream = decoder.on_token is not None and len(requests) * per_prompt == 1
        self.read_every = 1 if is_stream else READ_EVERY
        self.last_slot = max(len(request.suffix) + request.limit for request in requests) - 2
        self.slots = whole_blocks(self.last_slot + 1)
        self.rows = [None] * (prompts * per_prompt)
        places = len(self.rows)
        self.slot_B, self.last_B = (torch.zeros(places, dtype=torch.long, device=device) for _ in range(2))
        self.column_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.uniform_BC = decoder.uniforms(places, READ_EVERY)
        self.token_BC = torch.zeros(places, READ_EVERY, dtype=torch.long, device=device)
        self.logprob_BC = torch.zeros(places, READ_EVERY, dtype=torch.float32, device=device)
        self.cache = Cache(layers=[])

    def _add_layers(self, kv_by_layer: KVByLayer) -> None:
        """Make the buffers, for keys and values like these."""
        if not kv_by_layer:  # prompts of one token, which is not encoded
            _, kv_by_layer = self.decoder.encode([[0]])
        layers = [SlotLayer(kv_by_layer[i]) for i in sorted(kv_by_layer)]
        for layer in layers:
            layer.reserve(len(self.rows), self.slots)
            layer.show(self.slot_B, self.slots)
        self.cache = Cache(layers=layers)

    def _join(self, waiting: deque[Request], answers: dict[int, list[Row]]) -> None:
        """Encode prompts up to their last token, for all groups of places that are free."""
        per_prompt = self.decoder.sampling.answers_per_prompt
        groups = [i for i in range(0, len(self.rows), per_prompt) if not any(self.rows[i : i + per_prompt])]
        joining = [(group, waiting.popleft()) for group in groups[: len(waiting)]]
        if not joining:
            return
        suffixes = [request.suffix[:-1] for _, request in joining]
        for part in encoded_together([len(suffix) for suffix in suffixes]):
            segments, kv_by_layer = self.decoder.encode(suffixes[part])
            if not self.cache.layers:
                self._add_layers(kv_by_layer)
            for segment, (group, _) in zip(segments, joining[part], strict=True):
                for layer, states in kv_by_layer.items():
                    key, value = (part[:, :, segment.start : segment.end] for part in states)
                    self.cache.layers[layer].write(slice(group, group + per_prompt), (key, value))
        places, slots, tokens = list[int](), list[int](), list[int]()
        for group, request in joining:
            for place in range(group, group + per_prompt):
                length = len(request.suffix)
                row = Row(request.prompt, request.limit, length, length - 1, request.suffix[-1], begun=request.begun)
                self.rows[place] = row
                answers[request.prompt].append(row)
                places, slots, tokens = [*places, place], [*slots, length - 1], [*tokens, request.suffix[-1]]
        index, *values = torch.tensor([places, slots, tokens], device=self.slot_B.device)
        self.slot_B[index], self.last_B[index] = values

    def _advance(self, step: Callable[[], None]) -> None:
        """Take steps until the next read, and give the tokens to their rows."""
        self.column_1.zero_()
        remaining = max(row.limit - len(row.tokens) for row in self.rows if row is not None)
        count = min(self.read_every, remaining)
        if self.uniform_BC is not None:
            self.uniform_BC.copy_(self.decoder.uniforms(len(self.rows), READ_EVERY))  # type: ignore[arg-type]
        for _ in range(count):
            step()
        tokens, logprobs = self.token_BC[:, :count].tolist(), self.logprob_BC[:, :count].tolist()
        ended = set()
        for place, row in enumerate(self.rows):
            if row is None:
                continue
            pairs = zip(tokens[place], logprobs[place], strict=True)
            # the tokens behind the end of an answer are dropped
            if not all(row.add(token, p, self.decoder.stop_ids, self.decoder.on_token) for token, p in pairs):
                self.rows[place] = None
                ended.add(row.prompt)
        answered = ended - {row.prompt for row in self.rows if row is not None}
        if answered and self.decoder.on_answered is not None:
            self.decoder.on_answered(len(answered))

    def _step(self) -> None:
        """One token for every place, those of no row too; reads and writes the tensors of this object alone."""
        decoder, slots = self.decoder, torch.arange(self.slots, device=self.slot_B.device)
        out = decoder.policy.model(
            **model_inputs(decoder.policy.embed(self.last_B[:, None], decoder.task)),
            position_ids=(decoder.start + self.slot_B)[:, None],
            past_key_values=self.cache,
            prefix=decoder.prefix,
            attention_mask=(slots <= self.slot_B[:, None])[:, None, None],
            row_slots=self.slot_B,
            use_cache=True,
            logits_to_keep=1,
        )
        uniform_B1 = None if self.uniform_BC is None else self.uniform_BC.index_select(1, self.column_1)
        tokens, logprobs = decoder.choose_tokens(out.logits[:, -1], uniform_B1)
        self.token_BC.index_copy_(1, self.column_1, tokens[:, None])
        self.logprob_BC.index_copy_(1, self.column_1, logprobs[:, None])
        self.last_B.copy_(tokens)
        # a place without a row goes on at the last slot that some row reads: a position beyond it may be one that the
        # model does not have, or that changes the frequencies of all rows (longrope)
        self.slot_B.add_(1).clamp_(max=self.last_slot)
        self.column_1.add_(1).clamp_(max=READ_EVERY - 1)

    def _recorded(self) -> Callable[[], None]:
        """The step as a graph; as it is where there is no card, or where the model cannot be recorded."""
        if not torch.cuda.is_available():
            return self._step
        state = (self.slot_B, self.last_B, self.column_1)
        saved = [tensor.clone() for tensor in state]
        try:
            replay = self._record()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            print_status(f"answers are decoded without a graph, which is slower: {reason}")
            replay = self._step
        # the warm steps wrote behind the prompts, where the next ones write again
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)
        return replay

    def _record(self) -> Callable[[], None]:
        policy, graph, stream = self.decoder.policy, torch.cuda.CUDAGraph(), torch.cuda.Stream(self.slot_B.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.slot_B.device))
        # without a cache of converted weights: a graph would go on reading those of its recording
        options: Any = {"dtype": policy.base.compute_dtype, "enabled": torch.is_autocast_enabled("cuda")}
        with torch.autocast("cuda", cache_enabled=False, **options):
            with torch.cuda.stream(stream):
                for _ in range(WARM_STEPS):
                    self._step()
            torch.cuda.current_stream(self.slot_B.device).wait_stream(stream)
            with torch.cuda.graph(graph):
                self._step()
        return graph.replay
