"""Data that a model writes: `rung synth`. Stands above the commands, because judging and training are parts of it."""
