"""How far two ways to compute the same number may lie apart, by dtype and shape."""

FLOAT64 = 1e-9
"""Shapes with LayerNorm: every step is in float64."""

RMS_NORM = 1e-7
"""transformers' RMSNorm computes in float32 inside, whatever the dtype, and bottoms out here."""

LLAMA_GRADIENT = 1e-6
"""The same for whole gradients against transformers as it comes; against a norm in float64 they reach FLOAT64."""

FLOAT32 = 1e-5
"""Relative, for sums of a few thousand float32 products in another order."""

FLOAT32_NATS = 2e-5
"""Absolute, log-probabilities of tiny models in float32."""
