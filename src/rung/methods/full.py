"""Methods that move weights of the base itself: all of them, or the output head alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from rung.config.method import FullConfig, HeadConfig
from rung.errors import ConfigError, PlanError
from rung.methods.protocol import Method, require_same_keys, require_same_shapes
from rung.models.bfloat16_weights import keeps_bfloat16_weights


class _MovesTheBase(Method):
    """Shared by both: a moved model is saved whole, so that transformers loads it as it is."""

    artifact = "model"
    starts_as_base = True
    model: PreTrainedModel

    def trainable(self) -> dict[str, nn.Parameter]:
        """What moves, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """Write the model as transformers does: in float32, lest the config say bfloat16 and the head be rounded."""
        if keeps_bfloat16_weights(self.model):
            self.model.float()
        self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; keys missing or left over raise `CheckpointError`."""
        tensors = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
        own = dict(self.model.named_parameters())  # tied weights stand once, as save_pretrained writes them
        require_same_keys(tensors.keys(), own.keys(), str(folder))
        require_same_shapes(own, tensors, str(folder))
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def merge(self) -> nn.Module:
        """The model itself: it is whole already."""
        model: nn.Module = self.model
        return model


class Full(_MovesTheBase):
    """Every weight moves, in float32 whatever the compute type."""

    kind = "full"

    def __init__(self, model: PreTrainedModel, config: FullConfig) -> None:
        narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
        self.model = model.float() if narrow else model
        self.model.requires_grad_(True)
        self.left = 0
        """Parameters of a head that nothing reads."""

    def declared_parameters(self) -> int:
        """All of the base that something reads."""
        return sum(int(p.numel()) for p in self.model.parameters()) - self.left

    def freeze_output_head(self) -> None:
        """A head of its own stays as it is; one that is tied moves with the embeddings."""
        head, embeddings = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is not None and head.weight is not embeddings.weight:
            head.requires_grad_(False)
            self.left = sum(int(p.numel()) for p in head.parameters())

    def disabled(self) -> AbstractContextManager[None]:
        """Raises `PlanError`: the base has moved."""
        raise PlanError(
            "full fine-tuning moves the base itself, so the base is no longer there to compare with",
            hint="load the base a second time",
        )


class Head(_MovesTheBase):
    """Only the output head moves; a tied head is copied first, so that the embeddings stay."""

    kind = "head"

    def __init__(self, model: PreTrainedModel, config: HeadConfig) -> None:
        self.model = model
        original = model.get_output_embeddings()
        if not isinstance(original, nn.Linear):
            raise ConfigError("this model has no linear output head", where="method.kind", given="head")
        self.original = original
        weight = original.weight
        dtype = torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype
        self.head = nn.Linear(
            original.in_features, original.out_features, original.bias is not None, weight.device, dtype
        )
        with torch.no_grad():
            self.head.weight.copy_(weight)
            if original.bias is not None:
                self.head.bias.copy_(original.bias)
        model.set_output_embeddings(self.head)
        model.config.tie_word_embeddings = False

    def freeze_output_head(self) -> None:
        """Raises `PlanError`: there would be nothing to train."""
        raise PlanError("the output head is all that moves, and this objective does not read it", where="method.kind")

    def declared_parameters(self) -> int:
        """Vocabulary times width, and the bias where there is one."""
        outputs, inputs = self.original.weight.shape
        return int(outputs * inputs + (outputs if self.original.bias is not None else 0))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base with its own head, inside the context."""
        self.model.set_output_embeddings(self.original)
        try:
            yield
        finally:
            self.model.set_output_embeddings(self.head)
