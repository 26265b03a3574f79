"""What one graphics card must show: the engine is right there, and how fast it is beside the card's own limits.

`scripts/gpu --output FILE` runs the sections, `python -m benchmarks.gpu.report FILE` writes benchmarks/GPU.md from the
JSON. Models are random and of true shapes, so nothing is downloaded. Without a card the same code runs on tiny models.
"""
