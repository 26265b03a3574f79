"""Initial values of a low-rank pair B [O, R], A [R, I] computed from weights, activations or gradients.

Each is a pure function in float32 or wider. `scale` is the factor by which the pair will be multiplied (alpha / rank).
They cost a decomposition for each matrix, and some a pass over training documents; `MOMENT_BYTES` bounds the memory at
the price of more passes. `methods/lora.py` and `methods/qlora.py` call them.

Suffixes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rung.errors import ConfigError
from rung.methods.adapter_merging import LowRankFactors, split_singular_values
from rung.methods.protocol import CalibrationData
from rung.models.bfloat16_storage import replaced_data

LORA_GA_GAMMA = 16.0
"""LoRA-GA's scale factor: the value of the paper's experiments (Wang et al. 2024)."""


RANDOMIZED_SVD_SIZE = 1024
"""A card decomposes matrices of at least this many rows and columns by a randomized SVD: a full one of 8,192 by 28,672
takes many times as long (not measured)."""
_SKETCH, _ITERATIONS = 4, 16
"""Columns of the sketch for each singular vector, and power iterations (Halko et al. 2011, algorithm 4.4)."""


def leading_singular_vectors(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular values [R] and their vectors, [O, R] and [R, I].

    By a full decomposition; of large matrices on a card by a randomized one, which comes as close to the matrix as the
    full one to 2e-4 of the part that both capture, even where the values hardly fall (`tests/reference`).
    """
    if matrix_OI.device.type == "cuda" and min(matrix_OI.shape) >= RANDOMIZED_SVD_SIZE:
        return _randomized_svd(matrix_OI, rank)
    u, s, vh = torch.linalg.svd(matrix_OI, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def _randomized_svd(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    columns = min(_SKETCH * rank, *matrix_OI.shape)
    u, s, v = torch.svd_lowrank(matrix_OI, q=columns, niter=_ITERATIONS)
    return u[:, :rank], s[:rank], v[:, :rank].T


def pissa(weight_OI: Tensor, rank: int, scale: float) -> LowRankFactors:
    """Principal singular values and vectors: scale * B A is the best approximation of W (Meng et al. 2024, sec. 3)."""
    u, s, vh = leading_singular_vectors(weight_OI, rank)
    return split_singular_values(u, s / scale, vh)


def olora(weight_OI: Tensor, rank: int) -> LowRankFactors:
    """The first columns of Q and rows of R where W = Q R (Büyükakyüz 2024, section 3)."""
    q, r = torch.linalg.qr(weight_OI)
    return LowRankFactors(q[:, :rank].contiguous(), r[:rank].contiguous())


def corda(weight_OI: Tensor, moment_II: Tensor, rank: int, scale: float, *, knowledge: bool) -> LowRankFactors:
    """Singular vectors of W C, C the second moment of the inputs (Yang et al. 2024, section 3).

    The largest ones, which the documents use most; with `knowledge` the smallest, which preserves what the documents
    need. Raises `ConfigError` if C cannot be inverted.
    """
    moment, inverse = _damped_inverse(moment_II)
    if knowledge:
        u, s, vh = torch.linalg.svd(weight_OI @ moment, full_matrices=False)
        u, s, vh = u[:, -rank:], s[-rank:], vh[-rank:]
    else:
        u, s, vh = leading_singular_vectors(weight_OI @ moment, rank)
    return split_singular_values(u, s / scale, vh @ inverse)


def eva(weight_OI: Tensor, moment_II: Tensor, rank: int) -> LowRankFactors:
    """A spans the directions of largest input variance, B is zero (Paischer et al. 2024, section 3)."""
    _, vectors = torch.linalg.eigh(moment_II)  # ascending
    return LowRankFactors(weight_OI.new_zeros(len(weight_OI), rank), vectors[:, -rank:].flip(1).T.contiguous())


def lora_ga(gradient_OI: Tensor, rank: int) -> LowRankFactors:
    """Singular vectors of the gradient, different ones for B and A (Wang et al. 2024, section 3).

    The first step then changes the product by nearly the direction of the full gradient. Both are scaled by
    O^(1/4) / sqrt(GAMMA).
    """
    u, _, v = torch.svd_lowrank(gradient_OI, q=min(4 * rank, *gradient_OI.shape), niter=4)
    factor = len(gradient_OI) ** 0.25 / LORA_GA_GAMMA**0.5
    # B takes the second group of left vectors, A the first group of right ones: the first step covers 2 R directions.
    return LowRankFactors(u[:, rank : 2 * rank] * factor, (v[:, :rank] * factor).T.contiguous())


def loftq(weight_OI: Tensor, quantized_OI: Tensor, rank: int, scale: float) -> LowRankFactors:
    """Best approximation of the quantization error by scale * B A (Li et al. 2023, algorithm 1).

    One iteration, because further ones would quantize another matrix than W.
    """
    # A randomized SVD with oversampling suffices: only the leading vectors are used.
    u, s, v = torch.svd_lowrank(weight_OI - quantized_OI, q=min(2 * rank, *weight_OI.shape), niter=4)
    return split_singular_values(u[:, :rank], s[:rank] / scale, v[:, :rank].T)


def check_rank(init: str, rank: int, name: str, outputs: int, inputs: int) -> None:
    """Raise `ConfigError` if an initialization cannot have this rank for a matrix of this shape."""
    max_rank = min(outputs, inputs)
    # LoRA-GA takes different singular vectors for A and B, so it needs twice as many.
    max_rank = {"lora_ga": max_rank // 2, "eva": inputs}.get(init, max_rank)
    if rank > max_rank:
        reason = f"init {init} has no start of this rank for {name}, a matrix of {outputs} x {inputs}"
        raise ConfigError(reason, where="method.rank", given=rank, allowed=f"1 to {max_rank}")


def _damped_inverse(moment_II: Tensor) -> tuple[Tensor, Tensor]:
    """Add as much of the mean diagonal to the moment as a stable inverse needs; return both."""
    identity = torch.eye(len(moment_II), dtype=moment_II.dtype, device=moment_II.device)
    damping = 0.01 * moment_II.diagonal().mean() * identity
    # As in peft's CorDA: 1 % of the mean diagonal, doubled until the inverse is accurate.
    for doublings in range(10):
        damped = moment_II + damping * 2**doublings
        inverse = torch.linalg.inv(damped)
        # The product with the inverse shows whether the inversion was numerically sound.
        if bool((damped @ inverse - identity).norm() < 0.05):
            return damped, inverse
    hint = "raise method.init_examples, or take another start"
    raise ConfigError("the inputs of a layer vary too little for this start", where="method.init", hint=hint)


MOMENT_BYTES = 512 * 2**20
"""Memory for moments or gradients at one time; more matrices take more passes over the sample."""


def weight_gradients(weights: Mapping[str, nn.Parameter], sample: CalibrationData) -> Iterator[tuple[str, Tensor]]:
    """Gradient of the loss over the sample for each weight, in float32 or wider, in the weight's shape."""
    for names in in_chunks({name: w.numel() for name, w in weights.items()}):
        parameters = [weights[name] for name in names]
        with _in_float32(parameters):
            gradients = dict(zip(names, sample.gradients(parameters), strict=True))
        # Popped, so that each gradient is freed once its pair is computed.
        while gradients:
            yield gradients.popitem()


def input_second_moments(
    modules: Mapping[str, nn.Module], widths: Mapping[str, int], sample: CalibrationData
) -> Iterator[tuple[str, Tensor]]:
    """Mean of x x^T over the tokens of the sample for the inputs of each module, [I, I] in float32 or wider."""
    for names in in_chunks({name: width**2 for name, width in widths.items()}):
        sums: dict[str, Tensor] = {}
        run_hooked(sample, [(modules[name], partial(_add_moment, sums, name)) for name in names])
        while sums:
            name, total = sums.popitem()
            yield name, total / total.new_tensor(sample.tokens)


def run_hooked(sample: CalibrationData, hooks: Iterable[tuple[nn.Module, Callable[..., None]]]) -> None:
    """Run the sample's documents; each module calls its hook with its inputs."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        sample.run_forward()
    finally:
        for handle in handles:
            handle.remove()


def in_chunks(sizes: Mapping[str, int], limit: int = MOMENT_BYTES) -> Iterator[list[str]]:
    """Names in order, in chunks of at most `limit` bytes of float32; a larger one is a chunk by itself."""
    chunk: list[str] = []
    for name in sizes:
        if chunk and 4 * sum(sizes[n] for n in (*chunk, name)) > limit:
            yield chunk
            chunk = []
        chunk.append(name)
    if chunk:
        yield chunk


def _add_moment(sums: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):  # the trunk's autocast would multiply and add in bfloat16
        moment = x.T @ x
    sums[name] = sums[name].add_(moment) if name in sums else moment


@contextmanager
def _in_float32(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the context parameters are float32 or wider and require gradients; bfloat16 would round them."""
    with replaced_data(parameters, lambda data: data.to(torch.promote_types(data.dtype, torch.float32))):
        for p in parameters:
            p.requires_grad_(True)
        try:
            yield
        finally:
            for p in parameters:
                p.requires_grad_(False)
                p.grad = None
