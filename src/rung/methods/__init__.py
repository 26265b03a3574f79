"""Which numbers may move: full fine-tuning, the head alone, LoRA."""
