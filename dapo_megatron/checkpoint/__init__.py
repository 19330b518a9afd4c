"""Checkpoints of a run: what it takes to go on as if nothing had happened."""
