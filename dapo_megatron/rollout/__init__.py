"""Sampling: engines and their processes, and the collection of groups worth training on."""
