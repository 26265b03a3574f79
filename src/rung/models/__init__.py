"""The base model: loading it, attention over segment trees, the head, generation."""
