"""What a run takes, before anything runs. Nothing here imports torch, or reads a weight."""
