"""From a config to a finished run: loading bases, data and auxiliary models, training, and the files of a run."""
