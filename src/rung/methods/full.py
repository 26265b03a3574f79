"""Methods that train weights of the base itself: all of them, or only the output head.

The base is gone afterwards, so a reference policy needs a second copy, and the run folder holds a whole model instead
of an adapter. `methods/registry.py` builds them.
"""

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
from rung.methods.protocol import Method, require_same_tensors
from rung.models.bfloat16_storage import keeps_bfloat16_weights


class _TrainsBase(Method):
    """Common part of both methods: the whole model is saved, so that transformers loads it directly."""

    artifact = "model"
    model: PreTrainedModel

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that require gradients, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """Save as transformers does, in float32: a config that says bfloat16 would round the trained head."""
        if keeps_bfloat16_weights(self.model):
            self.model.float()
        self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote; missing or unexpected keys raise `CheckpointError`."""
        # All shards: `save_pretrained` splits large models.
        tensors = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
        parameters = dict(self.model.named_parameters())  # tied weights once, as in the file
        require_same_tensors(parameters, tensors, str(folder))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def merge(self) -> nn.Module:
        """Return the model: there is nothing to merge."""
        return self.model  # type: ignore[no-any-return]


class Full(_TrainsBase):
    """Train every weight, in float32 whatever the compute dtype."""

    kind = "full"

    def __init__(self, model: PreTrainedModel, config: FullConfig) -> None:
        has_half_precision = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
        # As `FullConfig.widens_base` says. Products may still run in bfloat16.
        self.model = (model.float() if has_half_precision else model).requires_grad_(True)
        self.unused_head_parameters = 0
        """Parameters of an untied head that the objective does not read."""

    def declared_parameters(self) -> int:
        """All parameters of the base except an unused head."""
        return sum(int(p.numel()) for p in self.model.parameters()) - self.unused_head_parameters

    def freeze_output_head(self) -> None:
        """Freeze an untied head; a tied one is trained as the embeddings."""
        head, embeddings = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is not None and head.weight is not embeddings.weight:
            head.requires_grad_(False)
            self.unused_head_parameters = sum(int(p.numel()) for p in head.parameters())

    def disabled(self) -> AbstractContextManager[None]:
        """Raise `PlanError`: the base has changed."""
        reason = "full fine-tuning moves the base itself, so the base is no longer there to compare with"
        raise PlanError(reason, hint="load the base a second time")


class Head(_TrainsBase):
    """Train only the output head; a tied head is copied first, so that the embeddings stay frozen."""

    kind = "head"

    def __init__(self, model: PreTrainedModel, config: HeadConfig) -> None:
        self.model = model
        original = model.get_output_embeddings()
        if not isinstance(original, nn.Linear):
            raise ConfigError("this model has no linear output head", where="method.kind", given="head")
        # Kept for `disabled`, which needs the untrained head.
        self.original = original
        (outputs, inputs), has_bias = original.weight.shape, original.bias is not None
        dtype = torch.promote_types(original.weight.dtype, torch.float32)
        self.head = nn.Linear(inputs, outputs, has_bias, original.weight.device, dtype)
        self.head.load_state_dict(original.state_dict())
        model.set_output_embeddings(self.head)
        # Otherwise transformers ties the head again when the saved model is loaded.
        model.config.tie_word_embeddings = False

    def freeze_output_head(self) -> None:
        """Raise `PlanError`: nothing would be left to train."""
        raise PlanError("the output head is all that moves, and this objective does not read it", where="method.kind")

    def declared_parameters(self) -> int:
        """Vocabulary times width, plus the bias if there is one."""
        return sum(p.numel() for p in self.original.parameters())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context the model has its original head."""
        self.model.set_output_embeddings(self.original)
        try:
            yield
        finally:
            self.model.set_output_embeddings(self.head)
