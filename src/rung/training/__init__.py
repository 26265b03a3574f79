"""How a step runs: the only place that packs, divides, clips, steps and saves."""
