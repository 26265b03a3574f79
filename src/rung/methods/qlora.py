"""LoRA on a base in 4 or 8 bits (QLoRA, Dettmers et al. 2023), through bitsandbytes.

Every linear of the layers is quantized once, when the method is attached; embeddings, norms and the head stay as they
are. It saves memory, not time: each product first dequantizes its matrix. `methods/lora.py` calls `quantize`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rung.config.method import QloraConfig
from rung.errors import PlanError
from rung.methods.adapter_merging import LowRankFactors
from rung.methods.lora_init import check_rank, loftq
from rung.models.bfloat16_storage import keeps_bfloat16_weights
from rung.models.fused_modules import linear_weight
from rung.models.fused_ops import LinearParams
from rung.models.streaming import clear_placement, layer_linears, placement_of, stored_linear
from rung.models.targets import select_linears

BLOCK_SIZE = 64
"""Weights that share one scale."""
OUTLIER_THRESHOLD = 6.0
"""Columns of the inputs with a magnitude of at least this are not rounded to 8 bits (Dettmers et al. 2022, LLM.int8(),
section 3.2; transformers' `llm_int8_threshold`). On a card bitsandbytes chooses them anew for every batch; on a
processor it rounds no inputs."""
_FLAGS = {4: "is_loaded_in_4bit", 8: "is_loaded_in_8bit"}


def merged_linear(layer: Any, adapter: str) -> nn.Module:
    """The dequantized linear of a peft layer with B A added, in float32: the weights that were trained and measured."""
    plain: Any = _dequantized_linear(layer.base_layer)
    delta = layer.get_delta_weight(adapter).to(plain.weight.dtype)
    with torch.no_grad():
        plain.weight += delta.T if isinstance(plain, Conv1D) else delta
    return plain  # type: ignore[no-any-return]


def dequantize_base(model: nn.Module) -> None:
    """Replace every quantized linear by a dense one: the same values, faster, in more memory."""
    for name, module in list(model.named_modules()):
        if is_quantized(module):
            model.set_submodule(name, _dequantized_linear(module))
    for flag in _FLAGS.values():
        setattr(model, flag, False)


def require_bitsandbytes() -> Any:
    """Import bitsandbytes. Raises `PlanError` if it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        hint = "pip install 'rung[quantized]'"
        raise PlanError("a quantized base needs bitsandbytes", where="method.kind", given="qlora", hint=hint) from error
    return bitsandbytes


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear of bitsandbytes."""
    # By module name, so that bitsandbytes need not be installed to ask.
    return type(module).__module__.startswith("bitsandbytes.") and hasattr(module, "weight")


def dense_weight(module: nn.Module) -> Tensor:
    """The dequantized matrix [O, I] of a quantized linear, in float32."""
    bnb, weight = require_bitsandbytes(), cast(Any, module.weight)
    if hasattr(weight, "CB"):
        storage = _eight_bit_storage(module)
        scaled: Tensor = storage.CB.float() * storage.SCB.float()[:, None] / 127.0
        return scaled.contiguous()
    weight_OI: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight_OI.float()


def _eight_bit_storage(module: nn.Module) -> Any:
    """Where CB and SCB are: the first product moves them from the weight to the module's state."""
    weight = cast(Any, module.weight)
    return weight if weight.CB is not None else module.state


def quantized_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Packed weights and their scales by name: what has to be equal in processes that quantized one base."""
    for name, module in model.named_modules():
        if not is_quantized(module):
            continue
        weight: Any = module.weight
        yield f"{name}.weight", weight.data
        state = getattr(weight, "quant_state", None)
        while state is not None:  # scales of double quantization are quantized themselves
            yield f"{name}.absmax{state.absmax.dtype}", state.absmax
            state = state.state2
        if hasattr(weight, "CB"):
            yield f"{name}.SCB", _eight_bit_storage(module).SCB


def four_bit_params(module: nn.Module) -> LinearParams | None:
    """Parameters of a linear in 4 bits for the fused functions; None for any other module, and without a gradient.

    bitsandbytes has a kernel of its own for the single rows of decoding, and rounds the inputs of 8 bits on a card.
    """
    if not is_quantized(module) or not hasattr(module.weight, "quant_state") or not torch.is_grad_enabled():
        return None
    weight = cast(Any, module.weight)
    return LinearParams(weight.data, module.bias, dequantize=partial(_dequantize, weight.quant_state))  # type: ignore[arg-type]


def _dequantize(quant_state: Any, packed: Tensor, dtype: torch.dtype) -> Tensor:
    dense: Tensor = require_bitsandbytes().functional.dequantize_4bit(packed, quant_state)
    return dense.to(dtype)


def quantize(model: PreTrainedModel, config: QloraConfig) -> dict[str, LowRankFactors]:
    """Quantize the linears of all layers one at a time, so that two copies of the model never exist.

    Those of a base that was loaded with `stream_linears` come from its file.

    Returns the initial factors of `init: loftq` by target; an empty dictionary otherwise.
    """
    starts: dict[str, LowRankFactors] = {}
    is_bfloat16 = next(model.parameters()).dtype is torch.bfloat16 and not keeps_bfloat16_weights(model)
    compute_dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    if (placement := placement_of(model)) is not None:
        compute_dtype = placement.compute
    quantize_linear = partial(_to_four_bits, config, compute_dtype) if config.bits == 4 else _to_eight_bits
    loftq_names = set(select_linears(model, config.targets, config.layers)) if config.init == "loftq" else set()
    for name, module in layer_linears(model).items():
        bias = stored_linear(model, module.bias)
        weight = cast(Tensor, stored_linear(model, linear_weight(module).detach())).float().contiguous()
        quantized = quantize_linear(weight, bias)
        if name in loftq_names:
            check_rank("loftq", config.rank, name, *weight.shape)
            starts[name] = loftq(weight, dense_weight(quantized), config.rank, config.scale_at(config.rank))
        quantized.transposed = isinstance(module, Conv1D)  # type: ignore[assignment]
        model.set_submodule(name, quantized)
        # Frees the dense matrix now: the table of linears still refers to the module.
        module.weight = None
    clear_placement(model)
    # peft reads this flag to choose the layers for quantized linears.
    setattr(model, _FLAGS[config.bits], True)
    return starts


def _to_four_bits(config: QloraConfig, compute_dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> nn.Module:
    bnb, (outputs, inputs) = require_bitsandbytes(), weight.shape
    options: dict[str, Any] = {"compress_statistics": config.double_quant, "quant_type": "nf4"}
    has_bias = bias is not None
    linear = bnb.nn.Linear4bit(inputs, outputs, bias=has_bias, compute_dtype=compute_dtype, device="meta", **options)
    quantized = bnb.nn.Params4bit(weight, requires_grad=False, blocksize=BLOCK_SIZE, module=linear, **options)
    linear.weight = quantized.to(weight.device)
    # On processors with AVX512-BF16 an evaluation would repack the weights for a kernel without a backward pass, and
    # training afterwards would continue without gradients.
    linear.support_avx512bf16_for_cpu = False
    linear.bias = _frozen_bias(bias)
    return linear  # type: ignore[no-any-return]


def _to_eight_bits(weight: Tensor, bias: Tensor | None) -> nn.Module:
    bnb, (outputs, inputs) = require_bitsandbytes(), weight.shape
    options = {"has_fp16_weights": False, "threshold": OUTLIER_THRESHOLD, "device": "meta"}
    linear = bnb.nn.Linear8bitLt(inputs, outputs, bias=bias is not None, **options)
    linear.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
    # On a processor bitsandbytes rounds inputs in evaluation but not in training, so evaluation would measure another
    # model than the one that was trained.
    linear.train = MethodType(lambda self, mode=True: self, linear)
    linear.bias = _frozen_bias(bias)
    return linear  # type: ignore[no-any-return]


def _dequantized_linear(module: nn.Module) -> nn.Module:
    """Convert a quantized linear to a dense one with the same values; return any other module unchanged."""
    if not is_quantized(module):
        return module
    weight, bias = dense_weight(module), cast(Any, module.bias)
    outputs, inputs = weight.shape
    linear: Any = Conv1D(outputs, inputs) if module.transposed else nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(weight.T.contiguous() if module.transposed else weight, requires_grad=False)
    linear.bias = _frozen_bias(bias)
    return linear  # type: ignore[no-any-return]


def _frozen_bias(bias: Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
