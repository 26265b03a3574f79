"""From a config to a finished run: loading bases, data and auxiliary models, training, and what a run folder holds."""
