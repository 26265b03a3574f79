"""What a run is. Nothing here imports torch, so every config error is instant."""
