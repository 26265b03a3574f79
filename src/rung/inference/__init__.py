"""Inference over HTTP: answers from a model behind a server. Local generation is in `models.generate`."""
