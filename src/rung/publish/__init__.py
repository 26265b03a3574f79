"""Handing a model over: folding an adapter in, and proving that the result is the same model."""
