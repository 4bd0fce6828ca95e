"""One training run: what it is made of, its checkpoints, its records, what it says."""
